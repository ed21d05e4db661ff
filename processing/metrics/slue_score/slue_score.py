"""The SLUE score, as a module of Hugging Face `evaluate`."""

import math

import datasets
import evaluate


_DESCRIPTION = """\
The SLUE score, in per cent: the mean of 100 - WER (itself the mean of the WERs on SLUE-VoxPopuli and SLUE-VoxCeleb), \
the micro F1 of named entities on SLUE-VoxPopuli, and the macro F1 of sentiment on SLUE-VoxCeleb. It is defined on \
these two corpora alone: numbers of others are refused.
"""

_CITATION = """\
@inproceedings{shon2022slue,
  title={{SLUE}: New Benchmark Tasks for Spoken Language Understanding Evaluation on Natural Speech},
  author={Shon, Suwon and Pasad, Ankita and Wu, Felix and Brusco, Pablo and Artzi, Yoav and Livescu, Karen and
          Han, Kyu J.},
  booktitle={ICASSP},
  year={2022}
}
"""

_INPUTS = """
Args:
    predictions: the four results of one system, each a dict:
        metric: wer, ner_f1 or sentiment_f1.
        corpus: slue-voxpopuli (wer, ner_f1) or slue-voxceleb (wer, sentiment_f1).
        split: test or dev, the same in all four.
        value: in per cent.

Returns:
    slue_score: in per cent.
    split: of the results.

Raises:
    ValueError: a result of another corpus or split, one that is missing or given twice, values that are no per cent.

Examples:
    >>> import evaluate
    >>> slue = evaluate.load("processing/metrics/slue_score")
    >>> results = [
    ...     {"metric": "wer", "corpus": "slue-voxpopuli", "split": "test", "value": 9.3},
    ...     {"metric": "wer", "corpus": "slue-voxceleb", "split": "test", "value": 11.1},
    ...     {"metric": "ner_f1", "corpus": "slue-voxpopuli", "split": "test", "value": 71.8},
    ...     {"metric": "sentiment_f1", "corpus": "slue-voxceleb", "split": "test", "value": 65.5},
    ... ]
    >>> round(slue.compute(predictions=results)["slue_score"], 1)
    75.7
"""

PARTS = (
    ("wer", "slue-voxpopuli"),
    ("wer", "slue-voxceleb"),
    ("ner_f1", "slue-voxpopuli"),
    ("sentiment_f1", "slue-voxceleb"),
)
SPLITS = ("test", "dev")
FIELDS = ("metric", "corpus", "split", "value")


def slue_score(wer_voxpopuli: float, wer_voxceleb: float, ner_f1: float, sentiment_f1: float) -> float:
    """The formula alone, in per cent; of numbers on SLUE's own splits."""
    return (100 - (wer_voxpopuli + wer_voxceleb) / 2 + ner_f1 + sentiment_f1) / 3


class SlueScore(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        result = {"metric": text, "corpus": text, "split": text, "value": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": result}),
            reference_urls=["https://arxiv.org/abs/2111.10367", "https://github.com/asappresearch/slue-toolkit"],
        )

    def add_batch(self, *, predictions=None, **kwargs):
        """Adds results, after a check of their fields."""
        for result in predictions:
            if not isinstance(result, dict) or set(result) != set(FIELDS):
                raise ValueError(f"a result is a dict of {', '.join(FIELDS)}; found {result!r}")
        super().add_batch(predictions=predictions, **kwargs)

    def _compute(self, predictions):
        values = {}
        for result in predictions:
            part = _check(result)
            if part in values:
                raise ValueError(f"{' on '.join(part)} is given twice; give it once")
            values[part] = result["value"]
        missing = [" on ".join(part) for part in PARTS if part not in values]
        if missing:
            raise ValueError(f"the SLUE score needs {', '.join(missing)} too; it has no meaning without")
        splits = {result["split"] for result in predictions}
        if len(splits) > 1:
            raise ValueError(f"split: found {' and '.join(sorted(splits))}; give four results of one split")
        for pair in (PARTS[:2], PARTS[2:]):
            found = [values[part] for part in pair]
            if 0 < max(found) <= 1:
                names = " and ".join(map(" on ".join, pair))
                raise ValueError(f"value: found {found} for {names}, which look like fractions; give per cent")
        return {"slue_score": slue_score(*(values[part] for part in PARTS)), "split": splits.pop()}


def _check(result: dict) -> tuple[str, str]:
    """Metric and corpus of a result."""
    part, value = (result["metric"], result["corpus"]), result["value"]
    if part not in PARTS or result["split"] not in SPLITS:
        raise ValueError(
            f"no SLUE score of {part[0]!r} on corpus {part[1]!r}, split {result['split']!r}: it is made of "
            f"{', '.join(map(' on '.join, PARTS))}, split {' or '.join(SPLITS)}; report others by themselves"
        )
    if value is None or not math.isfinite(value) or value < 0 or (part[0] != "wer" and value > 100):
        raise ValueError(f"value: found {value} for {' on '.join(part)}; give it in per cent")
    return part
