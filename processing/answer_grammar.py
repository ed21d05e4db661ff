"""
What an answer may look like, byte by byte: a task's grammar, for constrained decoding (`processing/constrained.py`).

A grammar has a first state, `start`; `step` says which state follows a byte (None: the byte may not stand there), and
`is_complete` whether the answer may end. States are hashable, and few: each is gone through with every byte once.
A task of one's own brings `OneOf`, `TaggedWords`, or a subclass of `Grammar`. Standard library only.
"""

import unicodedata
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple


class Grammar:
    """Base class; a frozen dataclass, so that equal grammars are prepared for a tokenizer once."""

    start: ClassVar[Any]

    def step(self, state: Any, byte: int) -> Hashable | None:
        """The state after one more byte of UTF-8; None where it may not stand."""
        raise NotImplementedError

    def is_complete(self, state: Any) -> bool:
        """Whether the answer may end here."""
        raise NotImplementedError


@dataclass(frozen=True)
class OneOf(Grammar):
    """One of a few answers, and nothing else; a space before it is allowed: some tokenizers write one."""

    choices: tuple[str, ...]
    start = b""

    def step(self, written: bytes, byte: int) -> bytes | None:
        written += bytes([byte])
        begun = written.removeprefix(b" ")
        return written if any(choice.encode().startswith(begun) for choice in self.choices) else None

    def is_complete(self, written: bytes) -> bool:
        return written.removeprefix(b" ") in [choice.encode() for choice in self.choices]


class Place(NamedTuple):
    """Where an answer of `TaggedWords` stands."""

    tag: str = ""  # that is open
    is_filled: bool = False  # it has a word
    markup: bytes = b""  # an unfinished tag, from its <
    tail: bytes = b""  # bytes that begin a character that is forbidden


# Beyond ASCII: spaces (a phrase of these alone would be read as empty), control characters, which terminals obey, and
# what turns the direction of a text.
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
FORBIDDEN = frozenset(
    char.encode()
    for char in map(chr, range(0x80, 0x3001))
    if char.isspace() or char in TURNING or unicodedata.category(char) == "Cc"
)
FORBIDDEN_BEGINNINGS = frozenset(char[:n] for char in FORBIDDEN for n in range(1, len(char)))


@dataclass(frozen=True)
class TaggedWords(Grammar):
    """
    Words, and phrases in tags: `<PERSON> anna karenina </PERSON> left <PLACE> moscow </PLACE>`. Tags are of the set,
    closed, never nested, never empty; < and > stand in tags only, there is no space but the plain one and no control
    character.
    """

    tags: tuple[str, ...]
    start = Place()

    def step(self, place: Place, byte: int) -> Place | None:
        if place.markup or byte == ord("<"):
            return self._mark_up(place, place.markup + bytes([byte]))
        if byte == ord(">") or byte < 0x20 or byte == 0x7F:
            return None
        seen = place.tail + bytes([byte])
        if seen in FORBIDDEN:
            return None
        tail = next((t for t in (seen, bytes([byte])) if t in FORBIDDEN_BEGINNINGS), b"")
        return Place(place.tag, bool(place.tag) and (place.is_filled or byte != ord(" ")), tail=tail)

    def _mark_up(self, place: Place, markup: bytes) -> Place | None:
        if not place.tag:
            possible = [f"<{tag}>" for tag in self.tags]
        else:
            possible = [f"</{place.tag}>"] if place.is_filled else []
        if not any(tag.encode().startswith(markup) for tag in possible):
            return None
        if not markup.endswith(b">"):
            return Place(place.tag, place.is_filled, markup)
        return Place() if place.tag else Place(markup[1:-1].decode())

    def is_complete(self, place: Place) -> bool:
        return not place.tag and not place.markup
