"""Answers of a system -> its metrics, in per cent, each with a bootstrap interval over utterances."""

import bisect
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache

import jiwer
import numpy as np
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from .metrics import load_metric
from .metrics.slue_ner.slue_ner import count_matches, normalize_phrase
from .tasks import SENTIMENTS, TASKS, Answer, combine, phrases


NORMALIZE = EnglishTextNormalizer()
NORMALIZE_OTHERS = BasicTextNormalizer(preserve_marks=True)  # else vowels of Indic scripts go
BOOTSTRAP_SAMPLES = 1000
WITHIN_WORDS = "'\u200c\u200d"  # apostrophe; how Persian and Indic letters join
# Groups of `wer_by`: the edges between them; and how many utterances an interval needs.
DURATIONS = (2, 4, 6, 8, 10, 15, 20)  # seconds
SPEAKING_RATES = (1, 1.5, 2, 2.5, 3, 3.5, 4)  # words a second
FEWEST = 5


def plain(text: str) -> str:
    """
    Lower case, letters with their marks, digits and apostrophes alone: how the entities of every system are compared.
    Punctuation that SLUE drops is dropped ("u.s." is "us"), other parts words.
    """
    text = re.sub("[.,!?;\u00ad]", "", unicodedata.normalize("NFC", text.lower()).replace("\u2019", "'"))
    # By category, because re's \w has not the vowel signs of Indic scripts: it would part words at them.
    kept = "".join(c if c in WITHIN_WORDS or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join(word for word in kept.split() if any(map(str.isalnum, word)))


def normalize(text: str, language: str | None = None) -> str:
    """By Whisper's English normaliser, which in another language would drop words; there by its basic one."""
    return (NORMALIZE if (language or "en").strip().lower().startswith("en") else NORMALIZE_OTHERS)(text)


def score_asr(rows: list[dict], answers: list[Answer]) -> dict:
    """
    `wer` on the strings as they are, `wer_slue` on them as SLUE scores text (marks dropped, possessives split),
    `wer_normalized` after Whisper's normaliser (see `normalize`). Where nothing is said, there is no rate.
    """
    return _wers(rows, answers, {"wer": lambda text, _: text, "wer_slue": _as_slue, "wer_normalized": normalize})


def _as_slue(text: str, language: str | None) -> str:
    return normalize_phrase(text)


def _wers(rows: list[dict], answers: list[Answer], forms: Mapping[str, Callable[[str, str | None], str]]) -> dict:
    """The WER by name, each on texts brought to its form, which is given their language too."""
    metrics: dict = {}
    for name, form in forms.items():
        references = [form(row["text"], row.get("language")) for row in rows]
        heard = [form(answer.text or "", row.get("language")) for row, answer in zip(rows, answers)]
        counts = np.array([word_errors(*pair) for pair in zip(references, heard)])
        if not counts[:, 1].any():
            continue
        metrics[name] = 100 * load_metric("wer").compute(predictions=heard, references=references)["wer"]
        metrics[f"{name}_interval"] = bootstrap(counts, lambda sums: ratio(sums[..., 0], sums[..., 1]))
    return metrics


def word_errors(reference: str, heard: str) -> tuple[int, int]:
    """Errors, and words of the reference. Words are parted by any white space, as `metrics/wer` parts them."""
    reference, heard = (" ".join(text.split()) for text in (reference, heard))
    if not reference:
        return len(heard.split()), 0
    found = jiwer.process_words(reference, heard)
    errors = found.substitutions + found.deletions + found.insertions
    return errors, found.hits + found.substitutions + found.deletions


def wer_by(rows: list[dict], answers: list[Answer], seconds: list[float]) -> dict[str, list[dict]]:
    """
    The WER after Whisper's normaliser (see `normalize`), of groups of utterances.

    Args:
        rows: of the project's schema, the references.
        answers: one a row, with the words heard.
        seconds: how long each clip is.

    Returns:
        by what they are grouped by (`duration`, `speaking_rate`, which is the reference's words a second, and
        `speaker`, where the corpus knows one), the groups: `group` (its name), `n` (utterances), `words` (of the
        references, normalised), `errors`; where there are words, `wer_normalized`, and with `FEWEST` utterances or
        more `wer_normalized_interval`.
    """
    rates = [len(row["text"].split()) / s for row, s in zip(rows, seconds)]
    keys = {"duration": [_bin(s, DURATIONS, "s") for s in seconds]}
    keys["speaking_rate"] = [_bin(rate, SPEAKING_RATES, "words/s") for rate in rates]
    if any(row["speaker"] for row in rows):  # unknown ones stand last
        keys["speaker"] = [(not row["speaker"], row["speaker"] or "unknown") for row in rows]
    told = [(row.get("language"), row["text"], answer.text or "") for row, answer in zip(rows, answers)]
    counts = np.array([word_errors(normalize(said, name), normalize(heard, name)) for name, said, heard in told])
    return {name: _groups(keys_of_rows, counts) for name, keys_of_rows in keys.items()}


def _bin(value: float, edges: tuple[float, ...], unit: str) -> tuple[int, str]:
    """The place of the bin that a value falls in, from one edge to below the next, and its name."""
    place = bisect.bisect_right(edges, value)
    if place == 0:
        return place, f"below {edges[0]:g} {unit}"
    if place == len(edges):
        return place, f"{edges[-1]:g} {unit} or more"
    return place, f"{edges[place - 1]:g} to {edges[place]:g} {unit}"


def _groups(keys: list[tuple], counts: np.ndarray) -> list[dict]:
    """`counts` (errors, words) of utterances, by their keys: `(what groups are ordered by, their name)`."""
    groups = []
    for key in sorted(set(keys)):
        of_group = counts[[other == key for other in keys]]
        errors, words = of_group.sum(0).tolist()
        wer = {"wer_normalized": 100 * errors / words} if words else {}
        if words and len(of_group) >= FEWEST:
            wer["wer_normalized_interval"] = bootstrap(of_group, lambda sums: ratio(sums[..., 0], sums[..., 1]))
        groups.append({"group": key[1], "n": len(of_group), "words": words, "errors": errors, **wer})
    return groups


def score_ner(rows: list[dict], answers: list[Answer]) -> dict:
    """
    SLUE's NER F1 and label-F1 on the 7 combined tags, of rows with entity labels: `ner_f1` and `ner_label_f1` on
    phrases as `plain` leaves them, `ner_f1_normalized` on phrases after Whisper's normaliser ("two" is "2");
    `ner_malformed_rate` is the share of answers with a tag that could not be read. `ner_wer` is the WER of their
    words, possessives split on both sides as a tag may split them, `ner_wer_normalized` after Whisper's normaliser.
    `ner_per_tag` is the metric's own, in shares of 1 and counts.
    """
    labelled = [(row, answer) for row, answer in zip(rows, answers) if row["entities"] is not None]
    metrics: dict = {}
    for suffix, clean in (("", lambda text, _: plain(text)), ("_normalized", normalize)):
        references = [_clean(row["text"], row["entities"], clean, row) for row, _ in labelled]
        predictions = [_clean(answer.text or "", answer.entities or [], clean, row) for row, answer in labelled]
        found = load_metric("slue_ner").compute(predictions=predictions, references=references)
        metrics |= _ner_with_intervals(suffix, found, predictions, references)
        if not suffix:
            others = ("precision", "recall", "macro_f1", "label_precision", "label_recall", "label_macro_f1")
            metrics |= {f"ner_{name}": 100 * found[name] for name in others}
            metrics["ner_per_tag"] = found["per_tag"]
    metrics["ner_malformed_rate"] = 100 * np.mean([answer.malformed > 0 for _, answer in labelled]).item()
    forms = {"ner_wer": _as_slue, "ner_wer_normalized": normalize}
    return metrics | _wers([row for row, _ in labelled], [answer for _, answer in labelled], forms)


def _ner_with_intervals(suffix: str, found: dict, predictions: list, references: list) -> dict:
    counts = np.array([_utterance_counts(*pair) for pair in zip(predictions, references)])  # n x (exact, label) x 3
    return {
        f"ner_f1{suffix}": 100 * found["f1"],
        f"ner_f1{suffix}_interval": bootstrap(counts[:, 0], _f1),
        f"ner_label_f1{suffix}": 100 * found["label_f1"],
        f"ner_label_f1{suffix}_interval": bootstrap(counts[:, 1], _f1),
    }


def _utterance_counts(prediction: list, reference: list) -> list[list[int]]:
    """True positives, predicted and reference entities, of exact matches and of labels."""
    return [np.sum(list(counts.values()) or [(0, 0, 0)], axis=0) for counts in count_matches(prediction, reference)]


def _f1(sums: np.ndarray) -> np.ndarray:
    return ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _clean(text: str, entities: list, clean: Callable[[str, str | None], str], row: dict) -> list[list[str]]:
    return [[tag, clean(phrase, row.get("language"))] for tag, phrase in phrases(text, combine(entities))]


def score_sa(rows: list[dict], answers: list[Answer]) -> dict:
    """SLUE's macro F1 of the sentiment, of rows with a label for it; `sa_confusion`: said x heard (or unreadable)."""
    pairs = [(row["sentiment"], a.sentiment or "") for row, a in zip(rows, answers) if row["sentiment"] is not None]
    references, heard = map(list, zip(*pairs))
    found = load_metric("slue_sentiment").compute(predictions=heard, references=references)
    cells = sentiment_cells(references, heard)
    return {
        "sa_f1": 100 * found["f1"],
        "sa_f1_interval": bootstrap(cells.reshape(len(pairs), -1), _macro_f1),
        "sa_accuracy": 100 * found["accuracy"],
        "sa_malformed_rate": 100 * np.mean([answer == "" for answer in heard]).item(),
        "sa_confusion": cells.sum(0).tolist(),
    }


def sentiment_cells(references: list[str], heard: list[str]) -> np.ndarray:
    """`(utterances, 3, 4)`: 1 where an utterance's true and heard class cross, the last column unreadable (`""`)."""
    columns = (*SENTIMENTS, "")
    cells = np.zeros((len(references), len(SENTIMENTS), len(columns)), dtype=int)
    for i, (reference, answer) in enumerate(zip(references, heard)):
        cells[i, SENTIMENTS.index(reference), columns.index(answer)] = 1
    return cells


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    cells = sums.reshape(*sums.shape[:-1], len(SENTIMENTS), len(SENTIMENTS) + 1)
    hits = np.diagonal(cells, axis1=-2, axis2=-1)
    return ratio(2 * hits, cells.sum(-1) + cells.sum(-2)[..., : len(SENTIMENTS)]).mean(-1)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, 0 where `whole` is 0."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) != 0)


@lru_cache(maxsize=1)
def _draw(utterances: int) -> np.ndarray:
    """How often each sample has each utterance, `(samples, utterances)`; of every system the same ones."""
    return np.random.default_rng(0).multinomial(utterances, np.full(utterances, 1 / utterances), BOOTSTRAP_SAMPLES)


def bootstrap(counts: np.ndarray, measure: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """
    95 % interval, in per cent, of a metric that is a function of sums over utterances.

    Args:
        counts: what each utterance adds to the sums, `(utterances, ...)`.
        measure: sums `(samples, ...)` -> metric `(samples,)`, from 0 to 1.
    """
    low, high = np.percentile(100 * measure(np.tensordot(_draw(len(counts)), counts, axes=1)), (2.5, 97.5))
    return [float(low), float(high)]


SCORERS = {"asr": score_asr, "ner": score_ner, "sa": score_sa}
HEADLINES = {  # the table's columns
    "wer": "WER",
    "wer_normalized": "normalised",
    "ner_f1": "NER F1",
    "ner_f1_normalized": "normalised",
    "ner_label_f1": "label-F1",
    "sa_f1": "sentiment macro F1",
}


def score(rows: list[dict], answers: dict[str, list[Answer]]) -> dict:
    """
    Metrics of a system by name, in per cent.

    Args:
        rows: of the project's schema, the references.
        answers: by task, one a row. A task without a labelled row, or without a scorer here, is left out.
    """
    metrics: dict = {}
    for name, given in answers.items():
        if name in SCORERS and any(row[TASKS[name].label] is not None for row in rows):
            metrics |= SCORERS[name](rows, given)
    return metrics
