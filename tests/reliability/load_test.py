"""
Many clients at once, for minutes: is every answer the right one, and does every request get one?

    python -m tests.reliability.load_test --seconds 300 --clients 32

A tiny random model answers. Each client has a recording of its own length, which bounds the answer's length, so that
all answers are different; what is right was heard alone before. Each answer is compared: one that is another
recording's was mixed up. At the end the server is stopped while all clients ask. Then the same clients ask a server
that hears in batches and one that does not, by turns; and the page, as its own code in a browser does.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gradio_client
import httpx
import numpy as np
import torch
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor, SpokenLanguageUnderstandingPipeline
from processing.synthesis import Espeak, speak
from tests.conftest import save_llm, save_whisper, wav


ROOT = Path(__file__).resolve().parents[2]
KINDS = {  # of questions: path and fields
    "text": ("/v1/audio/transcriptions", {}),
    "words": ("/v1/audio/transcriptions", {"response_format": "verbose_json", "timestamp_granularities[]": "word"}),
    "understand": ("/v1/understand", {}),
}
LONG_SHARE = 0.02  # of the requests: a recording of more than a window


@dataclass
class Tally:
    """What became of the requests."""

    statuses: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # that answered requests took
    wrong: list[str] = field(default_factory=list)
    mixed_up: int = 0
    lost: list[str] = field(default_factory=list)

    def report(self, seconds: float) -> dict:
        p50, p95 = np.percentile(self.seconds or [0], [50, 95])
        return {
            "answered": len(self.seconds),
            "a second": round(len(self.seconds) / seconds, 2),
            "p50 s": round(float(p50), 2),
            "p95 s": round(float(p95), 2),
            "statuses": dict(self.statuses),
            "lost": len(self.lost),
            "mixed up": self.mixed_up,
            "wrong": len(self.wrong),
        }


def make_model(folder: Path) -> str:
    """A tiny random SENSE that takes all three tasks."""
    whisper, llm = save_whisper(folder / "whisper"), save_llm(LlamaConfig, LlamaForCausalLM, folder / "llama")
    torch.manual_seed(0)
    prompts = {"asr": "Transcribe the speech.", "ner": "Transcribe and tag.", "sa": "How is it meant?"}
    SenseForConditionalGeneration.from_backbones(whisper, llm).save_pretrained(folder / "model")
    SenseProcessor.from_backbones(whisper, llm, prompts=prompts).save_pretrained(folder / "model")
    return str(folder / "model")


def make_clips(number: int) -> list[bytes]:
    """Speech for each client, each clip 0.24 s longer than the one before; last, 40 s with pauses."""
    said = speak(Espeak(), "the user and the assistant speak", "en-us", random.Random(0), False, False)
    clips = [np.tile(said, 6)[: 9600 + 3840 * i] for i in range(number)]
    clips.append(np.tile(np.concatenate([said, np.zeros(48000, np.float32)]), 10)[: 40 * 16000])
    return [wav(clip) for clip in clips]


def hear_alone(model: str, clips: list[bytes], kinds=tuple(KINDS)) -> list[dict]:
    """By clip, the right answers to these kinds of questions."""
    pipe = SpokenLanguageUnderstandingPipeline(
        SenseForConditionalGeneration.from_pretrained(model), processor=SenseProcessor.from_pretrained(model)
    )
    right = [pipe(clip, return_entities=False, return_sentiment=False) for clip in clips]
    assert len({answer["text"] for answer in right}) == len(clips), "answers that are alike"
    if "understand" in kinds:
        for clip, answer in zip(clips, right):
            answer["understand"] = pipe(clip, return_timestamps="word")
        assert len({answer["understand"]["text"] for answer in right}) == len(clips), "answers that are alike"
    return right


def shape_of(kind: str, right: dict) -> dict:
    """What of a clip's right answer a kind of question shows."""
    if kind == "text":
        return {"text": right["text"]}
    if kind == "words":
        return {"text": right["text"], "duration": right["duration"], "words": right["text"].split()}
    whole = right["understand"]
    entities = [(e["entity"], e["word"], e["start"]) for e in whole["entities"]]
    return {
        "text": whole["text"],
        "duration": whole["duration"],
        "entities": entities,
        "mood": whole["sentiment"]["label"],
    }


def shape_of_answer(kind: str, answer: dict) -> dict:
    if kind == "understand":
        return shape_of(kind, {"understand": answer})
    shape = {"text": answer["text"]}
    if kind == "words":
        shape |= {"duration": answer["duration"], "words": [word["word"] for word in answer["words"]]}
    return shape


@contextmanager
def serving(model: str, *options: str):
    """`sense serve` in a process of its own; its address and process. Stopped by SIGTERM, it must end well."""
    with running("-m", "sense_cli", "serve", model, "--device", "cpu", *options) as (address, process):
        wait_for(f"{address}/health", process)
        yield address, process
        process.send_signal(signal.SIGTERM)  # nothing happens where it has ended already
        assert process.wait(120) == 0, process.returncode


@contextmanager
def running(*command: str):
    """A Python program that serves at `--port`, its address and process; it is gone at the end."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *command, "--port", str(port)], cwd=ROOT, env=environment)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(address: str, process: subprocess.Popen):
    for _ in range(1200):
        try:
            httpx.get(address, timeout=30).raise_for_status()
            return
        except httpx.TransportError:
            assert process.poll() is None, "it ended before it served"
            time.sleep(0.1)
    raise TimeoutError(f"{address} does not answer")


def metrics_of(address: str) -> dict[str, float]:
    lines = httpx.get(f"{address}/metrics", timeout=60).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


class Clients:
    """Threads that ask a server until they are told to stop, each about its own clip."""

    def __init__(self, address: str, clips: list[bytes], right: list[dict], number: int, kinds=tuple(KINDS)):
        self.address, self.clips, self.right, self.kinds = address, clips, right, kinds
        self.number, self.tally, self.lock = number, Tally(), threading.Lock()
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self._ask_on, args=(i,), daemon=True) for i in range(number)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> Tally:
        """Waits for the answers that are still to come."""
        self.stopped.set()
        for thread in self.threads:
            thread.join(300)
            assert not thread.is_alive(), "a request that nobody answers"
        return self.tally

    def _ask_on(self, client: int):
        rng, limits = random.Random(client), httpx.Limits(max_keepalive_connections=0)  # a connection for each request
        with httpx.Client(base_url=self.address, timeout=300, limits=limits) as http:
            while not self.stopped.is_set():
                is_long = rng.random() < LONG_SHARE
                wait = self._ask(http, self.number if is_long else client, rng.choice(self.kinds))
                self.stopped.wait(wait)

    def _ask(self, http: httpx.Client, clip: int, kind: str) -> float:
        """One request; the seconds to wait before the next."""
        path, fields = KINDS[kind]
        files, begin = {"file": (f"{clip}.wav", self.clips[clip])}, time.monotonic()
        try:
            answer = http.post(path, files=files, data=fields)
        except httpx.ConnectError:  # never taken
            with self.lock:
                self.tally.statuses["no server"] += 1
            return 1.0
        except httpx.TransportError as error:
            with self.lock:
                self.tally.lost.append(f"{kind} of clip {clip}: {error!r}")
            return 0.0
        with self.lock:
            self.tally.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                self.tally.seconds.append(time.monotonic() - begin)
                self._compare(clip, kind, shape_of_answer(kind, answer.json()))
            elif answer.status_code not in (429, 503):
                self.tally.lost.append(f"{kind} of clip {clip}: {answer.status_code} {answer.text}")
        return float(answer.headers.get("retry-after", 0))

    def _compare(self, clip: int, kind: str, found: dict):
        if found != shape_of(kind, self.right[clip]):
            self.tally.wrong.append(f"{kind} of clip {clip}: {found}")
            others = [shape_of(kind, other)["text"] for i, other in enumerate(self.right) if i != clip]
            self.tally.mixed_up += found["text"] in others


def load(model: str, clips: list[bytes], right: list[dict], seconds: float, clients: int, *options: str) -> dict:
    """Asks a server for so long, then stops it in the midst of it."""
    with serving(model, *options) as (address, process):
        asking = Clients(address, clips, right, clients)
        time.sleep(min(seconds / 5, 20))
        before, begin, memory = metrics_of(address), time.monotonic(), []
        answered = len(asking.tally.seconds)
        for _ in range(6):
            time.sleep((seconds - min(seconds / 5, 20)) / 6)
            after = metrics_of(address)
            memory.append(round(after["process_resident_memory_bytes"] / 1e6))
        lasted, in_measure = time.monotonic() - begin, len(asking.tally.seconds) - answered
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
        tally = asking.stop()
    change = {name: after[name] - before.get(name, 0) for name in after}
    batches = change["sense_batch_windows_count"]
    return tally.report(seconds) | {
        "a second": round(in_measure / lasted, 2),
        "windows a batch": round(change["sense_batch_windows_sum"] / batches, 2),
        "mean s in the queue": round(change["sense_waiting_seconds_sum"] / change["sense_waiting_seconds_count"], 2),
        "mean s of a batch": round(change["sense_hearing_seconds_sum"] / batches, 2),
        "MB at start": round(before["process_resident_memory_bytes"] / 1e6),
        "MB in six parts": memory,
        "exit code": code,
        "faults": tally.lost[:5] + tally.wrong[:5],
    }


def compare(model: str, clips: list[bytes], right: list[dict], seconds: float, clients: int) -> dict:
    """Answers a second with and without batches, by turns of both servers."""
    answered = Counter()
    with serving(model) as (batched, _), serving(model, "--max-batch", "1") as (alone, _):
        for _ in range(3):
            for name, address in (("batched", batched), ("alone", alone)):
                asking = Clients(address, clips, right, clients, kinds=("text",))
                time.sleep(seconds / 6)
                answered[name] += len(asking.tally.seconds)
                tally = asking.stop()
                assert not (tally.lost or tally.wrong), (tally.lost, tally.wrong)
    return {
        **{name: round(2 * number / seconds, 2) for name, number in answered.items()},
        "ratio": round(answered["batched"] / answered["alone"], 2),
    }


class Visitors(Clients):
    """Visitors of the page, each of whom presses its button again and again."""

    def _ask_on(self, client: int):
        visitor = gradio_client.Client(self.address, verbose=False)
        button = next(i for i, endpoint in visitor.endpoints.items() if endpoint.api_name == "/run")
        visitor.endpoints[button].is_valid = True  # the page is for browsers: it offers this to no program
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            file.write(self.clips[client])
            file.flush()
            while not self.stopped.is_set():
                self._press(visitor, button, client, gradio_client.handle_file(file.name))

    def _press(self, visitor: gradio_client.Client, button: int, clip: int, file):
        begin, shown = time.monotonic(), [None] * 4
        try:
            job = visitor.submit(file, fn_index=button)
            job.result(timeout=300)
        except QueueError:
            with self.lock:
                self.tally.statuses["queue is full"] += 1
            self.stopped.wait(1.0)
            return
        except AppError as error:
            with self.lock:
                self.tally.lost.append(f"clip {clip}: {error!r}")
            return
        for update in job.outputs():  # what an update leaves out stays as it was
            is_left = [isinstance(new, dict) and new.get("__type__") == "update" for new in update]
            shown = [old if left else new for old, new, left in zip(shown, update, is_left)]
        line, tokens, _, _ = shown
        with self.lock:
            self.tally.statuses["answered"] += 1
            self.tally.seconds.append(time.monotonic() - begin)
            found = "".join(token["token"] for token in tokens).strip()
            if "understood" not in line or found != self.right[clip]["understand"]["text"].strip():
                self.tally.wrong.append(f"clip {clip}: {line} {found!r}")
                others = [each["understand"]["text"].strip() for i, each in enumerate(self.right) if i != clip]
                self.tally.mixed_up += found in others


def load_page(model: str, clips: list[bytes], right: list[dict], seconds: float, visitors: int) -> dict:
    """Asks the page for so long."""
    with running("app.py", model) as (address, process):
        wait_for(address, process)
        asking = Visitors(address, clips, right, visitors)
        time.sleep(seconds)
        return asking.stop().report(seconds) | {"faults": asking.tally.lost[:5] + asking.tally.wrong[:5]}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max_queue", type=int, default=24, help="fewer than the clients: some are sent away")
    parser.add_argument(
        "--parts", nargs="+", choices=("load", "compared", "page"), default=["load", "compared", "page"]
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model, clips = make_model(Path(folder)), make_clips(args.clients)
        setting = (model, clips, hear_alone(model, clips))
        for part in args.parts:
            if part == "load":
                queue = ("--max-queue", str(args.max_queue))
                found = load(*setting, args.seconds, args.clients, *queue)
            else:
                found = (compare if part == "compared" else load_page)(*setting, args.seconds / 3, args.clients)
            print(json.dumps({part: found}, indent=1), flush=True)
            if found.get("lost") or found.get("wrong") or found.get("exit code"):
                sys.exit("an answer was lost or wrong, or the stop was no clean one")


if __name__ == "__main__":
    main()
