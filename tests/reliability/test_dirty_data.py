"""One row of a hundred is broken, in eleven ways: training stops with one list of them, or goes on with all others."""

import io
import json
import multiprocessing
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile
from accelerate import PartialState
from huggingface_hub import constants

import annotate_sense
import eval_sense
import train_sense
from processing import bad_rows, model_card
from processing.bad_rows import BadRows
from processing.checkpoints import CHECKSUMS
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
    fields |= {"backbone_dtype": "float32", "output_dir": tmp_path / "out", "per_device_train_batch_size": 4}
    fields |= {"max_steps": 1, "warm_start": False, "eval_strategy": "no", "use_cpu": True}
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
        (line,) = [
            line
            for line in listed
            if f"{folder}/train/metadata.jsonl, line {i + 1}" in re.split(", (?!line)|:", line, 1)[0]
        ]
        assert re.search(SAID[kind], line), line
    assert not (tmp_path / "out").exists()


SAID = {  # field, what was found, what to do
    "missing_file": r"file_name: .*row-\d+.wav: no such file; put it there, or delete the row",
    "empty_file": r"file_name: .*row-\d+.wav: 0 bytes; get the file again",
    "truncated": r"audio: .*row-\d+.flac: .*; (get the file again|give a WAV, FLAC)",
    "unreadable": r"audio: .*row-\d+.wav: not readable as audio .*; give a WAV, FLAC, OGG or MP3 file",
    "not_finite": r"audio: .*: 1 of 8000 samples are NaN or infinite, .*; repair or drop the clip",
    "silent": r"audio: .*: silence or a constant from end to end; record it again",
    "too_short": r"audio: .*: 0.010 s, no word is so short; delete the row",
    "too_long": r"audio: .*: 40.00 s of audio, the limit is 30 s; cut it into shorter clips",
    "empty_text": r"text: ' '; write down what is said, or delete the row",
    "wrong_entities": r"entities: \['PERSON', 3, 99\] is no .* within the 8 characters of text; mend its numbers",
    "bad_utf8": r"byte 0xe9 at \d+ is not UTF-8; save the line as UTF-8",
}


def test_training_goes_on_with_exactly_the_good_rows(corpus, train, tmp_path, monkeypatch, decoded, capsys):
    folder, broken = corpus
    seen, begin, out = [], train_sense.SenseTrainer.train, tmp_path / "out"

    def spy(self, **kwargs):
        seen.extend(row["id"] for row in self.train_dataset)  # the questions of an epoch
        return begin(self, **kwargs)

    monkeypatch.setattr(train_sense.SenseTrainer, "train", spy)
    metrics = train("--on_bad_row", "skip")
    good = [f"row-{i}" for i in range(1100) if f"row-{i}" not in broken]
    assert seen == good  # each once
    assert metrics["train_clips"] == 1089 and metrics["bad_rows"] == dict.fromkeys(broken.values(), 1)
    listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert {row["id"]: row["kind"] for row in listed} == broken and len(listed) == 11
    for row in listed:
        assert re.search(SAID[row["kind"]], f"{row['field']}: {row['message']}"), row
        assert Path(row["file"]).stem == row["id"] and row["where"].startswith(f"{folder}/train/metadata.jsonl, line ")
    assert "11 of 1102 rows can't be used (1 bad_utf8" in capsys.readouterr().out

    # Started again, it decodes what was bad alone, and a file that changed; what was mended is used, and it is said.
    assert len(decoded) == 1100 - 4 + 2  # of four rows the line is wrong, or there is no file
    decoded.clear()
    mended, changed = next(name for name, kind in broken.items() if kind == "silent"), good[5]
    for name in (mended, changed):
        (folder / "train" / f"{name}.wav").write_bytes(wav(tone(0.25)))
    metrics = train("--on_bad_row", "skip", "--max_steps", "2")
    bad_clips = {name for name, kind in broken.items() if kind in CLIPS and not kind.endswith("_file")}
    assert {Path(path).stem for path in decoded} == {*bad_clips, changed, "a"}
    assert metrics["train_clips"] == 1090 and sum(metrics["bad_rows"].values()) == 10
    assert "bad_rows.jsonl: the run before left out other rows" in capsys.readouterr().out
    assert len((out / "bad_rows.jsonl").read_text().splitlines()) == 10


# --- two processes


def of_two(rank: int, port: int, folder: str, mode: str, out: str, answers):
    """One of two processes that look at a split."""
    heard, find = [], bad_rows.find_problem
    bad_rows.find_problem = lambda audio: heard.append(audio["path"]) or find(audio)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    state, said = PartialState(cpu=True), ""
    noted = BadRows(mode, out, training=True)
    rows = noted.check(load_corpus(folder, "train", bad_rows=noted))
    try:
        noted.settle()
    except ValueError as error:
        said = str(error)
    answers.put((rank, rows["id"], len(heard), said))
    state.wait_for_everyone()
    state.destroy_process_group()


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_of_two_processes_both_decode_one_reports_and_both_use_the_same_rows(tmp_path, own_cache, mode):
    broken = write_dirty_split(tmp_path / "corpus" / "train", 33)
    context = multiprocessing.get_context("fork")  # with all that is imported
    answers = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = (port, str(tmp_path / "corpus"), mode, str(tmp_path / "out"), answers)
    processes = [context.Process(target=of_two, args=(rank, *where)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    (_, ids, heard, said), (_, others_ids, others_heard, others_said) = found
    assert ids == others_ids == [f"row-{i}" for i in range(33) if f"row-{i}" not in broken]
    assert heard + others_heard == 33 - 4 and abs(heard - others_heard) < 5  # they share them out
    listed = tmp_path / "out" / "bad_rows.jsonl"
    if mode == "skip":
        assert said == others_said == "" and len(listed.read_text().splitlines()) == 11
    else:
        assert len(said.splitlines()) == 13 and not listed.exists()
        assert others_said == "11 rows can't be used; the main process lists them"


# --- streams


def test_a_stream_is_checked_as_it_comes(tmp_path):
    broken = write_dirty_split(tmp_path / "corpus" / "train", 33)
    first = next(iter(broken))
    noted = BadRows(folder=tmp_path / "out", training=True)
    rows = noted.usable(load_corpus(tmp_path / "corpus", "train", streaming=True, bad_rows=noted))
    before = int(first.removeprefix("row-"))
    assert [next(rows)["id"] for _ in range(before)] == [f"row-{i}" for i in range(before)]
    with pytest.raises(ValueError, match=rf"1 of {before + 1} rows can't be used .*\n.*line {before + 1}, file_name"):
        next(rows)

    listed, ids = tmp_path / "out" / "bad_rows.jsonl", [f"row-{i}" for i in range(33) if f"row-{i}" not in broken]
    for _ in range(2):  # runs of two epochs: nothing is listed twice
        noted = BadRows("skip", tmp_path / "out", training=True)
        rows = load_corpus(tmp_path / "corpus", "train", streaming=True, bad_rows=noted)
        for _ in range(2):
            assert [row["id"] for row in noted.usable(rows)] == ids
            found = [json.loads(line) for line in listed.read_text().splitlines()]
            assert {row["id"]: row["kind"] for row in found} == broken and len(found) == 11
    others, torn = BadRows("skip", tmp_path / "out", training=True), listed.read_bytes()
    assert bad_rows.count_kinds(others.read_list().values()) == noted.counts
    listed.write_bytes(torn[:-20] + b"\n")  # by a crash: listed once more
    noted = BadRows("skip", tmp_path / "out", training=True)
    assert [row["id"] for row in noted.usable(rows)] == ids
    assert len(listed.read_text().splitlines()) == 12 and noted.read_list().keys() == others.listed.keys()
    assert [row["id"] for row in others.usable(rows)] == ids and len(listed.read_text().splitlines()) == 12
    noted.start_over()
    assert not listed.exists()


def test_a_streamed_training_lists_its_bad_rows_once(corpus, train, tmp_path):
    """Those that are looked at before the first step, those of a worker, and of the run that goes on."""
    small, out = tmp_path / "small", tmp_path / "out"
    broken = write_dirty_split(small / "train", 33)
    shutil.copytree(corpus[0] / "dev", small / "dev")
    out.mkdir()
    (out / "bad_rows.jsonl").write_text('{"where": "of another run", "kind": "silent"}\n')
    asked = ["--streaming", "true", "--warm_start_clips", "8", "--on_bad_row", "skip", "--dataloader_num_workers", "1"]
    asked += ["--max_eval_samples", "2", "--save_steps", "4", "--dataset_dir", str(small)]
    for steps in (4, 8):  # of 4 rows
        metrics = train(*asked, "--max_steps", str(steps))
        listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
        assert len({row["where"] for row in listed}) == len(listed) > 0
        assert {row["id"] for row in listed} <= broken.keys()
        assert metrics["bad_rows"] == bad_rows.count_kinds(listed)
    assert len(listed) == 11  # of the second epoch
    with pytest.raises(ValueError, match=r"with 4 rows in a process's batch \(per_device.*\), now there are 2"):
        train(*asked, "--max_steps", "30", "--per_device_train_batch_size", "2")
    checkpoint = out / "checkpoint-8"
    for rank in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    (checkpoint / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match="was written with 2 processes, now there are 1: a stream goes on"):
        train(*asked, "--max_steps", "30", "--resume_from_checkpoint", str(checkpoint))


# --- scoring, labelling


def test_scoring_stops_or_says_what_it_left_out(tmp_path, own_cache, saved, capsys):
    """Silence, a blip and an empty reference can be scored: hearing nothing is right."""
    broken = write_dirty_split(tmp_path / "corpus" / "test", 22)
    bad = {name: kind for name, kind in broken.items() if kind not in bad_rows.TRAINING_ONLY}
    out = tmp_path / "scored"
    asked = ["--model", saved, "--dataset", str(tmp_path / "corpus"), "--output_dir", str(out), "--tasks", "sa"]
    with pytest.raises(ValueError, match="8 of 22 rows can't be used .*") as stopped:
        eval_sense.main(asked)
    assert len(str(stopped.value).splitlines()) == 10 and not out.exists()
    metrics = eval_sense.main([*asked, "--on_bad_row", "skip", "--report"])
    assert metrics["n_utterances"] == 14 and sum(metrics["bad_rows"].values()) == 8
    assert json.loads((out / "metrics.json").read_text())["bad_rows"] == dict.fromkeys(bad.values(), 1)
    listed = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text().splitlines()]
    assert {row["id"]: row["kind"] for row in listed} == bad
    scored = [json.loads(line)["id"] for line in (out / "utterances.jsonl").read_text().splitlines()]
    assert {*scored} == {f"row-{i}" for i in range(22)} - bad.keys()
    said = "8 rows are left out of all scores: they can't be used (1 bad_utf8, 1 wrong_entities, 1 missing_file"
    assert all(said in text for text in (capsys.readouterr().out, (out / "results.md").read_text()))
    assert "8 rows are left out of all scores" in (out / "report.html").read_text()
    card = model_card._measured(metrics)
    assert "8 rows left out that can't be used" in card and model_card.eval_results(metrics) == []


def test_labelling_stops_or_leaves_out_what_it_cannot_read(tmp_path, own_cache):
    """It asks about the words; the clips are not listened to."""
    broken = write_dirty_split(tmp_path / "corpus" / "train", 22)
    bad = {n for n, kind in broken.items() if kind in ("missing_file", "empty_file", "wrong_entities", "bad_utf8")}
    out = tmp_path / "out"
    asked = ["--input", str(tmp_path / "corpus"), "--output", str(out), "--task", "sentiment", "--local", "vader"]
    with pytest.raises(ValueError, match="4 of 22 rows can't be used .*"):
        annotate_sense.main(asked)
    provenance = annotate_sense.main([*asked, "--on_bad_row", "skip"])
    assert provenance["bad_rows"] == {"bad_utf8": 1, "wrong_entities": 1, "missing_file": 1, "empty_file": 1}
    assert {json.loads(line)["id"] for line in (out / "bad_rows.jsonl").read_text().splitlines()} == bad
    written = [json.loads(line)["id"] for line in (out / "train" / "metadata.jsonl").read_text().splitlines()]
    assert written == [f"row-{i}" for i in range(22) if f"row-{i}" not in bad]
