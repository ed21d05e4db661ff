"""
Scores a SENSE checkpoint on a dataset.

    python eval_sense.py --model DIR --dataset data/quickstart --split test --output_dir OUT [--num_beams 5]
    accelerate launch --num_processes 2 eval_sense.py ...     # same result, in less time

Writes OUT/metrics.json and OUT/utterances.jsonl, and prints the worst utterances.
"""

import argparse
import json
import os
import time
from pathlib import Path

import jiwer
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    WhisperForConditionalGeneration,
    set_seed,
)
from whisper_normalizer.english import EnglishTextNormalizer

import processing  # noqa: F401  registers the processor
from processing.datasets import load_corpus
from processing.processing_sense import load_audio
from scripts.get_backbones import resolve_backbone


NORMALIZE = EnglishTextNormalizer()
TOKENS_PER_SECOND = 7  # more than fast speech needs: a bound on answers that do not end by themselves


def transcribe(
    model, processor, dataset, *, num_beams: int = 1, batch_size: int = 8, max_new_tokens: int | None = None
):
    """
    The model's transcript of each row of `dataset`, in order. Under several processes each does its share of the rows
    and all get the whole list.
    """

    def answer(clips):
        inputs = processor.apply_transcription_request(clips).to(model.device)
        prompt_length = inputs["input_ids"].shape[1]
        limit = max_new_tokens or answer_limit(clips)
        output = model.generate(**inputs, num_beams=num_beams, max_new_tokens=limit, do_sample=False)
        return processor.batch_decode(output[:, prompt_length:], skip_special_tokens=True)

    return _over_processes(dataset, answer, batch_size, "transcribing")


def transcribe_whisper(source, dataset, *, num_beams: int = 1, batch_size: int = 8, device="cpu"):
    """The same by Whisper's own decoder: the control. `source` is a Hub id or folder of a Whisper checkpoint."""
    whisper = WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32).to(device).eval()
    extractor = AutoProcessor.from_pretrained(source).feature_extractor
    tokenizer = AutoTokenizer.from_pretrained(source)
    language = {"language": "en", "task": "transcribe"} if whisper.generation_config.is_multilingual else {}

    def answer(clips):
        features = extractor(clips, sampling_rate=16000, return_tensors="pt", return_attention_mask=True).to(device)
        return tokenizer.batch_decode(
            whisper.generate(**features, num_beams=num_beams, **language), skip_special_tokens=True
        )

    return _over_processes(dataset, answer, batch_size, "whisper's decoder")


def answer_limit(clips) -> int:
    """Bound on the tokens of an answer to 16 kHz `clips`: what the longest of them can hold."""
    return 16 + int(TOKENS_PER_SECOND * max(len(clip) for clip in clips) / 16000)


def _over_processes(dataset, answer, batch_size: int, label: str) -> list[str]:
    """Calls `answer` on batches of waveforms, longest first, shared out over the processes; results in row order."""
    state = PartialState()
    order = sorted(range(len(dataset)), key=lambda i: (-(dataset[i]["duration"] or 0), i))
    mine = order[state.process_index :: state.num_processes]
    found = []
    batches = range(0, len(mine), batch_size)
    for start in tqdm(batches, desc=label, unit="batch", disable=not state.is_main_process):
        rows = mine[start : start + batch_size]
        found += zip(rows, answer([load_audio(dataset[i]["audio"]) for i in rows]))
    everyone = gather_object(found) if state.num_processes > 1 else found
    return [text.strip() for _, text in sorted(everyone)]


def shuffle_audio(dataset):
    """The same texts, each beside the clip of another row: what a model scores that does not listen."""
    texts = list(dataset["text"])
    return dataset.remove_columns("text").add_column("text", texts[1:] + texts[:1])


def score(references: list[str], answers: list[str]) -> dict[str, float]:
    """`wer` on the strings as they are, `wer_normalized` after Whisper's English normaliser; both in per cent."""
    normalized = [(NORMALIZE(r), NORMALIZE(a)) for r, a in zip(references, answers)]
    normalized = [pair for pair in normalized if pair[0]]
    return {
        "wer": 100 * jiwer.wer(references, answers),
        "wer_normalized": 100 * jiwer.wer([r for r, _ in normalized], [a for _, a in normalized]),
    }


def utterance_table(dataset, answers: list[str]) -> list[dict]:
    """One dict an utterance: `id, reference, answer, errors, words, wer`, the worst first."""
    table = []
    for row, answer in zip(dataset, answers):
        found = jiwer.process_words(row["text"], answer)
        errors = found.substitutions + found.deletions + found.insertions
        words = len(row["text"].split())
        table.append(
            {"id": row["id"], "reference": row["text"], "answer": answer, "errors": errors, "words": words}
            | {"wer": 100 * errors / words}
        )
    return sorted(table, key=lambda row: -row["wer"])


def show_worst(table: list[dict], number: int):
    """The `number` utterances with the highest WER, said beside heard."""
    view = Table("WER %", "said", "heard", title=f"worst {min(number, len(table))} of {len(table)} utterances")
    for row in table[:number]:
        view.add_row(f"{row['wer']:.0f}", row["reference"], row["answer"])
    Console(width=None if os.isatty(1) else 140).print(view)


def write_text(path: Path, content: str):
    """Writes to a temporary name first: a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(content)
    os.replace(temporary, path)


def load_checkpoint(folder: str, dtype: str = "auto"):
    """Model (eval mode, on the GPU where there is one) and processor of a saved SENSE folder or Hub id."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=dtype)
    return model.to(PartialState().device).eval(), processor


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    set_seed(args.seed)
    model, processor = load_checkpoint(args.model, args.dtype)
    dataset = load_corpus(args.dataset, args.split, text_column=args.text_column, config_name=args.config_name)
    if args.max_samples:
        dataset = dataset.select(range(min(args.max_samples, len(dataset))))
    how = {"num_beams": args.num_beams, "batch_size": args.batch_size}

    begin = time.perf_counter()
    answers = transcribe(model, processor, dataset, **how)
    seconds = time.perf_counter() - begin
    references = list(dataset["text"])
    audio_seconds = sum(len(load_audio(row["audio"])) for row in dataset) / 16000
    metrics = score(references, answers) | {
        "n_utterances": len(dataset),
        "audio_seconds": audio_seconds,
        "rtf": seconds / audio_seconds,
    }
    if args.shuffled_control:
        # The answers do not depend on the texts: pairing them otherwise is the same as shuffling the clips.
        shuffled = score(list(shuffle_audio(dataset)["text"]), answers)
        metrics |= {f"{name}_shuffled": value for name, value in shuffled.items()}
    if args.baseline == "whisper":
        source = resolve_backbone(model.config.backbones["audio"]["id"])
        baseline = score(references, transcribe_whisper(source, dataset, device=model.device, **how))
        metrics |= {f"{name}_whisper": value for name, value in baseline.items()}
    if PartialState().is_main_process:
        report(Path(args.output_dir), metrics, utterance_table(dataset, answers), args.show)
    return metrics


def report(folder: Path, metrics: dict, table: list[dict], show: int):
    """Writes metrics.json and utterances.jsonl; prints the worst utterances and the metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "utterances.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    show_worst(table, show)
    for name, value in metrics.items():
        print(f"{name:24} {value:.2f}" if isinstance(value, float) else f"{name:24} {value}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a SENSE checkpoint")
    parser.add_argument("--dataset", required=True, help="audiofolder, LibriSpeech tree or Hub dataset")
    parser.add_argument("--config_name", help="configuration of a Hub dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--tasks", nargs="+", choices=["asr"], default=["asr"])
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_samples", type=int)
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, float16")
    parser.add_argument("--baseline", choices=["whisper"], help="also score Whisper's own decoder on the same clips")
    parser.add_argument("--shuffled_control", action="store_true", help="also score with the clips shuffled")
    parser.add_argument("--show", type=int, default=10, help="how many of the worst utterances to print")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
