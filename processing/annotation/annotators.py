"""
Who annotates: a server that speaks OpenAI's chat API, a language model on this machine, or spaCy and VADER.

Each has `name`, `context_tokens` (None: no bound), `count(text)` (tokens) and `async ask(request) -> Reply`.
"""

import asyncio
import math
import random
from dataclasses import dataclass
from urllib.parse import urlparse

import torch
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..controls import SpacyTagger, VaderSentiment
from .prompting import EntityAnnotation


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
    """A request that the server refused, or did not answer however often it was asked."""


class FatalError(RuntimeError):
    """The server will not answer any request: a wrong address, key or model."""


def estimate_tokens(text: str) -> int:
    """Without the model's tokenizer: three characters a token, more than most text needs."""
    return math.ceil(len(text) / 3)


class EndpointAnnotator:
    """
    A chat model behind an OpenAI-compatible server, through huggingface_hub's `AsyncInferenceClient`.

    Args:
        endpoint: URL of the server, or the name of an inference provider that huggingface_hub knows.
        model: its name there.
        token: for the server. Without one, Hugging Face's own is used for its hosts and providers, and none elsewhere.
        timeout: seconds for a request.
        max_retries: of a request that failed on the way (429, 408, 5xx, timeout, no connection, no chat completion).
        backoff: seconds before the first of them, doubled each time, up to a minute; a server's Retry-After wins.
        context_tokens: what fits into the model.
        tokenizer: counts tokens; default: an estimate.
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
        self.name = f"{model} at {endpoint}"
        self.model, self.timeout, self.max_retries, self.backoff = model, timeout, max_retries, backoff
        self.context_tokens = context_tokens
        self.count = estimate_tokens if tokenizer is None else lambda text: len(tokenizer.encode(text))
        self.structured = True  # until the server is found not to take a schema
        self.retries = 0
        where = {"base_url": endpoint} if "://" in endpoint else {"provider": endpoint}
        if token is None and not is_hugging_face(endpoint):
            token = "none"  # the client would send Hugging Face's token to anybody
        self.client = AsyncInferenceClient(**where, token=token, timeout=timeout)

    async def ask(self, request: Request) -> Reply:
        """
        Raises:
            NoAnswer: after all retries, or where the server refuses this request.
            FatalError: where it would refuse all.
        """
        structured = self.structured and request.schema is not None
        try:
            return await self._persist(request, structured)
        except NoAnswer as error:
            if not structured or status_of(error.__cause__) not in (400, 415, 422, 501):
                raise
            reply = await self._persist(request, structured=False)
            self.structured = False
            return reply

    async def _persist(self, request: Request, structured: bool) -> Reply:
        """Asks until there is an answer, or no hope of one."""
        for tried in range(self.max_retries + 1):
            try:
                return await asyncio.wait_for(self._post(request, structured), self.timeout)
            except (HTTPError, OSError, TimeoutError, ValueError, TypeError, KeyError, AttributeError) as error:
                status, cause = status_of(error), error
            if status in (401, 403, 404):
                raise FatalError(f"{self.name}: {describe(cause)}; check address, model and --token_env") from cause
            if status is not None and status < 500 and status not in (408, 425, 429):
                raise NoAnswer(f"refused: {describe(cause)}") from cause
            if tried < self.max_retries:
                self.retries += 1
                await asyncio.sleep(self._wait(tried, cause))
        raise NoAnswer(f"no answer after {self.max_retries + 1} tries: {describe(cause)}") from cause

    async def _post(self, request: Request, structured: bool) -> Reply:
        extra = {}
        if structured:
            named = {"name": "annotation", "schema": request.schema, "strict": True}
            extra["response_format"] = {"type": "json_schema", "json_schema": named}
        if request.attempt:
            extra["seed"] = request.attempt
        output = await self.client.chat_completion(
            request.messages,
            model=self.model,
            max_tokens=request.max_tokens,
            temperature=0.7 if request.attempt else 0.0,
            **extra,
        )
        text = output.choices[0].message.content if output.choices else None
        if not isinstance(text, str):
            raise ValueError("the server's reply has no message")
        usage = output.usage
        asked = sum(self.count(message["content"]) for message in request.messages)
        return Reply(
            text,
            usage.prompt_tokens if usage else asked,
            usage.completion_tokens if usage else self.count(text),
        )

    def _wait(self, tried: int, error: Exception) -> float:
        """Seconds before the next try."""
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        try:
            return min(600, float(headers.get("retry-after", "")))
        except ValueError:  # none, or a date
            return min(60, self.backoff * 2**tried) * random.uniform(0.5, 1)

    async def close(self):
        await self.client.close()


def is_hugging_face(endpoint: str) -> bool:
    """A provider's name, which goes through Hugging Face, or one of its hosts."""
    host = urlparse(endpoint).hostname or ""
    return "://" not in endpoint or host.endswith(("huggingface.co", "huggingface.cloud", "hf.co", "hf.space"))


def status_of(error: BaseException | None) -> int | None:
    """HTTP status of an error, if the server sent one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def describe(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class LocalAnnotator:
    """
    A chat model of transformers on this machine. Requests that wait together are answered as one batch.

    Args:
        source: Hub id or folder.
        batch_size: most requests in a batch.
        name: what the model is called; default: its source.
    """

    def __init__(self, source: str, batch_size: int = 8, name: str | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device).eval()
        self.context_tokens = self.model.config.max_position_embeddings
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
            except Exception as error:  # whoever asked gets it
                replies = [error] * len(batch)
            for (_, future), reply in zip(batch, replies):
                if not future.done():
                    future.set_exception(reply) if isinstance(reply, Exception) else future.set_result(reply)
            await asyncio.sleep(0)

    @torch.inference_mode()
    def _generate(self, requests: list[Request]) -> list[Reply]:
        chats = [request.messages for request in requests]
        inputs = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
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

    async def close(self):
        """Nothing is open."""


class SpacyAnnotator:
    """spaCy's English model for entities: a stand-in with real accuracy where there is no large language model."""

    context_tokens = None

    def __init__(self, tag_set: str):
        self.tagger = SpacyTagger.from_pretrained(combined=tag_set == "combined")
        self.name = self.tagger.name
        self.task = EntityAnnotation(tag_set)

    def count(self, text: str) -> int:
        return 0

    async def ask(self, request: Request) -> Reply:
        (entities,) = self.tagger.tag([request.text])
        return Reply(self.task.write({"text": request.text, "entities": entities}))

    async def close(self):
        """Nothing is open."""


class VaderAnnotator:
    """VADER's lexicon for sentiment: spaCy has none."""

    context_tokens = None

    def __init__(self):
        self.vader = VaderSentiment()
        self.name = "VADER"

    def count(self, text: str) -> int:
        return 0

    async def ask(self, request: Request) -> Reply:
        return Reply(self.vader.classify([request.text])[0])

    async def close(self):
        """Nothing is open."""
