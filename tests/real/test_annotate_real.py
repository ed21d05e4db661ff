"""annotate_sense.py against a live `transformers serve`, with a language model that can follow examples."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch

import annotate_sense
from processing.backbones import backbone_path
from processing.datasets import load_corpus
from processing.grammar import sentences
from processing.tasks import combine
from tests.test_annotate import journal, wait_for, write_transcripts


pytestmark = pytest.mark.real
ROOT = Path(annotate_sense.__file__).parent


def rows(split, number):
    found = sentences("quickstart", split, number, seed=1)
    return [{"text": u.text, "entities": combine(u.entities), "sentiment": u.sentiment} for u in found]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address and model of a server on a loopback port."""
    model = str(backbone_path("SmolLM2-135M-Instruct"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    # CPUs without bfloat16 are 20 times slower in it.
    dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", dtype]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: is_up(f"http://127.0.0.1:{port}/health"), process)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.terminate()
        process.wait(20)


def is_up(url):
    try:
        return urllib.request.urlopen(url, timeout=1).status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        time.sleep(0.3)
        return False


def test_transcripts_killed_and_started_again(server, tmp_path):
    transcripts = rows("test", 24)
    data = write_transcripts(tmp_path / "in", [{"text": row["text"]} for row in transcripts])
    gold = write_transcripts(tmp_path / "gold", transcripts)
    labelled = write_transcripts(tmp_path / "labelled", rows("train", 300))
    endpoint, model = server
    out = tmp_path / "out"
    asked = ["--input", data, "--output", str(out), "--task", "ner", "--endpoint", endpoint, "--model", model]
    asked += ["--examples", labelled, "--retrieve", "4", "--attempts", "1", "--tokenizer", model]
    command = [sys.executable, str(ROOT / "annotate_sense.py"), *asked]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (out / "answers.jsonl").is_file() and len(journal(out)) >= 8, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = journal(out)
    made = annotate_sense.main(asked)

    entries = journal(out)
    assert entries[: len(first)] == first and len(first) < 24
    assert Counter(entry["id"] for entry in entries) == Counter(f"row-{i}" for i in range(24))
    assert all(entry["prompt_tokens"] > 100 and entry["completion_tokens"] > 0 for entry in entries)
    found = load_corpus(out, "train")
    assert found["text"] == [row["text"] for row in transcripts] and made["stopped"] is None
    scores = annotate_sense.main(["compare", gold, str(out), "--output_dir", str(tmp_path / "report")])
    assert scores["filters"]["both"]["all"]["f1"] > 20


def test_sentiment_over_the_wire(server, tmp_path):
    data = write_transcripts(tmp_path / "in", [{"text": row["text"]} for row in rows("test", 4)])
    endpoint, model = server
    asked = ["--input", data, "--task", "sentiment", "--endpoint", endpoint, "--model", model]
    made = annotate_sense.main([*asked, "--output", str(tmp_path / "out")])
    assert made["counts"]["rows"] == 4 and made["tokens"]["prompt"] > 0
    assert (tmp_path / "out" / "rejected.jsonl").is_file()
