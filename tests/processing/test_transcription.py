"""Transcripts by Whisper's own decoder, of recordings that nobody transcribed; here it hears what the test says."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from filelock import FileLock
from transformers import WhisperFeatureExtractor

from processing import transcription
from processing.datasets import load_corpus
from processing.warm_start import knows_language
from tests.conftest import tone


@pytest.fixture
def recordings(tmp_path):
    """Six of them: four can be read, one of these is 31 s long."""
    folder = tmp_path / "recordings"
    (folder / "deep" / "er").mkdir(parents=True)
    for i, name in enumerate(("a.wav", "b.flac", "deep/er/c.wav")):
        soundfile.write(folder / name, tone(0.5 + i / 4, seed=i), 16000)
    soundfile.write(folder / "long.wav", np.zeros(31 * 16000, np.float32), 16000)
    (folder / "broken.wav").write_text("no audio")
    (folder / "phone.m4a").write_text("nor read here")
    (folder / "notes.txt").write_text("no recording")
    return folder


@pytest.fixture
def heard(monkeypatch):
    """What Whisper hears, by the clip's tenths of a second; and how often it was asked for each."""
    said, asked = {5: "Anna left Moscow.", 7: "It's TEN o'clock!", 10: "..."}, []

    class Decoder:
        def __init__(self, source, device):
            pass

        def knows(self, language):
            return language in (None, "de")

        def __call__(self, clips, languages):
            lengths = [len(clip) // 1600 for clip in clips]
            asked.extend(zip(lengths, languages, strict=True))
            return [said[length] for length in lengths]

    monkeypatch.setattr(transcription, "WhisperDecoder", Decoder)
    monkeypatch.setattr(transcription, "resolve_backbone", str)
    return said, asked


def run(recordings, out, *more):
    return transcription.main([str(recordings), "--output", str(out), "--device", "cpu", *more])


def test_a_split_to_train_on(recordings, heard, tmp_path):
    out = tmp_path / "data" / "train"
    assert run(recordings, out, "--language", "de", "--batch_size", "2") == {"heard": 2, "rejected": 4}
    rows = load_corpus(tmp_path / "data", "train")
    assert rows["text"] == ["anna left moscow", "it's ten o'clock"] and rows["id"] == ["a.wav", "b.flac"]
    assert rows["duration"] == [0.5, 0.75] and rows["language"] == ["de", "de"] and rows["entities"] == [None, None]
    assert [row["path"] for row in rows["audio"]] and sorted(heard[1]) == [(5, "de"), (7, "de"), (10, "de")]
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["file"].rpartition("/")[2]: line["reason"] for line in rejected}
    assert all("not readable as audio" in reasons[name] for name in ("broken.wav", "phone.m4a"))
    assert "30" in reasons["long.wav"]
    assert reasons["c.wav"] == "nothing was heard"  # marks alone
    assert {path.name for path in out.iterdir()} - {".lock"} == {"metadata.jsonl", "rejected.jsonl"}
    with pytest.raises(ValueError, match="holds a metadata.jsonl: choose another --output"):
        run(recordings, out)


def test_as_whisper_writes_it(recordings, heard, tmp_path):
    assert run(recordings, tmp_path / "data" / "train", "--as_written")["heard"] == 3
    assert load_corpus(tmp_path / "data", "train")["text"] == ["Anna left Moscow.", "It's TEN o'clock!", "..."]


def test_it_goes_on_where_it_was_interrupted(recordings, heard, tmp_path):
    said, asked = heard
    ten, out = said.pop(10), tmp_path / "data" / "train"
    with pytest.raises(KeyError):  # in the place of a kill
        run(recordings, out, "--batch_size", "1")
    assert not (out / "metadata.jsonl").exists() and [length for length, _ in asked] == [5, 7, 10]
    with pytest.raises(ValueError, match="answers of another run \\(language changed\\)"):
        run(recordings, out, "--language", "de")
    said[10] = ten
    assert run(recordings, out)["heard"] == 2 and [length for length, _ in asked] == [5, 7, 10, 10]


def test_a_language_that_whisper_does_not_know_is_not_taken_for_english(recordings, heard, tmp_path):
    with pytest.raises(ValueError, match="--language deu: whisper-base does not know it"):
        run(recordings, tmp_path / "out", "--language", "deu")
    assert not heard[1] and not (tmp_path / "out" / "heard.jsonl").exists()
    known = SimpleNamespace(is_multilingual=True, lang_to_id={"<|en|>": 1, "<|de|>": 2})
    assert [knows_language(known, name) for name in (None, "de", "German", "de-AT", "deu")] == [True] * 4 + [False]
    english = SimpleNamespace(is_multilingual=False)
    assert knows_language(english, None) and knows_language(english, "en-US") and not knows_language(english, "de")


def test_two_at_once_do_not_hear_the_same(recordings, heard, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(SystemExit, match="another processing.transcription"):
        run(recordings, tmp_path / "out")
    assert not heard[1]


def test_folders_without_a_word(recordings, heard, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no recording in it; give a folder of WAV"):
        run(tmp_path / "empty", tmp_path / "out")
    strange = os.fsdecode(os.fsencode(tmp_path / "empty") + b"/caf\xe9.wav")
    Path(strange).write_bytes(b"")
    with pytest.raises(ValueError, match="names that are no UTF-8, rename them"):
        run(tmp_path / "empty", tmp_path / "out")
    for length in heard[0]:
        heard[0][length] = ""
    with pytest.raises(ValueError, match="nothing was heard in any of 6 recordings"):
        run(recordings, tmp_path / "out")


def test_the_decoder_hears_with_a_checkpoint(tiny_whisper, monkeypatch):
    """A random one, without a tokenizer: that its output reaches it."""

    class Tokenizer:
        def batch_decode(self, output, skip_special_tokens):
            return [f" {len(row)} tokens " for row in output]

    monkeypatch.setattr(transcription.AutoTokenizer, "from_pretrained", lambda *a, **k: Tokenizer())
    monkeypatch.setattr(transcription.AutoProcessor, "from_pretrained", fake_processor)
    texts = transcription.WhisperDecoder(tiny_whisper)([tone(0.5), tone(1.0)], [None, "de"])
    assert len(texts) == 2 and all(text.endswith("tokens") for text in texts)


def fake_processor(source, **kwargs):
    return SimpleNamespace(feature_extractor=WhisperFeatureExtractor.from_pretrained(source))
