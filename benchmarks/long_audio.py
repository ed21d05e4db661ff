"""
`python -m benchmarks.long_audio --model DIR --dataset DIR`: recordings of 5 and 60 minutes against the same speech
clip by clip: word error rate, and peak memory, each recording in a process of its own.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import jiwer
import numpy as np
import soundfile
from accelerate import PartialState

from processing import SpokenLanguageUnderstandingPipeline
from processing.datasets import load_corpus
from processing.hub import load_checkpoint
from processing.processing_sense import load_audio
from processing.report import markdown_table

from .measure import in_own_process
from .memory import resident_bytes
from .report import write_results


RATE = 16000
PAUSES = (0.3, 1.5)  # seconds between clips, drawn evenly


def write_recording(path: Path, rows, minutes: float) -> list[int]:
    """Clips one after the other, from the first again where they end; the index of each that is in it."""
    rng, order, written = np.random.default_rng(0), [], 0
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        while written < minutes * 60 * RATE:
            order.append(len(order) % len(rows))
            pause = np.zeros(int(rng.uniform(*PAUSES) * RATE), np.float32)
            clip = np.concatenate([load_audio(rows[order[-1]]["audio"]), pause])
            file.write(clip)
            written += len(clip)
    return order


def make_pipe(model: str, chunk_length_s: float | None = None) -> SpokenLanguageUnderstandingPipeline:
    PartialState(cpu=True)  # what is measured is a CPU, on machines with a GPU too
    parts = load_checkpoint(model)
    how = {"return_entities": False, "return_sentiment": False, "chunk_length_s": chunk_length_s}
    return SpokenLanguageUnderstandingPipeline(model=parts[0], processor=parts[1], **how)


def hear_recording(model: str, path: str, batch_size: int, chunk_length_s: float | None) -> dict:
    """Runs alone in a process: text, seconds and the peak of the process's memory."""
    pipe = make_pipe(model, chunk_length_s)
    before = time.perf_counter()
    found = pipe(path, batch_size=batch_size, return_timestamps=True, progress=True)
    peak = resident_bytes("VmHWM") / 2**20
    return {"seconds": time.perf_counter() - before, "peak_mib": peak, "windows": len(found["chunks"])} | found


def hear_alone(args, path: Path) -> dict:
    """`hear_recording` in a process of its own."""
    arguments = ["--model", args.model, "--hear", path, "--batch_size", args.batch_size]
    if args.chunk_length_s:
        arguments += ["--chunk_length_s", args.chunk_length_s]
    return in_own_process("benchmarks.long_audio", arguments)


def measure(args) -> dict:
    """Clip by clip, then each recording."""
    splits = (load_corpus(args.dataset, split, text_column=args.text_column) for split in args.splits)
    rows = [row for split in splits for row in split]
    pipe = make_pipe(args.model)
    by_length = sorted(range(len(rows)), key=lambda i: -(rows[i]["duration"] or 0))
    clips = [load_audio(rows[i]["audio"]) for i in by_length]
    singly = {i: found["text"] for i, found in zip(by_length, pipe(clips, batch_size=args.batch_size))}
    chunk = args.chunk_length_s or pipe.processor.chunk_length_s
    results = {"clips": len(rows), "chunk_length_s": chunk, "recordings": []}
    del pipe, clips
    for minutes in sorted(args.minutes):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recording.wav"
            order = write_recording(path, rows, minutes)
            found = hear_alone(args, path)
        text = " ".join(rows[i]["text"] for i in order)
        by_clip = jiwer.wer([rows[i]["text"] for i in order], [singly[i] for i in order])
        wers = {"wer": 100 * jiwer.wer(text, found["text"]), "wer_by_clip": 100 * by_clip}
        kept = {name: found[name] for name in ("duration", "windows", "seconds", "peak_mib")}
        results["recordings"].append({"minutes": minutes, **wers, **kept})
    return results


def page(results: dict) -> str:
    rows = [
        [f"{r['minutes']:g}", f"{r['wer']:.1f}", f"{r['wer_by_clip']:.1f}", f"{r['peak_mib']:.0f}", str(r["windows"]),
         f"{r['seconds'] / r['duration']:.2f}"]
        for r in results["recordings"]
    ]  # fmt: skip
    header = ["minutes", "WER", "clip by clip", "peak memory, MiB", "windows", "time / duration"]
    peaks = [r["peak_mib"] for r in results["recordings"]]
    return f"{markdown_table(header, rows)}\n\nPeak of the longest / of the shortest: {peaks[-1] / peaks[0]:.2f}\n"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required="--hear" not in (sys.argv if argv is None else argv))
    parser.add_argument("--splits", nargs="+", default=["dev", "test"])
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--minutes", nargs="+", type=float, default=[5, 60])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--chunk_length_s", type=float, help="longest window; default: what the model is used to")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--hear", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.hear:
        print(json.dumps(hear_recording(args.model, args.hear, args.batch_size, args.chunk_length_s)))
        return {}
    results = measure(args)
    write_results(args.out, "long_audio", results, page(results))
    return results


if __name__ == "__main__":
    main()
