"""Wrong labels at a known rate among right ones: how much of them training stands (paper: an open question)."""

import random
from collections.abc import Sequence

from ..tasks import COMBINED_TAGS, Entity, phrases
from .filters import filter_entities, find_words, place_phrases, plain_words, words_of


KINDS = ("hallucinated", "meaningless", "spurious")
MEANINGLESS_TAGS = ("THING", "COLOR", "ANIMAL", "ACTION", "FEELING")  # of the sort that language models invent
RATES = ("false_positives", "drops", "swaps")
Annotation = list[list]  # [tag, phrase] pairs, as an annotator writes them; those of true labels tell their start too


def add_noise(
    rows: Sequence[dict], *, false_positives: float = 0.0, drops: float = 0.0, swaps: float = 0.0, seed: int = 0
) -> list[Annotation]:
    """
    The entities of labelled rows as an annotator would write them that errs at these rates.

    Args:
        rows: with `text` and `entities`, in SLUE's 7 tags.
        false_positives: share of all labels, afterwards, that are false. One third of them is hallucinated (an entity
            of another row, not said in this one), one third bears a meaningless tag and one third is spurious (a tag
            of the set on a word that is no entity): filter 1 sees the first, filter 2 the second, no filter the third.
        drops: share of the true entities that are missing.
        swaps: share of those left whose tag is another one of the set.
        seed: the same seed makes the same noise.

    Returns:
        by row its `[tag, phrase]` pairs, the true ones first, as `[tag, phrase, start]`: that a phrase may stand there
        twice is no error of theirs.

    Raises:
        ValueError: a rate that is no share, or rows in which no false label can be put.
    """
    for name, rate in zip(RATES, (false_positives, drops, swaps)):
        if not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ValueError(f"{name}: {rate!r} is no share; give a number from 0 to below 1")
    rng = random.Random(f"noise {seed}")
    truth = [[[tag, row["text"][at : at + n], at] for tag, at, n in row["entities"]] for row in rows]
    places = [(row, i) for row, found in enumerate(truth) for i in range(len(found))]
    dropped = set(rng.sample(places, round(drops * len(places))))
    kept = [place for place in places if place not in dropped]
    for row, i in rng.sample(kept, round(swaps * len(kept))):
        truth[row][i][0] = rng.choice([tag for tag in COMBINED_TAGS if tag != truth[row][i][0]])
    noisy = [[pair for i, pair in enumerate(found) if (row, i) not in dropped] for row, found in enumerate(truth)]
    invent = _Inventor(rows, rng)
    for number in range(round(len(kept) * false_positives / (1 - false_positives))):
        invent.put(noisy, KINDS[number % len(KINDS)])
    return noisy


class _Inventor:
    """False labels of each kind."""

    def __init__(self, rows: Sequence[dict], rng: random.Random):
        self.rng = rng
        self.words = [plain_words(row["text"]) for row in rows]
        self.free = [_free_words(row["text"], row["entities"]) for row in rows]
        self.known = [pair for row in rows for pair in phrases(row["text"], row["entities"])]

    def put(self, noisy: list[Annotation], kind: str):
        """Adds one to a row, by chance, in which there is room for it."""
        make = self.hallucinated if kind == "hallucinated" else self.on_free_word
        for _ in range(1000):
            row = self.rng.randrange(len(noisy))
            pair = make(row, kind)
            if pair is not None:
                noisy[row].append(pair)
                return
        raise ValueError(f"found no row for one more {kind} label: lower false_positives, or give more rows")

    def hallucinated(self, row: int, kind: str) -> list[str] | None:
        tag, phrase = self.rng.choice(self.known)
        return None if find_words(self.words[row], plain_words(phrase)) else [tag, phrase]

    def on_free_word(self, row: int, kind: str) -> list[str] | None:
        if not self.free[row]:
            return None
        word = self.free[row].pop(self.rng.randrange(len(self.free[row])))
        return [self.rng.choice(MEANINGLESS_TAGS if kind == "meaningless" else COMBINED_TAGS), word]


def _free_words(text: str, entities: list[Entity]) -> list[str]:
    """Words of the text that are in no entity and stand there once, so that a label on them has one place."""
    words, free = plain_words(text), []
    for word, start, end in words_of(text):
        inside = any(first < end and start < first + length for _, first, length in entities)
        if not inside and words.count(word) == 1:
            free.append(text[start:end])
    return free


def with_annotation(row: dict, pairs: Annotation, filtered: bool) -> dict:
    """
    A row with an annotation for its labels, `text` and `entities` of the schema.

    Filtered, the entities are what both filters leave. Unfiltered, all pairs stay: a phrase that is not in the
    transcript has no place there, so it is put behind the last word, and the model learns to write what nobody said.
    """
    if filtered:
        return {"text": row["text"], "entities": filter_entities(row["text"], pairs, "combined").entities}
    text, entities = row["text"], []
    for (tag, phrase, *_), spot, reason in zip(pairs, *place_phrases(row["text"], pairs)):
        if reason == "hallucinated":
            spot = (len(text) + 1, len(phrase))
            text = f"{text} {phrase}"
        if spot is not None:
            entities.append([tag, *spot])
    return {"text": text, "entities": entities}
