"""What many callers ask at once, heard together: one worker takes what waits and gives it to the model in batches."""

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field


@dataclass(eq=False)
class Job:
    """A window that waits to be heard, how it is asked about, and where the answer goes."""

    window: dict
    options: dict
    future: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """
    Hears windows that come from many threads, several at a time. Those of a batch have the same options.

    Args:
        hear: called in the worker's thread with a list of windows and the options; gives what is heard in each.
        max_batch: the most windows that are heard at a time.
        max_wait: seconds that the first of a batch waits for others.
        on_batch: told after each batch, in the worker's thread, the seconds that each window waited and the seconds
            that the batch was heard for.
    """

    def __init__(
        self,
        hear: Callable[[list, dict], list],
        max_batch: int,
        max_wait: float,
        on_batch: Callable[[list[float], float], None] = lambda waited, seconds: None,
    ):
        self.hear, self.max_batch, self.max_wait, self.on_batch = hear, max_batch, max_wait, on_batch
        self.seconds_per_window = 0.0  # of late
        self._waiting: list[Job] = []
        self._is_closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._worker.start()

    @property
    def waiting(self) -> int:
        """Windows that wait."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether windows are heard: until `close`, or an error of `on_batch`."""
        return self._worker.is_alive()

    def submit(self, window: dict, **options) -> Future:
        """
        Puts a window in the queue. A future that is cancelled before its window's turn costs the model nothing.

        Raises:
            RuntimeError: after `close`, or where the worker has ended by an error of `on_batch`.
        """
        job = Job(window, options)
        with self._changed:
            if self._is_closed:
                raise RuntimeError("this batcher is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self):
        """Hears what waits, then ends the worker."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._worker.join()

    def _work(self):
        try:
            while (jobs := self._take()) is not None:
                if jobs:
                    begin = time.monotonic()
                    self._answer(jobs)
                    seconds = time.monotonic() - begin
                    self.seconds_per_window += 0.1 * (seconds / len(jobs) - self.seconds_per_window)
                    self.on_batch([begin - job.since for job in jobs], seconds)
        finally:  # by an error, too: nobody waits for a worker that is gone
            with self._changed:
                self._is_closed, left, self._waiting = True, self._waiting, []
            for job in left:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(RuntimeError("this batcher's worker has ended by an error"))

    def _take(self) -> list[Job] | None:
        """The next batch, once it is full or its first window has waited long enough; None at the end."""
        with self._changed:
            while not self._waiting:
                if self._is_closed:
                    return None
                self._changed.wait()
            first = self._waiting[0]
            while not self._is_closed and (left := first.since + self.max_wait - time.monotonic()) > 0:
                if sum(job.options == first.options for job in self._waiting) >= self.max_batch:
                    break
                self._changed.wait(left)
            batch = [job for job in self._waiting if job.options == first.options][: self.max_batch]
            self._waiting = [job for job in self._waiting if job not in batch]
        return [job for job in batch if job.future.set_running_or_notify_cancel()]

    def _answer(self, jobs: list[Job]):
        """Where a batch fails, each is heard alone: who can't be heard costs the others time, not their answer."""
        try:
            found = self.hear([job.window for job in jobs], jobs[0].options)
            answers = list(zip(jobs, found, strict=True))
        except Exception as error:  # whatever the model raises is for who asked; the worker goes on
            traceback.clear_frames(error.__traceback__)  # what they hold on a GPU is free again
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:
                for job in jobs:
                    self._answer([job])
        else:
            for job, heard in answers:
                job.future.set_result(heard)


__all__ = ["Batcher"]
