"""
The two filters (paper: synthetic data): an annotator's phrases -> entities on the transcript, and why others fell.

Filter 1 drops what is not said: a phrase must stand in the transcript as whole words, each mention on its own words.
Filter 2 drops meaningless tags: a tag must be of the tag set, `TAG_NAMES` maps near misses to it first.

Both compare words after one normalisation, `words_of`: lower case; `. , ! ? ;` dropped ("U.S." is "us"), all other
marks part words, but for combining ones, which are of their letter; a possessive is a word of its own ("europe's" is
"europe 's"), as SLUE scores them.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..tasks import RAW_TO_COMBINED, TAG_SETS, Entity


DROPPED_MARKS = ".,!?;"
REASONS = {
    "empty": "not one word in the phrase",
    "hallucinated": "the phrase is not in the transcript as whole words",
    "duplicate": "listed more often than it is said",
    "overlap": "its words are in another, longer or earlier entity",
    "meaningless": "the tag is not in the tag set",
}
# What annotators write for OntoNotes' tags, and SLUE's own names for them.
_NEAR_MISSES = {
    "PER": "PERSON",
    "PEOPLE": "PERSON",
    "NAME": "PERSON",
    "HUMAN": "PERSON",
    "CHARACTER": "PERSON",
    "LOCATION": "LOC",
    "CITY": "GPE",
    "COUNTRY": "GPE",
    "STATE": "GPE",
    "ORGANIZATION": "ORG",
    "ORGANISATION": "ORG",
    "COMPANY": "ORG",
    "INSTITUTION": "ORG",
    "NATIONALITY": "NORP",
    "RELIGION": "NORP",
    "GROUP": "NORP",
    "NUMBER": "CARDINAL",
    "NUM": "CARDINAL",
    "COUNT": "CARDINAL",
    "DAY": "DATE",
    "MONTH": "DATE",
    "YEAR": "DATE",
    "DURATION": "DATE",
    "CURRENCY": "MONEY",
    "PERCENTAGE": "PERCENT",
    "DISTANCE": "QUANTITY",
    "FACILITY": "FAC",
    "BUILDING": "FAC",
    "WORKOFART": "WORK_OF_ART",
    "LANG": "LANGUAGE",
}
TAG_NAMES = {
    "raw": {**_NEAR_MISSES, "PLACE": "GPE", "WHEN": "DATE", "QUANT": "CARDINAL"},
    "combined": {
        **RAW_TO_COMBINED,
        **{name: RAW_TO_COMBINED[tag] for name, tag in _NEAR_MISSES.items() if tag in RAW_TO_COMBINED},
    },
}


@dataclass
class Filtered:
    """What is left of an annotation, and what is not."""

    entities: list[Entity]  # on the transcript, by place
    rejected: list[dict] = field(default_factory=list)  # tag, phrase, reason
    mapped: list[dict] = field(default_factory=list)  # tag, phrase, to


def words_of(text: str) -> list[tuple[str, int, int]]:
    """The words of a text, normalised, each with its first character in the text and the one after its last."""
    words: list[tuple[str, int, int]] = []
    letters: list[tuple[str, int]] = []  # of the word that is being read
    for at, letter in enumerate([*text, " "]):
        for sign in letter.lower().replace("’", "'"):
            if sign in DROPPED_MARKS:
                continue
            # A combining mark is of the letter that it follows.
            is_mark = unicodedata.category(sign).startswith("M") and letters and letters[-1][0] != "'"
            if sign.isalnum() or sign == "'" or is_mark:
                letters.append((sign, at))
            elif letters:
                words += _split_possessive(letters)
                letters = []
    return words


def plain_words(text: str) -> list[str]:
    """The words alone."""
    return [word for word, _, _ in words_of(text)]


def find_words(said: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where a phrase begins in a text, each given by its words; nowhere, if it has none."""
    length = len(wanted)
    return [at for at in range(len(said)) if said[at : at + length] == wanted] if length else []


def _split_possessive(letters: list[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """The letters between two gaps -> a word, or two where it ends in 's; quotation marks around it fall."""
    word = "".join(sign for sign, _ in letters)
    inner = word.strip("'")
    start = word.find(inner)
    cuts = [(start, start + len(inner))]
    if inner.endswith("'s") and len(inner) > 2:
        cuts = [(start, start + len(inner) - 2), (start + len(inner) - 2, start + len(inner))]
    elif inner == "s" and start:  # a possessive that stands alone, as SLUE's texts have it
        cuts = [(start - 1, start + 1)]
    return [(word[a:b], letters[a][1], letters[b - 1][1] + 1) for a, b in cuts if a < b]


def rename_tag(tag: str, tag_set: str) -> str | None:
    """The tag of the set that an annotator's tag stands for; None where there is none (filter 2)."""
    name = "_".join(tag.strip().upper().replace("-", " ").split())
    name = TAG_NAMES[tag_set].get(name, name)
    return name if name in TAG_SETS[tag_set] else None


def place_phrases(text: str, pairs: Sequence[Sequence]) -> tuple[list[tuple[int, int] | None], list[str | None]]:
    """
    Where each `[tag, phrase]` stands in the text (filter 1): of its mentions the first whose words are free, longer
    phrases before shorter ones; of a `[tag, phrase, start]` the one nearest to that character.

    Returns:
        by pair its first character and length, or None; and by pair the reason of the None, a key of `REASONS`.
    """
    words = words_of(text)
    said = [word for word, _, _ in words]
    wanted = [plain_words(phrase) for _, phrase, *_ in pairs]
    holder: dict[int, int] = {}  # a word of the text: the pair that has it
    spots: list[tuple[int, int] | None] = [None] * len(pairs)
    reasons: list[str | None] = [None] * len(pairs)
    for i in sorted(range(len(pairs)), key=lambda i: (-len(wanted[i]), i)):
        length = len(wanted[i])
        mentions = find_words(said, wanted[i])
        free = [at for at in mentions if not holder.keys() & set(range(at, at + length))]
        if free:
            near = pairs[i][2] if len(pairs[i]) > 2 else 0
            at = min(free, key=lambda at: abs(words[at][1] - near))
            holder |= dict.fromkeys(range(at, at + length), i)
            spots[i] = (words[at][1], words[at + length - 1][2] - words[at][1])
        elif not mentions:
            reasons[i] = "hallucinated" if length else "empty"
        else:
            others = {holder[k] for at in mentions for k in range(at, at + length) if k in holder}
            reasons[i] = "duplicate" if all(wanted[other] == wanted[i] for other in others) else "overlap"
    return spots, reasons


def filter_tags(pairs: Iterable[Sequence[str]], tag_set: str) -> Filtered:
    """Filter 2 alone: `entities` are pairs as given, still unplaced, under tags of the set."""
    found = Filtered([])
    for tag, phrase, *start in pairs:
        name = rename_tag(tag, tag_set)
        if name is None:
            found.rejected.append({"tag": tag, "phrase": phrase, "reason": "meaningless"})
            continue
        if name != tag:
            found.mapped.append({"tag": tag, "phrase": phrase, "to": name})
        found.entities.append([name, phrase, *start])
    return found


def filter_phrases(text: str, pairs: Sequence[Sequence[str]]) -> Filtered:
    """Filter 1 alone: the entities on the text, under the tags as they were written."""
    found = Filtered([])
    for (tag, phrase, *_), spot, reason in zip(pairs, *place_phrases(text, pairs)):
        if spot is None:
            found.rejected.append({"tag": tag, "phrase": phrase, "reason": reason})
        else:
            found.entities.append([tag, *spot])
    found.entities.sort(key=lambda entity: entity[1])
    return found


def filter_entities(text: str, pairs: Iterable[Sequence[str]], tag_set: str) -> Filtered:
    """
    Both filters, tags first, so that a meaningless entity takes no words from a good one.

    Args:
        text: the transcript.
        pairs: `[tag, phrase]`, as the annotator wrote them, or `[tag, phrase, start]` where it says where.
        tag_set: `"combined"` (SLUE's 7) or `"raw"` (OntoNotes' 18).
    """
    tagged = filter_tags(pairs, tag_set)
    placed = filter_phrases(text, tagged.entities)
    return Filtered(placed.entities, tagged.rejected + placed.rejected, tagged.mapped)
