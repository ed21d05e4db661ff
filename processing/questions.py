"""What training and evaluation ask: rows of a corpus, each with a task, in the order of an epoch or of a stream."""

import itertools
import math
import random

import numpy as np
import torch
from accelerate import PartialState
from datasets.distributed import split_dataset_by_node
from transformers.trainer_pt_utils import LengthGroupedSampler

from .bad_rows import BadRows, without_verdict
from .processing_sense import MAX_SECONDS, load_audio, text_ids
from .tasks import ENGLISH_RATE, mix


RATED_CLIPS = 100  # that a corpus' rate of speech is measured on


class Mixture(torch.utils.data.Dataset):
    """
    The questions of a training epoch, a row each with its `task`. Where a task shows some of its rows only,
    `set_epoch`, which Trainer calls, draws others. What is drawn, also for a row's augmentation (`seed`), depends
    on the seed, the epoch and the row alone: it is the same in a run that goes on from a checkpoint, and on any number
    of processes and workers.
    """

    def __init__(self, args, rows, audio_tokens: list[int], tasks, tokenizer, seed: int):
        self.rows, self.tasks, self.seed = rows, tasks, seed
        self.weights, self.balance = args.tasks, args.balance_classes
        self.labels = list(rows.select_columns(["text", "entities", "sentiment"]))
        self.audio_tokens = audio_tokens
        self.answer_tokens = {name: count_answer_tokens(self.labels, tasks[name], tokenizer) for name in args.tasks}
        self.lengths: list[int] = []
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        self.epoch = epoch
        self.pairs = mix(self.labels, self.tasks, self.weights, self.balance, self.seed + epoch)
        # In place: the sampler holds this list.
        self.lengths[:] = [self.audio_tokens[row] + self.answer_tokens[task][row] for row, task in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        row, task = self.pairs[index]
        return {**self.rows[row], "task": task, "seed": f"{self.seed}/{self.epoch}/{index}"}


class Stream(torch.utils.data.IterableDataset):
    """
    Questions without an end, from rows that are read as they come: each row for each task that it has a label for, as
    often as the recipe says; where that is no whole number, by chance. Every process and every worker of its loader
    reads rows of its own: other files of the dataset, or where these do not divide every so many-th row. It listens to
    these alone.

    Args:
        args: of the recipe.
        rows: a stream of `load_corpus`, with `bad_rows`.
        tasks: by name.
        seed: of order and chances.
        batch_size: rows of one process's batch.
        bad_rows: tells which rows can be used.
        batches: of each process that are left out, since an earlier run learnt from them. Their clips are not heard:
            the rows that this run left out are listed. With several workers the next ones may come in another order.
    """

    def __init__(self, args, rows, tasks, seed: int, batch_size: int, bad_rows: BadRows, batches: int = 0):
        state = PartialState()
        # One file after the other, in another order each time: Arrow reads whole files ahead, of all that are open.
        shuffled = rows.shuffle(seed=seed, buffer_size=args.shuffle_buffer, max_buffer_input_shards=1)
        self.rows = split_dataset_by_node(shuffled, state.process_index, state.num_processes)
        self.tasks, self.weights, self.bad_rows = tasks, args.tasks, bad_rows
        self.seed, self.batch_size, self.batches = f"{seed}/{state.process_index}", batch_size, batches

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        index, number = (worker.id, worker.num_workers) if worker else (0, 1)
        known = len(range(index, self.batches, number)) * self.batch_size  # workers take turns, batch by batch
        rng = random.Random(f"{self.seed}/{index}")
        left_out = set(self.bad_rows.read_list()) if known else set()
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            labelled = 0
            for row in self.rows:
                learnt = known > 0
                if not (row["bad"] is None and row["where"] not in left_out if learnt else self.bad_rows.can_use(row)):
                    continue
                names = [name for name in self.weights if self.tasks[name].target(row) is not None]
                labelled += len(names)
                asked = self._ask(without_verdict(row), names, rng)
                yield from asked[known:]
                known = max(0, known - len(asked))
            if not labelled:
                asked_for = ", ".join(self.weights)
                raise ValueError(f"not one row of this process's share of the stream has a label for {asked_for}")

    def _ask(self, row: dict, names: list[str], rng: random.Random) -> list[dict]:
        """The questions about a row."""
        times = {name: int(self.weights[name]) + (rng.random() < self.weights[name] % 1) for name in names}
        return [{**row, "task": name} for name, number in times.items() for _ in range(number)]


class EpochSampler(torch.utils.data.Sampler):
    """
    The order of an epoch: drawn from the seed and the epoch's number alone, so that all processes draw the same, and
    a run that is resumed what it drew before.

    Args:
        mixture: knows the epoch.
        seed: of the recipe.
        step: rows of an optimiser's step, to be of about the same length; None: any.
    """

    def __init__(self, mixture: Mixture, seed: int, step: int | None):
        self.mixture, self.seed, self.step = mixture, seed, step

    def set_epoch(self, epoch: int):
        # accelerate tells the sampler or the dataset, depending on the number of processes: both must know.
        self.mixture.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.mixture)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.mixture.epoch)
        if self.step is None:
            return iter(torch.randperm(len(self), generator=generator).tolist())
        return iter(LengthGroupedSampler(self.step, lengths=self.mixture.lengths, generator=generator))


def count_audio_tokens(rows, cache, processor) -> list[int]:
    """Of each row's clip; without a cache by its duration, one that is not known counts as 30 s."""
    if cache:
        return cache.lengths
    rate = processor.feature_extractor.sampling_rate
    seconds = [min(MAX_SECONDS, duration or MAX_SECONDS) for duration in rows["duration"]]
    return [processor.num_tokens(max(1, round(s * rate))) for s in seconds]


def usual_length(durations: list[float | None]) -> float:
    """
    The length that three of four clips stay below, in whole seconds; where none is known, 30. It bounds the windows
    that long recordings are cut into (docs/long_recordings.md).
    """
    known = [seconds for seconds in durations if seconds is not None]
    return min(MAX_SECONDS, max(1, math.ceil(np.percentile(known, 75)))) if known else MAX_SECONDS


def usual_rate(rows, tokenizer) -> float:
    """An LLM's tokens in a second of speech: the median of rows with words, of which some are listened to."""
    some = spread(rows, RATED_CLIPS)
    tokens = map(len, text_ids(list(some["text"]), tokenizer))
    rates = [16000 * number / len(load_audio(clip)) for number, clip in zip(tokens, some["audio"]) if number]
    return float(np.median(rates)) if rates else ENGLISH_RATE


def count_answer_tokens(labels: list[dict], task, tokenizer) -> list[int]:
    """Of each row's answer to a task, 0 where it has none. With the clip's, what batches are grouped by."""
    answers = [task.target(row) or "" for row in labels]
    return [len(ids) for ids in text_ids(answers, tokenizer)]


def ask_once(rows, tasks):
    """Each row once for each task that it has a label for."""
    pairs = mix(list(rows.select_columns(["text", "entities", "sentiment"])), tasks, dict.fromkeys(tasks, 1.0))
    return rows.select([row for row, _ in pairs]).add_column("task", [name for _, name in pairs])


def spread(rows, number: int | None):
    """So many rows, evenly spaced; all by default."""
    number = min(number or len(rows), len(rows))
    return rows.select([i * len(rows) // number for i in range(number)])


__all__ = [
    "EpochSampler",
    "Mixture",
    "Stream",
    "ask_once",
    "count_answer_tokens",
    "count_audio_tokens",
    "spread",
    "usual_length",
    "usual_rate",
]
