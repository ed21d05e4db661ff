"""The server: what it answers, whom it turns away, and that it stops as it should."""

import asyncio
import contextlib
import io
import json
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import soundfile
from typer.testing import CliRunner

import sense_cli
from processing.hub import public_name
from processing.pipeline_sense import SpokenLanguageUnderstandingPipeline
from processing.subtitles import to_srt, to_vtt
from processing.synthesis import Espeak, speak
from serve import Server, Service, make_app
from tests.conftest import tone, wav
from tests.reliability.load_test import Clients, hear_alone, make_clips, metrics_of, serving


NAME = "tiny/sense"
ASR = "/v1/audio/transcriptions"
CLIP = wav(tone(0.8))
LIMITS = {"max_batch": 8, "max_wait": 0.01, "max_queue": 64}
LIMITS |= {"max_upload": 500_000_000, "max_seconds": 180 * 60, "upload_seconds": 120}


@pytest.fixture(scope="module")
def pipe(parts) -> SpokenLanguageUnderstandingPipeline:
    return SpokenLanguageUnderstandingPipeline(parts[0], processor=parts[1], device="cpu")


@contextlib.contextmanager
def served(pipe, **limits):
    """A server of this process: a client for it, and its service."""
    service = Service(pipe, NAME, **LIMITS | limits)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = Server(service, log_level="critical")
        thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{taken.getsockname()[1]}", timeout=120) as client:
            while not server.started:
                time.sleep(0.01)
            client.server, client.thread = server, thread
            yield client, service
        server.handle_exit(signal.SIGTERM, None)
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(pipe) -> httpx.Client:
    with served(pipe, language="en", max_upload=5_000_000, max_seconds=60) as (client, _):
        yield client


def ask(client, path=ASR, content=CLIP, **fields) -> httpx.Response:
    return client.post(path, files={"file": ("a.wav", content)}, data=fields)


class Held:
    """A model whose batches wait until they are let go."""

    def __init__(self, pipe, monkeypatch):
        self.free, self.begun, self.batches, forward = threading.Event(), threading.Event(), [], pipe.forward

        def hear(windows, **options):
            self.batches.append((len(windows), options))
            self.begun.set()
            assert self.free.wait(60)
            return forward(windows, **options)

        monkeypatch.setattr(pipe, "forward", hear)


# ---------------------------------------------------------------- answers


def test_the_openai_client_is_answered(client, pipe):
    plain = {"return_entities": False, "return_sentiment": False}
    true = pipe(CLIP, return_timestamps="word", **plain)
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in api.models.list()] == [NAME] == [api.models.retrieve(NAME).id]
    with pytest.raises(openai.NotFoundError, match="other/model: there is no such model here"):
        api.models.retrieve("other/model")
    create = api.audio.transcriptions.create
    asked = {"model": NAME, "file": ("a.wav", CLIP), "language": "en", "temperature": 0}
    assert create(**asked).text == true["text"]
    assert create(**asked, response_format="text").strip() == true["text"].strip()
    whole = create(**asked, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert (whole.text, whole.language, whole.duration) == (true["text"], "en", 0.8)
    words = [(word.word, (word.start, word.end)) for word in whole.words]
    assert words == [(chunk["text"], chunk["timestamp"]) for chunk in true["chunks"]]
    assert [(s.id, s.text, s.start, s.end) for s in whole.segments] == [(0, true["text"], 0.0, 0.8)]
    segments = create(**asked, response_format="verbose_json")
    assert segments.words is None and len(segments.segments) == 1
    beams = create(**asked, extra_body={"num_beams": 3})
    assert beams.text == pipe(CLIP, generate_kwargs={"num_beams": 3}, **plain)["text"]
    with pytest.raises(openai.UnprocessableEntityError, match="temperature: found 0.7") as caught:
        create(**asked | {"temperature": 0.7})
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as caught:
        create(**asked | {"model": "whisper-1"})
    assert caught.value.code == "model_not_found"


def test_subtitles_are_those_of_the_command(client, pipe):
    true = pipe(CLIP, return_timestamps="word", return_entities=False, return_sentiment=False)
    assert ask(client, response_format="srt").text == to_srt(true)
    vtt = ask(client, response_format="vtt")
    assert vtt.text == to_vtt(true) and vtt.headers["content-type"].startswith("text/vtt")


def test_understand_answers_what_the_pipeline_hears(client, pipe):
    true = json.loads(json.dumps(pipe(CLIP, return_timestamps="word")))
    assert {"text", "entities", "sentiment", "chunks"} <= true.keys()
    assert ask(client, "/v1/understand", model=NAME).json() == true


def test_understanding_is_constrained_on_demand(client, pipe):
    free, kept = (json.loads(json.dumps(pipe(CLIP, return_timestamps="word", constrained=on))) for on in (False, True))
    assert ask(client, "/v1/understand", constrained="true").json() == kept != free
    assert ask(client, "/v1/understand", constrained="false").json() == free
    assert ask(client, "/v1/understand", constrained="some").json()["error"]["param"] == "constrained"
    assert ask(client, constrained="true").json()["error"]["message"] == "constrained: there is no such field"


def test_long_recordings_go_through_windows(client, pipe):
    said = speak(Espeak(), "the user speaks", "en-us", random.Random(0), False, False)
    long = wav(np.tile(np.concatenate([said, np.zeros(48000, np.float32)]), 9)[: 35 * 16000])
    true = pipe(long, return_timestamps=True, return_entities=False, return_sentiment=False)
    answer = ask(client, content=long, response_format="verbose_json").json()
    assert answer["text"] == true["text"] and len(answer["segments"]) == len(true["chunks"]) > 1
    assert [(s["start"], s["end"]) for s in answer["segments"]] == [c["timestamp"] for c in true["chunks"]]


# ---------------------------------------------------------------- who is turned away


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"temperature": "0.5"}, "temperature", "never sampled"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"prompt": "names: anna"}, "prompt", "leave it out"),
        ({"stream": "true"}, "stream", "come whole"),
        ({"language": "de"}, "language", "the one it hears is 'en'"),
        ({"response_format": "diarized_json"}, "response_format", "'verbose_json'"),
        (
            {"response_format": "verbose_json", "timestamp_granularities[]": "phone"},
            "timestamp_granularities[]",
            "'word'",
        ),
        ({"timestamp_granularities[]": "word"}, None, "goes with response_format verbose_json"),
        ({"num_beams": "99"}, "num_beams", "less than or equal to 8"),
        ({"include[]": "logprobs"}, "include[]", "no such field"),
    ],
)
def test_what_it_can_not_do_is_refused(client, fields, param, message):
    answer = ask(client, **fields)
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["type"] == "invalid_request_error"
    assert (error["param"], message in error["message"]) == (param, True), error


def nan() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(8000, np.nan, np.float32), 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def broken_off() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(3.0), 16000, format="FLAC")
    return file.getvalue()[: len(file.getvalue()) // 2]


@pytest.mark.parametrize(
    "content, status, message",
    [
        (b"Dear model, ...", 415, "a.wav: not readable as audio"),
        (b"", 415, "not readable as audio"),
        (wav(np.zeros(0)), 422, "0 samples"),
        (nan(), 422, "NaN"),
        (wav(np.zeros(61 * 1000), 1000), 413, "up to 1 are taken"),
        (b"0" * 5_000_001, 413, "larger than 5 MB"),
    ],
    ids=["text", "empty", "no samples", "nan", "too long", "too large"],  # not the bytes: a WAV holds its time
)
def test_bad_uploads(client, content, status, message):
    answer = ask(client, content=content)
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
    assert answer.json()["error"]["param"] == "file"


def test_a_file_that_breaks_off(client):
    assert ask(client, content=broken_off()).status_code in (415, 422)


def test_other_paths_forms_and_fields(client):
    assert client.get("/openapi.json").status_code == client.get("/docs").status_code == 404
    assert client.post(ASR, json={"file": "a.wav"}).status_code == 415
    missing = client.post(ASR, files={"sound": ("a.wav", CLIP)}).json()["error"]
    assert missing["param"] == "file" and "required" in missing["message"]
    assert client.get("/v1/elsewhere").status_code == 404 and client.get(ASR).status_code == 405
    assert client.get(ASR).json()["error"]["type"] == "invalid_request_error"
    assert client.post("/v1/chat/completions", json={}).status_code == 404
    assert client.post("/v1/models").status_code == 405


@pytest.mark.parametrize(
    "form, message",
    [
        ([("file", ("a.wav", CLIP)), ("file", ("b.wav", CLIP))], "Too many files"),
        ([("file", ("a.wav", CLIP)), *((f"field{i}", (None, "0")) for i in range(17))], "Too many fields"),
        ([("file", ("a.wav", CLIP)), ("model", (None, "0" * 65537))], "maximum size of 64KB"),
    ],
)
def test_what_lies_in_memory_of_a_form_is_little(client, form, message):
    answer = client.post(ASR, files=form)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


def test_an_upload_without_end_is_cut_while_it_comes(client):
    sent = 0

    def endless():
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        while sent < 200:  # MB
            sent += 1
            yield b"0" * 1_000_000

    head = {"content-type": "multipart/form-data; boundary=x"}
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address, timeout=60) as raw:
        raw.sendall(f"POST {ASR} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n".encode())
        raw.sendall("".join(f"{k}: {v}\r\n" for k, v in head.items()).encode() + b"\r\n")
        raw.setblocking(True)
        for piece in endless():
            raw.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            raw.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                assert raw.recv(12) == b"HTTP/1.1 413"
                break
            raw.settimeout(60)
    assert 5 <= sent < 60


def test_an_upload_that_does_not_come(pipe):
    with served(pipe, upload_seconds=0.2) as (client, service):
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as raw:
            head = f"POST {ASR} HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n"
            raw.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x".encode())
            assert raw.recv(12) == b"HTTP/1.1 408"
        for _ in range(600):  # the answer is on its way before its place in the queue is free again
            if not service.accepted:
                break
            time.sleep(0.1)
        assert service.accepted == 0


def test_the_key_is_asked_for(pipe):
    with served(pipe, api_key="sésame") as (client, _):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sésame".encode()}):
            for answer in (client.get("/v1/models", headers=headers), client.post(ASR, headers=headers)):
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"authorization": "Bearer sésame".encode()}).status_code == 200
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_the_host_header_is_no_way_around_the_gate(pipe):
    service = Service(pipe, NAME, **LIMITS, api_key="key")
    headers = [(b"host", b"a?"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": "POST"}
    scope |= {"path": ASR, "raw_path": ASR.encode(), "query_string": b"", "root_path": "", "headers": headers}
    scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"--x--", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(make_app(service)(scope, receive, send))
    service.batcher.close()
    assert sent[0]["status"] == 401


def test_a_model_that_was_not_trained_for_it(pipe, monkeypatch):
    with served(pipe) as (client, _):
        monkeypatch.setattr(pipe.processor, "prompts", {"asr": "words?"})
        answer = ask(client, "/v1/understand")
        assert answer.status_code == 422 and "was trained for asr; this needs ner, or asr and sa" in answer.text
        assert "which ones it hears is not known" in ask(client, language="en").text
        monkeypatch.setattr(pipe.processor, "prompts", {"sa": "how?"})
        for path in (ASR, "/v1/understand"):
            assert ask(client, path).status_code == 422


# ---------------------------------------------------------------- many at once


def test_requests_are_heard_together_by_their_options_and_a_full_queue_refuses(pipe, monkeypatch):
    held = Held(pipe, monkeypatch)
    with served(pipe, max_batch=4, max_queue=8) as (client, service), ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, client)
        assert held.begun.wait(60)
        others = [pool.submit(ask, client, num_beams=1 + i % 2) for i in range(7)]
        wait_until(lambda: service.batcher.waiting == 7)
        assert "sense_queue_windows 7.0" in client.get("/metrics").text
        full = ask(client)
        assert full.status_code == 429 and 1 <= int(full.headers["retry-after"]) <= 60
        assert full.json()["error"]["type"] == "rate_limit_error"
        held.free.set()
        assert [each.result().status_code for each in (first, *others)] == [200] * 8
        beams = [(number, options["generate_kwargs"]["num_beams"]) for number, options in held.batches]
        assert sorted(beams) == [(1, 1), (3, 2), (4, 1)]
        assert ask(client).status_code == 200
        told = metrics_of(str(client.base_url).rstrip("/"))
        assert told[f'sense_requests_total{{path="{ASR}",status="200"}}'] == 9
        assert told[f'sense_requests_total{{path="{ASR}",status="429"}}'] == 1
        assert told["sense_batch_windows_sum"] == told["sense_waiting_seconds_count"] == 9
        assert told["sense_audio_seconds_total"] == pytest.approx(9 * 0.8)
        assert told["sense_hearing_seconds_count"] == 4 and told["process_resident_memory_bytes"] > 0


def test_a_clip_that_the_model_fails_on_costs_the_others_nothing(pipe, monkeypatch):
    held, whole = Held(pipe, monkeypatch), pipe.forward

    def fail_on_long_ones(windows, **options):
        if any(len(window["samples"]) > 16000 for window in windows):
            raise RuntimeError("secret detail")
        return whole(windows, **options)

    monkeypatch.setattr(pipe, "forward", fail_on_long_ones)
    with served(pipe) as (client, service), ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, client)
        assert held.begun.wait(60)
        others = [pool.submit(ask, client, content=wav(tone(seconds))) for seconds in (0.5, 1.5, 0.6)]
        wait_until(lambda: service.batcher.waiting == 3)
        held.free.set()
        assert first.result().status_code == 200
        assert [each.result().status_code for each in others] == [200, 500, 200]
        error = others[1].result().json()["error"]
        assert error["type"] == "server_error" and "secret" not in others[1].result().text


def test_long_recordings_hold_up_no_short_ones(pipe, monkeypatch):
    free, begun, preprocess = threading.Event(), threading.Event(), pipe.preprocess

    def stuck(windows):
        begun.set()
        assert free.wait(60)
        yield from windows

    def open_slowly(*args):
        recording = preprocess(*args)
        if recording.duration > 30:
            recording.windows = stuck(recording.windows)
        return recording

    monkeypatch.setattr(pipe, "preprocess", open_slowly)
    silence = wav(np.zeros(31 * 1000), 1000)
    with served(pipe) as (client, service), ThreadPoolExecutor(4) as pool:
        long = [pool.submit(ask, client, content=silence) for _ in range(4)]
        assert begun.wait(60)
        wait_until(lambda: service.accepted == 4)
        assert ask(client).status_code == 200
        free.set()
        assert [each.result().json()["text"] for each in long] == [""] * 4


def test_who_hangs_up_is_not_heard(pipe, monkeypatch):
    held = Held(pipe, monkeypatch)
    with served(pipe) as (client, service), ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client)
        assert held.begun.wait(60)
        with pytest.raises(httpx.ReadTimeout):
            client.post(ASR, files={"file": ("a.wav", CLIP)}, timeout=0.5)
        wait_until(lambda: service.accepted == 1)
        held.free.set()
        assert first.result().status_code == ask(client).status_code == 200
        assert [number for number, _ in held.batches] == [1, 1]
        assert f'sense_requests_total{{path="{ASR}",status="499"}} 1.0' in client.get("/metrics").text


def test_a_thread_that_reads_ends_before_its_upload_is_closed(pipe, monkeypatch):
    free, begun, preprocess, seen = threading.Event(), threading.Event(), pipe.preprocess, []

    def open_slowly(audio, *args):
        begun.set()
        assert free.wait(60)
        seen.append(audio["bytes"].closed)
        return preprocess(audio, *args)

    monkeypatch.setattr(pipe, "preprocess", open_slowly)
    with served(pipe) as (client, service):
        with pytest.raises(httpx.ReadTimeout):
            client.post(ASR, files={"file": ("a.wav", CLIP)}, timeout=0.5)
        assert begun.wait(60)
        time.sleep(0.5)
        assert service.accepted == 1
        free.set()
        wait_until(lambda: service.accepted == 0)
        assert seen == [False]


def test_a_server_whose_worker_is_gone_says_so(pipe, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    with served(pipe) as (client, service):
        assert client.get("/health/live").json() == {"live": True}
        monkeypatch.setattr(service.batcher, "on_batch", lambda waited, seconds: 1 / 0)
        assert ask(client).status_code == 200
        wait_until(lambda: not service.batcher.is_alive)
        for path in ("/health", "/health/live"):
            assert client.get(path).status_code == 503 and not client.get(path).json()["live"]
        assert ask(client).status_code == 500


def test_stopping_answers_those_who_were_accepted_and_no_others(pipe, monkeypatch):
    held = Held(pipe, monkeypatch)
    with served(pipe) as (client, _), ThreadPoolExecutor(3) as pool:
        assert client.get("/health").json() == {"live": True, "ready": True}
        taken = [pool.submit(ask, client) for _ in range(3)]
        assert held.begun.wait(60)
        wait_until(lambda: client.server.service.accepted == 3)
        client.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.5)  # it looks for a reason to end ten times a second
        late = httpx.post(f"{client.base_url}{ASR}", files={"file": CLIP})  # by a connection of its own
        assert late.status_code == 503 and late.headers["retry-after"]
        assert client.get("/health").status_code == 503 and client.get("/health/live").status_code == 200
        held.free.set()
        assert [each.result().status_code for each in taken] == [200] * 3
        client.thread.join(60)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{client.base_url}/health")


def test_the_second_signal_stops_at_once(pipe, monkeypatch):
    held = Held(pipe, monkeypatch)
    with served(pipe) as (client, _), ThreadPoolExecutor(1) as pool:
        taken = pool.submit(ask, client)
        assert held.begun.wait(60)
        for _ in range(2):
            client.server.handle_exit(signal.SIGTERM, None)
        client.thread.join(20)
        assert not client.thread.is_alive()
        with contextlib.suppress(httpx.TransportError):
            assert taken.result().status_code == 500
        held.free.set()


def wait_until(holds):
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it does not come to that")


# ---------------------------------------------------------------- the command, and load


def test_32_clients_of_the_command_and_a_stop_in_the_midst(saved, monkeypatch):
    """The load test in short."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    clips, kinds = make_clips(32), ("text", "words")
    right = hear_alone(saved, clips, kinds)
    with serving(saved, "--max-queue", "24") as (address, process):
        asking = Clients(address, clips, right, 32, kinds)
        time.sleep(10)
        told = metrics_of(address)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        tally = asking.stop()
    assert not tally.lost and not tally.wrong
    assert tally.statuses[200] >= 16 and tally.statuses[429] and tally.statuses[503] + tally.statuses["no server"]
    assert told["sense_batch_windows_sum"] > 2 * told["sense_batch_windows_count"]


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["no/such/folder"], "is no model that can be loaded"),
        (["some/model", "--max-upload-mb", "0"], "--max-upload-mb"),
        (["some/model", "--max-minutes", "0"], "--max-minutes"),
        (["some/model", "--upload-seconds", "0"], "--upload-seconds"),
    ],
)
def test_a_server_that_can_not_start_says_why(options, problem, monkeypatch):
    for name in ("SENSE_MODEL", "NO_SUCH_KEY"):
        monkeypatch.delenv(name, raising=False)
    model = ["some/model"] if "--api-key-env" in options else []
    found = CliRunner().invoke(sense_cli.cli, ["serve", *model, *options])
    assert found.exit_code and problem in " ".join(found.stderr.replace("│", " ").split())


def test_options_reach_the_server(saved, monkeypatch):
    made = {}
    monkeypatch.setattr("serve.Server.run", lambda server: made.update(server=server))
    monkeypatch.setenv("TINY_KEY", "open")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    words = "--host 127.0.0.2 --port 8123 --name tiny --language en --max-batch 3 --max-wait-ms 7 --max-queue 5"
    words += " --max-upload-mb 2 --max-minutes 4 --upload-seconds 6 --api-key-env TINY_KEY"
    found = CliRunner().invoke(sense_cli.cli, ["serve", saved, *words.split()])
    assert found.exit_code == 0, found.output
    server, service = made["server"], made["server"].service
    assert (server.config.host, server.config.port) == ("127.0.0.2", 8123)
    assert (service.name, service.language, service.api_key) == ("tiny", "en", "open")
    assert (service.max_queue, service.max_upload) == (5, 2_000_000)
    assert (service.max_seconds, service.upload_seconds) == (240, 6)
    assert (service.batcher.max_batch, service.batcher.max_wait) == (3, 0.007)


@pytest.mark.parametrize(
    "model, name",
    [("org/model", "org/model"), ("work/of/one", "of/one"), ("work/of/one/..", "work/of"), ("/usr", "usr")],
)
def test_a_model_is_named_by_its_id_or_where_it_lies(model, name, tmp_path, monkeypatch):
    (tmp_path / "work/of/one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name(model) == name
