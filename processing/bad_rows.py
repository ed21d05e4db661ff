"""
Rows that can't be used: all of them are found before training begins, and listed or left out (`on_bad_row`).

What is wrong with a row is a dict: `kind` (one of `KINDS`), `field` (None: the whole line), `message` (what was found,
and what to do).
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub import constants
from tqdm.auto import tqdm

from .processing_sense import check_finite, check_length, open_audio, read_file
from .report import write_text


ON_BAD_ROW = ("stop", "skip")
# Of a line, of its fields, of its audio file, of what is in that.
KINDS: tuple[str, ...] = (
    "bad_utf8",
    "bad_json",
    "wrong_field",
    "empty_text",
    "wrong_entities",
    "wrong_sentiment",
    "missing_file",
)
KINDS += ("empty_file", "unreadable", "truncated", "too_long", "not_finite", "too_short", "silent")
# There is nothing in these to learn from. To be scored on them is fair: the right answer is to hear nothing.
TRAINING_ONLY = ("empty_text", "too_short", "silent")
MIN_SECONDS = 0.1  # no word is said in less; an audio token is 0.12 s
SILENCE = 1e-4  # -80 dB of full scale, three steps of 16 bits: a clip that stays as close to its mean holds no speech
MOST_LISTED = 1000  # rows, in an error's message
BATCH = 64  # clips that are listened to before verdicts are written
# From so many clips on, those that were found good are kept: fewer are decoded again in seconds.
WORTH_KEEPING = 1000
BAD_ROWS = "bad_rows.jsonl"
VERDICT = ("where", "bad")  # columns beside the schema's: where a row stands, and what is wrong with it


class RowError(ValueError):
    """What is wrong with a row."""

    def __init__(self, kind: str, field: str | None, message: str):
        super().__init__(message if field is None else f"{field}: {message}")
        self.problem = problem(kind, field, message)


class BadRows:
    """
    The rows of one job that can't be used, by where they stand. `load_corpus` notes those with wrong fields, `check`
    those whose clips can't be heard, `settle` says what becomes of them.

    Args:
        on_bad_row: `"stop"` raises, `"skip"` goes on without them.
        folder: where `skip` writes bad_rows.jsonl; it is made if need be. None writes none.
        training: rows with nothing to learn from (`TRAINING_ONLY`) are bad too.

    Raises:
        ValueError: another `on_bad_row`.
    """

    def __init__(self, on_bad_row: str = "stop", folder: str | os.PathLike | None = None, training: bool = False):
        if on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row: give {' or '.join(ON_BAD_ROW)}, found {on_bad_row!r}")
        self.on_bad_row, self.training = on_bad_row, training
        self.path = None if folder is None else Path(folder) / BAD_ROWS
        self.found: dict[str, dict] = {}
        self.looked_at = 0
        self.listed: dict[str, dict] = {}
        self.bytes_read = 0  # of the list

    def __len__(self) -> int:
        return len(self.found)

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each kind that there is."""
        return count_kinds(self.found.values())

    def note(self, row: dict, problem: dict):
        """Keeps what is wrong with a row of the schema that has its `where` too."""
        self.found[row["where"]] = {"where": row["where"], "id": row["id"], "file": row["audio"]["path"], **problem}

    def leave_out(self, rows):
        """The rows of a `Dataset` with nothing in their `bad` column, which goes; notes the others."""
        self.looked_at += len(rows)
        bad = {index: problem for index, problem in enumerate(rows["bad"]) if problem is not None}
        return self._without(rows.remove_columns("bad"), bad)

    def _without(self, rows, bad: dict[int, dict]):
        """The rows without some, by index, that are noted."""
        for index, problem in bad.items():
            self.note(rows[index], problem)
        return rows.select([index for index in range(len(rows)) if index not in bad]) if bad else rows

    def check(self, rows):
        """
        The rows, as `load_corpus` gives them with `bad_rows`, that can be used; notes the others. Decodes each clip
        once: the processes share them out, all go on with the same rows.

        Raises:
            ValueError: not one is left.
        """
        rows = self._without(rows, dict(sorted(gather_object(list(self._listen(rows).items())))))
        if not len(rows):
            raise ValueError(f"not one row is left: {self}")
        return rows.remove_columns("where")

    def _listen(self, rows) -> dict[int, dict]:
        """By index, what is wrong with rows of this process's share."""
        known, bad, state = GoodClips(), {}, PartialState()
        share = range(state.process_index, len(rows), state.num_processes)

        def listen(row: dict) -> tuple[str | None, dict | None]:
            key = known.key(row["audio"])
            return key, None if key in known.keys else find_problem(row["audio"])

        looked_at = rows.select_columns(["text", "audio"])
        bar = tqdm(total=len(share), desc="checking clips", unit="clip", disable=not state.is_main_process)
        with bar, ThreadPoolExecutor(count_cores()) as pool:  # libsndfile works without Python's lock
            for first in range(0, len(share), BATCH):
                indices = share[first : first + BATCH]
                part = looked_at.select(indices)
                heard = list(pool.map(listen, part))
                for index, text, (_, clip) in zip(indices, part["text"], heard):
                    if (found := self._judge(text, clip)) is not None:
                        bad[index] = found
                if len(rows) >= WORTH_KEEPING:
                    known.add([key for key, clip in heard if key is not None and clip is None])
                bar.update(len(part))
        return bad

    def _judge(self, text: str, clip: dict | None) -> dict | None:
        """What is wrong with a row, by its text and by what is wrong with its clip."""
        if not self.training:
            return None if clip is not None and clip["kind"] in TRAINING_ONLY else clip
        empty = problem("empty_text", "text", f"{text!r}; write down what is said, or delete the row")
        return clip if any(map(str.isalnum, text)) else empty

    def stream(self, rows):
        """
        The rows of an `IterableDataset` that have nothing in their `bad` column, which goes, as does `where`. Their
        clips are not heard.

        Raises:
            ValueError: while it is read, at the first bad row, where these stop.
        """
        features = rows.features.copy()
        for name in VERDICT:
            del features[name]
        # `remove_columns` forgets the features, and would have `datasets` ask for torchcodec.
        fine = rows.filter(partial(self.can_use, listen=False, write=False))
        return fine.map(remove_columns=list(VERDICT), features=features)

    def usable(self, rows) -> Iterator[dict]:
        """
        The rows of a stream, as `load_corpus` gives them with `bad_rows`, that can be used. Each is checked as it
        comes, its clip too. All processes read the same rows, the main one lists the bad ones.

        Raises:
            ValueError: at the first bad row, where these stop.
        """
        write = PartialState().is_main_process
        return (without_verdict(row) for row in rows if self.can_use(row, write=write))

    def can_use(self, row: dict, listen: bool = True, write: bool = True) -> bool:
        """
        Whether a row of a stream can be used, its clip too if it is to `listen`. `write` adds a bad one to
        bad_rows.jsonl at once, since nobody knows the last, if it is not there: of an earlier run or epoch.

        Raises:
            ValueError: it can not, where these stop.
        """
        found = row["bad"]
        if found is None and listen:
            found = self._judge(row["text"], find_problem(row["audio"]))
        self.looked_at += 1
        if found is None:
            return True
        self.note(row, found)
        if self.on_bad_row == "stop":
            raise ValueError(str(self))
        if write and self.path is not None and row["where"] not in self.read_list():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:  # several processes do: a whole line at once
                file.write(_lines([self.found[row["where"]]]).encode())
        return False

    def read_list(self) -> dict[str, dict]:
        """The rows in bad_rows.jsonl, by where they stand: a stream's of all processes, and of the runs before."""
        if self.path is not None and self.path.is_file():
            with open(self.path, "rb") as file:
                file.seek(self.bytes_read)
                for line in file.read().splitlines(keepends=True):
                    if line.endswith(b"\n"):  # else another process is writing it
                        self.bytes_read += len(line)
                        self._take_listed(line)
        return self.listed

    def _take_listed(self, line: bytes):
        try:
            row = json.loads(line)
        except ValueError:  # torn by a crash: it is listed again when it is found again
            return
        self.listed[row["where"]] = row

    def start_over(self):
        """For a stream that does not go on from a checkpoint: removes the list of another run."""
        if PartialState().is_main_process and self.path is not None:
            self.path.unlink(missing_ok=True)

    def settle(self):
        """
        Call it when all rows were looked at, so never for a stream. `skip` says how many are left out and writes
        bad_rows.jsonl, a line each.

        Raises:
            ValueError: there are bad rows, and these stop; it lists them.
        """
        is_main = PartialState().is_main_process
        if self.found and self.on_bad_row == "stop":
            raise ValueError(str(self) if is_main else f"{len(self)} rows can't be used; the main process lists them")
        if is_main and self.found:
            print(f"{self._summary()}; they are left out" + (f", see {self.path}" if self.path else ""), flush=True)
        if is_main and self.path is not None:
            self._write()

    def _write(self):
        """Writes bad_rows.jsonl, if there is anything to write or there was."""
        before = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        after = _lines(self.found.values())
        if before and before != after:
            print(f"{self.path}: the run before left out other rows; what is resumed goes on with other data")
        if before or after:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, after)

    def _summary(self) -> str:
        counts = ", ".join(f"{number} {kind}" for kind, number in self.counts.items())
        return f"{len(self)} of {self.looked_at} rows can't be used ({counts})"

    def __str__(self) -> str:
        places = [f"{row['where']}" + (f", {row['field']}" if row["field"] else "") for row in self.found.values()]
        lines = [f"  {place}: {row['message']}" for place, row in zip(places, self.found.values())]
        more = [f"  and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
        hint = "Mend or delete them, or leave them out with --on_bad_row skip."
        return "\n".join([f"{self._summary()}:", *lines[:MOST_LISTED], *more, hint])


def count_kinds(rows: Iterable[dict]) -> dict[str, int]:
    """Bad rows of each kind that there is."""
    counted = Counter(row["kind"] for row in rows)
    return {kind: counted[kind] for kind in KINDS if counted[kind]}


def without_verdict(row: dict) -> dict:
    """A row of the schema alone."""
    return {name: value for name, value in row.items() if name not in VERDICT}


def count_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def problem(kind: str, field: str | None, message: str) -> dict:
    """What is wrong with a row."""
    return {"kind": kind, "field": field, "message": message}


def find_problem(audio: dict) -> dict | None:
    """What is wrong with a clip `{bytes, path}`; None where `load_audio` takes it and speech may be in it."""
    kind = "unreadable"
    try:
        source, rate, name = open_audio(audio)
        with source:
            kind = "too_long"
            check_length(source.frames, rate, name)
            kind = "truncated"
            samples = read_file(source, name)
        kind = "not_finite"
        check_finite(samples, name)
    except ValueError as error:
        return problem(kind, "audio", str(error))
    seconds, mono = len(samples) / rate, samples.mean(axis=1)
    if seconds < MIN_SECONDS:
        return problem("too_short", "audio", f"{name}: {seconds:.3f} s, no word is so short; delete the row")
    if np.abs(mono - mono.mean()).max() < SILENCE:
        return problem("silent", "audio", f"{name}: silence or a constant from end to end; record it again")
    return None


class GoodClips:
    """Clips in which nothing was wrong, over all runs: they are not decoded again while their files do not change."""

    def __init__(self):
        self.path = Path(constants.HF_HOME) / "sense-good-clips.txt"
        self.keys = set(self.path.read_text().split()) if self.path.is_file() else set()

    @staticmethod
    def key(audio: dict) -> str | None:
        """
        Of a clip `{bytes, path}`: by its bytes, or by its file's path, size and time of change, and by the limits.
        None where there is no file.
        """
        what = hashlib.sha256(f"{MIN_SECONDS} {SILENCE}".encode())
        if audio["bytes"] is not None:
            what.update(audio["bytes"])
        else:
            try:
                file = Path(audio["path"]).resolve(strict=True)
                state = file.stat()
            except OSError:
                return None
            what.update(f"{file} {state.st_size} {state.st_mtime_ns}".encode())
        return what.hexdigest()[:32]

    def add(self, keys: Sequence[str]):
        """Keeps more. A line that was torn by a crash is a clip that is decoded again."""
        new = [key for key in keys if key not in self.keys]
        self.keys.update(new)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write("".join(f"{key}\n" for key in new))
        except OSError as error:  # a read-only cache will do
            tqdm.write(f"{self.path}: clips are checked again on the next start ({error})")
