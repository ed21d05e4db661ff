"""
Ten hours of silence, a FLAC of a megabyte, to the processor, the pipeline, the command and the page: what comes out,
how long it takes, and the memory on top of that of the loaded model.

    python -m tests.reliability.ten_hours --model outputs/quickstart [--hours 10]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import app
from processing import SpokenLanguageUnderstandingPipeline, load_audio
from processing.hub import load_checkpoint
from tests.reliability.hostile import memory, silence


def tell(name: str, ask: Callable[[], object]):
    """Prints what `ask` gives or raises, its seconds and its memory."""
    begin, found = time.monotonic(), []

    def run():
        try:
            found.append(str(ask()))
        except ValueError as error:
            found.append(f"ValueError: {error}")

    peak = memory(run)
    print(f"{name}: {found[0][:160]} | {time.monotonic() - begin:.0f} s, {peak:.0f} MB more", flush=True)


def command(model: str, path: Path):
    """Runs `sense transcribe` and prints its memory, in all, beside that for a second of silence."""
    for clip in (silence(path.with_name("second.flac"), 1), path):
        begin = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-m", "sense_cli", "transcribe", str(clip), "--model", model, "--json"],
            capture_output=True,
            text=True,
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        said = (ran.stdout or ran.stderr).strip().splitlines()[-1][-160:]
        print(f"command, {clip.name}: {said} | {time.monotonic() - begin:.0f} s, {peak:.0f} MB in all", flush=True)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a SENSE model")
    parser.add_argument("--hours", type=int, default=10)
    args = parser.parse_args(argv)
    pipe = SpokenLanguageUnderstandingPipeline(*load_checkpoint(args.model))
    with tempfile.TemporaryDirectory() as work:
        path = silence(Path(work) / "silence.flac", args.hours * 3600)
        print(f"{args.hours} hours of silence: {path.stat().st_size:,} bytes", flush=True)
        tell("processor", lambda: load_audio(path))
        tell("page", lambda: list(app.understand(pipe, str(path)))[-1][0])
        tell("pipeline", lambda: pipe(str(path)))
        command(args.model, path)


if __name__ == "__main__":
    main()
