"""SLUE's macro F1 of the sentiment of speech, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support


_DESCRIPTION = """\
Macro-averaged precision, recall and F1 of sentiment heard in speech, over the three classes that SLUE-VoxCeleb \
scores: Negative, Neutral, Positive. Rows whose annotators disagreed are dropped.
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
    predictions: one string an utterance: Negative, Neutral or Positive; any other one is an unreadable answer. It is
        wrong, but no class of its own.
    references: one string an utterance. Those with another one than the three ("Disagreement", "<mixed>") are dropped.

Returns, rates from 0 to 1:
    f1, precision, recall: means over the three classes; 0 for a class where the denominator is 0.
    accuracy: share of right answers.
    per_class: by class precision, recall, f1, and the numbers of true (support) and predicted utterances (predicted).
    confusion: 3 x 4 numbers of utterances; a row is a true class, a column a predicted one, in the order Negative,
        Neutral, Positive, and any other answer.
    n_dropped: how many rows were dropped.

Examples:
    >>> import evaluate
    >>> sentiment = evaluate.load("processing/metrics/slue_sentiment")
    >>> found = sentiment.compute(predictions=["Positive", "Neutral"], references=["Positive", "Negative"])
    >>> found["accuracy"]
    0.5
"""

CLASSES = ("Negative", "Neutral", "Positive")
OTHER = "other"


class SlueSentiment(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://arxiv.org/abs/2111.10367", "https://github.com/asappresearch/slue-toolkit"],
        )

    def _compute(self, predictions, references):
        _refuse_misspelt(references)
        kept = [(said, heard) for said, heard in zip(references, predictions) if said in CLASSES]
        if not kept:
            raise ValueError(
                f"references: not one of {len(references)} is {', '.join(CLASSES)}, so there is nothing to score; "
                f"found {sorted(map(str, set(references)))}"
            )
        said = [reference for reference, _ in kept]
        heard = [prediction if prediction in CLASSES else OTHER for _, prediction in kept]
        by_class = precision_recall_fscore_support(said, heard, labels=CLASSES, zero_division=0)
        confusion = confusion_matrix(said, heard, labels=[*CLASSES, OTHER])[: len(CLASSES)]
        per_class = {
            name: {"precision": precision, "recall": recall, "f1": f1, "support": support, "predicted": predicted}
            for name, precision, recall, f1, support, predicted in zip(
                CLASSES, *(values.tolist() for values in by_class), confusion.sum(axis=0).tolist()
            )
        }
        means = {key: sum(c[key] for c in per_class.values()) / len(CLASSES) for key in ("f1", "precision", "recall")}
        return means | {
            "accuracy": float(accuracy_score(said, heard)),
            "per_class": per_class,
            "confusion": confusion.tolist(),
            "n_dropped": len(references) - len(kept),
        }


def _refuse_misspelt(references: list[str]):
    """A class in other letters ("positive") is a mistake of the caller, which dropping would hide."""
    for i, reference in enumerate(references):
        if reference not in CLASSES and str(reference).strip().capitalize() in CLASSES:
            raise ValueError(f"references, utterance {i}: found {reference!r}; write it {', '.join(CLASSES)}")
