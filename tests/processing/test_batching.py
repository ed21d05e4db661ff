"""What waits is heard together, and each caller gets its own answer."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from processing.batching import Batcher


@pytest.fixture
def batches():
    return []


@pytest.fixture
def make(batches):
    """Makes batchers that give each window back, with its options; they note the batches."""
    made = []

    def make(**how) -> Batcher:
        def hear(windows, options):
            batches.append((windows, options))
            time.sleep(0.002)
            return [(window["number"], options) for window in windows]

        made.append(Batcher(**{"hear": hear, "max_batch": 8, "max_wait": 0.01} | how))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


def test_each_caller_gets_its_own_answer(make, batches):
    batcher = make(max_batch=5, max_wait=0.001)

    def call(number):
        return batcher.submit({"number": number}, beams=number % 3).result(60)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(call, range(1000)))
    assert answers == [(number, {"beams": number % 3}) for number in range(1000)]
    assert all(len({window["number"] % 3 for window in windows}) == 1 for windows, _ in batches)
    sizes = [len(windows) for windows, _ in batches]
    assert max(sizes) == 5 and sum(sizes) == 1000 and sum(sizes) / len(sizes) > 2


def test_the_first_waits_for_others_and_a_full_batch_for_nobody(make, batches):
    batcher, begin = make(max_batch=2, max_wait=0.3), time.monotonic()
    batcher.submit({"number": 0}).result(60)
    assert 0.3 <= time.monotonic() - begin
    slow = make(max_batch=2, max_wait=30)
    both = [slow.submit({"number": number}) for number in (1, 2)]
    assert [each.result(10)[0] for each in both] == [1, 2]
    assert [len(windows) for windows, _ in batches] == [1, 2]


def test_what_fails_fails_alone_and_what_was_cancelled_is_not_heard(make):
    begun, free, seen = threading.Event(), threading.Event(), []

    def hear(windows, options):
        begun.set()
        assert free.wait(60)
        seen.append([window["number"] for window in windows])
        return [1 / window["number"] for window in windows]

    told = []
    batcher = make(hear=hear, on_batch=lambda waited, seconds: told.append((len(waited), min(waited) >= 0)))
    first = batcher.submit({"number": 1})
    assert begun.wait(60)
    futures = [batcher.submit({"number": number}) for number in (2, 0, 4, 5)]
    assert batcher.waiting == 4 and futures[3].cancel()
    free.set()
    assert [first.result(60), futures[0].result(60), futures[2].result(60)] == [1, 0.5, 0.25]
    with pytest.raises(ZeroDivisionError):
        futures[1].result(60)
    batcher.close()
    assert not any(5 in numbers for numbers in seen)
    assert told == [(1, True), (3, True)] and batcher.seconds_per_window > 0


def test_what_a_failed_batch_held_is_free_before_each_is_heard_alone(make):
    class Memory:
        pass

    refs, alive = [], []

    def hear(windows, options):
        alive.append(sum(ref() is not None for ref in refs))
        memory = Memory()
        refs.append(weakref.ref(memory))
        if len(windows) > 1:
            raise RuntimeError("out of memory")
        return windows

    batcher = make(hear=hear, max_wait=0.2)
    futures = [batcher.submit({"number": number}) for number in range(2)]
    assert [future.result(10)["number"] for future in futures] == [0, 1] and alive == [0, 0, 0]


def test_who_gets_no_answer_is_told_and_the_worker_goes_on(make):
    batcher = make(hear=lambda windows, options: windows[1:], max_wait=0.2)
    for future in [batcher.submit({"number": number}) for number in range(2)]:
        with pytest.raises(ValueError, match="zip"):
            future.result(10)
    assert batcher.is_alive


def test_nobody_waits_for_a_worker_that_is_gone(make, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    batcher = make(max_batch=1, on_batch=lambda waited, seconds: 1 / 0)
    first, second = (batcher.submit({"number": number}) for number in (1, 2))
    assert first.result(10)[0] == 1
    with pytest.raises(RuntimeError, match="ended by an error"):
        second.result(10)
    batcher.close()
    assert not batcher.is_alive
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit({"number": 3})


def test_closing_hears_what_waits_and_takes_no_more(make):
    batcher = make(max_wait=30)
    futures = [batcher.submit({"number": number}) for number in range(3)]
    batcher.close()
    assert [each.result(0)[0] for each in futures] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit({"number": 3})
