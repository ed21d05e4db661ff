"""What the pipeline heard, with word times, as subtitles: SubRip (`.srt`) and WebVTT (`.vtt`)."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby


LINE = 42  # characters, of at most two lines
LONGEST = 6.0  # seconds that a subtitle stands
SHORTEST = 1.0  # if the next one does not come before
PAUSE = 0.6  # seconds without words that end a subtitle


@dataclass(frozen=True)
class Word:
    """A word, its times in seconds, and the entity it is of: its number and tag."""

    text: str
    start: float
    end: float
    entity: tuple[int, str] | None = None


@dataclass(frozen=True)
class Cue:
    """A subtitle: when it stands, in milliseconds, and its one or two lines."""

    start: int
    end: int
    lines: list[list[Word]]


def to_srt(result: dict) -> str:
    """
    Args:
        result: of the pipeline, called with `return_timestamps="word"`.
    """
    blocks = []
    for number, cue in enumerate(make_cues(_words(result)), start=1):
        lines = [_joined(line).replace("-->", "->") for line in cue.lines]
        blocks.append("\n".join([str(number), f"{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}", *lines, ""]))
    return "\n".join(blocks)


def to_vtt(result: dict) -> str:
    """
    The same, with each entity in a class span, `<c.PERSON>anna karenina</c>`, which a page styles with
    `::cue(.PERSON)`.
    """
    blocks = ["WEBVTT\n"]
    for cue in make_cues(_words(result)):
        lines = [_marked(line) for line in cue.lines]
        blocks.append("\n".join([f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}", *lines, ""]))
    return "\n".join(blocks)


def make_cues(words: list[Word]) -> list[Cue]:
    """
    Words as subtitles that follow each other without overlap: at most two lines of 42 characters and 6 s each. A pause
    ends one; where words must be parted that have no pause between them, the longest gap in the second half of those
    that fit does. A word that is longer than a line is broken.
    """
    words = _in_order([piece for word in words for piece in _pieces(word)])
    groups = []
    while words:
        number = _break(words)
        groups.append(words[:number])
        words = words[number:]
    cues, free = [], 0  # from when on nothing stands
    for i, group in enumerate(groups):
        start = max(_ms(group[0].start), free)
        end = max(min(_ms(group[-1].end), start + _ms(LONGEST)), start + _ms(SHORTEST))
        if i + 1 < len(groups):
            end = min(end, _ms(groups[i + 1][0].start))
        free = max(end, start + 1)  # words that are said to be spoken at once
        lines = _lines(group)
        assert lines is not None  # `_break` took no more words than fit
        cues.append(Cue(start, free, lines))
    return cues


def _words(result: dict) -> list[Word]:
    """The words of a result, and the entity of each."""
    entity_of = {}
    for number, entity in enumerate(result.get("entities", [])):
        first = result["text"][: entity["start"]].count(" ")
        for i in range(first, first + entity["word"].count(" ") + 1):
            entity_of[i] = (number, entity["entity"])
    chunks = enumerate(result["chunks"])
    return [Word(c["text"], c["timestamp"][0], c["timestamp"][1], entity_of.get(i)) for i, c in chunks]


def _pieces(word: Word) -> Iterator[Word]:
    """A word that is longer than a line in pieces, its time shared out by characters."""
    each = (word.end - word.start) / len(word.text)
    for at in range(0, len(word.text), LINE):
        text = word.text[at : at + LINE]
        yield Word(text, word.start + at * each, word.start + (at + len(text)) * each, word.entity)


def _in_order(words: list[Word]) -> list[Word]:
    """No word starts before the one it follows, or ends before it starts."""
    ordered, latest = [], 0.0
    for word in words:
        latest = max(latest, word.start)
        ordered.append(Word(word.text, latest, max(latest, word.end), word.entity))
    return ordered


def _break(words: list[Word]) -> int:
    """How many of the words the next subtitle takes."""

    def gap(number: int) -> float:
        return words[number].start - words[number - 1].end

    most = 1
    while most < len(words) and _fits(words[: most + 1]):
        if gap(most) >= PAUSE:
            return most
        most += 1
    if most == len(words):
        return most
    return max(range((most + 1) // 2, most + 1), key=lambda number: (gap(number), number))


def _fits(words: list[Word]) -> bool:
    return words[-1].end - words[0].start <= LONGEST and _lines(words) is not None


def _lines(words: list[Word]) -> list[list[Word]] | None:
    """Words in one line, or else in two of about the same length; None if they don't fit."""
    if len(_joined(words)) <= LINE:
        return [words]
    halves = [[words[:i], words[i:]] for i in range(1, len(words))]
    lines = min(halves, key=lambda pair: max(len(_joined(line)) for line in pair))
    return lines if all(len(_joined(line)) <= LINE for line in lines) else None


def _joined(words: list[Word]) -> str:
    return " ".join(word.text for word in words)


def _marked(line: list[Word]) -> str:
    """A line in WebVTT's markup."""
    spans = []
    for entity, words in groupby(line, key=lambda word: word.entity):
        text = html.escape(_joined(list(words)), quote=False)
        spans.append(f"<c.{entity[1]}>{text}</c>" if entity else text)
    return " ".join(spans)


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _clock(ms: int, point: str) -> str:
    seconds, ms = divmod(ms, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{ms:03d}"


__all__ = ["make_cues", "to_srt", "to_vtt"]
