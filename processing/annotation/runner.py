"""A run over many transcripts that survives: every answer is on disk before the next one is asked for."""

import asyncio
import hashlib
import json
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .annotators import FatalError, NoAnswer, Refused, Reply, Request
from .filters import words_of
from .prompting import FRAME, Labels, Unreadable, build_messages


# Requests without an answer, one after the other, before the run stops; and refusals, where nothing was ever answered.
FAILURES_IN_A_ROW, REFUSALS_IN_A_ROW = 5, 20


class BudgetSpent(RuntimeError):
    """`--max_tokens_total` is reached."""


@dataclass(frozen=True)
class Item:
    """A transcript to annotate. `key` is the same on every start of the run, whatever rows were added since."""

    key: str
    split: str
    id: str
    text: str


def make_items(split: str, rows: datasets.Dataset) -> list[Item]:
    """Items of a split's rows; of rows with the same id and text each gets a key of its own."""
    seen: defaultdict = defaultdict(int)
    items = []
    for row in rows.select_columns(["id", "text"]):
        same = (split, row["id"], row["text"])
        named = json.dumps([*same, seen[same]], ensure_ascii=False)
        seen[same] += 1
        items.append(Item(hashlib.sha256(named.encode()).hexdigest()[:20], split, row["id"], row["text"]))
    return items


@contextmanager
def only_one(folder: Path, command: str) -> Iterator[None]:
    """Makes a folder and keeps it for this process. Raises SystemExit where another `command` is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise SystemExit(f"{folder}: another {command} is at work there") from None


class Journal:
    """
    OUT/answers.jsonl: what the run is, then every answer in the order of arrival, each written through to the disk.

    Args:
        path: of the file.
        run: what the answers depend on; another run's file is refused.

    Raises:
        ValueError: the file is of a run with other settings, or damaged before its end.
    """

    def __init__(self, path: Path, run: dict):
        self.answers: dict[str, list[dict]] = defaultdict(list)
        is_new = not (path.is_file() and self._read(path, run))
        self.file = open(path, "a", encoding="utf-8")
        if is_new:
            self._put({"run": run})

    def _read(self, path: Path, run: dict) -> bool:
        """Whether there is anything in the file."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the last line was being written when the run was killed
            os.truncate(path, whole)
        lines = content[:whole].split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); delete the line to ask again") from error
            if number == 1:
                _require_same(path, entry.get("run"), run)
            else:
                self.answers[entry["key"]].append(entry)
        return bool(lines)

    def _put(self, entry: dict):
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def write(self, entry: dict):
        """Keeps an answer, under its `key`."""
        self._put(entry)
        self.answers[entry["key"]].append(entry)

    def add(self, item: Item, attempt: int, reply: Reply, estimate: int):
        """Keeps a reply, with what was estimated for it: the next start bounds its spending by the same experience."""
        entry = {"key": item.key, "split": item.split, "id": item.id, "attempt": attempt, "estimate": estimate}
        self.write(entry | asdict(reply))

    def close(self):
        self.file.close()


def _require_same(path: Path, found: dict | None, run: dict):
    if found != run:
        changed = [name for name in run if (found or {}).get(name) != run[name]]
        raise ValueError(
            f"{path} holds answers of another run ({', '.join(changed)} changed): "
            "choose another --output, or delete it"
        )


@dataclass
class Meter:
    """
    Tokens of all answers, those of earlier starts too, and what they cost. What a server bills for requests that
    failed on the way is not known here.
    """

    most: int | None = None  # tokens; None: no bound
    price_in: float = 0.0  # per million tokens
    price_out: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reserved: int = field(default=0, repr=False)  # for requests on their way
    scale: float = field(default=1.0, repr=False)  # most tokens that a request took, by what was estimated for it

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost(self) -> float:
        return (self.prompt_tokens * self.price_in + self.completion_tokens * self.price_out) / 1e6

    def reserve(self, estimate: int) -> int:
        """
        Tokens that are kept for a request, to be given back when its answer is counted.

        Raises:
            BudgetSpent: so many more could be too many.
        """
        tokens = math.ceil(estimate * self.scale)
        if self.most is not None and self.total + self.reserved + tokens > self.most:
            raise BudgetSpent(f"{self.total:,} tokens are spent, the next request may take {tokens:,}")
        self.reserved += tokens
        return tokens

    def add(self, prompt_tokens: int, completion_tokens: int, estimate: int = 0):
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        if estimate:
            self.scale = max(self.scale, (prompt_tokens + completion_tokens) / estimate)


class Run:
    """
    Annotates items with bounded concurrency.

    Args:
        task: see `ANNOTATIONS`.
        annotator: who is asked.
        journal: where the answers go.
        meter: of tokens.
        examples: few-shot examples for a transcript, `(transcript, answer)`.
        attempts: how often a transcript is asked whose answer can't be read.
        concurrency: requests on their way at a time.
    """

    def __init__(
        self,
        task,
        annotator,
        journal: Journal,
        meter: Meter,
        examples: Callable[[str], Sequence[tuple[str, str]]],
        attempts: int = 3,
        concurrency: int = 8,
    ):
        self.task, self.annotator, self.journal, self.meter = task, annotator, journal, meter
        self.examples, self.attempts, self.concurrency = examples, attempts, concurrency
        self.failures: dict[str, str] = {}  # key: why this start got no answer
        self.failed_in_a_row = self.refused_in_a_row = 0
        self.stopped: Exception | None = None
        for entries in journal.answers.values():
            for entry in entries:
                meter.add(entry["prompt_tokens"], entry["completion_tokens"], entry.get("estimate", 0))

    @property
    def room(self) -> int | None:
        """
        Tokens that a transcript and its answer may take: a quarter of the context; instruction and examples share the
        rest.
        """
        return None if self.annotator.context_tokens is None else self.annotator.context_tokens // 4

    def unaskable(self, text: str) -> str | None:
        """Why a transcript is not asked about, if so."""
        if not words_of(text):
            return "empty: not one word in the transcript"
        tokens = self.annotator.count(text)
        needed = tokens + self.task.most_tokens(tokens)
        if self.room is not None and needed > self.room:
            return f"too long: needs {needed} tokens with its answer, there is room for {self.room}"
        return None

    def result(self, item: Item) -> Labels | str:
        """The labels of an item, or why it has none."""
        reason = self.failures.get(item.key) or self.unaskable(item.text) or "not asked yet"
        for entry in self.journal.answers.get(item.key, ()):
            try:
                return self.task.finish(item.text, self.task.read(entry["text"]))
            except Unreadable as error:
                reason = f"unreadable: {error}"
        return reason

    def is_done(self, item: Item) -> bool:
        """There is nothing more to ask."""
        if len(self.journal.answers.get(item.key, ())) >= self.attempts or self.unaskable(item.text) is not None:
            return True
        return not isinstance(self.result(item), str)

    async def start(self, items: Sequence[Item]):
        """
        Asks about all items that are not done. Where it stops early, requests on their way are waited for.

        Raises:
            BudgetSpent: the next request could exceed it.
            FatalError, NoAnswer: the server turns all requests down, or several in a row get no answer.
        """
        queue = deque(item for item in items if not self.is_done(item))
        with tqdm(total=len(items), initial=len(items) - len(queue), desc="annotating", unit="text") as bar:
            spent = None

            async def work():
                nonlocal spent
                while queue and not self.stopped:
                    item = queue.popleft()
                    try:
                        await self._ask(item)
                    except BudgetSpent as error:  # for one more beside those on their way: they may leave some over
                        queue.append(item)
                        spent = error
                        return
                    except (FatalError, NoAnswer) as error:
                        self.stopped = self.stopped or error
                    bar.update()
                    bar.set_postfix(self._state(), refresh=False)

            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(queue))):
                    group.create_task(work())
        if self.stopped:
            raise self.stopped
        if spent and queue:  # the last worker's, when nothing else was on its way
            raise spent

    def _state(self) -> dict:
        """Beside the progress bar."""
        state: dict = {"tokens": f"{self.meter.total:,}"}
        if self.meter.price_in or self.meter.price_out:
            state["cost"] = f"{self.meter.cost:.2f}"
        if self.annotator.retries:
            state["retries"] = self.annotator.retries
        if self.failures:
            state["no answer"] = len(self.failures)
        return state

    def _messages(self, item: Item) -> list[dict]:
        return build_messages(self.task, item.text, self.examples(item.text))

    def _most_tokens(self, text: str, attempt: int) -> int:
        """Bound on an answer. After one that could not be read there is more room: it may have been cut off."""
        tokens = self.annotator.count(text)
        most = self.task.most_tokens(tokens) * 4**attempt
        return most if self.room is None else min(most, self.room - tokens)

    async def _ask(self, item: Item):
        """Asks until the answer can be read; keeps every answer."""
        messages = self._messages(item)
        asked = sum(self.annotator.count(message["content"]) + FRAME for message in messages)
        for attempt in range(len(self.journal.answers.get(item.key, ())), self.attempts):
            most = self._most_tokens(item.text, attempt)
            estimate = asked + most
            reserved = self.meter.reserve(estimate)
            try:
                reply = await self.annotator.ask(Request(item.text, messages, most, attempt, self.task.schema))
            except NoAnswer as error:
                return self._note_failure(item, error)
            finally:
                self.meter.reserved -= reserved
            self.failed_in_a_row = self.refused_in_a_row = 0
            self.journal.add(item, attempt, reply, estimate)
            self.meter.add(reply.prompt_tokens, reply.completion_tokens, estimate)
            try:
                self.task.read(reply.text)
                return
            except Unreadable:
                continue

    def _note_failure(self, item: Item, error: NoAnswer):
        """A transcript is left for the next start; raises the error where there have been too many."""
        self.failures[item.key] = str(error) if isinstance(error, Refused) else f"no answer: {error}"
        if isinstance(error, Refused):
            self.refused_in_a_row += 1
            if self.refused_in_a_row >= REFUSALS_IN_A_ROW and not self.journal.answers:
                raise error
        else:
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= FAILURES_IN_A_ROW:
                raise error
