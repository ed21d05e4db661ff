"""
Memory of a process that reads a stream for training: rows of Parquet files, shuffled, decoded, collated to batches of
features. The features are those of windows of 1 s in place of Whisper's 30 s, for speed.

    python -m tests.reliability.stream_memory --rows 50000
"""

import argparse
import io
import itertools
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from processing import SenseProcessor
from processing.bad_rows import BadRows
from processing.collator import SenseCollator
from processing.datasets import load_corpus
from processing.processing_sense import AUDIO_TOKEN
from processing.questions import Stream
from processing.tasks import make_tasks
from tests.conftest import make_tokenizer
from tests.processes import launch


PROMPTS = {"asr": "Transcribe."}
BATCH = 20


def write_stream(folder: Path, rows: int, seconds: float, files: int = 4):
    """Noise with texts, `rows` in all, in so many Parquet files of `folder`."""
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "text": datasets.Value("string"),
            "sentiment": datasets.Value("string"),
            "duration": datasets.Value("float64"),
        }
    )

    for first in range(files):
        rng = np.random.default_rng(first)
        with pq.ParquetWriter(folder / f"train-{first:05}.parquet", features.arrow_schema) as file:
            numbers = range(first, rows, files)
            for start in range(0, len(numbers), 100):  # a reader holds so many at a time
                group = [make_row(number, seconds, rng) for number in numbers[start : start + 100]]
                file.write_table(pa.Table.from_pylist(group, schema=features.arrow_schema))


def make_row(number: int, seconds: float, rng: np.random.Generator) -> dict:
    wav = io.BytesIO()
    soundfile.write(wav, 0.1 * rng.standard_normal(round(16000 * seconds)), 16000, format="WAV")
    audio = {"bytes": wav.getvalue(), "path": f"{number}.wav"}
    return {"audio": audio, "text": f"row {number}", "sentiment": "Neutral", "duration": seconds}


def read(folder: str, rows: int, report: str):
    """Reads as many rows as that through loader and collator; writes the memory by rows read (MiB) to a JSON file."""
    torch.set_num_threads(1)
    args = SimpleNamespace(tasks={"asr": 1}, shuffle_buffer=200)
    tasks = make_tasks(PROMPTS)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    processor = SenseProcessor(extractor, tokenizer, num_audio_tokens=8, prompts=PROMPTS)
    bad_rows = BadRows()
    stream = Stream(args, load_corpus(folder, "train", streaming=True, bad_rows=bad_rows), tasks, 0, BATCH, bad_rows)
    collator = SenseCollator(processor, tasks)
    batches = torch.utils.data.DataLoader(stream, batch_size=BATCH, collate_fn=collator)
    process, memory, began = psutil.Process(), {}, time.perf_counter()
    for number, batch in enumerate(itertools.islice(batches, rows // BATCH), 1):
        assert batch["input_features"].shape == (BATCH, 80, 100)
        seen = number * BATCH
        if number % max(1, rows // BATCH // 10) == 0:
            memory[seen] = process.memory_info().rss / 2**20
            print(f"{seen:,} rows, {memory[seen]:.0f} MiB, {time.perf_counter() - began:.0f} s", flush=True)
    Path(report).write_text(json.dumps(list(memory.items())))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each clip")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        write_stream(data, args.rows, args.seconds, files=25)
        size = sum(path.stat().st_size for path in data.iterdir()) / 2**20
        print(f"{args.rows:,} rows, {size:.0f} MiB on disk", flush=True)
        # In a process of its own: the memory that writing took is not counted.
        launch(1, read, str(data), args.rows, str(Path(folder, "memory.json")))


if __name__ == "__main__":
    main()
