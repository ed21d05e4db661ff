"""Pictures of a run."""

import os
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot as plt  # noqa: E402


def plot_training(history: list[dict], path: str | os.PathLike):
    """
    Draws a run's curves to a PNG: the loss in training, on held-out speech and on the same texts with the clips
    shuffled (where these two part, the model begins to listen), and the WER.

    Args:
        history: `log_history` of a Trainer's state, as trainer_state.json holds it.
        path: where the PNG goes.
    """
    curves = {"loss": "training", "eval_true_loss": "held out, true clips", "eval_shuffled_loss": "clips shuffled"}
    figure, (losses, errors) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for key, label in curves.items():
        losses.plot(*_curve(history, key), label=label, linewidth=1 if key == "loss" else 2)
    errors.plot(*_curve(history, "eval_wer"), marker="o")
    losses.set(xlabel="step", ylabel="cross-entropy, nats per token", title="Loss", ylim=(0, None))
    errors.set(xlabel="step", ylabel="WER, %", title="Word error rate, held out (greedy)", ylim=(0, 120))
    losses.legend()
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)


def _curve(history: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], float(entry[key])) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]
