"""A chat server for tests that speaks OpenAI's API, knows the right answers, and fails as it is told."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler

from tests.local_server import LocalServer


HANG = 30  # seconds
REFUSAL = {"error": "response_format is not supported"}
USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}


class ChatServer(LocalServer):
    """
    Args:
        answers: by transcript, the answer.
        faults: by transcript, what goes wrong at its first, second, ... request (a method of `Faults`); then it works.
        seconds: that each request takes.
        takes_schema: else a request with `response_format` is refused.
        refusal: what it then says.
        usage: what it says of tokens.
    """

    path = "/v1"

    def __init__(self, answers, faults=None, seconds=0.0, takes_schema=True, usage=USAGE, refusal=REFUSAL):
        self.answers, self.faults, self.seconds, self.takes_schema = answers, faults or {}, seconds, takes_schema
        self.usage, self.refusal = usage, refusal
        self.asked = Counter()  # by transcript
        self.bodies, self.headers = [], []
        self.lock = threading.Lock()

    def handler(self):
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat.handle(self, body)

        return Handler

    def handle(self, request, body):
        text = body["messages"][-1]["content"].removeprefix("Transcript: ")
        with self.lock:
            before = self.asked[text]
            self.asked[text] += 1
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
        time.sleep(self.seconds)
        if "response_format" in body and not self.takes_schema:
            return send(request, 422, self.refusal)
        faults = self.faults.get(text, ())
        answer = self.answers.get(text, '{"entities": []}')
        if before < len(faults):
            return getattr(Faults, faults[before])(request, answer)
        send(request, 200, completion(answer) | {"usage": self.usage})


class Faults:
    """What servers do."""

    def rate_limited(request, answer):
        send(request, 429, {"error": "slow down"}, {"Retry-After": "0.05"})

    def overloaded(request, answer):
        send(request, 500, {"error": "out of memory"})

    def no_json(request, answer):
        send(request, 502, "<html>Bad Gateway</html>")

    def hangs(request, answer):
        time.sleep(HANG)

    def hangs_up(request, answer):
        request.connection.close()

    def truncated_body(request, answer):
        send(request, 200, json.dumps(completion(answer))[:60])

    def no_content(request, answer):
        send(request, 200, completion(None))

    def no_choices(request, answer):
        send(request, 200, {"id": "1", "choices": []})

    def another_object(request, answer):
        send(request, 200, ["what", "is", "this"])

    def null(request, answer):
        send(request, 200, "null")

    def empty_list(request, answer):
        send(request, 200, [])

    def truncated_json(request, answer):
        send(request, 200, completion(answer[: len(answer) // 2]))

    def wrong_schema(request, answer):
        send(request, 200, completion('{"labels": {"found": "some"}}'))

    def chatter(request, answer):
        send(request, 200, completion("As an AI language model, I see no entities."))

    def markdown(request, answer):
        send(request, 200, completion(f"Here you are:\n```json\n{answer}\n```\nAnything else?"))

    def refused(request, answer):
        send(request, 400, {"error": "content policy"})

    def no_such_model(request, answer):
        send(request, 404, {"error": "no such model"})

    def no_credit(request, answer):
        send(request, 402, {"error": "credit used up"})

    def no_key(request, answer):
        send(request, 401, {"error": "who are you?"})


def completion(text: str | None) -> dict:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "oracle",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": USAGE,
    }


def send(request, status, body, headers=()):
    content = (body if isinstance(body, str) else json.dumps(body)).encode()
    request.send_response(status)
    for name, value in {
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        **dict(headers),
    }.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(content)
