"""
Recordings of any length as windows that a model can hear: cut where nobody speaks, by Silero's voice activity
detector (the package brings its weights). Reads files block by block: memory does not grow with their length.
"""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch

from .processing_sense import LOUDEST, check_whole, read_block, resample


RATE = 16000  # Hz, of everything below
STEP = 512  # samples that the detector judges at a time, 32 ms
BLOCK_SECONDS = 20
SPEECH = 0.5  # probability from which on a step counts as speech
MARGIN = 6  # steps of silence that stay around speech
LONG_PAUSE = 16  # steps, 0.5 s: a window ends here, however short it is


def speech_windows(
    blocks: Iterator[np.ndarray], max_seconds: float = 30.0, whole_seconds: float | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """
    Windows of speech, one after the other: they hold no pause above half a second, and are cut in the longest pause
    of their second half.

    Args:
        blocks: the recording, from `read_blocks`.
        max_seconds: the longest window.
        whole_seconds: a recording that is no longer is one window, as it is; `max_seconds` by default.

    Yields:
        the window's start in seconds and its samples, float32 `(samples,)` at 16000 Hz.

    Raises:
        ImportError: the recording is longer than `whole_seconds`, and silero-vad is not installed.
    """
    whole = int((whole_seconds or max_seconds) * RATE)
    most, origin, held = int(max_seconds * RATE), 0, np.zeros(0, np.float32)
    detector, probabilities = None, np.zeros(0)
    for block, is_last in _mark_last(blocks):
        held = np.concatenate([held, block])
        if detector is None and len(held) <= whole:
            if is_last and len(held):
                yield 0.0, held
            continue
        detector = detector or SpeechDetector()
        unheard = held[len(probabilities) * STEP :]
        probabilities = np.concatenate([probabilities, detector(unheard, is_last)])
        while found := find_window(probabilities, most // STEP, is_last):
            start, end, done = found
            if end > start:
                yield (origin + start * STEP) / RATE, held[start * STEP : end * STEP]
            origin += done * STEP
            held, probabilities = held[done * STEP :], probabilities[done:]


def find_window(probabilities: np.ndarray, most: int, is_last: bool) -> tuple[int, int, int] | None:
    """
    The next window in these steps of a recording, none of which was given out yet.

    Args:
        probabilities: of speech, one a step.
        most: steps of the longest window.
        is_last: the recording ends here.

    Returns:
        its first step, the one after it, and how many steps are done with; the first two alike where these steps are
        silence; None where more steps are needed.
    """
    speech = probabilities >= SPEECH
    if not speech.any():
        silent = len(speech) if is_last else len(speech) - MARGIN
        return (0, 0, silent) if silent > 0 else None
    first = int(speech.argmax())
    start = max(0, first - MARGIN)
    pauses = _pauses(speech, first)
    for begin, end in pauses:
        if begin - start > most - MARGIN:
            break
        if end - begin >= LONG_PAUSE:
            return start, begin + MARGIN, end - MARGIN
    left = len(speech) - start
    if is_last and left <= most:
        return start, len(speech), len(speech)
    if left <= most:
        return None
    cut = _best_cut(probabilities, pauses, start + most // 2, start + most)
    return start, cut, cut


def _pauses(speech: np.ndarray, first: int) -> list[tuple[int, int]]:
    """Runs of silence behind `first`, each with its first step and the one after it."""
    edges = np.diff(np.concatenate([[0], (~speech[first:]).astype(int), [0]])).nonzero()[0] + first
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def _best_cut(probabilities: np.ndarray, pauses: list[tuple[int, int]], low: int, high: int) -> int:
    """The middle of the longest pause between two steps; without one, the step that is least like speech."""
    inside = [(max(begin, low), min(end, high)) for begin, end in pauses if begin < high and end > low]
    if inside:
        begin, end = max(inside, key=lambda pause: pause[1] - pause[0])
        return (begin + end + 1) // 2
    return low + int(probabilities[low:high].argmin())


class SpeechDetector:
    """Silero VAD over a recording that comes in pieces."""

    def __init__(self):
        threads = torch.get_num_threads()
        try:
            from silero_vad import load_silero_vad
        except ImportError as error:
            raise ImportError("long recordings are cut into windows by silero-vad: pip install silero-vad") from error
        finally:
            torch.set_num_threads(threads)  # importing it sets 1, for the whole process
        self.model = load_silero_vad()

    @torch.no_grad()
    def __call__(self, samples: np.ndarray, is_last: bool) -> np.ndarray:
        """Probability of speech for each whole step of 512 samples; at the recording's end for a broken one too."""
        if is_last:
            samples = np.pad(samples, (0, -len(samples) % STEP))
        if len(samples) > STEP and np.ptp(samples) == 0:  # hours of a constant cost kilobytes to send: no minutes here
            self.model.reset_states()
            return np.zeros(len(samples) // STEP)
        steps = torch.from_numpy(samples[: len(samples) // STEP * STEP]).view(-1, 1, STEP)
        return np.array([self.model(step, RATE).item() for step in steps])


def read_blocks(source, rate: int, name: str, seconds: float = BLOCK_SECONDS) -> Iterator[np.ndarray]:
    """
    A recording, as `open_audio` gives it, in blocks of float32 `(samples,)` at 16000 Hz.

    Raises:
        ValueError: NaN or infinite samples, or a file that ends before it should.
    """
    return _resampled(_raw_blocks(source, rate, name, seconds), rate)


def _raw_blocks(source, rate: int, name: str, seconds: float) -> Iterator[np.ndarray]:
    """Channels mixed down, at the source's own rate; of an open file or an array `(samples, channels)`."""
    size, position = int(seconds * rate), 0
    if not isinstance(source, np.ndarray):
        check_whole(source, name)
    while True:
        if isinstance(source, np.ndarray):
            block = source[position : position + size]
        else:
            block = read_block(source, size, name)
        if not len(block):
            break
        if bad := block.size - int((np.abs(block) <= LOUDEST).sum()):
            raise ValueError(
                f"{name}: {bad} samples from {position / rate:.1f} s on are NaN or infinite, or beyond {LOUDEST:.0f} "
                "times full scale; repair it"
            )
        yield block.mean(axis=1, dtype=np.float32)
        position += len(block)
    if position < (len(source) if isinstance(source, np.ndarray) else source.frames):
        raise ValueError(f"{name}: corrupt, it ends after {position / rate:.1f} s; get the file again")


def _resampled(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Blocks brought to 16000 Hz, sample for sample as the whole would be: each is resampled with its surroundings."""
    if rate == RATE:
        yield from blocks
        return
    ratio = Fraction(rate, RATE).limit_denominator(640)  # as in `resample`
    before, after = ratio.numerator, ratio.denominator  # so many samples become so many
    reach = math.ceil(6 * before / min(before, after) / 0.99) + 1  # of torchaudio's filter
    margin = -(-reach // before) * before
    held, given = np.zeros(0, np.float32), 0  # the first `given` samples held are surroundings only
    for block, is_last in _mark_last(blocks):
        held = np.concatenate([held, block])
        end = len(held) if is_last else (len(held) - margin) // before * before
        if end > given:
            piece = resample(held, rate, RATE)
            yield piece[given * after // before : None if is_last else end * after // before]
            keep = max(0, end - margin)
            held, given = held[keep:], end - keep


def _mark_last(blocks: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each block, and whether it is the last one."""
    blocks = iter(blocks)
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        yield block, following is None
        block = following


__all__ = ["find_window", "read_blocks", "speech_windows"]
