"""One row of a hundred is broken, in eleven ways: training stops with one list of them, or goes on with all others."""

import io
import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from accelerate import PartialState
from huggingface_hub import constants

import annotate_sense
import eval_sense
import train_sense
from processing import bad_rows
from processing.bad_rows import BadRows
from processing.collator import SenseCollator
from processing.datasets import load_corpus
from tests.conftest import tone, wav


def audio_file(samples, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format=kind, subtype=subtype)
    return file.getvalue()


FLAC = audio_file(tone(0.5), "FLAC")
# By kind, what the row's audio file holds (None: there is none) or how its line is written.
CLIPS = {
    "missing_file": None,
    "empty_file": b"",
    "truncated": FLAC[: len(FLAC) // 2],
    "unreadable": b"this is no sound, whatever its name says\n",
    "not_finite": audio_file(np.where(np.arange(8000) == 4000, np.nan, tone(0.5)), subtype="FLOAT"),
    "silent": wav(np.full(8000, 0.25)),
    "too_short": wav(tone(0.01)),
    "too_long": wav(np.tile(tone(4.0), 10)),
}
LINES = {
    "empty_text": lambda line: line.replace(b"so it is", b" "),
    "wrong_entities": lambda line: line.replace(b"[]", b'[["PERSON", 3, 99]]'),
    "bad_utf8": lambda line: line.replace(b"so it is", b"caf\xe9"),
}
BROKEN = (*CLIPS, *LINES)


def write_dirty_split(folder: Path, number: int) -> dict[str, str]:
    """So many rows, the broken ones spread among them; returns what is wrong with them, by id."""
    folder.mkdir(parents=True)
    places = {(i * number + number // 2) // len(BROKEN): kind for i, kind in enumerate(BROKEN)}
    clips, lines = [wav(tone(0.2, seed=seed)) for seed in range(7)], []
    for i in range(number):
        kind = places.get(i)
        content = CLIPS.get(kind, clips[i % 7])
        name = f"row-{i}." + ("flac" if kind == "truncated" else "wav")
        if content is not None:
            (folder / name).write_bytes(content)
        row = {"file_name": name, "text": "so it is", "entities": [], "sentiment": "Neutral"}
        lines.append(LINES.get(kind, bytes)(json.dumps(row).encode()))
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return {f"row-{i}": kind for i, kind in places.items()}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Nothing is known of any clip."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def corpus(tmp_path, own_cache):
    """The folder, and what is wrong by id: 11 of 1100 rows of train."""
    broken = write_dirty_split(tmp_path / "corpus" / "train", 1100)
    folder = tmp_path / "corpus" / "dev"
    folder.mkdir()
    (folder / "a.wav").write_bytes(wav(tone(0.3)))
    lines = [json.dumps({"file_name": "a.wav", "id": f"dev-{i}", "text": "so it is"}) for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "corpus", broken


@pytest.fixture
def train(corpus, tiny_whisper, tiny_llama, tmp_path):
    """Trains on the corpus with options of the command line."""
    fields = {"dataset_dir": corpus[0], "audio_backbone": tiny_whisper, "text_backbone": tiny_llama}
    fields |= {"backbone_dtype": "float32", "output_dir": tmp_path / "out", "per_device_train_batch_size": 33}
    fields |= {"num_train_epochs": 1, "warm_start": False, "eval_strategy": "no", "save_steps": 10, "use_cpu": True}
    asked = [word for name, value in (fields | {"report_to": "none"}).items() for word in (f"--{name}", str(value))]
    return lambda *more: train_sense.main([*asked, *more])


@pytest.fixture
def decoded(monkeypatch):
    """Paths of the clips that are decoded to be checked."""
    found, find = [], bad_rows.find_problem
    monkeypatch.setattr(bad_rows, "find_problem", lambda audio: found.append(audio["path"]) or find(audio))
    return found


def test_training_stops_with_one_list_before_it_begins(corpus, train, tmp_path, monkeypatch):
    folder, broken = corpus
    monkeypatch.setattr(train_sense.SenseTrainer, "__init__", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(ValueError) as stopped:
        train()
    head, *listed, hint = str(stopped.value).splitlines()
    assert head.startswith("11 of 1102 rows can't be used (1 bad_utf8, 1 empty_text") and "--on_bad_row skip" in hint
    assert len(listed) == len(broken) == 11
    for i, kind in ((int(name.removeprefix("row-")), kind) for name, kind in broken.items()):
        (line,) = [line for line in listed if f"{folder}/train/metadata.jsonl, line {i + 1}, " in line]
        assert re.search(SAID[kind], line), line
    assert not (tmp_path / "out").exists()


SAID = {  # field, what was found, what to do
    "missing_file": r"file_name: .*row-\d+.wav: no such file; put it there, or delete the row",
    "empty_file": r"file_name: .*row-\d+.wav: 0 bytes; get the file again",
    "truncated": r"audio: .*row-\d+.flac: .*; (get the file again|give a WAV, FLAC)",
    "unreadable": r"audio: .*row-\d+.wav: not readable as audio .*; give a WAV, FLAC, OGG or MP3 file",
    "not_finite": r"audio: .*: 1 of 8000 samples are NaN or infinite; repair or drop the clip",
    "silent": r"audio: .*: silence or a constant from end to end; record it again",
    "too_short": r"audio: .*: 0.010 s, no word is so short; delete the row",
    "too_long": r"audio: .*: 40.00 s of audio, the limit is 30 s; cut it into shorter clips",
    "empty_text": r"text: ' '; write down what is said, or delete the row",
    "wrong_entities": r"entities: \['PERSON', 3, 99\] is no .* within the 8 characters of text; mend its numbers",
    "bad_utf8": r"line: byte 0xe9 at \d+ is not UTF-8; save the line as UTF-8",
}


def test_training_goes_on_with_exactly_the_good_rows(corpus, train, tmp_path, monkeypatch, decoded, capsys):
    folder, broken = corpus
    seen, collate, out = [], SenseCollator.__call__, tmp_path / "out"

    def spy(self, rows):
        seen.extend(row["id"] for row in rows)
        return collate(self, rows)

    monkeypatch.setattr(SenseCollator, "__call__", spy)
    metrics = train("--on_bad_row", "skip")
    good = [f"row-{i}" for i in range(1100) if f"row-{i}" not in broken]
    assert sorted(name for name in seen if name.startswith("row")) == sorted(good)  # each once
    assert metrics["train_clips"] == 1089 and metrics["bad_rows"] == 11
    listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert {row["id"]: row["kind"] for row in listed} == broken and len(listed) == 11
    for row in listed:
        assert re.search(SAID[row["kind"]], f"{row['field'] or 'line'}: {row['message']}"), row
        assert Path(row["file"]).stem == row["id"] and row["where"].startswith(f"{folder}/train/metadata.jsonl, line ")
    assert "11 of 1102 rows can't be used (1 bad_utf8" in capsys.readouterr().out

    # Started again, it decodes what was bad alone, and a file that changed; what was mended is used, and it is said.
    assert len(decoded) == 1100 - 5 + 2  # of five rows the line or the file is wrong
    decoded.clear()
    mended, changed = next(name for name, kind in broken.items() if kind == "silent"), good[5]
    for name in (mended, changed):
        (folder / "train" / f"{name}.wav").write_bytes(wav(tone(0.25)))
    metrics = train("--on_bad_row", "skip", "--max_steps", "1")
    bad_clips = {name for name, kind in broken.items() if kind in CLIPS and not kind.endswith("_file")}
    assert {Path(path).stem for path in decoded} == {*bad_clips, changed, "a"}
    assert metrics["train_clips"] == 1090 and metrics["bad_rows"] == 10
    assert "bad_rows.jsonl: the run before left out other rows" in capsys.readouterr().out
    assert len((out / "bad_rows.jsonl").read_text().splitlines()) == 10
