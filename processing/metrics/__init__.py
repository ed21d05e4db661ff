"""Metrics as modules of Hugging Face `evaluate`; each folder is also a Space of the Hub. See their README.md."""

from functools import cache
from pathlib import Path

import evaluate


FOLDER = Path(__file__).resolve().parent
METRICS = ("slue_ner", "slue_score", "slue_sentiment", "wer")


@cache
def load_metric(name: str) -> evaluate.EvaluationModule:
    """
    The metric of that name, from this folder, wherever the caller stands; no network. Loaded once a process, and kept
    in memory: several processes may compute it at the same time.

    Raises:
        ValueError: a name that is not in `METRICS`.
    """
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    return evaluate.load(str(FOLDER / name), keep_in_memory=True)
