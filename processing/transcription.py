"""
Transcripts for speech that nobody has transcribed, by Whisper's own decoder: a split to train on.

    python -m processing.transcription RECORDINGS --output OUT/train [--whisper whisper-base] [--language de]

RECORDINGS is a folder of clips of up to 30 s, at any depth. OUT/train/metadata.jsonl names them where they lie, each
with what was heard, as train_sense.py reads it; OUT/train/rejected.jsonl those without, each with the reason.
Started again, it goes on where it was interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoProcessor, AutoTokenizer, WhisperForConditionalGeneration

from modeling_sense.modeling_sense import load_safely

from .annotation.runner import Journal, only_one
from .arguments import positive
from .backbones import resolve_backbone
from .processing_sense import load_audio
from .report import write_text
from .scoring import plain
from .warm_start import knows_language, whisper_language


# Of recordings; those that can't be read here are rejected by name, not passed over.
SUFFIXES = {".aac", ".aif", ".aiff", ".amr", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav", ".webm", ".wma"}


class WhisperDecoder:
    """
    What Whisper's own decoder hears.

    Args:
        source: Hub id or folder of a Whisper checkpoint.
        device: to hear on.
    """

    def __init__(self, source: str | os.PathLike, device="cpu"):
        whisper = load_safely(WhisperForConditionalGeneration.from_pretrained, source, dtype=torch.float32)
        self.whisper = whisper.to(device).eval()
        self.extractor = AutoProcessor.from_pretrained(source, trust_remote_code=False).feature_extractor
        self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)

    def knows(self, language: str | None) -> bool:
        """Whether the checkpoint writes a language; another one it would take for English."""
        return knows_language(self.whisper.generation_config, language)

    def __call__(
        self, clips: Sequence[np.ndarray], languages: Sequence[str | None], *, num_beams: int = 1
    ) -> list[str]:
        """The words of clips of 16 kHz, as Whisper writes them; `languages` as `whisper_language` takes them."""
        how = {"sampling_rate": 16000, "return_tensors": "pt", "return_attention_mask": True}
        features = self.extractor(list(clips), **how).to(self.whisper.device)
        spoken = [whisper_language(self.whisper.generation_config, language) for language in languages]
        told = {"language": spoken, "task": "transcribe"} if all(spoken) else {}
        output = self.whisper.generate(**features, num_beams=num_beams, **told)
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]


def find_recordings(folder: Path) -> dict[str, Path]:
    """
    Audio files in a folder at any depth, by their path from there, in order.

    Raises:
        ValueError: there is none, or one whose name no metadata.jsonl can hold.
    """
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    found = {str(path.relative_to(folder)): path for path in files}
    if not found:
        raise ValueError(f"{folder}: no recording in it; give a folder of WAV, FLAC, OGG or MP3 files")
    if strange := [name for name in found if name.encode("utf-8", "ignore").decode() != name]:
        raise ValueError(f"{folder}: names that are no UTF-8, rename them: {strange}")
    return dict(sorted(found.items()))


def hear(decoder: WhisperDecoder, files: Sequence[Path], language: str | None) -> list[dict]:
    """Of each file its `text`, as Whisper writes it, and `duration` in seconds, or the `reason` why it is not read."""
    clips: dict[Path, np.ndarray] = {}
    found: dict[Path, dict] = {}
    for file in files:
        try:
            clips[file] = load_audio(file)
        except ValueError as error:
            found[file] = {"reason": str(error)}
    if clips:
        texts = decoder(list(clips.values()), [language] * len(clips))
        found |= {
            file: {"text": text, "duration": len(clip) / 16000} for (file, clip), text in zip(clips.items(), texts)
        }
    return [found[file] for file in files]


def transcribe(args) -> dict[str, int]:
    """The whole job; returns how many were heard and rejected."""
    if (args.output / "metadata.jsonl").exists():
        raise ValueError(f"{args.output} holds a metadata.jsonl: choose another --output, or delete it")
    recordings = find_recordings(args.recordings)
    decoder = WhisperDecoder(resolve_backbone(args.whisper), args.device)
    if not decoder.knows(args.language):
        raise ValueError(f"--language {args.language}: {args.whisper} does not know it; give a code such as de")
    run = {"whisper": args.whisper, "language": args.language, "recordings": str(args.recordings.resolve())}
    journal = Journal(args.output / "heard.jsonl", run)
    try:
        waiting = [name for name in recordings if name not in journal.answers]
        done = len(recordings) - len(waiting)
        with tqdm(total=len(recordings), initial=done, desc="transcribing", unit="clip") as bar:
            for start in range(0, len(waiting), args.batch_size):
                names = waiting[start : start + args.batch_size]
                for name, entry in zip(names, hear(decoder, [recordings[name] for name in names], args.language)):
                    journal.write({"key": name, **entry})
                bar.update(len(names))
    finally:
        journal.close()
    return _write(args, recordings, {name: journal.answers[name][-1] for name in recordings})


def _write(args, recordings: dict[str, Path], heard: dict[str, dict]) -> dict[str, int]:
    """metadata.jsonl and rejected.jsonl; the journal is done with."""
    rows, rejected = [], []
    for name, entry in heard.items():
        text = entry.get("text", "") if args.as_written else plain(entry.get("text", ""))
        if not text:
            rejected.append({"file": str(recordings[name]), "reason": entry.get("reason", "nothing was heard")})
            continue
        place = os.path.relpath(recordings[name].resolve(), args.output.resolve())
        row = {"file_name": place, "id": name, "text": text, "duration": entry["duration"]}
        rows.append(row | ({"language": args.language} if args.language else {}))
    if not rows:
        raise ValueError(f"{args.recordings}: nothing was heard in any of {len(heard)} recordings: {rejected[0]}")
    for file, lines in (("rejected.jsonl", rejected), ("metadata.jsonl", rows)):
        write_text(args.output / file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (args.output / "heard.jsonl").unlink()
    print(f"{args.output}: {len(rows)} transcripts, {len(rejected)} recordings without", flush=True)
    return {"heard": len(rows), "rejected": len(rejected)}


def main(argv: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, help="folder of clips of up to 30 s")
    parser.add_argument("--output", required=True, type=Path, help="folder of the split, such as DIR/train")
    parser.add_argument("--whisper", default="whisper-base", help="Hub id, folder or short name of a checkpoint")
    parser.add_argument("--language", help="spoken, such as de; default: en")
    parser.add_argument("--as_written", action="store_true", help="keep Whisper's capitals and marks")
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    with only_one(args.output, "processing.transcription"):
        return transcribe(args)


if __name__ == "__main__":
    main()
