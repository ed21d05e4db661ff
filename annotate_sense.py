"""
Labels for transcripts, written by a language model: named entities or sentiment, from few-shot examples, filtered.

    python annotate_sense.py --input DATA --output OUT --task ner --endpoint http://localhost:8000/v1 --model NAME \\
        --examples LABELLED
    python annotate_sense.py --input DATA --output OUT --task ner --local spacy
    python annotate_sense.py compare GOLD OUT --splits dev test --output_dir REPORT

DATA and LABELLED are datasets of any kind that train_sense.py reads, and OUT is one: recipes/2_ner_synthetic.yaml
trains on such a folder. OUT/rejected.jsonl holds every drop with its reason, OUT/provenance.json where the labels come
from. A run that was interrupted goes on where it stopped when started again; no answered request is repeated.
"""

import argparse
import asyncio
import datetime
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from transformers import AutoTokenizer

from processing.annotation.annotators import (
    EndpointAnnotator,
    FatalError,
    LocalAnnotator,
    NoAnswer,
    SpacyAnnotator,
    VaderAnnotator,
)
from processing.annotation.fewshot import Retriever, count_groups, fit, select_examples
from processing.annotation.output import write_dataset
from processing.annotation.prompting import ANNOTATIONS, FRAME, EntityAnnotation, SentimentAnnotation
from processing.annotation.quality import compare
from processing.annotation.runner import BudgetSpent, Journal, Meter, Run, make_items, only_one
from processing.arguments import positive
from processing.backbones import resolve_backbone
from processing.bad_rows import BAD_ROWS, ON_BAD_ROW, BadRows
from processing.datasets import first_rows, load_corpus
from processing.report import print_table


def make_task(args) -> EntityAnnotation | SentimentAnnotation:
    return EntityAnnotation(args.entity_tags) if args.task == "ner" else SentimentAnnotation()


def make_annotator(args):
    """
    Raises:
        ValueError: a stand-in that has no such labels.
    """
    stand_ins = {"spacy": "ner", "vader": "sentiment"}
    if args.local in stand_ins:
        if args.task != stand_ins[args.local]:
            raise ValueError(f"--local {args.local} knows {stand_ins[args.local]}, not {args.task}")
        return SpacyAnnotator(args.entity_tags) if args.local == "spacy" else VaderAnnotator()
    if args.local:
        source = resolve_backbone(args.local)
        return LocalAnnotator(source, args.concurrency, name=args.local, context_tokens=args.context_tokens)
    return EndpointAnnotator(
        args.endpoint,
        args.model,
        token=os.environ[args.token_env] if args.token_env else None,
        timeout=args.timeout,
        max_retries=args.max_retries,
        context_tokens=args.context_tokens or 8192,
        tokenizer=AutoTokenizer.from_pretrained(resolve_backbone(args.tokenizer)) if args.tokenizer else None,
    )


def load_rows(args, split: str, bad_rows: BadRows):
    """A split of the input, its audio undecoded and not in memory."""
    rows = load_corpus(
        args.input,
        split,
        config_name=args.config_name,
        audio_column=args.audio_column,
        text_column=args.text_column,
        # A dataset that gets sentiment keeps the entities that it has.
        entity_tags=args.entity_tags if args.task == "ner" else "any",
        lowercase=args.lowercase,
        bad_rows=bad_rows,
    )
    return first_rows(rows, args.max_samples)


def room_for_examples(task, annotator) -> int | None:
    """
    Tokens of the context beside the instruction and the quarter that a transcript and its answer may take.

    Raises:
        ValueError: there are none.
    """
    if annotator.context_tokens is None:
        return None
    asked = annotator.count(task.instruction) + 2 * FRAME
    room = annotator.context_tokens - annotator.context_tokens // 4 - asked
    if room < 0:
        raise ValueError(
            f"the instruction takes {asked} of {annotator.name}'s {annotator.context_tokens} tokens, three quarters "
            "are the most: take a model with a longer context, or a larger --context_tokens"
        )
    return room


def choose_examples(args, task, annotator, bad_rows: BadRows) -> list[tuple[str, str]]:
    """
    Few-shot examples of the labelled set, (transcript, answer), balanced; those that fit, unless each transcript gets
    its own. Prints the balance reached.

    Raises:
        ValueError: not one row of the set has such a label.
    """
    if not args.examples:
        return []
    rows = load_corpus(
        args.examples,
        args.examples_split,
        config_name=args.examples_config_name,
        audio_column=args.examples_audio_column or args.audio_column,
        text_column=args.examples_text_column or args.text_column,
        entity_tags=args.entity_tags,
        lowercase=args.lowercase,
        bad_rows=bad_rows,
    )
    bad_rows.settle()
    rows = [row for row in rows.select_columns(["text", task.column]) if row[task.column] is not None]
    if not rows:
        raise ValueError(f"{args.examples}, {args.examples_split}: no row has {task.column}; name a labelled set")
    groups = [task.groups(row) for row in rows]
    chosen = select_examples(groups, args.num_examples, args.seed)
    examples = [(rows[i]["text"], task.write(rows[i])) for i in chosen]
    room = room_for_examples(task, annotator)
    if not args.retrieve and room is not None:
        examples = fit(examples, room, annotator.count)
    counts = [count_groups(groups, part) for part in (range(len(rows)), chosen, chosen[: len(examples)])]
    table = [[name, *(str(count[name]) for count in counts)] for name in counts[0]]
    total = ["examples", *(str(len(part)) for part in (rows, chosen, examples))]
    print_table("few-shot examples", ["", "in the set", "selected", "in the context"], [*table, total])
    return examples


def example_source(args, task, annotator, examples):
    """Examples for a transcript: always the same, or the most similar ones that fit."""
    room = room_for_examples(task, annotator)
    if not args.retrieve or not examples:
        return lambda text: examples
    retriever, room = Retriever(examples, args.retrieve), sys.maxsize if room is None else room
    # The most similar one stands last: what does not fit is cut from the front.
    return lambda text: fit(retriever.nearest(text)[::-1], room, annotator.count)[::-1]


def digest(value) -> str:
    """SHA-256 of a value, shortened."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


async def ask(run: Run, items: list) -> str | None:
    """Runs; returns why it stopped early, if it did."""
    try:
        await run.start(items)
    except BudgetSpent as stop:
        return f"stopped before --max_tokens_total was exceeded ({stop}; with a larger one, it goes on)"
    except (FatalError, NoAnswer) as stop:
        return f"stopped: {stop}"
    finally:
        await run.annotator.close()
    return None


def check_output(folder: Path, splits: list[str]):
    """Raises ValueError for a folder of something else, or of other splits, too: its lists are of all of them."""
    if not (folder / "answers.jsonl").is_file() and {path.name for path in folder.iterdir()} - {".lock", BAD_ROWS}:
        raise ValueError(f"{folder} holds something else: choose another --output")
    found = {path.parent.name for path in folder.glob("*/metadata.jsonl")}
    if others := sorted(found - set(splits)):
        raise ValueError(
            f"{folder} holds {', '.join(others)}, too: name all of its splits (what was answered is not asked again), "
            "or choose another --output"
        )


def annotate(args) -> dict:
    """The whole job; returns the provenance."""
    check_output(args.output, args.splits)
    task, annotator = make_task(args), make_annotator(args)
    bad_rows = BadRows(args.on_bad_row, args.output)
    splits = {split: load_rows(args, split, bad_rows) for split in args.splits}
    bad_rows.settle()
    examples = choose_examples(args, task, annotator, BadRows(args.on_bad_row))
    items = {split: make_items(split, rows) for split, rows in splits.items()}
    settings = {
        "task": args.task,
        "entity_tags": args.entity_tags if args.task == "ner" else None,
        "annotator": annotator.name,
        "prompt": digest([task.instruction, task.schema]),
        "examples": digest([examples, args.retrieve]),
    }
    journal = Journal(args.output / "answers.jsonl", settings)
    meter = Meter(args.max_tokens_total, args.price_in, args.price_out)
    source = example_source(args, task, annotator, examples)
    run = Run(task, annotator, journal, meter, source, args.attempts, args.concurrency)
    try:
        stopped = asyncio.run(ask(run, [item for found in items.values() for item in found]))
    finally:
        journal.close()
    provenance = {
        **settings,
        "input": str(args.input),
        "endpoint": re.sub("//[^/]*@", "//", args.endpoint or "") or None,  # without a password
        "attempts": args.attempts,
        "column": task.column,
        "instruction": task.instruction,
        "examples_from": args.examples,
        "num_examples": len(examples),
        "retrieve": args.retrieve,
        "filters": ["phrase in the transcript", "tag in the tag set"] if args.task == "ner" else ["class in the set"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tokens": {"prompt": meter.prompt_tokens, "completion": meter.completion_tokens, "cost": meter.cost},
        "stopped": stopped,
        "bad_rows": bad_rows.counts,
    }
    results = {split: [run.result(item) for item in found] for split, found in items.items()}
    provenance = write_dataset(args.output, splits, results, provenance)
    print_table("annotated", ["", "number"], [[name, str(n)] for name, n in sorted(provenance["counts"].items())])
    tokens = f"{meter.prompt_tokens:,} prompt and {meter.completion_tokens:,} completion tokens"
    print(f"{args.output}: {tokens}" + (f", cost {meter.cost:.2f}" if meter.cost else ""), flush=True)
    if stopped or run.failures:
        print(f"{stopped or 'some got no answer'}: start again to go on", file=sys.stderr, flush=True)
    return provenance


def count(text: str) -> int:
    """A number from 0 on, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 0 on")
    return int(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="dataset with the transcripts: folder or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder for the labelled dataset")
    parser.add_argument("--task", required=True, choices=list(ANNOTATIONS))
    parser.add_argument("--splits", nargs="+", default=["train"])
    parser.add_argument("--config_name", help="configuration of a Hub dataset")
    parser.add_argument("--audio_column", default="audio")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--lowercase", action="store_true", help="transcripts in lower case, as LibriSpeech needs")
    parser.add_argument(
        "--entity_tags", default="combined", choices=["combined", "raw"], help="SLUE's 7 or OntoNotes' 18"
    )
    parser.add_argument("--max_samples", type=positive, help="the first rows of each split only")
    parser.add_argument(
        "--on_bad_row", default="stop", choices=ON_BAD_ROW, help="skip: leave rows out that can't be read"
    )
    who = parser.add_argument_group("who annotates")
    who.add_argument("--endpoint", help="URL of an OpenAI-compatible server, or an inference provider's name")
    who.add_argument("--model", help="the model's name there")
    who.add_argument("--token_env", help="environment variable with the server's key")
    who.add_argument("--tokenizer", help="of that model, to count tokens: Hub id or folder; default: an estimate")
    who.add_argument(
        "--context_tokens", type=positive, help="what the model can read; default: 8192; local: as it says"
    )
    who.add_argument(
        "--local", help="instead: a model on this machine (Hub id or folder), spacy (ner), vader (sentiment)"
    )
    shots = parser.add_argument_group("few-shot examples")
    shots.add_argument("--examples", help="labelled dataset to take them from; none: no examples")
    shots.add_argument("--examples_split", default="train")
    shots.add_argument("--examples_config_name")
    shots.add_argument("--examples_audio_column", help="default: --audio_column")
    shots.add_argument("--examples_text_column", help="default: --text_column")
    shots.add_argument("--num_examples", type=positive, default=1000, help="balanced over tags")
    shots.add_argument("--retrieve", type=positive, help="give each transcript the so many most similar of them")
    shots.add_argument("--seed", type=int, default=0)
    how = parser.add_argument_group("the run")
    how.add_argument("--concurrency", type=positive, default=8, help="requests at a time; for --local the batch")
    how.add_argument("--timeout", type=float, default=120, help="seconds for a request")
    how.add_argument("--max_retries", type=count, default=8, help="of a request that failed on the way")
    how.add_argument("--attempts", type=positive, default=3, help="at an answer that can be read")
    how.add_argument(
        "--max_tokens_total", type=positive, help="stop before more tokens are spent, as far as the server tells them"
    )
    how.add_argument("--price_in", type=float, default=0.0, help="of a million prompt tokens")
    how.add_argument("--price_out", type=float, default=0.0, help="of a million completion tokens")
    args = parser.parse_args(argv)
    if bool(args.endpoint) == bool(args.local):
        parser.error("name either --endpoint with --model, or --local")
    if args.endpoint and not args.model:
        parser.error("--endpoint needs --model")
    if args.token_env and not os.environ.get(args.token_env):
        parser.error(f"--token_env: the environment variable {args.token_env} is empty or not set")
    return args


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    args = parse_args(argv)
    with only_one(args.output, "annotate_sense.py"):
        return annotate(args)


if __name__ == "__main__":
    sys.exit(1 if main().get("stopped") else 0)
