"""
Pictures and tables of runs.

    python -m processing.report PNG LABEL=DIR [LABEL=DIR ...]      # output folders of train_sense.py, side by side
"""

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .scoring import HEADLINES
from .tasks import SENTIMENTS


TITLES = HEADLINES | {"wer_normalized": "WER, normalised", "ner_f1_normalized": "NER F1, normalised"}
SCORES = {"precision": "precision", "recall": "recall", "f1": "F1", "label_f1": "label-F1"}
MOST_GROUPS = 30  # in a picture


def plot_training(runs: dict[str, list[dict]]) -> Figure:
    """
    The curves of one or several runs: the loss in training, on held-out speech and on the same texts with the clips
    shuffled (where these two part, the model begins to listen), and the WER.

    Args:
        runs: by label, the `log_history` of a Trainer's state, as trainer_state.json holds it.
    """
    styles = {
        "loss": {"label": "training", "linewidth": 0.7, "alpha": 0.6},
        "eval_true_loss": {"label": "held out, true clips", "linewidth": 2},
        "eval_shuffled_loss": {
            "label": "clips shuffled",
            "linewidth": 2,
            "linestyle": "--",
            "markerfacecolor": "none",
        },
    }
    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, errors = figure.subplots(1, 2, sharex=True)
    for i, (name, history) in enumerate(runs.items()):
        for key, style in styles.items():
            label = ": ".join(filter(None, [name, str(style["label"])]))
            steps, values = _curve(history, key)
            marker = "o" if len(steps) == 1 else None  # a line needs two
            losses.plot(steps, values, color=f"C{i}", marker=marker, **(style | {"label": label}))
        errors.plot(*_curve(history, "eval_wer"), marker="o", color=f"C{i}", label=name or "held out")
    losses.set(xlabel="step", ylabel="cross-entropy, nats per token", title="Loss", ylim=(0, None))
    errors.set(xlabel="step", ylabel="WER, %", title="Word error rate, held out, greedy", ylim=(0, None))
    _legend_below(figure, losses, ncols=3)
    errors.legend(fontsize="small")
    return figure


def _legend_below(figure: Figure, axes, ncols: int = 1):
    """One legend for all panels, of what is in one; names in it are no formulas, whatever signs they hold."""
    handles, labels = axes.get_legend_handles_labels()
    for text in figure.legend(handles, labels, ncols=ncols, fontsize="small", loc="outside lower center").get_texts():
        text.set_parse_math(False)


def save_png(figure: Figure, path: str | os.PathLike):
    """Writes a picture, to a temporary name first."""
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


def make_folder(folder: Path) -> bool:
    """Makes a folder where there is none; whether it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def write_text(path: Path, content: str):
    """Writes to a temporary name first: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # nobody's own file
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def write_evaluation(folder: Path, metrics: dict, table: list[dict], show: int):
    """
    Writes what eval_sense.py found to `folder`: metrics.json, utterances.jsonl, results.md, sentiment.png; prints it.

    Args:
        metrics: of `processing.scoring.score`, and `controls`, the same of other systems by name.
        table: one dict an utterance, see `eval_sense.utterance_table`.
        show: how many of the worst utterances to print.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "utterances.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    tables = {}  # by title
    if "ner_per_tag" in metrics:
        tables["entities, by tag"] = tag_table(metrics["ner_per_tag"])
    if "sa_confusion" in metrics:
        tables["sentiment: said (rows), heard (columns)"] = confusion_table(metrics["sa_confusion"])
        save_png(plot_confusion(metrics["sa_confusion"]), folder / "sentiment.png")
    tables["per cent [95 % interval, bootstrap over utterances]"] = comparison(systems_of(metrics))
    left_out = left_out_of(metrics)
    sections = [f"{left_out}\n"] if left_out else []
    sections += [f"## {title}\n\n{markdown_table(*found)}\n" for title, found in reversed(tables.items())]
    write_text(folder / "results.md", "\n".join(sections))
    if show:
        worst = [[f"{row['wer']:.0f}", row["reference"], row["heard"]] for row in table if "wer" in row]
        print_table(
            f"worst {min(show, len(worst))} of {len(table)} utterances", ["WER %", "said", "heard"], worst[:show]
        )
    for title, found in tables.items():
        print_table(title, *found)
    if left_out:
        print(left_out)
    for name, value in metrics.items():
        if isinstance(value, int | float):
            print(f"{name:28} {value:.2f}" if isinstance(value, float) else f"{name:28} {value}")


def left_out_of(metrics: dict) -> str:
    """A sentence on the rows that eval_sense.py left out, by kind; empty where there are none."""
    counts = metrics.get("bad_rows") or {}
    listed = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    return f"{sum(counts.values())} rows are left out of all scores: they can't be used ({listed})." if counts else ""


def systems_of(metrics: dict) -> dict[str, dict]:
    """By name, the metrics of the model and of what it is compared with."""
    return {"SENSE": metrics, **metrics["controls"]}


def comparison(systems: dict[str, dict], names: dict[str, str] = HEADLINES) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table of systems, metrics with their intervals; `names` are the columns'."""
    columns = headlines_of(systems)
    rows = [[name, *(score_cell(metrics, key) for key in columns)] for name, metrics in systems.items()]
    return ["", *(names[key] for key in columns)], rows


def headlines_of(systems: dict[str, dict]) -> list[str]:
    """The headline metrics that one of the systems has."""
    return [key for key in HEADLINES if any(key in metrics for metrics in systems.values())]


def score_cell(metrics: dict, key: str, digits: int = 1) -> str:
    """A metric with its interval, if there are such."""
    if key not in metrics:
        return "-"
    value, *interval = (f"{number:.{digits}f}" for number in (metrics[key], *(metrics.get(f"{key}_interval") or ())))
    return value + (f" [{', '.join(interval)}]" if interval else "")


def tag_table(per_tag: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the entities' scores by tag, in per cent."""
    rows = [
        [tag, str(found["support"]), str(found["predicted"]), *(f"{100 * found[key]:.1f}" for key in SCORES)]
        for tag, found in sorted(per_tag.items())
    ]
    return ["tag", "said", "heard", *SCORES.values()], rows


def confusion_table(cells: list[list[int]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a confusion of sentiments: said by row, heard by column, the last one unreadable answers."""
    rows = [[name, *map(str, row)] for name, row in zip(SENTIMENTS, cells)]
    return ["", *SENTIMENTS, "unreadable"], rows


def plot_confusion(cells: list[list[int]]) -> Figure:
    """A confusion of sentiments, as `confusion_table` has it."""
    figure = Figure(figsize=(5.5, 3.5), layout="constrained")
    axes = figure.subplots()
    draw_confusion(axes, cells, SENTIMENTS, [*SENTIMENTS, "unreadable"])
    axes.set(xlabel="heard", ylabel="said", title="Sentiment")
    return figure


def draw_confusion(axes, cells: list[list[int]], rows: Sequence[str], columns: Sequence[str]):
    """Counts in a grid; colours are shares of each row."""
    shares = [[cell / max(1, sum(row)) for cell in row] for row in cells]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            # Not black, which is the page's own colour of text in an SVG: cells are light or dark in both its themes.
            axes.text(x, y, str(cell), ha="center", va="center", color="white" if shares[y][x] > 0.5 else "#111111")
    axes.set_xticks(range(len(columns)), columns, rotation=30 if len(columns) > 4 else 0)
    axes.set_yticks(range(len(rows)), rows)


def plot_tags(per_tag: dict[str, dict]) -> Figure:
    """The entities' scores by tag, as `tag_table` has them, with how many were said and heard."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, tags = figure.subplots(), sorted(per_tag)
    _score_bars(axes, [{key: 100 * per_tag[tag][key] for key in SCORES} for tag in tags])
    counts = [f"{tag}\n{per_tag[tag]['support']} said\n{per_tag[tag]['predicted']} heard" for tag in tags]
    axes.set_xticks(range(len(tags)), counts, fontsize="small")
    _legend_below(figure, axes, ncols=4)
    return figure


def plot_quality(found: dict) -> Figure:
    """
    What `annotate_sense.py compare` found: scores filter by filter, F1 by tag and the confusion of tags; of sentiment
    the confusion alone.
    """
    if "filters" not in found:
        return plot_confusion(found["sa_confusion"])
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    filters, tags, grid = figure.subplots(1, 3)
    _score_bars(filters, [scores["all"] for scores in found["filters"].values()])
    filters.set_xticks(range(len(found["filters"])), [name.partition(":")[0] for name in found["filters"]])
    filters.set(title="Filters")
    filters.legend(fontsize="small")
    by_tag = {tag: scores for tag, scores in found["filters"]["both"].items() if tag != "all"}
    _bars(tags, range(len(by_tag)), list(by_tag.values()), "f1")
    tags.set_xticks(range(len(by_tag)), by_tag, rotation=30)
    tags.set(title="F1 by tag, both filters", ylim=(0, 100))
    draw_confusion(grid, found["confusion"], [*found["tags"], "none"], [*found["tags"], "none"])
    grid.set(title="Tags, both filters", xlabel="synthetic", ylabel="gold")
    return figure


def _score_bars(axes, scores: list[dict]):
    """`SCORES` of several things, in per cent, side by side."""
    for i, (key, name) in enumerate(SCORES.items()):
        _bars(axes, [x + 0.2 * (i - 1.5) for x in range(len(scores))], scores, key, width=0.2, label=name)
    axes.set(ylabel="%", ylim=(0, 100))


def _bars(axes, places, scores: list[dict], key: str, **style):
    """A metric of several things, with its intervals."""
    values = [found[key] for found in scores]
    intervals = [found.get(f"{key}_interval", (value, value)) for found, value in zip(scores, values)]
    errors = _errors(values, intervals) if any(f"{key}_interval" in found for found in scores) else None
    axes.bar(places, values, yerr=errors, capsize=2, **style)


def _errors(values: list[float], intervals: list[list[float]]) -> list[list[float]]:
    """Intervals as matplotlib draws them: below and above the values."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, intervals)]
    return [below, [max(0.0, high - value) for value, (_, high) in zip(values, intervals)]]


def plot_comparison(systems: dict[str, dict]) -> Figure:
    """The metrics of systems by name, as `comparison` lists them, with their intervals."""
    keys, names = headlines_of(systems), [textwrap.fill(name, 28) for name in systems]
    height = 1.2 + 0.35 * sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(2.5 + 1.8 * len(keys), height), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys):
        for place, metrics in enumerate(systems.values()):
            if key in metrics:
                _point(axes, metrics, key, place, color="C0")
        axes.set(title=TITLES[key], xlabel="% (less is better)" if "wer" in key else "%", xlim=(0, None))
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(systems)), names, parse_math=False)
    panels[0].set_ylim(len(systems) - 0.5, -0.5)
    return figure


def _point(axes, metrics: dict, key: str, place: float, *, color: str, label: str | None = None):
    """A metric, and its interval as a line if it has one, at a height."""
    if interval := metrics.get(f"{key}_interval"):
        axes.plot(interval, [place, place], color=color, linewidth=2, clip_on=False)
    axes.plot(metrics[key], place, "o", color=color, label=label, clip_on=False)


def plot_groups(systems: dict[str, list[dict]]) -> Figure:
    """
    The normalised WER of groups of utterances and their numbers, of each system that has such; the groups where the
    first one errs most if they are many.

    Args:
        systems: by name, the groups as `processing.scoring.wer_by` has them, the same of each.
    """
    key, first = "wer_normalized", next(iter(systems.values()))
    known = [i for i, group in enumerate(first) if key in group]
    places = sorted(sorted(known, key=lambda i: -first[i][key])[:MOST_GROUPS])
    figure = Figure(figsize=(6, 1.6 + 0.3 * len(places)), layout="constrained")
    axes = figure.subplots()
    for s, (name, groups) in enumerate(systems.items()):
        for y, i in enumerate(places):
            shift = 0.3 * (s - (len(systems) - 1) / 2) / len(systems)
            _point(axes, groups[i], key, y + shift, color=f"C{s}", label=name if y == 0 else None)
    names = [f"{shorten(first[i]['group'])} ({first[i]['n']})" for i in places]
    axes.set_yticks(range(len(places)), names, parse_math=False)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set(xlabel="WER, normalised, %", xlim=(0, None))
    axes.grid(axis="x", alpha=0.3)
    if len(systems) > 1:
        _legend_below(figure, axes)
    return figure


def shorten(name: str) -> str:
    """A name that fits beside a picture."""
    return name if len(name) <= 24 else f"{name[:23]}…"


def plot_curves(lines: dict[str, dict[float, dict]], xlabel: str) -> Figure:
    """
    Metrics along a quantity, with their intervals.

    Args:
        lines: by the line's name, by x a system's metrics. Those of `HEADLINES` that all have get a panel each.
        xlabel: the quantity.
    """
    systems = [metrics for line in lines.values() for metrics in line.values()]
    keys = [key for key in HEADLINES if all(key in metrics for metrics in systems)]
    figure = Figure(figsize=(1 + 3 * len(keys), 3.6), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, key in zip(panels, keys):
        for name, line in lines.items():
            values = [metrics[key] for metrics in line.values()]
            errors = _errors(values, [metrics[f"{key}_interval"] for metrics in line.values()])
            axes.errorbar(list(line), values, errors, marker="o", capsize=3, label=name)
        axes.set(title=TITLES[key], xlabel=xlabel, ylabel="%")
        axes.grid(alpha=0.3)
    _legend_below(figure, panels[0], ncols=len(lines))
    return figure


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)


def _markdown_cell(cell: str) -> str:
    """In one line, and without a bar that would end the cell."""
    return " ".join(cell.replace("|", "\\|").split())


def print_table(title: str, headers: list[str], rows: list[list[str]]):
    view = Table(*headers, title=title)
    for row in rows:
        view.add_row(*(escape(cell) for cell in row))
    Console(width=None if os.isatty(1) else 160).print(view)


def _curve(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], float(entry[key])) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def main(argv: list[str]) -> None:
    """
    Raises:
        SystemExit: wrong arguments.
        FileNotFoundError: a folder without trainer_state.json.
    """
    if len(argv) < 2 or not all("=" in run for run in argv[1:]):
        raise SystemExit(__doc__)
    runs = {}
    for run in argv[1:]:
        label, _, folder = run.partition("=")
        runs[label] = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    save_png(plot_training(runs), argv[0])


if __name__ == "__main__":
    main(sys.argv[1:])
