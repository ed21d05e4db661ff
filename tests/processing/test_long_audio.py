"""Recordings in blocks and in windows: nothing lost, nothing twice, cut in the pauses."""

import io

import numpy as np
import pytest
import soundfile
import torch

from processing.long_audio import LONG_PAUSE, MARGIN, SpeechDetector, find_window, read_blocks, speech_windows
from processing.processing_sense import load_audio, open_audio
from processing.synthesis import main as synthesize
from tests.conftest import tone, wav


def blocks(audio, rate=None, seconds=20.0):
    return read_blocks(*open_audio(audio, rate), seconds)


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 44101, 48000])
def test_blocks_joined_are_the_whole(rate):
    clip = tone(5.3, rate)
    joined = np.concatenate(list(blocks(clip, rate, seconds=0.7)))
    np.testing.assert_allclose(joined, load_audio(clip, rate), atol=1e-5)


def test_blocks_of_a_file_mix_its_channels_down():
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone(3, 22050), tone(3, 22050, seed=1)], axis=1), 22050, format="FLAC")
    joined = np.concatenate(list(blocks(file.getvalue(), seconds=1)))
    np.testing.assert_allclose(joined, load_audio(file.getvalue()), atol=1e-5)


def test_a_file_is_read_block_by_block(tmp_path):
    path = tmp_path / "long.wav"
    path.write_bytes(wav(tone(60)))
    lengths = [len(block) for block in blocks(path)]
    assert lengths == [320_000] * 3


def test_nan_in_the_middle_names_file_and_time():
    clip = tone(50)
    clip[16000 * 45] = np.nan
    with pytest.raises(ValueError, match=r"audio \(ndarray\): 1 samples from 40.0 s on are NaN"):
        list(blocks(clip))


def test_a_truncated_file_names_where_it_ends(tmp_path):
    file = io.BytesIO()
    soundfile.write(file, tone(60), 16000, format="FLAC")
    (tmp_path / "cut.flac").write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(ValueError, match="cut.flac"):
        list(blocks(tmp_path / "cut.flac"))
    (tmp_path / "cut.wav").write_bytes(wav(tone(60))[:1_000_000])
    with pytest.raises(ValueError, match="cut.wav: corrupt, 920044 bytes of its 1920000 are missing"):
        list(blocks(tmp_path / "cut.wav"))


# ------------------------------------------------------------------ windows


def steps(*runs):
    """`(probability, steps)` one after the other."""
    return np.concatenate([np.full(number, probability) for probability, number in runs])


def test_a_window_ends_at_a_long_pause():
    found = find_window(steps((0, 50), (1, 100), (0, LONG_PAUSE + 5), (1, 20)), most=900, is_last=False)
    assert found == (50 - MARGIN, 150 + MARGIN, 150 + LONG_PAUSE + 5 - MARGIN)


def test_short_pauses_stay_inside_until_the_window_is_full():
    speech = steps((1, 100), (0, 8), (1, 60), (0, 12), (1, 60))
    assert find_window(speech, most=900, is_last=False) is None
    assert find_window(speech, most=900, is_last=True) == (0, 240, 240)
    assert find_window(speech, most=200, is_last=False) == (0, 174, 174)  # the middle of the longer pause


def test_speech_without_a_pause_is_cut_where_it_is_least_like_speech():
    speech = steps((0.9, 180), (0.6, 3), (0.9, 400))
    assert find_window(speech, most=200, is_last=False) == (0, 180, 180)


def test_silence_is_done_with_but_for_a_margin():
    assert find_window(np.zeros(100), most=900, is_last=False) == (0, 0, 100 - MARGIN)
    assert find_window(np.zeros(100), most=900, is_last=True) == (0, 0, 100)
    assert find_window(np.zeros(MARGIN), most=900, is_last=False) is None


@pytest.mark.parametrize("seed", range(10))
def test_windows_never_lose_speech_nor_give_it_twice(seed):
    rng = np.random.default_rng(seed)
    speech = steps(*[(float(i % 2), int(rng.integers(1, 90))) for i in range(60)])
    given, position, rest = np.zeros(len(speech), int), 0, speech
    while found := find_window(rest, most=150, is_last=True):
        start, end, done = found
        assert 0 <= start <= end <= start + 150 and done > 0
        given[position + start : position + end] += 1
        position, rest = position + done, rest[done:]
    assert given.max() == 1 and given[speech >= 0.5].min() == 1


def test_a_recording_that_fits_is_one_window_as_it_is():
    clip = tone(29)
    ((start, samples),) = speech_windows(blocks(clip))
    assert start == 0 and np.array_equal(samples, clip)


def test_silence_gives_no_window():
    assert list(speech_windows(blocks(np.zeros(16000 * 70, np.float32)))) == []


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "speech"
    synthesize([str(folder), "--grammar", "quickstart", "--train", "12", "--dev", "1", "--test", "1"])
    return [load_audio(path) for path in sorted((folder / "train").glob("*.flac"))]


def test_synthesised_sentences_two_seconds_apart_are_a_window_each(sentences):
    parts, starts, at = [], [], 0
    for clip in sentences * 2:
        starts.append(at / 16000)
        parts += [clip, np.zeros(32000, np.float32)]
        at += len(clip) + 32000
    found = list(speech_windows(blocks(np.concatenate(parts))))
    assert len(found) == len(starts)
    for (start, samples), begin, clip in zip(found, starts, sentences * 2):
        assert begin - 0.3 < start < begin + 0.5
        assert abs(len(samples) - len(clip)) < 16000


def test_windows_are_never_longer_than_asked(sentences):
    recording = np.concatenate(sentences * 3)
    found = list(speech_windows(blocks(recording), max_seconds=6))
    assert len(found) > 5 and max(len(samples) for _, samples in found) <= 6 * 16000
    assert sum(len(samples) for _, samples in found) > 0.9 * len(recording)
    for start, samples in found:
        at = round(start * 16000)
        assert np.array_equal(recording[at : at + len(samples)], samples)


def test_the_detector_leaves_the_number_of_threads_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        SpeechDetector()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
