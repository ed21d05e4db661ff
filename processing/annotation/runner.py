"""A run over many transcripts that survives: every answer is on disk before the next one is asked for."""

import asyncio
import hashlib
import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from ..report import write_text
from .annotators import FatalError, NoAnswer, Reply, Request
from .filters import words_of
from .prompting import Labels, Unreadable, build_messages


FAILURES_IN_A_ROW = 5  # requests that get no answer, one after the other, before the run stops


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
    seen, items = defaultdict(int), []
    for row in rows.select_columns(["id", "text"]):
        same = (split, row["id"], row["text"])
        named = json.dumps([*same, seen[same]], ensure_ascii=False)
        seen[same] += 1
        items.append(Item(hashlib.sha256(named.encode()).hexdigest()[:20], split, row["id"], row["text"]))
    return items


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
        if not path.is_file():
            write_text(path, json.dumps({"run": run}, ensure_ascii=False) + "\n")
        self._read(path, run)
        self.file = open(path, "a", encoding="utf-8")

    def _read(self, path: Path, run: dict):
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the last line was being written when the run was killed
            os.truncate(path, whole)
        lines = content[:whole].decode().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); delete the line to ask again") from error
            if number == 1:
                _require_same(path, entry.get("run"), run)
            else:
                self.answers[entry["key"]].append(entry)

    def add(self, item: Item, attempt: int, reply: Reply):
        entry = {"key": item.key, "split": item.split, "id": item.id, "attempt": attempt, **asdict(reply)}
        self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.answers[item.key].append(entry)

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
    """Tokens so far, those of earlier starts too, and what they cost."""

    most: int | None = None  # tokens; None: no bound
    price_in: float = 0.0  # per million tokens
    price_out: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reserved: int = field(default=0, repr=False)  # for requests on their way

    @property
    def cost(self) -> float:
        return (self.prompt_tokens * self.price_in + self.completion_tokens * self.price_out) / 1e6

    def reserve(self, tokens: int):
        """
        Raises:
            BudgetSpent: so many more could be too many.
        """
        spent = self.prompt_tokens + self.completion_tokens
        if self.most is not None and spent + self.reserved + tokens > self.most:
            raise BudgetSpent(f"{spent:,} tokens are spent, the next request may take {tokens:,} more")
        self.reserved += tokens

    def add(self, prompt_tokens: int, completion_tokens: int):
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens


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
        self.failed_in_a_row = 0
        for entries in journal.answers.values():
            for entry in entries:
                meter.add(entry["prompt_tokens"], entry["completion_tokens"])

    def room(self) -> int | None:
        """Tokens that a transcript and its answer may take: a quarter of the context, the rest is for the examples."""
        return None if self.annotator.context_tokens is None else self.annotator.context_tokens // 4

    def unaskable(self, text: str) -> str | None:
        """Why a transcript is not asked about, if so."""
        if not words_of(text):
            return "empty: not one word in the transcript"
        tokens = self.annotator.count(text)
        needed = tokens + self.task.most_tokens(tokens)
        if self.room() is not None and needed > self.room():
            return f"too long: needs {needed} tokens with its answer, there is room for {self.room()}"
        return None

    def result(self, item: Item) -> Labels | str:
        """The labels of an item, or why it has none."""
        reason = self.unaskable(item.text)
        if reason is not None:
            return reason
        reason = self.failures.get(item.key, "not asked yet")
        for entry in self.journal.answers.get(item.key, ()):
            try:
                return self.task.finish(item.text, self.task.read(entry["text"]))
            except Unreadable as error:
                reason = f"unreadable: {error}"
        return reason

    def is_done(self, item: Item) -> bool:
        """There is nothing more to ask."""
        asked = len(self.journal.answers.get(item.key, ()))
        return (
            asked >= self.attempts or not isinstance(self.result(item), str) or self.unaskable(item.text) is not None
        )

    async def start(self, items: Sequence[Item]):
        """
        Asks about all items that are not done.

        Raises:
            BudgetSpent: before the request that could exceed it.
            FatalError, NoAnswer: the server refuses all requests, or several in a row. What was answered is kept.
        """
        queue = deque(item for item in items if not self.is_done(item))
        with tqdm(total=len(items), initial=len(items) - len(queue), desc="annotating", unit="text") as bar:

            async def work() -> BudgetSpent | None:
                while queue:
                    item = queue.popleft()
                    try:
                        await self._ask(item)
                    except BudgetSpent as error:  # for one more beside those on their way: they may leave some over
                        queue.append(item)
                        return error
                    bar.update()
                    bar.set_postfix(self._state(), refresh=False)

            try:
                async with asyncio.TaskGroup() as group:
                    workers = [group.create_task(work()) for _ in range(min(self.concurrency, len(queue)))]
            except* (FatalError, NoAnswer) as errors:
                raise errors.exceptions[0] from None
        if queue:
            raise next(worker.result() for worker in reversed(workers) if worker.result() is not None)

    def _state(self) -> dict:
        """Beside the progress bar."""
        state = {"tokens": f"{self.meter.prompt_tokens + self.meter.completion_tokens:,}"}
        if self.meter.price_in or self.meter.price_out:
            state["cost"] = f"{self.meter.cost:.2f}"
        if self.failures:
            state["no answer"] = len(self.failures)
        return state

    async def _ask(self, item: Item):
        """Asks until the answer can be read; keeps every answer."""
        messages = build_messages(self.task, item.text, self.examples(item.text))
        most = self.task.most_tokens(self.annotator.count(item.text))
        estimate = most + sum(self.annotator.count(message["content"]) + 8 for message in messages)
        for attempt in range(len(self.journal.answers.get(item.key, ())), self.attempts):
            request = Request(item.text, messages, most, attempt, self.task.schema)
            self.meter.reserve(estimate)
            try:
                reply = await self.annotator.ask(request)
            except NoAnswer as error:
                self.failures[item.key] = f"no answer: {error}"
                self.failed_in_a_row += 1
                if self.failed_in_a_row >= FAILURES_IN_A_ROW:
                    raise
                return
            finally:
                self.meter.reserved -= estimate
            self.failed_in_a_row = 0
            self.failures.pop(item.key, None)
            self.journal.add(item, attempt, reply)
            self.meter.add(reply.prompt_tokens, reply.completion_tokens)
            try:
                self.task.read(reply.text)
                return
            except Unreadable:
                continue
