"""
Pictures of runs.

    python -m processing.report PNG LABEL=DIR [LABEL=DIR ...]      # output folders of train_sense.py, side by side
"""

import json
import os
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot as plt  # noqa: E402


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
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)


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
