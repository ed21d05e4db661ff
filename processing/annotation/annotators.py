"""Who annotates: a server that speaks OpenAI's chat API, a language model on this machine, or spaCy and VADER."""

import asyncio
import json
import math
import random
import re
from dataclasses import dataclass
from urllib.parse import urlparse

import torch
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_sense.modeling_sense import load_safely

from ..controls import SpacyTagger, VaderSentiment
from .prompting import EntityAnnotation, printable


@dataclass(frozen=True)
class Request:
    """A transcript to annotate: the chat that asks for it, and a bound on the answer."""

    text: str
    messages: list[dict[str, str]]
    max_tokens: int
    attempt: int = 0  # after an unreadable answer 1, 2, ...: asked again with some chance in it
    schema: dict | None = None


@dataclass(frozen=True)
class Reply:
    """What came back; tokens as the annotator counts them."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NoAnswer(RuntimeError):
    """A request that the server did not answer, however often it was asked."""


class Refused(NoAnswer):
    """A request that the server will not answer, as its transcript is."""


class FatalError(RuntimeError):
    """The server will not answer any request: a wrong address, key or model."""


class BadReply(RuntimeError):
    """What came back is no chat completion."""


def estimate_tokens(text: str) -> int:
    """Without the model's tokenizer: three characters a token, more than most text needs."""
    return math.ceil(len(text) / 3)


class Annotator:
    """Somebody who answers requests."""

    name: str
    context_tokens: int | None = None  # that it can read; None: no bound
    retries = 0  # of requests that failed on the way

    def count(self, text: str) -> int:
        """Tokens."""
        return 0

    async def ask(self, request: Request) -> Reply:
        raise NotImplementedError

    async def close(self):
        """Ends what is open."""


class EndpointAnnotator(Annotator):
    """
    A chat model behind an OpenAI-compatible server, through huggingface_hub's `AsyncInferenceClient`.

    The answer's JSON schema goes with each request until the server turns one down. Providers get it as OpenAI writes
    it (`json_schema`); for a URL, huggingface_hub rewrites it to `{"type": "json_object", "value": schema}`, which
    some servers read as "any JSON" and some ignore.

    Args:
        endpoint: URL of the server, or the name of an inference provider that huggingface_hub knows.
        model: its name there.
        token: for the server. Without one, Hugging Face's own is used for its hosts and providers, and none elsewhere.
        timeout: seconds for a request.
        max_retries: of a request that failed on the way (408, 429, 5xx, timeout, no connection, no chat completion).
        backoff: seconds before the first of them, doubled each time, up to a minute; a longer Retry-After wins.
        context_tokens: what fits into the model.
        tokenizer: counts tokens; default: an estimate.

    Raises:
        ValueError: an endpoint that is neither a URL nor a name.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        token: str | None = None,
        timeout: float = 120,
        max_retries: int = 8,
        backoff: float = 1.0,
        context_tokens: int = 8192,
        tokenizer=None,
    ):
        check_endpoint(endpoint)
        self.name = model
        self.endpoint, self.timeout, self.max_retries, self.backoff = endpoint, timeout, max_retries, backoff
        self.context_tokens = context_tokens
        self.tokenizer = tokenizer
        self.structured = True  # until the server is found not to take a schema
        self.answered = False
        where = {"base_url": endpoint} if "://" in endpoint else {"provider": endpoint}
        if not token:  # the client would send Hugging Face's token to anybody
            token = None if is_hugging_face(endpoint) else "none"
        self.client = AsyncInferenceClient(**where, token=token, timeout=timeout)

    def count(self, text: str) -> int:
        return estimate_tokens(text) if self.tokenizer is None else len(self.tokenizer.encode(text))

    async def ask(self, request: Request) -> Reply:
        """
        Raises:
            NoAnswer: after all retries.
            Refused: the server turns this request down.
            FatalError: where it would turn down all.
        """
        structured = self.structured and request.schema is not None
        try:
            reply = await self._persist(request, structured)
        except Refused as error:
            if not structured or status_of(error.__cause__) not in (400, 415, 422, 501):
                raise
            reply = await self._persist(request, structured=False)
            self.structured = False
        self.answered = True
        return reply

    async def _persist(self, request: Request, structured: bool) -> Reply:
        """Asks until there is an answer, or no hope of one."""
        for tried in range(self.max_retries + 1):
            try:
                return await asyncio.wait_for(self._post(request, structured), self.timeout)
            except (HTTPError, OSError, BadReply) as error:
                status, cause = status_of(error), error
            if status in (401, 402) or (status in (403, 404) and not self.answered):
                raise FatalError(
                    f"{self.name}: {describe(cause)}; check address, model, --token_env, credit"
                ) from cause
            if status is not None and (status < 500 or status == 501) and status not in (408, 425, 429):
                raise Refused(f"refused: {describe(cause)}") from cause
            if tried < self.max_retries:
                self.retries += 1
                await asyncio.sleep(self._wait(tried, cause))
        raise NoAnswer(f"no answer after {self.max_retries + 1} tries: {describe(cause)}") from cause

    async def _post(self, request: Request, structured: bool) -> Reply:
        extra: dict = {}
        if structured:
            named = {"name": "annotation", "schema": request.schema, "strict": True}
            extra["response_format"] = {"type": "json_schema", "json_schema": named}
        if request.attempt:
            extra["seed"] = request.attempt
        try:
            output = await self.client.chat_completion(
                request.messages,
                model=self.name,
                max_tokens=request.max_tokens,
                temperature=0.7 if request.attempt else 0.0,
                **extra,
            )
            text = output.choices[0].message.content or ""
            usage = output.usage
            tokens = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        except HTTPError:  # some are ValueErrors too
            raise
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, IndexError, AttributeError) as error:
            if isinstance(error.__context__, HTTPError):  # whose body the client could not read
                raise error.__context__ from None
            raise BadReply(f"no chat completion ({describe(error)})") from error
        except ValueError as error:
            if "://" in self.endpoint or self.answered:
                raise BadReply(f"no chat completion ({describe(error)})") from error
            # The client knows no such provider.
            raise FatalError(f"{self.endpoint}: {describe(error)}; give a URL or a provider's name") from error
        counts = [sum(self.count(message["content"]) for message in request.messages), self.count(str(text))]
        return Reply(printable(str(text)), *(n if type(n) is int else count for n, count in zip(tokens, counts)))

    def _wait(self, tried: int, error: Exception) -> float:
        """Seconds before the next try."""
        wait = min(60, self.backoff * 2**tried) * random.uniform(0.5, 1)
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        try:
            asked = float(headers.get("retry-after", ""))
        except ValueError:  # none, or a date
            return wait
        return max(wait, min(600, asked)) if math.isfinite(asked) else wait

    async def close(self):
        await self.client.close()


def check_endpoint(endpoint: str):
    """Raises ValueError for what is neither a URL nor a provider's name."""
    url = urlparse(endpoint)
    try:
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:  # a port that is no number
        is_url = False
    if not is_url and not re.fullmatch(r"[a-z0-9-]+", endpoint):
        raise ValueError(f"endpoint {endpoint!r}: give a URL such as http://localhost:8000/v1, or a provider's name")


def is_hugging_face(endpoint: str) -> bool:
    """A provider's name, which goes through Hugging Face, or one of its own hosts."""
    url = urlparse(endpoint)
    hosts = ("huggingface.co", "huggingface.cloud")
    own = any(url.hostname == host or (url.hostname or "").endswith(f".{host}") for host in hosts)
    return "://" not in endpoint or (url.scheme == "https" and own)


def status_of(error: BaseException | None) -> int | None:
    """HTTP status of an error, if the server sent one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def describe(error: BaseException) -> str:
    """In one line."""
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


class LocalAnnotator(Annotator):
    """
    A chat model of transformers on this machine. Requests that wait together are answered as one batch.

    Args:
        source: Hub id or folder.
        batch_size: most requests in a batch.
        name: what the model is called; default: its source.
        context_tokens: what fits into it; default: as its configuration says.
    """

    def __init__(self, source: str, batch_size: int = 8, name: str | None = None, context_tokens: int | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        how = {"dtype": torch.bfloat16, "trust_remote_code": False}
        self.model = load_safely(AutoModelForCausalLM.from_pretrained, source, **how).to(device).eval()
        self.context_tokens = context_tokens or self.model.config.max_position_embeddings
        self.name, self.batch_size = name or source, batch_size
        self.waiting: list[tuple[Request, asyncio.Future]] = []
        self.server: asyncio.Task | None = None

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    async def ask(self, request: Request) -> Reply:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        if self.server is None or self.server.done():
            self.server = asyncio.create_task(self._serve())
        return await future

    async def _serve(self):
        await asyncio.sleep(0)  # the other workers put theirs
        while self.waiting:
            alike = [pair for pair in self.waiting if pair[0].attempt == self.waiting[0][0].attempt]
            batch = alike[: self.batch_size]
            self.waiting = [pair for pair in self.waiting if pair not in batch]
            try:
                replies = await asyncio.to_thread(self._generate, [request for request, _ in batch])
            except Exception as error:  # no memory, a template without a system turn: no other batch would fare better
                replies = [FatalError(f"{self.name}: {describe(error)}")] * len(batch)
            for (_, future), reply in zip(batch, replies):
                if not future.done():
                    future.set_exception(reply) if isinstance(reply, Exception) else future.set_result(reply)
            await asyncio.sleep(0)

    @torch.inference_mode()
    def _generate(self, requests: list[Request]) -> list[Reply]:
        chats = [request.messages for request in requests]
        inputs = self.tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=False,  # for templates that know it
        ).to(self.model.device)
        attempt = requests[0].attempt
        torch.manual_seed(attempt)
        how = {"do_sample": True, "temperature": 0.7} if attempt else {"do_sample": False}
        most = max(request.max_tokens for request in requests)
        output = self.model.generate(**inputs, **how, max_new_tokens=most, pad_token_id=self.tokenizer.pad_token_id)
        answers = output[:, inputs["input_ids"].shape[1] :]
        replies = []
        for request, asked, ids in zip(requests, inputs["attention_mask"].sum(1).tolist(), answers):
            ids = ids[: request.max_tokens]
            written = int((ids != self.tokenizer.pad_token_id).sum())
            replies.append(Reply(self.tokenizer.decode(ids, skip_special_tokens=True), asked, written))
        return replies


class SpacyAnnotator(Annotator):
    """spaCy's English model for entities: a stand-in with real accuracy where there is no large language model."""

    def __init__(self, tag_set: str):
        self.tagger = SpacyTagger.from_pretrained(combined=tag_set == "combined")
        self.name = self.tagger.name
        self.task = EntityAnnotation(tag_set)

    async def ask(self, request: Request) -> Reply:
        """As a language model would write it, and where each phrase begins: it may stand there twice."""
        (entities,) = self.tagger.tag([request.text])
        found = json.loads(self.task.write({"text": request.text, "entities": entities}))
        for item, (_, start, _) in zip(found["entities"], entities):
            item["start"] = start
        return Reply(json.dumps(found, ensure_ascii=False))


class VaderAnnotator(Annotator):
    """VADER's lexicon for sentiment: spaCy has none."""

    def __init__(self):
        self.vader = VaderSentiment()
        self.name = "VADER"

    async def ask(self, request: Request) -> Reply:
        return Reply(self.vader.classify([request.text])[0])
