"""What is wrong with a clip; what is said of bad rows, and what is kept of good ones."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from huggingface_hub import constants

from processing import bad_rows, load_audio
from processing.bad_rows import KINDS, MIN_SECONDS, SILENCE, TRAINING_ONLY, BadRows, GoodClips, find_problem
from processing.datasets import load_corpus
from tests.conftest import tone, wav


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is known of any clip."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))


def stored(folder: Path, samples, name: str = "a.wav", rate: int = 16000, subtype: str | None = None) -> dict:
    soundfile.write(folder / name, samples, rate, subtype=subtype)
    return {"bytes": None, "path": str(folder / name)}


ONE = np.ones(8000, np.float32)


@pytest.mark.parametrize(
    "text, kind", [("ann", None), ("7", None), ("में", None), (" ", "empty_text"), ("...", "empty_text")]
)
def test_texts(text, kind):
    found = BadRows("skip", training=True)._judge(text, None)
    assert (found and found["kind"]) == kind
    assert BadRows("skip")._judge(text, None) is None  # to say nothing can be right


@pytest.mark.parametrize(
    "samples, how, kind",
    [
        (tone(0.5), {}, None),
        (tone(0.5), {"name": "a.flac"}, None),
        (np.stack([tone(0.5, 44100)] * 2, 1), {"rate": 44100}, None),
        (tone(30.0), {}, None),
        (tone(30.01), {}, "too_long"),
        (tone(MIN_SECONDS), {}, None),
        (tone(MIN_SECONDS - 0.001), {}, "too_short"),
        (0 * ONE, {}, "silent"),
        (-0.7 * ONE, {}, "silent"),
        (0.5 * ONE + 0.9 * SILENCE * np.sign(np.sin(np.arange(8000))), {"subtype": "FLOAT"}, "silent"),
        (0.5 * ONE + 2 * SILENCE * np.sign(np.sin(np.arange(8000))), {"subtype": "FLOAT"}, None),
        (np.stack([tone(0.5), -tone(0.5)], 1), {"subtype": "FLOAT"}, "silent"),  # mixed down, they cancel
        (np.where(np.arange(8000) == 7, np.inf, ONE), {"subtype": "FLOAT"}, "not_finite"),
        (tone(0.0), {}, "unreadable"),
    ],
)
def test_clips(tmp_path, samples, how, kind):
    audio = stored(tmp_path, samples, **how)
    for given in (audio, {"bytes": Path(audio["path"]).read_bytes(), "path": None}):
        found = find_problem(given)
        assert (found and found["kind"]) == kind
        assert found is None or re.search("; [a-z]", found["message"])  # what to do
        if kind is None or kind in TRAINING_ONLY:
            load_audio(given)
        else:
            with pytest.raises(ValueError, match=re.escape(found["message"])):
                load_audio(given)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_flac(tmp_path, share):
    path = Path(stored(tmp_path, tone(1.0), "a.flac")["path"])
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert find_problem({"bytes": None, "path": str(path)})["kind"] == "truncated"


def write_rows(folder: Path, clips: list[bytes], text: str = "so it is") -> Path:
    (folder / "train").mkdir(parents=True)
    for i, clip in enumerate(clips):
        (folder / "train" / f"{i}.wav").write_bytes(clip)
    lines = [json.dumps({"file_name": f"{i}.wav", "text": text}) + "\n" for i in range(len(clips))]
    (folder / "train" / "metadata.jsonl").write_text("".join(lines))
    return folder


def look(corpus: Path, *how, **more) -> tuple[BadRows, list[str]]:
    """What is noted, and the ids of the others."""
    noted = BadRows(*how, **more)
    return noted, list(noted.check(load_corpus(corpus, "train", bad_rows=noted))["id"])


def test_rows_without_anything_to_learn_from_can_be_scored(tmp_path):
    corpus = write_rows(tmp_path / "c", [wav(tone(0.3)), wav(0 * tone(0.3)), wav(tone(0.05)), b"no sound"])
    noted, ids = look(corpus, training=True)
    assert ids == ["0"] and noted.counts == {"unreadable": 1, "too_short": 1, "silent": 1}
    noted, ids = look(corpus)
    assert ids == ["0", "1", "2"] and noted.counts == {"unreadable": 1}
    silent = write_rows(tmp_path / "d", [wav(tone(0.3))], text=" \t")
    assert look(silent)[1] == ["0"]
    with pytest.raises(ValueError, match=r"(?s)not one row is left: 1 of 1 rows .*text: ' \\t'; write down what"):
        look(silent, "skip", training=True)


def test_good_clips_are_not_decoded_again_while_they_stay_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_rows, "WORTH_KEEPING", 3)
    decoded, find = [], bad_rows.find_problem
    monkeypatch.setattr(bad_rows, "find_problem", lambda audio: decoded.append(audio["path"]) or find(audio))
    corpus = write_rows(tmp_path / "c", [wav(tone(0.3)), wav(tone(0.2)), b"no sound", wav(0 * tone(0.3))])
    look(corpus)  # silence is fair there; training has to hear it nevertheless
    decoded.clear()
    assert look(corpus, training=True)[1] == ["0", "1"]
    assert sorted(Path(path).stem for path in decoded) == ["2", "3"]
    decoded.clear()
    (corpus / "train" / "0.wav").write_bytes(b"no sound either")
    assert look(corpus, training=True)[1] == ["1"] and len(decoded) == 3
    decoded.clear()
    monkeypatch.setattr(bad_rows, "MIN_SECONDS", 0.25)  # other limits, other verdicts
    with pytest.raises(ValueError, match="not one row is left"):
        look(corpus, training=True)
    monkeypatch.undo()
    kept = tmp_path / "hf" / "sense-good-clips.txt"
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    assert len(kept.read_text().split()) == len(GoodClips().keys) == 2
    few = write_rows(tmp_path / "few", [wav(tone(0.4))] * 2)
    look(few)
    assert len(kept.read_text().split()) == 2


def test_clips_in_memory_go_by_their_bytes(tmp_path):
    one, two = ({"bytes": wav(tone(0.2, seed=seed)), "path": "a.wav"} for seed in (1, 2))
    assert GoodClips.key(one) == GoodClips.key(one | {"path": None}) != GoodClips.key(two)
    assert GoodClips.key({"bytes": None, "path": str(tmp_path / "nowhere")}) is None


def test_a_cache_that_can_not_be_written_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bad_rows, "WORTH_KEEPING", 1)
    (tmp_path / "hf").write_text("a file, no folder")
    assert look(write_rows(tmp_path / "c", [wav(tone(0.3))]))[1] == ["0"]
    assert "clips are checked again on the next start" in capsys.readouterr().out


def test_where_the_system_does_not_tell_cores_apart_all_are_used(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")  # Linux alone has it
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert look(write_rows(tmp_path / "c", [wav(tone(0.3))]))[1] == ["0"]


def test_long_lists_end(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_rows, "MOST_LISTED", 2)
    noted, _ = look(write_rows(tmp_path / "c", [wav(tone(0.3)), *[b"no sound"] * 5]))
    lines = str(noted).splitlines()
    assert lines[0] == "5 of 6 rows can't be used (5 unreadable):" and lines[3] == "  and 3 more" and len(lines) == 5


def test_the_list_is_written_with_skip_and_emptied_when_all_is_mended(tmp_path, capsys):
    corpus, out = write_rows(tmp_path / "c", [wav(tone(0.3)), b"no sound"]), tmp_path / "out"
    noted, _ = look(corpus, "stop", out)
    with pytest.raises(ValueError, match="1 of 2 rows can't be used"):
        noted.settle()
    assert not out.exists()
    for _ in range(2):
        look(corpus, "skip", out)[0].settle()
        (line,) = (out / "bad_rows.jsonl").read_text().splitlines()
        assert json.loads(line) == {
            "where": f"{corpus}/train/metadata.jsonl, line 2",
            "id": "1",
            "file": str(corpus / "train" / "1.wav"),
            **find_problem({"bytes": None, "path": str(corpus / "train" / "1.wav")}),
        }
    assert "other rows" not in capsys.readouterr().out
    (corpus / "train" / "1.wav").write_bytes(wav(tone(0.4)))
    look(corpus, "stop", out)[0].settle()
    assert (out / "bad_rows.jsonl").read_text() == ""
    assert "the run before left out other rows" in capsys.readouterr().out
    look(corpus, "stop", tmp_path / "new")[0].settle()
    assert not (tmp_path / "new").exists()


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="on_bad_row: give stop or skip, found 'ignore'"):
        BadRows("ignore")


def test_the_page_on_training_names_every_kind():
    page = (Path(bad_rows.__file__).parents[1] / "docs" / "training.md").read_text()
    section = page.partition("## Rows that can't be used")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(KINDS)
    marked = re.findall(r"^\| `(\w+)` \|.*training only", section, re.MULTILINE)
    assert set(marked) == set(TRAINING_ONLY)
