"""
The tasks: what a model is asked, what it should answer, and how its answer is read.

ASR answers with the transcript, NER with the transcript and inline tags, SA with one word. A new task is one more
subclass of `Task` in `TASKS`. Standard library only.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .answer_grammar import Grammar, OneOf, TaggedWords


# OntoNotes tags, and what SLUE makes of them; five of them it drops.
RAW_TO_COMBINED = {
    "DATE": "WHEN",
    "TIME": "WHEN",
    "CARDINAL": "QUANT",
    "ORDINAL": "QUANT",
    "QUANTITY": "QUANT",
    "MONEY": "QUANT",
    "PERCENT": "QUANT",
    "GPE": "PLACE",
    "LOC": "PLACE",
    "NORP": "NORP",
    "ORG": "ORG",
    "LAW": "LAW",
    "PERSON": "PERSON",
}
DROPPED_TAGS = ("FAC", "EVENT", "WORK_OF_ART", "PRODUCT", "LANGUAGE")
RAW_TAGS = (*RAW_TO_COMBINED, *DROPPED_TAGS)
COMBINED_TAGS = tuple(dict.fromkeys(RAW_TO_COMBINED.values()))
TAG_SETS = {"raw": RAW_TAGS, "combined": COMBINED_TAGS}
ALL_TAGS = tuple(sorted({*RAW_TAGS, *COMBINED_TAGS}))  # no set: `datasets` would hash it differently in each process
SENTIMENTS = ("Negative", "Neutral", "Positive")
ENGLISH_RATE = 3.5  # an LLM's tokens in a second of English speech, at most

Entity = list  # [tag, first character, number of characters]


@dataclass
class Answer:
    """What an answer says. `malformed` counts the tags in it that could not be used."""

    text: str | None = None
    entities: list[Entity] | None = None
    sentiment: str | None = None
    malformed: int = 0


@dataclass(frozen=True)
class Task:
    """A question about a clip: `name` in recipes and on the command line, `prompt` as the recipe words it."""

    prompt: str
    name: ClassVar[str]
    label: ClassVar[str]  # column of the schema that a row must have filled to be scored
    classes: ClassVar[tuple[str, ...] | None] = None  # the answers, where they are few
    tokens_per_second: ClassVar[int] = 0  # of English speech: more than a true answer needs

    def target(self, row: dict) -> str | None:
        """The answer to learn for a row of the project's schema; None where the row has no label for this task."""
        raise NotImplementedError

    def parse(self, answer: str) -> Answer:
        """Reads a model's answer, whatever it holds: never raises."""
        raise NotImplementedError

    @classmethod
    def grammar(cls, tags: Sequence[str] = COMBINED_TAGS) -> Grammar | None:
        """
        What constrained decoding keeps answers to, of a model that was trained on these tags; None for any answer. By
        default one of the classes, where there are some.
        """
        return None if cls.classes is None else OneOf(cls.classes)

    @classmethod
    def most_tokens(cls, seconds: float, rate: float = ENGLISH_RATE) -> int:
        """
        Bound on the answer to a clip of so many seconds, for answers that do not end by themselves. `rate` is how many
        tokens a second of speech usually has: in other scripts several times as many as in English.
        """
        return 16 + int(cls.tokens_per_second * max(1.0, rate / ENGLISH_RATE) * seconds)


class TranscriptTask(Task):
    """ASR: the words."""

    name, label = "asr", "text"
    tokens_per_second = 7

    def target(self, row: dict) -> str:
        return row["text"]

    def parse(self, answer: str) -> Answer:
        """The words; a model that also learnt to tag entities puts tags in transcripts at times, which nobody said."""
        return Answer(text=" ".join(KNOWN_TAG.sub(" ", answer).split()))


class EntityTask(Task):
    """NER: the words, entities in tags: `<PERSON> anna karenina </PERSON> left <PLACE> moscow </PLACE>`."""

    name, label = "ner", "entities"
    tokens_per_second = 12

    def target(self, row: dict) -> str | None:
        return None if row["entities"] is None else write_tags(row["text"], row["entities"])

    def parse(self, answer: str) -> Answer:
        return read_tags(answer)

    @classmethod
    def grammar(cls, tags: Sequence[str] = COMBINED_TAGS) -> TaggedWords:
        return TaggedWords(tuple(tags))


class SentimentTask(Task):
    """SA: one word."""

    name, label = "sa", "sentiment"
    classes = SENTIMENTS

    def target(self, row: dict) -> str | None:
        return row["sentiment"]

    def parse(self, answer: str) -> Answer:
        """The first of the three classes that stands there as a whole word; where there is none, malformed."""
        found = re.search(rf"\b({'|'.join(SENTIMENTS)})\b", answer, flags=re.IGNORECASE)
        return Answer(sentiment=found[1].capitalize()) if found else Answer(malformed=1)


TASKS: dict[str, type[Task]] = {task.name: task for task in (TranscriptTask, EntityTask, SentimentTask)}
# By command: the tasks that a model must be trained for, of one set all.
NEEDED = {"transcribe": ({"asr"},), "understand": ({"ner"}, {"asr", "sa"}), "serve": ({"asr"}, {"ner"})}


def check_trained(model: str, trained: Iterable[str], command: str):
    """Raises ValueError where a model, by the tasks it was trained for, can't do what a command of `sense` asks."""
    trained = list(trained)
    if not any(tasks.issubset(trained) for tasks in NEEDED[command]):
        needed = ", or ".join(" and ".join(sorted(tasks)) for tasks in NEEDED[command])
        raise ValueError(f"{model} was trained for {', '.join(trained)}; this needs {needed}")


def make_tasks(prompts: dict[str, str], names: Iterable[str] | None = None) -> dict[str, Task]:
    """
    The tasks of these names (all in `prompts` by default), each with its prompt.

    Raises:
        ValueError: a name that is no task, or a task without a prompt.
    """
    tasks = {}
    for name in prompts if names is None else names:
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
        if name not in prompts:
            raise ValueError(f"task {name!r} has no prompt; the prompts are for {', '.join(prompts) or 'none'}")
        tasks[name] = TASKS[name](prompts[name])
    return tasks


def mix(
    rows: Sequence[dict], tasks: dict[str, Task], weights: dict[str, float], balance: bool = False, seed: int = 0
) -> list[tuple[int, str]]:
    """
    What one epoch consists of: pairs of a row's index and a task's name.

    Args:
        rows: of the project's schema; a task takes those that have a label for it.
        weights: how often each of its rows comes, by task: 2.0 twice, 0.5 every other one, by chance.
        balance: a task whose answers are a few classes shows each of them equally often, in as many rows.
        seed: of the chances.

    Raises:
        ValueError: a task has not one labelled row, or a weight by which none is shown.
    """
    rng, pairs = random.Random(seed), []
    for name, weight in weights.items():
        groups: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            target = tasks[name].target(row)
            if target is not None:
                groups.setdefault(target if balance and tasks[name].classes else "", []).append(index)
        if not groups:
            raise ValueError(f"task {name!r}: not one of {len(rows)} rows has a label for it")
        labelled = sum(map(len, groups.values()))
        number = weight * labelled / len(groups)
        if not round(number):
            raise ValueError(f"tasks: {name}: {weight} of {labelled} labelled rows is none; give a larger weight")
        for _, indices in sorted(groups.items()):
            repeats, rest = divmod(round(number), len(indices))
            pairs += [(index, name) for index in indices * repeats + sorted(rng.sample(indices, rest))]
    return pairs


def combine(entities: Iterable[Entity]) -> list[Entity]:
    """Raw OntoNotes tags -> SLUE's 7; combined tags stay as they are, all others are dropped."""
    mapped = ((RAW_TO_COMBINED.get(tag, tag), start, length) for tag, start, length in entities)
    return [[tag, start, length] for tag, start, length in mapped if tag in COMBINED_TAGS]


def phrases(text: str, entities: Iterable[Entity]) -> list[list[str]]:
    """`[[tag, phrase], ...]`, as SLUE scores entities."""
    return [[tag, text[start : start + length]] for tag, start, length in entities]


def write_tags(text: str, entities: Iterable[Entity]) -> str:
    """
    The text with each entity between tags, all parted by single spaces. Where entities overlap, the one that starts
    first stays, of two that start together the longer one: an inline tag can't hold both. What stands in the text
    itself and would be read as a tag loses its angle bracket; an entity of white space alone is left out.

    Raises:
        ValueError: an entity that reaches out of the text.
    """
    pieces, at = [], 0
    for tag, start, length in sorted(entities, key=lambda e: (e[1], -e[2])):
        if not (0 <= start and 0 < length and start + length <= len(text)):
            raise ValueError(
                f"entity {[tag, start, length]} reaches out of its text of {len(text)} characters: {text!r}"
            )
        phrase = _without_tags(text[start : start + length])
        if start >= at and phrase.strip():
            pieces += [_without_tags(text[at:start]), f"<{tag}>", phrase, f"</{tag}>"]
            at = start + length
    return " ".join(" ".join([*pieces, _without_tags(text[at:])]).split())


# Possessive quantifiers (++, *+) never step back: else a long run of spaces would take minutes.
TAG = re.compile(r"<\s*+(/?+)\s*+([A-Za-z_]++)\s*+>")
KNOWN_TAG = re.compile(rf"<\s*+/?+\s*+(?:{'|'.join(ALL_TAGS)})\s*+>", flags=re.IGNORECASE)
BROKEN_OFF = re.compile(r"<\s*+/?+\s*+([A-Z_]++)\s*+$")  # an answer may end within a tag
IN_TEXT = re.compile(r"((?:<[\s/]*+)++)([A-Za-z_]++\s*+>|[A-Z_]++\s*+$)?+")  # brackets, and what makes them either


def _without_tags(text: str) -> str:
    return IN_TEXT.sub(lambda found: f" {found[2]}" if found[2] else found[1], text)


def read_tags(answer: str) -> Answer:
    """
    The words of an answer and its entities; a tag that is unknown, unclosed, unopened, nested or empty is left out
    and counted, its words stay. `<PERSON> anna </PERSON>` and `<person>anna</person>` read the same.
    """
    words, entities, malformed = [], [], 0
    if (broken := BROKEN_OFF.search(answer)) and any(tag.startswith(broken[1]) for tag in ALL_TAGS):
        answer, malformed = answer[: broken.start()], 1
    opened: tuple[str, int] | None = None  # tag and the number of words before it
    at = 0
    for found in TAG.finditer(answer):
        words += answer[at : found.start()].split()
        at = found.end()
        closing, tag = bool(found[1]), found[2].upper()
        if tag not in ALL_TAGS:
            malformed += 1
        elif not closing:
            malformed += opened is not None  # the one before was never closed, or this one is nested in it
            opened = (tag, len(words))
        elif opened is None or opened[0] != tag or opened[1] == len(words):
            malformed += 1
            opened = None
        else:
            entities.append((tag, opened[1], len(words)))
            opened = None
    words += answer[at:].split()
    malformed += opened is not None
    return Answer(text=" ".join(words), entities=_offsets(words, entities), malformed=malformed)


def _offsets(words: list[str], entities: list[tuple[str, int, int]]) -> list[Entity]:
    """Spans of words -> spans of characters in the words joined by spaces."""
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    return [[tag, starts[first], starts[last] - 1 - starts[first]] for tag, first, last in entities]
