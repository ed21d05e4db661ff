"""All of an MP3 is heard, whatever its header says, or nothing of it."""

import io

import numpy as np
import pytest
import soundfile

from processing import load_audio
from processing.mp3 import find_frames, read_frame, with_length
from tests.conftest import tone


def encode(clip: np.ndarray, rate: int, mode: str = "VARIABLE") -> bytes:
    file, channels = io.BytesIO(), 1 if clip.ndim == 1 else clip.shape[1]
    how = {"format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": 0.5, "bitrate_mode": mode}
    with soundfile.SoundFile(file, "w", rate, channels, **how) as mp3:
        mp3.write(clip)
    return file.getvalue()


def without_header(mp3: bytes) -> bytes:
    first, _, _ = find_frames(mp3)
    return mp3[first + read_frame(mp3[first:])[0] :]


def clips(rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Speech-like in one thing: loud or silent; one begins with its narrowest frames, one with its widest."""
    noise, silence = tone(3, rate), np.zeros(rate, np.float32)
    return np.concatenate([silence, noise, silence]), np.concatenate([noise, silence, silence])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_without_its_header_it_is_as_long_as_with_it(rate, channels, tmp_path):
    for clip in clips(rate):
        clip = np.stack([clip] * channels, axis=1) if channels > 1 else clip
        for mode in ("VARIABLE", "CONSTANT"):
            mp3 = encode(clip, rate, mode)
            assert len(load_audio(mp3)) == 80000 and with_length(mp3, len(clip)) is None
            bare = without_header(mp3)
            picture = b"ID3\x03\0\0\0\0\x01\0" + b"\xff\xfb\x90\x64" * 32  # looks like frames
            (tmp_path / "bare.mp3").write_bytes(picture + bare)
            for source in (bare, io.BytesIO(bare), tmp_path / "bare.mp3"):
                # What an encoder puts around a clip, and tells in the header, stays: no more than three frames.
                assert 80000 <= len(load_audio(source)) <= 80000 + 16000 * 3 * 1152 / rate


def test_joined_files_are_heard_to_the_end():
    quiet, loud = clips(16000)
    heard = load_audio(encode(quiet, 16000) + encode(loud, 16000))
    assert len(heard) == pytest.approx(160000, abs=5000)
    assert np.abs(heard[-20000:]).max() < 0.05 and np.abs(heard[85000:120000]).max() > 0.2  # the second one's


def test_one_that_was_cut_off_is_not_taken_for_whole():
    mp3 = encode(tone(8), 16000)
    with pytest.raises(ValueError, match="corrupt|not readable"):
        load_audio(mp3[: len(mp3) // 2])


@pytest.mark.parametrize(
    "junk", [b"", b"\xff" * 1000, b"ID3", b"ID3" + b"\xff" * 20, b"\xff\xfb\x1c" * 100, bytes(100)]
)
def test_what_is_no_mp3_has_no_frames(junk):
    assert find_frames(junk) == (0, 0, 0) and with_length(junk, 5000) is None
