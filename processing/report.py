"""
Pictures of runs.

    python -m processing.report PNG LABEL=DIR [LABEL=DIR ...]      # output folders of train_sense.py, side by side
"""

import base64
import html
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot as plt  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402

from .scoring import HEADLINES  # noqa: E402
from .tasks import SENTIMENTS  # noqa: E402


TITLES = {"wer_normalized": "WER, normalised", "ner_f1_normalized": "NER F1, normalised"}


def plot_training(runs: dict[str, list[dict]], path: str | os.PathLike):
    """
    Draws the curves of one or several runs to a PNG: the loss in training, on held-out speech and on the same texts
    with the clips shuffled (where these two part, the model begins to listen), and the WER.

    Args:
        runs: by label, the `log_history` of a Trainer's state, as trainer_state.json holds it.
        path: where the PNG goes.
    """
    styles = {
        "loss": {"label": "training", "linewidth": 0.7, "alpha": 0.6},
        "eval_true_loss": {"label": "held out, true clips", "linewidth": 2},
        "eval_shuffled_loss": {"label": "clips shuffled", "linewidth": 2, "linestyle": "--"},
    }
    figure, (losses, errors) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (name, history) in enumerate(runs.items()):
        for key, style in styles.items():
            label = ": ".join(filter(None, [name, style["label"]]))
            losses.plot(*_curve(history, key), color=f"C{i}", **(style | {"label": label}))
        errors.plot(*_curve(history, "eval_wer"), marker="o", color=f"C{i}", label=name or "held out")
    losses.set(xlabel="step", ylabel="cross-entropy, nats per token", title="Loss", ylim=(0, None))
    errors.set(xlabel="step", ylabel="WER, %", title="Word error rate, held out, greedy", ylim=(0, None))
    figure.legend(*losses.get_legend_handles_labels(), ncols=3, fontsize="small", loc="outside lower center")
    errors.legend(fontsize="small")
    _save(figure, path)


def _save(figure, path: str | os.PathLike):
    """Writes a PNG, to a temporary name first."""
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)


def write_text(path: Path, content: str):
    """Writes to a temporary name first: a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
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
        plot_confusion(metrics["sa_confusion"], folder / "sentiment.png")
    systems = {"SENSE": metrics, **metrics["controls"]}
    tables["per cent [95 % interval, bootstrap over utterances]"] = comparison(systems)
    sections = [f"## {title}\n\n{markdown_table(*found)}\n" for title, found in reversed(tables.items())]
    write_text(folder / "results.md", "\n".join(sections))
    if show:
        worst = [
            [f"{row['wer']:.0f}", row["reference"], row.get("asr", row.get("ner"))] for row in table if "wer" in row
        ]
        print_table(
            f"worst {min(show, len(worst))} of {len(table)} utterances", ["WER %", "said", "heard"], worst[:show]
        )
    for title, found in tables.items():
        print_table(title, *found)
    for name, value in metrics.items():
        if isinstance(value, int | float):
            print(f"{name:28} {value:.2f}" if isinstance(value, float) else f"{name:28} {value}")


def comparison(systems: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table of systems, metrics with their intervals."""
    columns = [key for key in HEADLINES if any(key in metrics for metrics in systems.values())]
    rows = []
    for name, metrics in systems.items():
        cells = []
        for key in columns:
            low, high = metrics.get(f"{key}_interval", (0, 0))
            cells.append(f"{metrics[key]:.1f} [{low:.1f}, {high:.1f}]" if key in metrics else "-")
        rows.append([name, *cells])
    return ["", *(HEADLINES[key] for key in columns)], rows


def tag_table(per_tag: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the entities' scores by tag, in per cent."""
    keys = ("precision", "recall", "f1", "label_f1")
    rows = [
        [tag, str(found["support"]), str(found["predicted"]), *(f"{100 * found[key]:.1f}" for key in keys)]
        for tag, found in sorted(per_tag.items())
    ]
    return ["tag", "said", "heard", "precision", "recall", "F1", "label-F1"], rows


def confusion_table(cells: list[list[int]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a confusion of sentiments: said by row, heard by column, the last one unreadable answers."""
    rows = [[name, *map(str, row)] for name, row in zip(SENTIMENTS, cells)]
    return ["", *SENTIMENTS, "unreadable"], rows


def plot_confusion(cells: list[list[int]], path: str | os.PathLike):
    """Draws a confusion of sentiments, as `confusion_table` has it, to a PNG."""
    figure, axes = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
    draw_confusion(axes, cells, SENTIMENTS, [*SENTIMENTS, "unreadable"])
    axes.set(xlabel="heard", ylabel="said", title="Sentiment")
    _save(figure, path)


def draw_confusion(axes, cells: list[list[int]], rows: Sequence[str], columns: Sequence[str]):
    """Counts in a grid; colours are shares of each row."""
    shares = [[cell / max(1, sum(row)) for cell in row] for row in cells]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            axes.text(x, y, str(cell), ha="center", va="center", color="white" if shares[y][x] > 0.5 else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=30 if len(columns) > 4 else 0)
    axes.set_yticks(range(len(rows)), rows)


def plot_quality(found: dict, path: str | os.PathLike):
    """
    Draws what `annotate_sense.py compare` found to a PNG: scores filter by filter, F1 by tag and the confusion of
    tags; of sentiment the confusion alone.
    """
    if "filters" not in found:
        return plot_confusion(found["sa_confusion"], path)
    figure, (filters, tags, grid) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    names = {"precision": "precision", "recall": "recall", "f1": "F1", "label_f1": "label-F1"}
    for i, (key, name) in enumerate(names.items()):
        scores = [scores["all"] for scores in found["filters"].values()]
        _bars(filters, [x + 0.2 * (i - 1.5) for x in range(len(scores))], scores, key, width=0.2, label=name)
    filters.set_xticks(range(len(scores)), [name.partition(":")[0] for name in found["filters"]])
    filters.set(title="Filters", ylabel="%", ylim=(0, 100))
    filters.legend(fontsize="small")
    by_tag = {tag: scores for tag, scores in found["filters"]["both"].items() if tag != "all"}
    _bars(tags, range(len(by_tag)), list(by_tag.values()), "f1")
    tags.set_xticks(range(len(by_tag)), by_tag, rotation=30)
    tags.set(title="F1 by tag, both filters", ylim=(0, 100))
    draw_confusion(grid, found["confusion"], [*found["tags"], "none"], [*found["tags"], "none"])
    grid.set(title="Tags, both filters", xlabel="synthetic", ylabel="gold")
    _save(figure, path)


def _bars(axes, places, scores: list[dict], key: str, **style):
    """A metric of several systems, with its intervals."""
    values = [found[key] for found in scores]
    axes.bar(places, values, yerr=_errors(values, [found[f"{key}_interval"] for found in scores]), capsize=2, **style)


def _errors(values: list[float], intervals: list[list[float]]) -> list[list[float]]:
    """Intervals as matplotlib draws them: below and above the values."""
    below = [max(0.0, value - low) for value, (low, _) in zip(values, intervals)]
    return [below, [max(0.0, high - value) for value, (_, high) in zip(values, intervals)]]


def plot_comparison(systems: dict[str, dict], path: str | os.PathLike):
    """Draws the metrics of systems by name, as `comparison` lists them, with their intervals, to a PNG."""
    keys = [key for key in HEADLINES if all(key in metrics for metrics in systems.values())]
    height = 1.2 + 0.35 * len(systems)
    figure, panels = plt.subplots(
        1, len(keys), figsize=(2 + 2 * len(keys), height), sharey=True, layout="constrained", squeeze=False
    )
    places = range(len(systems))
    for axes, key in zip(panels[0], keys):
        for place, metrics in zip(places, systems.values()):
            low, high = metrics[f"{key}_interval"]
            axes.plot([low, high], [place, place], color="C0", linewidth=2)
            axes.plot(metrics[key], place, "o", color="C0")
        axes.set(title=TITLES.get(key, HEADLINES[key]), xlabel="%")
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(places, list(systems))
    panels[0][0].invert_yaxis()
    _save(figure, path)


def plot_curves(lines: dict[str, dict[float, dict]], xlabel: str, path: str | os.PathLike):
    """
    Draws metrics along a quantity, with their intervals, to a PNG.

    Args:
        lines: by the line's name, by x a system's metrics. Those of `HEADLINES` that all have get a panel each.
        xlabel: the quantity.
        path: where the PNG goes.
    """
    systems = [metrics for line in lines.values() for metrics in line.values()]
    keys = [key for key in HEADLINES if all(key in metrics for metrics in systems)]
    figure, panels = plt.subplots(1, len(keys), figsize=(1 + 3 * len(keys), 3.6), layout="constrained", squeeze=False)
    for axes, key in zip(panels[0], keys):
        for name, line in lines.items():
            values = [metrics[key] for metrics in line.values()]
            errors = _errors(values, [metrics[f"{key}_interval"] for metrics in line.values()])
            axes.errorbar(list(line), values, errors, marker="o", capsize=3, label=name)
        axes.set(title=TITLES.get(key, HEADLINES[key]), xlabel=xlabel, ylabel="%")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), ncols=len(lines), loc="outside lower center")
    _save(figure, path)


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)


def _markdown_cell(cell: str) -> str:
    """In one line, and without a bar that would end the cell."""
    return " ".join(cell.replace("|", "\\|").split())


def write_html(path: Path, title: str, lead: str, tables: dict[str, tuple[list[str], list[list[str]]]], picture: Path):
    """One page that stands alone: title, a sentence, a PNG and tables by title."""
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>"]
    parts.append(f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">')
    for name, (headers, rows) in tables.items():
        lines = [_html_row("th", headers), *(_html_row("td", row) for row in rows)]
        parts.append(f"<h2>{html.escape(name)}</h2><table>{''.join(lines)}</table>")
    style = (
        "body{font-family:sans-serif;margin:2em;max-width:80em}img{max-width:100%}table{border-collapse:collapse}"
        "td,th{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:left;vertical-align:top}"
    )
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    write_text(path, head + "\n".join(parts) + "\n")


def _html_row(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


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
    plot_training(runs, argv[0])


if __name__ == "__main__":
    main(sys.argv[1:])
