"""SLUE's named-entity F1 and label-F1, as a module of Hugging Face `evaluate`."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import datasets
import evaluate


_DESCRIPTION = """\
F1 of named entities heard in speech, as SLUE-VoxPopuli scores them: exact matches of (tag, phrase) within an \
utterance, as a multiset, in any order, micro-averaged over utterances; and label-F1, the same with the phrase ignored.
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
    predictions: one list an utterance, of [tag, phrase] pairs; it may be empty.
    references: the same, of the true entities.
    tag_set (optional): the tags that count; entities with another tag are discarded on both sides. Default: all.

Returns, all from 0 to 1:
    f1, precision, recall: micro-averaged, exact matches.
    label_f1, label_precision, label_recall: micro-averaged, tags alone.
    macro_f1, label_macro_f1: mean over the tags that occur in predictions or references.
    per_tag: by tag precision, recall, f1, label_precision, label_recall, label_f1, and the numbers of true (support)
        and of predicted entities (predicted).

Examples:
    >>> import evaluate
    >>> ner = evaluate.load("processing/metrics/slue_ner")
    >>> found = ner.compute(predictions=[[["PLACE", "rome"]]], references=[[["PLACE", "rome"], ["WHEN", "today"]]])
    >>> found["precision"], found["recall"]
    (1.0, 0.5)
"""

# By tag: matched, predicted, true entities.
Counts = dict[str, tuple[int, int, int]]


def normalize_phrase(phrase: str) -> str:
    """Without `. , ! ? ;`, possessives split off ("europe's" -> "europe 's"), single spaces. Case stays."""
    without_marks = re.sub(r"[.,!?;]", "", phrase)
    return " ".join(re.sub(r"('s)\b", r" \1", without_marks, flags=re.IGNORECASE).split())


def count_matches(
    prediction: Iterable[Sequence[str]], reference: Iterable[Sequence[str]], tag_set: Collection[str] | None = None
) -> tuple[Counts, Counts]:
    """
    What one utterance adds to the sums that the scores are made of.

    Args:
        prediction: `[tag, phrase]` pairs that were heard.
        reference: those that were said. Phrases of both are normalised here.
        tag_set: the tags that count; entities with another one are discarded. Default: all.

    Returns:
        by tag (matched, predicted, true), of exact matches and of tags alone. A pair that stands there twice matches
        as often as it stands on the other side.

    Raises:
        ValueError: an entity that is no pair of strings, None for a list, or a string for `tag_set`.
    """
    predicted, said = _read(prediction, tag_set), _read(reference, tag_set)
    return _count(predicted, said), _count([pair[:1] for pair in predicted], [pair[:1] for pair in said])


def _read(entities: Iterable[Sequence[str]], tag_set: Collection[str] | None) -> list[tuple[str, ...]]:
    if isinstance(tag_set, str):
        raise ValueError(f"tag_set is a list of tags; found the string {tag_set!r}")
    _check(entities)
    return [(tag, normalize_phrase(phrase)) for tag, phrase in entities if tag_set is None or tag in tag_set]


def _check(entities: Iterable[Sequence[str]]):
    if entities is None:
        raise ValueError("found None for a list of entities; leave out utterances without entity labels")
    for entity in entities:
        is_pair = isinstance(entity, list | tuple) and len(entity) == 2
        if not is_pair or not all(isinstance(part, str) for part in entity):
            raise ValueError(f"an entity is a pair of strings, [tag, phrase]; found {entity!r}")


def _count(predicted: list[tuple[str, ...]], said: list[tuple[str, ...]]) -> Counts:
    """Items start with their tag."""
    given, true = Counter(predicted), Counter(said)
    counts: dict[str, list[int]] = {}
    for column, items in enumerate((given & true, given, true)):
        for item, number in items.items():
            counts.setdefault(item[0], [0, 0, 0])[column] += number
    return {tag: (matched, predicted, said) for tag, (matched, predicted, said) in counts.items()}


def _add(several: Iterable[Counts]) -> Counts:
    sums: Counts = {}
    for counts in several:
        for tag, numbers in counts.items():
            before = sums.get(tag, (0, 0, 0))
            sums[tag] = (before[0] + numbers[0], before[1] + numbers[1], before[2] + numbers[2])
    return dict(sorted(sums.items()))


def _total(counts: Counts) -> tuple[int, int, int]:
    matched, predicted, said = (sum(numbers[column] for numbers in counts.values()) for column in range(3))
    return matched, predicted, said


def _scores(numbers: tuple[int, int, int], prefix: str = "") -> dict[str, float]:
    """Precision, recall, F1; 0 where the denominator is."""
    matched, predicted, said = numbers
    return {
        f"{prefix}precision": matched / predicted if predicted else 0.0,
        f"{prefix}recall": matched / said if said else 0.0,
        f"{prefix}f1": 2 * matched / (predicted + said) if predicted + said else 0.0,
    }


class SlueNer(evaluate.Metric):
    def _info(self):
        entities = datasets.Sequence(datasets.Sequence(datasets.Value("string")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": entities, "references": entities}),
            reference_urls=["https://arxiv.org/abs/2111.10367", "https://github.com/asappresearch/slue-toolkit"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds utterances, after a check of each."""
        # Of a batch with one number among its strings `datasets` makes JSON, quotes and all: nothing would match.
        for name, column in (("predictions", predictions), ("references", references)):
            if column is None:
                raise ValueError(f"{name} are missing: give one list of [tag, phrase] pairs an utterance")
            for i, entities in enumerate(column):
                try:
                    _check(entities)
                except ValueError as error:
                    raise ValueError(f"{name}, utterance {i}: {error}") from error
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one utterance, after a check of it."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def _compute(self, predictions, references, tag_set=None):
        found = [count_matches(*pair, tag_set) for pair in zip(predictions, references)]
        exact, label = _add(counts for counts, _ in found), _add(counts for _, counts in found)
        per_tag = {
            tag: _scores(exact[tag]) | _scores(label[tag], "label_") | {"support": said, "predicted": predicted}
            for tag, (_, predicted, said) in exact.items()
        }
        result = _scores(_total(exact)) | _scores(_total(label), "label_")
        for prefix in ("", "label_"):
            values = [scores[f"{prefix}f1"] for scores in per_tag.values()]
            result[f"{prefix}macro_f1"] = sum(values) / max(1, len(values))
        return result | {"per_tag": per_tag}
