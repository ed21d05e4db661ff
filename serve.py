"""
The server: one model answers many clients at once, in the manner of OpenAI's API for speech. `sense serve` starts it.

    POST /v1/audio/transcriptions    what a recording says
    POST /v1/understand              what it says, names and when, and how it was meant
    GET  /v1/models                  the model
    GET  /health, /health/live       whether requests are taken; whether the process lives
    GET  /metrics                    for Prometheus
"""

import asyncio
import hmac
import logging
import math
import signal
import time
from collections.abc import Coroutine
from typing import Annotated, Literal

import uvicorn
from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, exposition
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from soundfile import SoundFileError
from starlette.exceptions import HTTPException

from processing import subtitles
from processing.batching import Batcher
from processing.long_audio import SpeechDetector
from processing.pipeline_sense import Recording, SpokenLanguageUnderstandingPipeline
from processing.processing_sense import MAX_SECONDS
from processing.tasks import check_trained


MAX_BEAMS = 8
READERS = 2  # threads
FORM = {"max_files": 1, "max_fields": 16, "max_part_size": 2**16}  # in bytes; fields lie in memory
LAST_WORDS = 0.5  # seconds at the end, in which those who were connected by then are still told 503
TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # of errors; others by their hundreds
# Fields of OpenAI's that must be left out or nothing, and why.
NOT_TAKEN = {
    "temperature": "found {:g}; answers are greedy or by beams, never sampled: give 0 or leave it out",
    "prompt": "the model hears with the prompt that it was trained with: leave it out",
    "stream": "answers come whole: leave it out",
}
LOG = logging.getLogger("uvicorn.error")


class Refusal(HTTPException):
    """An answer with an error, which names the field that is at fault (`param`) where there is one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(status, message, {name.replace("_", "-"): value for name, value in headers.items()})
        self.param, self.code = param, code


HEARD = ("/v1/audio/transcriptions", "/v1/understand")  # paths that take recordings


class Asked(BaseModel):
    """Fields of every request to hear a recording."""

    model_config = ConfigDict(extra="forbid")

    file: UploadFile
    model: str | None = None
    num_beams: int = Field(1, ge=1, le=MAX_BEAMS, description="Of beam search; 1 is greedy.")


class Transcription(Asked):
    """OpenAI's fields, and `num_beams`. What SENSE can't do is refused, not ignored."""

    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    timestamp_granularities: list[Literal["word", "segment"]] = Field([], alias="timestamp_granularities[]")
    language: str | None = None
    temperature: float = 0.0
    prompt: str = ""
    stream: bool = False

    @field_validator(*NOT_TAKEN)
    @classmethod
    def _is_left_out(cls, value, info: ValidationInfo):
        if value:
            raise ValueError(NOT_TAKEN[info.field_name].format(value))
        return value

    @model_validator(mode="after")
    def _times_have_a_place(self) -> "Transcription":
        if self.timestamp_granularities and self.response_format != "verbose_json":
            raise ValueError("timestamp_granularities[] goes with response_format verbose_json")
        return self

    @property
    def wants_words(self) -> bool:
        return self.response_format in ("srt", "vtt") or "word" in self.timestamp_granularities


class Understanding(Asked):
    """Fields of `/v1/understand`."""

    constrained: bool = Field(False, description="Keep the answer to the grammar of tags.")


class Metrics:
    """What `/metrics` tells."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._new(Counter, "requests", "Answers given.", ["path", "status"])
        self.accepted = self._new(Gauge, "requests_accepted", "Requests that are being read, heard or answered.")
        self.queue = self._new(Gauge, "queue_windows", "Windows of recordings that wait for the model.")
        self.batches = self._new(
            Histogram, "batch_windows", "Windows heard at a time.", buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self.waited = self._new(Histogram, "waiting_seconds", "A window's time in the queue.")
        self.heard = self._new(Histogram, "hearing_seconds", "The model's time for a batch.")
        self.audio = self._new(Counter, "audio_seconds", "Audio of the recordings that were answered.")

    def _new(self, kind, name: str, what: str, labels=(), **how):
        return kind(f"sense_{name}", what, labels, registry=self.registry, **how)

    def on_batch(self, waited: list[float], seconds: float):
        self.batches.observe(len(waited))
        self.heard.observe(seconds)
        for each in waited:
            self.waited.observe(each)


class Service:
    """
    One model and those who ask it.

    Args:
        pipe: what hears the recordings.
        name: of the model, as clients name it.
        max_batch, max_wait: of the `Batcher`, in windows and seconds.
        max_queue: requests that are accepted and not yet answered, at most.
        max_upload: bytes of a request's body, at most.
        max_seconds: of a recording, at most.
        upload_seconds: within which a body must have come.
        language: ISO code of what the model was trained to hear, the one that requests may name.
        api_key: that `/v1` asks for.
    """

    def __init__(
        self,
        pipe: SpokenLanguageUnderstandingPipeline,
        name: str,
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        max_upload: int,
        max_seconds: float,
        upload_seconds: float,
        language: str | None = None,
        api_key: str | None = None,
    ):
        self.pipe, self.name, self.language, self.api_key = pipe, name, language, api_key
        self.max_queue, self.max_upload, self.max_seconds = max_queue, max_upload, max_seconds
        self.upload_seconds = upload_seconds
        self.accepted, self.is_draining, self.started = 0, False, int(time.time())
        self.metrics = Metrics()
        self.batcher = Batcher(self._forward, max_batch, max_wait, self.metrics.on_batch)
        self.metrics.queue.set_function(lambda: self.batcher.waiting)
        self.metrics.accepted.set_function(lambda: self.accepted)
        # Threads that read audio: few, each holds memory of its own. Long recordings, in which the search for speech
        # may take minutes, have theirs: they hold up each other, not the short ones.
        self.readers, self.long_readers = asyncio.Semaphore(READERS), asyncio.Semaphore(READERS)
        SpeechDetector()  # its import sets the process's threads: not while requests are heard

    def _forward(self, windows: list[dict], options: dict) -> list[dict]:
        return self.pipe.forward(windows, **self.pipe._forward_params | options)

    async def hear(self, file: UploadFile, **asked) -> Recording:
        """
        A recording, window by window: each waits for its turn in the model's batches, so that a long recording takes
        no more than one place in each. `asked` are the pipeline's options.
        """
        audio = {"bytes": file.file, "path": file.filename or "file"}
        recording = await self._read(self.readers, self.pipe.preprocess, audio, None, None, False)
        if recording.duration > self.max_seconds:
            minutes = f"{recording.duration / 60:.0f} minutes; up to {self.max_seconds / 60:g} are taken"
            raise Refusal(413, f"{audio['path']} lasts {minutes}", "file", "recording_too_long")
        readers = self.readers if recording.duration <= MAX_SECONDS else self.long_readers
        while (window := await self._read(readers, next, recording.windows, None)) is not None:
            recording.heard.append(await asyncio.wrap_future(self.batcher.submit(window, **asked)))
        self.metrics.audio.inc(recording.duration)
        return recording

    async def _read(self, readers: asyncio.Semaphore, function, *args):
        """Reads audio in a thread, once one of these is free; where it is cancelled, once the thread has ended."""
        async with readers:
            reading = asyncio.ensure_future(asyncio.to_thread(function, *args))
            try:
                return await asyncio.shield(reading)
            except asyncio.CancelledError:
                await asyncio.wait([reading])  # no thread reads an upload that is closed, nor stays behind uncounted
                raise
            except ValueError as error:
                is_audio = not isinstance(error.__cause__, SoundFileError)
                raise Refusal(422 if is_audio else 415, str(error), "file", "invalid_audio") from error

    def check_asked(self, asked: Asked, command: str):
        """Raises Refusal for what this model can't answer; `command` as of `check_trained`."""
        if asked.model not in (None, self.name):
            raise Refusal(404, f"no model {asked.model!r} here, but {self.name!r}", "model", "model_not_found")
        try:
            check_trained(self.name, self.pipe.processor.prompts, command)
        except ValueError as error:
            raise Refusal(422, str(error), "model") from error
        language = getattr(asked, "language", None)
        if language not in (None, self.language):
            known = f"the one it hears is {self.language!r}" if self.language else "which ones it hears is not known"
            raise Refusal(422, f"language {language!r}: {self.name} can't be told a language; {known}", "language")

    def refuse(self, request: Request) -> Refusal | None:
        """Why a request is not let in, as far as its head tells."""
        if not request.scope["path"].startswith("/v1/"):
            return None
        if self.api_key is not None and not _is_key(request.headers.get("authorization", ""), self.api_key):
            return Refusal(
                401, "give the key: Authorization: Bearer KEY", code="invalid_api_key", WWW_Authenticate="Bearer"
            )
        if request.method != "POST" or request.scope["path"] not in HEARD:
            return None
        if self.is_draining:
            return Refusal(503, "the server is stopping; ask another one", code="stopping", Retry_After="10")
        if self.accepted >= self.max_queue:
            wait = min(max(math.ceil(self.accepted * self.batcher.seconds_per_window), 1), 60)
            message = f"{self.accepted} requests are waiting; try again in {wait} s"
            return Refusal(429, message, code="rate_limit_exceeded", Retry_After=str(wait))
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return Refusal(415, "send the recording as multipart/form-data, in a field named file", "file")
        if int(request.headers.get("content-length", 0)) > self.max_upload:
            return self.too_large()
        return None

    def too_large(self) -> Refusal:
        message = f"the upload is larger than {self.max_upload / 1e6:g} MB; cut it, or send FLAC or MP3"
        return Refusal(413, message, "file", "upload_too_large")


def _is_key(header: str, key: str) -> bool:
    kind, _, given = header.partition(" ")  # a header's bytes come as Latin-1, whatever they are
    return kind.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), key.encode())


class Gate:
    """
    ASGI middleware before all else: turns away who can't be served before the body is read, keeps a place for the
    others, bounds the body while it comes, in size and time, and counts the answers.
    """

    def __init__(self, app, service: Service, paths: set[str]):
        self.app, self.service, self.paths = app, service, paths

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500  # unless an answer says otherwise

        async def note_status(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        request, path = Request(scope), scope["path"]  # the routes' path: that of request.url heeds the Host header
        is_counted = request.method == "POST" and path in HEARD
        refusal = self.service.refuse(request)
        try:
            if refusal:
                await error_answer(refusal)(scope, receive, note_status)
            elif is_counted:
                self.service.accepted += 1
                try:
                    await self.app(scope, self._bounded(receive), note_status)
                finally:
                    self.service.accepted -= 1
            else:
                await self.app(scope, receive, note_status)
        finally:
            self.service.metrics.requests.labels(path if path in self.paths else "other", status).inc()

    def _bounded(self, receive):
        size, is_whole, due = 0, False, asyncio.get_running_loop().time() + self.service.upload_seconds

        async def receive_some():
            nonlocal size, is_whole
            try:
                async with asyncio.timeout_at(None if is_whole else due):
                    message = await receive()
            except TimeoutError as error:
                raise Refusal(408, f"the upload took more than {self.service.upload_seconds:g} s", "file") from error
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > self.service.max_upload:
                raise self.service.too_large()
            return message

        return receive_some


class SmallFormRequest(Request):
    """Its form is a file and a few short fields."""

    def form(self, **limits):
        return super().form(**FORM)


class SmallFormRoute(APIRoute):
    """FastAPI reads the form of what comes to `get_route_handler`'s function."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def handle_small_form(request: Request) -> Response:
            return await handle(SmallFormRequest(request.scope, request.receive))

        return handle_small_form


def error_answer(error: HTTPException) -> JSONResponse:
    """In OpenAI's form."""
    kind = TYPES.get(error.status_code, "server_error" if error.status_code >= 500 else "invalid_request_error")
    told = {"message": error.detail, "type": kind}
    told |= {"param": getattr(error, "param", None), "code": getattr(error, "code", None)}
    return JSONResponse({"error": told}, error.status_code, error.headers)


def invalid_fields(error: RequestValidationError) -> Refusal:
    """The first field that is wrong; pydantic tells the others too, but OpenAI's form has one `param`."""
    first = error.errors()[0]
    field = str(first["loc"][1]) if len(first["loc"]) > 1 else None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field"
    return Refusal(422, f"{field}: {message}" if field else message, field, first["type"])


async def unless_gone(request: Request, work: Coroutine):
    """The work's result; the work is cancelled where the client hangs up before."""

    async def hang_up():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hang_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Refusal(499, "the client hung up")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # what still reads the upload, before it is closed


def make_app(service: Service) -> FastAPI:
    """The server's paths."""
    app = FastAPI(openapi_url=None)
    app.router.route_class = SmallFormRoute
    pipe = service.pipe

    @app.post(HEARD[0])
    async def transcriptions(request: Request, form: Annotated[Transcription, Form()]) -> Response:
        service.check_asked(form, "transcribe")
        asked = {"return_entities": False, "return_sentiment": False, "return_timestamps": form.wants_words}
        asked |= {"generate_kwargs": {"num_beams": form.num_beams}}
        recording = await unless_gone(request, service.hear(form.file, **asked))
        return transcription_answer(pipe, recording, form, service.language)

    @app.post(HEARD[1])
    async def understand(request: Request, form: Annotated[Understanding, Form()]) -> Response:
        service.check_asked(form, "understand")
        asked = {"return_timestamps": "word", "constrained": form.constrained}
        asked |= {"generate_kwargs": {"num_beams": form.num_beams}}
        recording = await unless_gone(request, service.hear(form.file, **asked))
        return JSONResponse(pipe.postprocess(recording, return_timestamps="word"))

    @app.get("/v1/models")
    async def models() -> dict:
        model = {"id": service.name, "object": "model", "created": service.started, "owned_by": "sense"}
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        known = (await models())["data"][0]
        if name != known["id"]:
            raise Refusal(404, f"{name}: there is no such model here, only {known['id']}", "model", "model_not_found")
        return known

    @app.get("/health/live")
    async def live() -> Response:
        is_live = service.batcher.is_alive
        return JSONResponse({"live": is_live}, 200 if is_live else 503)

    @app.get("/health")
    async def health() -> Response:
        is_live = service.batcher.is_alive
        is_ready = is_live and not service.is_draining
        return JSONResponse({"live": is_live, "ready": is_ready}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(
            exposition.generate_latest(service.metrics.registry), media_type=exposition.CONTENT_TYPE_LATEST
        )

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        return error_answer(error)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: Request, error: RequestValidationError) -> Response:
        return error_answer(invalid_fields(error))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return error_answer(Refusal(500, "the model failed on this recording; the server's log says why"))

    app.add_middleware(Gate, service=service, paths={route.path for route in app.routes})
    return app


def transcription_answer(
    pipe: SpokenLanguageUnderstandingPipeline, recording: Recording, form: Transcription, language: str | None
) -> Response:
    """What was heard, in the form that was asked for."""
    how = {"return_entities": False, "return_sentiment": False}
    result = pipe.postprocess(recording, return_timestamps="word" if form.wants_words else True, **how)
    if form.response_format == "text":
        return PlainTextResponse(result["text"] + "\n")
    if form.response_format == "srt":
        return PlainTextResponse(subtitles.to_srt(result))
    if form.response_format == "vtt":
        return PlainTextResponse(subtitles.to_vtt(result), media_type="text/vtt")
    answer = {"text": result["text"], "usage": {"type": "duration", "seconds": math.ceil(result["duration"])}}
    if form.response_format == "verbose_json":
        answer |= {"task": "transcribe", "language": language or "unknown", "duration": result["duration"]}
        if form.wants_words:
            words = [(chunk["text"], *chunk["timestamp"]) for chunk in result["chunks"]]
            answer["words"] = [{"word": word, "start": start, "end": end} for word, start, end in words]
        if form.timestamp_granularities != ["word"]:
            windows = enumerate(window for window in recording.heard if window["text"])
            answer["segments"] = [{"id": i} | {name: w[name] for name in ("text", "start", "end")} for i, w in windows]
    return JSONResponse(answer)


class Server(uvicorn.Server):
    """Stops once those who were accepted are answered; a second signal stops it at once."""

    def __init__(self, service: Service, **config):
        super().__init__(uvicorn.Config(make_app(service), access_log=False, **config))
        self.service = service

    def handle_exit(self, sig: int, frame):
        if self.service.is_draining:
            self.should_exit = self.force_exit = True
        self.service.is_draining = True
        LOG.info("%s: %d requests are to be answered first", signal.Signals(sig).name, self.service.accepted)

    async def on_tick(self, counter: int) -> bool:
        is_drained = self.service.is_draining and not self.service.accepted
        return await super().on_tick(counter) or is_drained

    async def shutdown(self, sockets=None):
        if not self.force_exit:
            for listener in self.servers:
                listener.close()
            await asyncio.sleep(LAST_WORDS)
        await super().shutdown(sockets)
        if not self.force_exit:
            self.service.batcher.close()
