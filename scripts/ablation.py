#!/usr/bin/env python3
"""
Trains and scores the cells of an ablation, each with the same minutes or steps of training, and compares them.

A recipe holds `cells`, what makes each one; `shared`, the fields of all; and, if they are to go on from a stage that
they have in common, `first`, the fields of that stage. It is trained once for each number of audio tokens. `curves`,
if it is there, draws cells along a quantity: `xlabel`, and `lines`, which map a name to the cell at each x.

    python scripts/ablation.py recipes/ablation.yaml --dataset_dir DIR --minutes 15 [--cells adapter "+ LoRA"]
    python scripts/ablation.py recipes/noise.yaml --dataset_dir data/noise --minutes 6 --split test --output_dir OUT
    python scripts/ablation.py recipes/limits.yaml --dataset_dir DIR --num_processes 2 --output_dir OUT

Each recipe has an output folder OUT of its own. A cell that was finished is not run again, one that was interrupted
goes on from its last checkpoint; another --split scores it anew. After each cell,
OUT/ablation.md, OUT/ablation.csv and OUT/ablation.png hold the cells asked for so far, OUT/curves.png the curves.
"""

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import yaml


# Of a training, beside the scores. How far the two losses are apart is what the model hears.
TRAINED = {"trained_parameters": "trained", "steps": "steps", "true_loss": "loss", "shuffled_loss": "clips shuffled"}
SAME = ("config_name", "audio_column", "text_column", "on_bad_row")  # scored as it was trained
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from processing.recipe import SenseArguments  # noqa: E402
from processing.report import (  # noqa: E402
    comparison,
    headlines_of,
    markdown_table,
    plot_comparison,
    plot_curves,
    save_png,
    write_text,
)


def read_recipe(path: Path, chosen: list[str] | None) -> dict:
    """
    `first`, the fields of the stage before the cells (none: no such stage); `shared`, those of all cells; `cells`, by
    name those that make each one; `curves` (none: no such picture).

    Raises:
        ValueError: the recipe is missing or has other parts, a chosen cell or one of a curve is not in it, or two
            cells would have the same folder.
    """
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    optional = {"first": {}, "curves": {}}
    if not isinstance(recipe, dict) or recipe.keys() - optional != {"shared", "cells"}:
        raise ValueError(f"{path} must hold `shared` and `cells`, may hold `first` and `curves`, and nothing else")
    recipe = optional | {name: part or {} for name, part in recipe.items()}
    if recipe["curves"] and recipe["curves"].keys() != {"xlabel", "lines"}:
        raise ValueError(f"{path}: `curves` must hold `xlabel` and `lines`, found {', '.join(recipe['curves'])}")
    cells = {name: fields or {} for name, fields in recipe["cells"].items()}
    drawn = [name for line in recipe["curves"].get("lines", {}).values() for name in line.values()]
    for name in [*(chosen or []), *drawn]:
        if name not in cells:
            raise ValueError(f"{path}: there is no cell {name!r}; there are {', '.join(cells)}")
    folders: dict[str, str] = {}
    for name in cells:
        folder = folder_of(name)
        if not folder or folder in folders:
            raise ValueError(
                f"{path}: the cell {name!r} would be in the folder {folder!r}, as {folders.get(folder)!r}: give it a "
                "name with other letters or digits"
            )
        folders[folder] = name
    return recipe | {"cells": {name: cells[name] for name in chosen or cells}}


def folder_of(cell) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(cell).lower()).strip("_")


def train(folder: Path, fields: dict, args: argparse.Namespace):
    """
    Trains in `folder`, or what is left of it.

    Raises:
        ValueError: the folder holds a training of other settings.
    """
    fields = fields | {"dataset_dir": args.dataset_dir, "output_dir": str(folder)}
    recipe, made = folder / "recipe.yaml", yaml.safe_dump(fields, sort_keys=False)
    made = f"# {args.num_processes} processes\n{made}"  # each with batches of its own
    if recipe.is_file() and recipe.read_text(encoding="utf-8") != made:
        raise ValueError(f"{folder} was made with other settings (see its recipe.yaml): choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(recipe, made)
    if not (folder / "config.json").is_file():  # the last of what train_sense.py writes
        launch(args, "train_sense.py", str(recipe))


def evaluate(folder: Path, fields: dict, args: argparse.Namespace):
    """Scores what was trained in `folder` on the split, unless that was done."""
    scored = folder / f"scored_{args.split}"
    if not (scored / "metrics.json").is_file():
        asked = {"model": folder, "dataset": args.dataset_dir, "split": args.split, "output_dir": scored, "show": 0}
        asked |= {name: fields[name] for name in SAME if fields.get(name) is not None}
        options = [part for name, value in asked.items() for part in (f"--{name}", str(value))]
        options += ["--lowercase"] if fields.get("lowercase") else []
        launch(args, "eval_sense.py", *options, "--tasks", *fields.get("tasks", {"asr": 1}))


def launch(args: argparse.Namespace, script: str, *options: str):
    # accelerate's own launcher starts one process on CPUs, whatever it is asked for.
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.num_processes}"]
    subprocess.run([*start, str(ROOT / script), *options], check=True)


def collect(folder: Path, split: str) -> dict:
    """A finished cell's scores, its steps, its losses and the number of parameters that it trained."""
    scores = json.loads((folder / f"scored_{split}" / "metrics.json").read_text(encoding="utf-8"))
    if "wer" not in scores:  # no transcript was asked for: the words of the entity answers
        scores |= {name.removeprefix("ner_"): value for name, value in scores.items() if name.startswith("ner_wer")}
    trained = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {name: trained[f"eval_{name}"] for name in ("true_loss", "shuffled_loss")}
    return scores | losses | {"trained_parameters": trained["trained_parameters"], "steps": state["global_step"]}


def write_comparison(folder: Path, cells: dict[str, dict], curves: dict):
    """The table of the cells that there are, in Markdown and CSV, its picture, and the curves through them."""
    headers, rows = comparison(cells)
    known = {name: [found[column] for column in TRAINED] for name, found in cells.items()}
    table = [
        [name, *(f"{value:.2f}" if isinstance(value, float) else f"{value:,}" for value in values), *row[1:]]
        for (name, values), row in zip(known.items(), rows)
    ]
    write_text(folder / "ablation.md", markdown_table(["", *TRAINED.values(), *headers[1:]], table) + "\n")
    columns = headlines_of(cells)
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    bounds = [name for key in columns for name in (key, f"{key}_low", f"{key}_high")]
    writer.writerow(["cell", *TRAINED, *bounds])
    for name, found in cells.items():
        values = [part for key in columns for part in (found.get(key), *found.get(f"{key}_interval", (None, None)))]
        writer.writerow([name, *known[name], *values])
    write_text(folder / "ablation.csv", lines.getvalue())
    save_png(plot_comparison(cells), folder / "ablation.png")
    if curves:
        lines = {
            name: {x: cells[cell] for x, cell in line.items() if cell in cells}
            for name, line in curves["lines"].items()
        }
        save_png(plot_curves(lines, curves["xlabel"]), folder / "curves.png")


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--minutes", type=float, help="of training, for each cell; default: the recipe's steps")
    parser.add_argument("--cells", nargs="+", help="default: all")
    parser.add_argument("--split", default="dev", help="to score on")
    parser.add_argument("--num_processes", type=int, default=1, help="on GPUs or CPU cores")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"))
    args = parser.parse_args(argv)
    recipe = read_recipe(args.recipe, args.cells)
    first, shared, found = recipe["first"], recipe["shared"], {}
    for name, changes in recipe["cells"].items():
        fields = {**shared, **changes}
        if args.minutes is not None:
            fields["max_minutes"] = args.minutes
        if first:
            tokens = fields.get("num_audio_tokens", SenseArguments.num_audio_tokens)
            before = args.output_dir / f"first_{tokens}_audio_tokens"
            train(before, {**shared, **first, "num_audio_tokens": tokens}, args)
            fields["init_from"] = str(before)
        folder = args.output_dir / folder_of(name)
        train(folder, fields, args)
        evaluate(folder, fields, args)
        found[name] = collect(folder, args.split)
        write_comparison(args.output_dir, found, recipe["curves"])
        print((args.output_dir / "ablation.md").read_text(encoding="utf-8"), flush=True)
    return found


if __name__ == "__main__":
    main()
