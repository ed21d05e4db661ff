"""Corpora of every kind into one schema; what is wrong with a corpus is named."""

import codecs
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import soundfile

from processing import load_audio
from processing.bad_rows import BadRows
from processing.datasets import SCHEMA, STORED_AUDIO, dataset_name, load_corpus
from processing.tasks import phrases
from tests.conftest import tone, wav


ROOT = Path(__file__).parents[2]
ROWS = [
    {
        "file_name": "a.flac",
        "text": "Ann left.",
        "duration": 0.5,
        "sentiment": "Neutral",
        "language": "en",
        "entities": [["PERSON", 0, 3]],
    },
    {"file_name": "clips/b.wav", "text": "Good.", "id": "second", "sentiment": "Positive"},
]


def write_split(folder, rows, audio=True):
    """A folder with metadata.jsonl and the clips that it names, the n-th of (n + 1) / 2 seconds."""
    folder.mkdir(parents=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for i, row in enumerate(rows if audio else []):
        file = folder / row["file_name"]
        file.parent.mkdir(exist_ok=True)
        soundfile.write(file, tone((i + 1) / 2, seed=i), 16000)


@pytest.fixture
def corpus(tmp_path):
    write_split(tmp_path / "corpus" / "train", ROWS)
    write_split(tmp_path / "corpus" / "test", ROWS[:1])
    return tmp_path / "corpus"


@pytest.fixture
def without_torchcodec(monkeypatch):
    """`datasets` as it is where torchcodec is not installed."""
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)
    for name in ("torchcodec.decoders", "torchcodec.encoders"):
        monkeypatch.setitem(sys.modules, name, None)


# --- metadata.jsonl


@pytest.mark.parametrize("streaming", [False, True])
def test_folder(corpus, streaming, without_torchcodec):
    loaded = load_corpus(corpus, "train", streaming=streaming)
    assert isinstance(loaded, datasets.IterableDataset if streaming else datasets.Dataset)
    assert loaded.features == SCHEMA
    first, second = loaded
    assert first == {
        "id": "a",
        "audio": {"bytes": None, "path": str(corpus / "train" / "a.flac")},
        "text": "Ann left.",
        "entities": [["PERSON", 0, 3]],
        "sentiment": "Neutral",
        "language": "en",
        "duration": 0.5,
        "speaker": None,
    }
    assert (second["id"], second["entities"], second["duration"], second["language"]) == ("second", None, 1.0, None)
    assert [len(load_audio(row["audio"])) for row in (first, second)] == [8000, 16000]


def test_folder_of_one_split(tmp_path):
    write_split(tmp_path / "one", ROWS)
    assert load_corpus(str(tmp_path / "one"), "train")["id"] == ["a", "second"]
    with pytest.raises(ValueError, match="no split 'test'; it has 'train'"):
        load_corpus(tmp_path / "one", "test")


def test_split_that_is_not_there(corpus):
    with pytest.raises(ValueError, match="corpus: no split 'dev'; it has 'test', 'train'"):
        load_corpus(corpus, "dev")


def test_columns_that_are_not_there(corpus):
    with pytest.raises(ValueError, match="no text column 'transcript'; it has 'file_name', 'text', 'duration'"):
        load_corpus(corpus, "train", text_column="transcript")
    with pytest.raises(ValueError, match="no audio column 'sound'; it has 'file_name', 'text'"):
        load_corpus(corpus, "train", audio_column="sound")


def test_other_columns(tmp_path):
    rows = [{"file_name": "x.wav", "said": "Yes."}]
    write_split(tmp_path / "c" / "train", rows)
    lines = [{"clip": row["file_name"], "said": row["said"]} for row in rows]
    (tmp_path / "c" / "train" / "metadata.jsonl").write_text(json.dumps(lines[0]), encoding="utf-8-sig")
    loaded = load_corpus(tmp_path / "c", "train", audio_column="clip", text_column="said")
    assert (loaded[0]["id"], loaded[0]["text"], len(load_audio(loaded[0]["audio"]))) == ("x", "Yes.", 8000)


@pytest.mark.parametrize(
    "columns, speaker",
    [
        ({"speaker": "ann"}, "ann"),
        ({"speaker_id": 84}, "84"),
        ({"speaker": None, "speaker_id": 0}, "0"),
        ({"speaker": ""}, None),
    ],
)
def test_speakers(tmp_path, columns, speaker):
    write_split(tmp_path / "c" / "train", [ROWS[0] | columns])
    assert load_corpus(tmp_path / "c", "train")["speaker"] == [speaker]


def test_missing_files_are_counted(tmp_path):
    rows = [{"file_name": f"{i}.wav", "text": "x"} for i in range(5)]
    write_split(tmp_path / "c" / "train", rows, audio=False)
    with pytest.raises(ValueError, match=r"5 of 5 rows can't be used \(5 missing_file\)") as raised:
        load_corpus(tmp_path / "c", "train")
    for i in range(5):
        assert re.search(rf"line {i + 1}, file_name: .*{i}.wav: no such file; put it there", str(raised.value))


def test_a_name_too_long_for_the_disk_is_a_missing_file(tmp_path):
    write_split(tmp_path / "c" / "train", [{"file_name": "a" * 300, "text": "x"}], audio=False)
    chapter = tmp_path / "tree" / "train" / "1" / "2"
    chapter.mkdir(parents=True)
    (chapter / "1-2.trans.txt").write_bytes(b"\xff" * 100 + b" ANNA LEFT")  # three bytes each, as U+FFFD
    for corpus in ("c", "tree"):
        with pytest.raises(ValueError, match=r"1 of 1 rows can't be used \(1 missing_file\)"):
            load_corpus(tmp_path / corpus, "train")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "metadata.jsonl: it is empty"),
        ('{"file_name": "a.wav", "text": "x"}\n{"file_name": ', "metadata.jsonl, line 2: not JSON"),
        ('["a.wav", "x"]', "line 1: a list; give an object"),
        ("[" * 100_000, "line 1: not JSON .*recursion"),
        ('{"file_name": "a.wav", "text": "\\ud83d"}', r"line 1: '\\ud83d' is no letter; write the line anew"),
        ('{"file_name": "a.wav", "text": "x"}\n{"file_name": "b.wav"}', "line 2, text: None; give the transcript"),
        ('{"file_name": "a.wav", "text": 7}', "line 1, text: 7; give the transcript as a string"),
        ('{"file_name": null, "text": "x"}', "line 1, file_name: None; give the path of an audio file"),
    ],
)
def test_bad_metadata(tmp_path, content, message):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path, "train")


def test_a_bad_line_spoils_itself_alone(tmp_path):
    write_split(tmp_path / "c" / "train", [ROWS[0] | {"file_name": f"{i}.wav", "id": i} for i in range(6)])
    path = tmp_path / "c" / "train" / "metadata.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = lines[1].replace(b"Ann", b"\xff\xfenn")
    lines[3] = lines[3][:-1]
    lines[4] = b"null"
    path.write_bytes(codecs.BOM_UTF8 + b"\r\n\n".join(lines))
    noted = BadRows("skip")
    loaded = load_corpus(tmp_path / "c", "train", bad_rows=noted)
    assert loaded["id"] == ["0", "2", "5"] and loaded["text"] == ["Ann left."] * 3
    assert loaded["where"] == [f"{path}, line {number}" for number in (1, 5, 11)]
    found = [(row["where"], row["id"], row["file"], row["kind"]) for row in noted.found.values()]
    assert found == [
        (f"{path}, line 3", "1", str(path.parent / "1.wav"), "bad_utf8"),
        (f"{path}, line 7", "", None, "bad_json"),
        (f"{path}, line 9", "", None, "bad_json"),
    ]
    assert re.search(r"line 3: byte 0xff at \d+ is not UTF-8", str(noted)) and noted.looked_at == 6


def test_entities_go_with_their_text(tmp_path):
    slue = {
        "file_name": "a.wav",
        "text": "MISTER SMITH CAME",
        "normalized_text": "mister smith came",
        "normalized_ner": [["PERSON", 7, 5], ["DATE", 0, 6]],
        "normalized_combined_ner": [["PERSON", 7, 5]],
    }
    write_split(tmp_path / "c" / "train", [slue])
    by_text = {
        column: load_corpus(tmp_path / "c", "train", text_column=column) for column in ("text", "normalized_text")
    }
    assert by_text["normalized_text"][0]["entities"] == [["PERSON", 7, 5]]
    assert by_text["text"][0]["entities"] is None
    raw = load_corpus(tmp_path / "c", "train", text_column="normalized_text", entity_tags="raw")
    assert raw[0]["entities"] == [["PERSON", 7, 5], ["DATE", 0, 6]]
    with pytest.raises(ValueError, match="entity_tags: give combined, raw or any, found 'all'"):
        load_corpus(tmp_path / "c", "train", entity_tags="all")


def test_large_folder_is_fast_and_mixed_rows_fit(tmp_path):
    rows = [{"file_name": "a.wav", "text": str(i), "entities": [["LAW", 0, 1]] * (i % 3)} for i in range(2000)]
    write_split(tmp_path / "c" / "train", rows[:1])
    (tmp_path / "c" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_corpus(tmp_path / "c", "train")
    assert [len(entities) for entities in loaded["entities"][:4]] == [0, 1, 2, 0] and len(loaded) == 2000


# --- LibriSpeech


@pytest.fixture
def librispeech(tmp_path):
    for split, speaker in (("dev-clean", "84"), ("test-clean", "1089")):
        chapter = tmp_path / "LibriSpeech" / split / speaker / "12"
        chapter.mkdir(parents=True)
        names = [f"{speaker}-12-{i:04d}" for i in range(2)]
        (chapter / f"{speaker}-12.trans.txt").write_text("".join(f"{name} HE SPOKE\n" for name in names))
        for name in names:
            soundfile.write(chapter / f"{name}.flac", tone(0.3), 16000)
    (tmp_path / "LibriSpeech" / "README.TXT").write_text("about")
    return tmp_path / "LibriSpeech"


def test_librispeech(librispeech, without_torchcodec):
    loaded = load_corpus(librispeech, "dev-clean")
    assert loaded.features == SCHEMA and loaded["id"] == ["84-12-0000", "84-12-0001"]
    assert loaded["speaker"] == ["84", "84"]
    assert set(loaded["text"]) == {"HE SPOKE"} and len(load_audio(loaded[1]["audio"])) == 4800


def test_librispeech_bad_requests(librispeech):
    with pytest.raises(ValueError, match="no split 'train'; it has 'dev-clean', 'test-clean'"):
        load_corpus(librispeech, "train")
    with pytest.raises(ValueError, match="no text column 'normalized_text'; it has 'audio', 'text'"):
        load_corpus(librispeech, "dev-clean", text_column="normalized_text")
    next(librispeech.glob("dev-clean/*/*/*0001.flac")).unlink()
    with pytest.raises(ValueError, match=r"1 of 2 rows .*\n.*12.trans.txt, line 2, audio: .*84-12-0001.flac: no such"):
        load_corpus(librispeech, "dev-clean")


def test_librispeech_with_a_bad_byte(librispeech):
    (path,) = librispeech.glob("test-clean/*/*/*.trans.txt")
    path.write_bytes(path.read_bytes().replace(b"HE SPOKE", b"CAF\xc9", 1) + b"\n")
    noted = BadRows("skip")
    assert load_corpus(librispeech, "test-clean", bad_rows=noted)["id"] == ["1089-12-0001"]
    ((where, row),) = noted.found.items()
    assert where == f"{path}, line 1" and (row["id"], row["kind"]) == ("1089-12-0000", "bad_utf8")


# --- whatever `datasets` loads


@pytest.fixture
def hub_like(tmp_path, monkeypatch):
    """A folder of Parquet files that hold the audio, as most data sets on the Hub do, with SLUE's columns."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, tone(0.5, rate=8000), 8000)
    tags = [{"type": "PERSON", "start": 0, "length": 3}]
    features = {
        "sound": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "normalized_text": datasets.Value("string"),
        "normalized_ner": datasets.List(
            {k: datasets.Value(v) for k, v in [("type", "string"), ("start", "int32"), ("length", "int32")]}
        ),
        "speaker_id": datasets.Value("int64"),
    }
    rows = [
        {"sound": {"bytes": clip.read_bytes(), "path": "one.wav"}, "normalized_text": "ann", "normalized_ner": tags},
        {"sound": {"bytes": clip.read_bytes(), "path": None}, "normalized_text": "", "normalized_ner": []},
    ]
    rows = [row | {"speaker_id": 7} for row in rows]
    source = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    source = source.cast_column("sound", datasets.Audio(decode=False))
    (tmp_path / "parquet").mkdir()
    source.to_parquet(tmp_path / "parquet" / "test.parquet")
    return tmp_path / "parquet", source


COLUMNS = {"audio_column": "sound", "text_column": "normalized_text"}


def check_hub_rows(rows):
    assert [row["id"] for row in rows] == ["one", "test-1"]
    assert [row["entities"] for row in rows] == [[["PERSON", 0, 3]], []]
    assert [row["speaker"] for row in rows] == ["7", "7"]
    assert [list(row) for row in rows] == [list(SCHEMA)] * 2
    assert [len(load_audio(row["audio"])) for row in rows] == [8000, 8000]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(hub_like, streaming):
    loaded = load_corpus(hub_like[0], "test", streaming=streaming, **COLUMNS)
    assert loaded.features == SCHEMA
    check_hub_rows(list(loaded))


def test_parquet_needs_no_torchcodec(hub_like, without_torchcodec):
    check_hub_rows(list(load_corpus(hub_like[0], "test", **COLUMNS)))


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_are_their_names_and_other_columns_are_left_alone(hub_like, tmp_path, streaming, without_torchcodec):
    folder, source = hub_like
    rows = [dict(row) | {"language": 1, "sentiment": place} for row, place in zip(source, (2, -1))]
    rows = [row | {"noisy": row["sound"], "picture": {"bytes": b"none", "path": None}} for row in rows]
    classes = {"language": ("en", "de"), "sentiment": ("negative", "neutral", "positive")}
    features = {name: datasets.ClassLabel(names=list(names)) for name, names in classes.items()}
    features |= {"sound": STORED_AUDIO, "noisy": STORED_AUDIO, "picture": STORED_AUDIO}
    made = datasets.Dataset.from_list(rows, features=datasets.Features({**source.features, **features}))
    made = made.cast_column("noisy", datasets.Audio(decode=False)).cast_column("picture", datasets.Image(decode=False))
    made = made.cast_column("noisy", datasets.Audio()).cast_column("picture", datasets.Image())
    made.to_parquet(folder / "test.parquet")
    loaded = list(load_corpus(folder, "test", streaming=streaming, **COLUMNS))
    check_hub_rows(loaded)
    assert [(row["language"], row["sentiment"]) for row in loaded] == [("de", "Positive"), ("de", None)]


def test_audio_in_any_column_of_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    content = wav(tone(0.5))
    (tmp_path / "data" / "clips").mkdir(parents=True)
    (tmp_path / "data" / "clips" / "a.wav").write_bytes(content)
    for sound in (content, "clips/a.wav", {"bytes": None, "path": "clips/a.wav"}):
        datasets.Dataset.from_list([{"sound": sound, "text": "anna"}]).to_parquet(tmp_path / "data" / "test.parquet")
        rows = load_corpus(tmp_path / "data", "test", audio_column="sound")
        assert len(load_audio(rows[0]["audio"])) == 8000, sound


@pytest.mark.parametrize("format", ["numpy", "torch"])
def test_saved_in_another_format(hub_like, tmp_path, format):
    datasets.DatasetDict({"test": hub_like[1].with_format(format)}).save_to_disk(tmp_path / "saved")
    check_hub_rows(load_corpus(tmp_path / "saved", "test", **COLUMNS))


def test_few_rows_are_held_at_a_time(hub_like):
    folder, source = hub_like
    datasets.concatenate_datasets([source] * 75).to_parquet(folder / "test.parquet")
    rows = load_corpus(folder, "test", **COLUMNS)
    assert len(rows) == 150 and max(map(len, rows.data.column("audio").chunks)) <= 100


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_to_disk(hub_like, tmp_path, streaming):
    datasets.DatasetDict({"test": hub_like[1]}).save_to_disk(tmp_path / "saved")
    check_hub_rows(list(load_corpus(tmp_path / "saved", "test", streaming=streaming, **COLUMNS)))
    with pytest.raises(ValueError, match="saved: no split 'train'; it has 'test'"):
        load_corpus(tmp_path / "saved", "train", streaming=streaming, **COLUMNS)


def test_one_split_saved_to_disk(hub_like, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    hub_like[1].save_to_disk(tmp_path / "csv")  # a loader's name, too
    monkeypatch.chdir(tmp_path)
    for name in ("~/csv", "csv"):
        rows = load_corpus(name, "train", **COLUMNS)
        assert rows["text"] == hub_like[1]["normalized_text"] and len(load_audio(rows[0]["audio"])) > 0
    with pytest.raises(ValueError, match="no split 'test'; it has 'train'"):
        load_corpus("~/csv", "test", **COLUMNS)
    datasets.load_dataset(str(hub_like[0]), split="test").save_to_disk(tmp_path / "saved")  # it knows what it is
    assert len(load_corpus(tmp_path / "saved", "test", **COLUMNS)) == len(hub_like[1])
    (tmp_path / "saved" / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="saved: `datasets` can't load it"):
        load_corpus(tmp_path / "saved", "test", **COLUMNS)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_bad_requests(hub_like, streaming):
    folder = hub_like[0]
    with pytest.raises(ValueError, match="no text column 'text'; it has 'sound', 'normalized_text', 'normalized_ner'"):
        load_corpus(folder, "test", audio_column="sound", streaming=streaming)
    with pytest.raises(ValueError, match="no audio column 'audio'; it has 'sound'"):
        load_corpus(folder, "test", text_column="normalized_text", streaming=streaming)
    with pytest.raises(ValueError, match="dev.*'test'"):
        load_corpus(folder, "dev", streaming=streaming, **COLUMNS)


def test_processes_prepare_a_dataset_once(hub_like, tmp_path):
    """However they hash strings: each copy has all audio."""
    load = f"load_corpus({str(hub_like[0])!r}, 'test', **{COLUMNS!r})"
    for seed in "12":
        cache = {"HF_DATASETS_CACHE": str(tmp_path / "shared"), "PYTHONHASHSEED": seed}
        code = f"from processing.datasets import load_corpus; {load}"
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **cache}, cwd=ROOT)
    assert len(list((tmp_path / "shared").rglob("cache-*.arrow"))) == 1


def test_a_file_that_was_put_back_is_found(hub_like, tmp_path):
    rows = [{"sound": {"bytes": None, "path": str(tmp_path / "x.wav")}, "normalized_text": "ann"}]
    features = datasets.Features({"sound": STORED_AUDIO, "normalized_text": datasets.Value("string")})
    (tmp_path / "files").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "files" / "test.parquet")
    found = []
    for _ in range(2):
        noted = BadRows("skip")
        found.append(len(load_corpus(tmp_path / "files", "test", bad_rows=noted, **COLUMNS)))
        soundfile.write(tmp_path / "x.wav", tone(0.5), 16000)
    assert found == [0, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_csv_names_files(tmp_path, streaming):
    soundfile.write(tmp_path / "x.wav", tone(0.5), 16000)
    (tmp_path / "table" / "clips").mkdir(parents=True)
    soundfile.write(tmp_path / "table" / "clips" / "y.wav", tone(0.25), 16000)
    table = f"sound,normalized_text\n{tmp_path / 'x.wav'},ann\nclips/y.wav,bob\n"  # as a whole, and from the folder
    (tmp_path / "table" / "train.csv").write_text(table)
    rows = load_corpus(tmp_path / "table", "train", streaming=streaming, **COLUMNS)
    found = [(row["id"], row["text"], row["duration"]) for row in rows]
    assert found == [("x", "ann", 0.5), ("y", "bob", 0.25)]


def test_rows_are_parts_of_a_recording(tmp_path):
    recording = np.stack([tone(3.0, seed=3)] * 9, 1)  # more channels than FLAC has
    soundfile.write(tmp_path / "long.wav", recording, 16000)
    head = "audio,text,start_second,end_second"
    (tmp_path / "train.csv").write_text(f"{head}\nlong.wav,well,0.0,1.0\nlong.wav,well,1.5,2.5\n")
    rows = list(load_corpus(tmp_path, "train"))
    assert [row["duration"] for row in rows] == [1, 1]
    for row, start in zip(rows, (0, 24000)):
        expected = recording[start : start + 16000, 0]
        np.testing.assert_allclose(load_audio(row["audio"]), expected, atol=2e-4)  # 16 bits


def test_a_part_that_is_not_finite_is_a_bad_row(tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(32000) == 20000, np.nan, 0.1), 16000, subtype="FLOAT")
    head = "audio,text,start_second,end_second"
    (tmp_path / "train.csv").write_text(f"{head}\nnan.wav,well,0.0,1.0\nnan.wav,well,1.0,2.0\n")
    noted = BadRows("skip")
    assert len(load_corpus(tmp_path, "train", bad_rows=noted)) == 1
    assert [row["kind"] for row in noted.found.values()] == ["not_finite"]


def test_metadata_names_clips_not_parts_of_recordings(tmp_path):
    (tmp_path / "train").mkdir()
    soundfile.write(tmp_path / "train" / "a.wav", tone(1.0), 16000)
    line = {"file_name": "a.wav", "text": "well", "start_second": 71.0, "end_second": 72.0}  # where it was cut from
    metadata = tmp_path / "train" / "metadata.jsonl"
    metadata.write_text(json.dumps(line))
    assert load_corpus(tmp_path, "train")["duration"] == [1]
    metadata.write_text(json.dumps(line | {"start_second": 0.25, "end_second": 0.5}))
    with pytest.raises(ValueError, match="line 1, start_second: 0.25, in a longer recording; cut it, or list it"):
        load_corpus(tmp_path, "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_parquet_are_noted_each_time(hub_like, tmp_path, streaming):
    """The second time, `datasets` takes what it kept of the first."""
    rows = [dict(row) for row in hub_like[1]]
    rows += [
        rows[0] | {"normalized_ner": [{"type": "PERSON", "start": 2, "length": 2}]},
        rows[0] | {"sound": None},
        rows[0] | {"sound": {"bytes": b"", "path": "two.wav"}},
        rows[0] | {"normalized_text": None},
        rows[0] | {"sound": {"bytes": None, "path": "memory://clips/nowhere.wav"}},
    ]
    features = datasets.Features({**hub_like[1].features, "sound": STORED_AUDIO})
    source = datasets.Dataset.from_list(rows, features=features)
    (tmp_path / "bad").mkdir()
    source.to_parquet(tmp_path / "bad" / "test.parquet")
    found = []
    for _ in range(2):
        noted = BadRows("skip")
        loaded = load_corpus(tmp_path / "bad", "test", streaming=streaming, bad_rows=noted, **COLUMNS)
        usable = noted.usable(loaded) if streaming else loaded
        check_hub_rows([{name: row[name] for name in SCHEMA} for row in usable])
        kinds = ["wrong_entities", "missing_file", "empty_file", "wrong_field", "missing_file"]
        assert [row["kind"] for row in noted.found.values()] == kinds
        named = [(where.partition("test, row ")[2], row["id"]) for where, row in noted.found.items()]
        assert [name for _, name in named] == ["one", "test-3", "two", "one", "nowhere"]
        assert streaming or [number for number, _ in named] == ["3", "4", "5", "6", "7"]
        found.append(named)
    assert found[0] == found[1] and (not streaming or all(len(place) == 16 for place, _ in found[0]))


def test_remote_audio_is_fetched(hub_like, tmp_path):
    content = (tmp_path / "clip.wav").read_bytes()
    with fsspec.open("memory://clips/far.wav", "wb") as file:
        file.write(content)
    rows = [{"audio": {"bytes": None, "path": "memory://clips/far.wav"}, "text": "Far."}]
    features = {"audio": {k: datasets.Value(v) for k, v in [("bytes", "binary"), ("path", "string")]}}
    features["text"] = datasets.Value("string")
    source = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    source = source.cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": source}).save_to_disk(tmp_path / "far")
    row = load_corpus(tmp_path / "far", "train")[0]
    assert row["id"] == "far" and len(load_audio(row["audio"])) == 8000


def test_folder_that_is_not_there(tmp_path):
    for dataset in (tmp_path / "nowhere", "./nowhere", "~nobody-of-that-name/nowhere"):
        with pytest.raises(ValueError, match="nowhere: no such folder"):
            load_corpus(dataset, "train")


def test_audio_is_not_decoded_by_loading(corpus):
    """A clip that cannot be decoded is found when it is used, by its path."""
    broken = corpus / "train" / "a.flac"
    broken.write_bytes(np.zeros(100, np.uint8).tobytes())
    row = load_corpus(corpus, "train")[0]
    assert next(iter(load_corpus(corpus, "train", streaming=True))) == row
    with pytest.raises(ValueError, match="a.flac: not readable as audio"):
        load_audio(row["audio"])


# --- SLUE, with the columns that asapp/slue has on the Hub

VOXPOPULI = {
    "id": "vp-1",
    "speaker_id": "17",
    "raw_text": "On Monday, the EU and 3 Greeks met.",
    "normalized_text": "on monday the e. u. and three greeks met in the louvre",
    "raw_ner": [["DATE", 3, 6], ["ORG", 15, 2], ["CARDINAL", 22, 1], ["NORP", 24, 6]],
    "normalized_ner": [["DATE", 3, 6], ["ORG", 14, 5], ["CARDINAL", 24, 5], ["NORP", 30, 6], ["FAC", 44, 10]],
    "raw_combined_ner": [["WHEN", 3, 6], ["ORG", 15, 2], ["QUANT", 22, 1], ["NORP", 24, 6]],
    "normalized_combined_ner": [["WHEN", 3, 6], ["ORG", 14, 5], ["QUANT", 24, 5], ["NORP", 30, 6]],
}


def as_objects(entities: list[list]) -> list[dict]:
    return [{"type": tag, "start": start, "length": length} for tag, start, length in entities]


def write_slue(folder: Path, split: str, rows: list[dict]) -> str:
    """A Parquet file, as `datasets.load_dataset` finds it on the Hub or in a folder."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_slue_voxpopuli(tmp_path, streaming):
    audio = {"bytes": wav(tone(1.0)), "path": "vp-1.wav"}
    named = {name: as_objects(value) if "ner" in name else value for name, value in VOXPOPULI.items()}
    nothing = {name: [] if "ner" in name else value for name, value in named.items()}
    corpus = write_slue(tmp_path, "validation", [{**named, "audio": audio}, {**nothing, "audio": audio, "id": "vp-2"}])
    expected = {
        ("normalized_text", "combined"): [
            ["WHEN", "monday"],
            ["ORG", "e. u."],
            ["QUANT", "three"],
            ["NORP", "greeks"],
        ],
        ("raw_text", "raw"): [["DATE", "Monday"], ["ORG", "EU"], ["CARDINAL", "3"], ["NORP", "Greeks"]],
    }
    for (text, tags), entities in expected.items():
        first, second = load_corpus(corpus, "validation", text_column=text, entity_tags=tags, streaming=streaming)
        assert (first["id"], first["text"], first["sentiment"]) == ("vp-1", VOXPOPULI[text], None)
        assert phrases(first["text"], first["entities"]) == entities and second["entities"] == []


def test_slue_without_combined_tags_has_its_raw_ones_mapped_and_five_dropped(tmp_path):
    columns = {name: value for name, value in VOXPOPULI.items() if "combined" not in name}
    row = {name: as_objects(value) if "ner" in name else value for name, value in columns.items()}
    corpus = write_slue(tmp_path, "test", [{**row, "audio": {"bytes": wav(tone(1.0)), "path": None}}])
    (loaded,) = load_corpus(corpus, "test", text_column="normalized_text")
    assert loaded["entities"] == VOXPOPULI["normalized_combined_ner"]
    (raw,) = load_corpus(corpus, "test", text_column="normalized_text", entity_tags="raw")
    assert raw["entities"] == VOXPOPULI["normalized_ner"]


def test_slue_voxceleb_is_cut_to_its_utterances_and_undecided_sentiments_are_none(tmp_path):
    recording, part = tone(3.0, seed=3), tone(1.25, seed=4)
    sentiments = ["Positive", "Neutral", "Negative", "Disagreement", "<mixed>"]
    rows = []
    for i, sentiment in enumerate(sentiments):
        clip = part if i == 1 else recording  # the second one is cut already
        rows.append({"id": f"vc-{i}", "audio": {"bytes": wav(clip), "path": f"{i}.wav"}, "speaker_id": "1"})
        rows[-1] |= {"normalized_text": "well", "sentiment": sentiment, "start_second": 1.5, "end_second": 2.75}
    loaded = list(load_corpus(write_slue(tmp_path, "train", rows), "train", text_column="normalized_text"))
    assert [row["sentiment"] for row in loaded] == ["Positive", "Neutral", "Negative", None, None]
    assert all(row["duration"] == pytest.approx(1.25) and row["entities"] is None for row in loaded)
    for row, clip in zip(loaded, (recording[24000:44000], part)):
        np.testing.assert_allclose(load_audio(row["audio"]), clip, atol=2e-4)  # 16 bits


def test_slue_voxceleb_with_a_part_that_cannot_be(tmp_path):
    row = {"id": "a", "audio": {"bytes": wav(tone(1.0)), "path": None}, "normalized_text": "well"}
    row |= {"sentiment": "Neutral", "start_second": 2.0, "end_second": 1.0}
    with pytest.raises(Exception, match="row 1, start_second: 2.0, and end_second 1.0; give 0 <= start"):
        load_corpus(write_slue(tmp_path, "train", [row]), "train", text_column="normalized_text")


@pytest.mark.parametrize(
    "start, end, message",
    [
        ("1.5", "2.5", "row 1, end_second: 2.5, but audio ends after 2.00 s; get it again"),
        ("2.5", "3.5", "row 1, end_second: 3.5, but audio ends after 2.00 s; get it again"),
        ("now", "1.0", "row 1, start_second: 'now'; give seconds, or none"),
    ],
)
def test_slue_voxceleb_with_less_audio_than_a_row_says(tmp_path, start, end, message):
    row = {"id": "a", "audio": {"bytes": wav(tone(2.0)), "path": None}, "normalized_text": "well"}
    row |= {"sentiment": "Neutral", "start_second": start, "end_second": end}
    with pytest.raises(ValueError, match=message):
        load_corpus(write_slue(tmp_path, "train", [row]), "train", text_column="normalized_text")


@pytest.mark.parametrize(
    "label, message",
    [
        (
            {"entities": [["LAW", 3, 9]]},
            r"line 1, entities: \['LAW', 3, 9\] is no .* within the 4 characters of text",
        ),
        ({"entities": [["NAME", 0, 4]]}, "line 1, entities: .* has the tag 'NAME'; tags are CARDINAL, DATE"),
        ({"entities": [["LAW", "0", 4]]}, r"line 1, entities: \['LAW', '0', 4\] is no .tag, start, length"),
        ({"entities": [["LAW", 0]]}, r"line 1, entities: \['LAW', 0\] is no .tag, start, length"),
        ({"entities": [{"type": "LAW"}]}, r"line 1, entities: .*; give a list of \[tag, start, length\]"),
        ({"entities": 7}, r"line 1, entities: 7; give a list of \[tag, start, length\]"),
        ({"entities": [[["LAW"], 0, 4]]}, r"line 1, entities: .* has the tag \['LAW'\]"),
        ({"sentiment": "happy"}, "line 1, sentiment: 'happy'; give one of Negative, Neutral, Positive, or none"),
        ({"sentiment": 1}, "line 1, sentiment: 1; give one of"),
        ({"duration": "long"}, "line 1, duration: 'long'; give seconds, or none"),
        ({"duration": float("nan")}, "line 1, duration: nan; give seconds"),
        ({"language": 7}, "line 1, language: 7; give a string such as 'en'"),
    ],
)
def test_labels_that_cannot_be(tmp_path, label, message):
    write_split(tmp_path / "c" / "train", [{"file_name": "a.wav", "text": "anna", **label}])
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / "c", "train")


def test_sentiment_in_lower_case_is_the_same(tmp_path):
    write_split(tmp_path / "c" / "train", [{"file_name": "a.wav", "text": "anna", "sentiment": " positive"}])
    assert load_corpus(tmp_path / "c", "train")[0]["sentiment"] == "Positive"


def test_lower_case_keeps_the_offsets(tmp_path):
    text = "MISTER \u0130NCE CAME"  # a dotted capital I has two letters in lower case
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.wav").write_bytes(wav(tone(0.5)))
    line = {"file_name": "a.wav", "text": text, "entities": [["PERSON", 0, 11]]}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    row = load_corpus(tmp_path, "train", lowercase=True)[0]
    assert row["text"] == "mister \u0130nce came" and row["entities"] == [["PERSON", 0, 11]]


def test_a_folder_goes_by_its_own_name_and_anything_else_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "speech").mkdir()
    for name in ("~/speech", tmp_path / "speech", f"{tmp_path}/speech/../speech"):
        assert dataset_name(name) == ("speech", False)
    assert dataset_name("asapp/slue") == ("asapp/slue", True)
