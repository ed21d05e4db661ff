#!/usr/bin/env python3
"""
Says what recordings say.

    python scripts/transcribe.py outputs/quickstart one.flac two.wav [--num_beams 5]

Where a clip's folder has a metadata.jsonl, prints its text too: what was said beside what was heard.
"""

import argparse
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval_sense import load_checkpoint  # noqa: E402
from processing import load_audio  # noqa: E402
from processing.tasks import TASKS  # noqa: E402


def what_was_said(clip: Path) -> str | None:
    """The clip's text in the metadata.jsonl beside it, if there is one."""
    metadata = clip.parent / "metadata.jsonl"
    if not metadata.is_file():
        return None
    lines = (json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines())
    return next((line.get("text") for line in lines if line["file_name"] == clip.name), None)


def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a SENSE checkpoint")
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("--num_beams", type=int, default=5)
    args = parser.parse_args(argv)
    model, processor = load_checkpoint(args.model)
    waves = [load_audio(clip) for clip in args.clips]
    inputs = processor.apply_transcription_request(waves).to(model.device)
    limit = TASKS["asr"].most_tokens(max(len(wave) for wave in waves) / 16000)
    output = model.generate(**inputs, num_beams=args.num_beams, max_new_tokens=limit)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for clip, answer in zip(args.clips, answers):
        said = what_was_said(clip)
        print(f"{clip}" + (f"\n  said:  {said}" if said else "") + f"\n  heard: {answer.strip()}")
    return answers


if __name__ == "__main__":
    main()
