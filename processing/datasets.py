"""Corpora of every kind -> rows of one schema, the audio still undecoded (`load_audio` decodes it)."""

import codecs
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import fsspec
import soundfile
from accelerate import PartialState

from .bad_rows import BadRows, RowError
from .processing_sense import MAX_DOWNLOAD, MAX_SECONDS
from .tasks import ALL_TAGS, SENTIMENTS, combine


SCHEMA = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": datasets.Audio(decode=False),  # {"bytes", "path"}
        "text": datasets.Value("string"),
        "entities": datasets.Json(),  # [[tag, first character, number of characters], ...], offsets into the text
        "sentiment": datasets.Value("string"),
        "language": datasets.Value("string"),
        "duration": datasets.Value("float64"),  # seconds
        "speaker": datasets.Value("string"),
    }
)
# Audio(decode=False) on disk. Rows are built with it, because `datasets` asks for torchcodec to build audio columns.
STORED_AUDIO = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
# While rows are loaded: where each stands, and what is wrong with it (see bad_rows.py).
NOTED = datasets.Features({**SCHEMA, "where": datasets.Value("string"), "bad": datasets.Json()})
# Where SLUE keeps the entities of each of its text columns, by tag set, the best first; the offsets hold for that
# column alone. From 18 raw tags one gets SLUE's 7, not the other way round.
ENTITY_COLUMNS = {
    "normalized_text": {
        "combined": ("normalized_combined_ner", "normalized_ner"),
        "raw": ("normalized_ner",),
        "any": ("normalized_ner", "normalized_combined_ner"),
    },
    "raw_text": {
        "combined": ("raw_combined_ner", "raw_ner"),
        "raw": ("raw_ner",),
        "any": ("raw_ner", "raw_combined_ner"),
    },
}
SPEAKER_COLUMNS = ("speaker", "speaker_id")  # the first that a row has
# Beside audio and text, the columns that are read.
READ = {"id", "entities", "sentiment", "language", "duration", "start_second", "end_second", *SPEAKER_COLUMNS}
READ |= {name for tag_sets in ENTITY_COLUMNS.values() for names in tag_sets.values() for name in names}
# Protocols of audio that a row names by an address; archives are read through one of the others.
REMOTE = {"hf", "http", "https", "memory", "bz2", "gzip", "tar", "xz", "zip", "zstd"}
UNDECIDED = ("disagreement", "<mixed>", "")  # SLUE's annotators: such a row has no sentiment label


def load_corpus(
    dataset: str | Path,
    split: str,
    *,
    audio_column: str = "audio",
    text_column: str = "text",
    config_name: str | None = None,
    entity_tags: str = "combined",
    lowercase: bool = False,
    streaming: bool = False,
    bad_rows: BadRows | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Loads one split of a corpus as rows of `SCHEMA`: `id, audio {bytes, path}, text, entities [[tag, start, length]],
    sentiment, language, duration, speaker`, the duration in seconds, by the file's header where no column has it. What
    the corpus does not know is None: a row in which nobody found an entity has [], one on whose sentiment SLUE's
    annotators disagreed None.

    Args:
        dataset: one of
            - a folder with `{split}/metadata.jsonl`, or one `metadata.jsonl` (its split is `train`), each line with
              `file_name`, the audio file's path from there, and the text;
            - a LibriSpeech tree, `{split}/{speaker}/{chapter}/*.trans.txt`, such as `dev-clean`;
            - a folder of `DatasetDict.save_to_disk`, or of `Dataset.save_to_disk`, whose split is the one that it was
              loaded as, or `train`;
            - anything that `datasets.load_dataset` takes: a Hub id, a folder of Parquet files.
        split: such as `train`.
        audio_column: column of the audio; in a metadata.jsonl `audio` stands for `file_name`.
        text_column: column of the transcript. Entities are read from `entities`, or from SLUE's column for that text.
        config_name: configuration of a Hub dataset, such as `voxpopuli` or `voxceleb` of `asapp/slue`.
        entity_tags: `"combined"` (SLUE's 7, to which OntoNotes' tags are mapped) or `"raw"` (as the corpus has them)
            or `"any"` (raw ones if it has them, else combined ones).
        lowercase: transcripts in lower case (LibriSpeech's are in upper case).
        streaming: return an `IterableDataset`, which downloads a Hub dataset as it is read.
        bad_rows: notes the rows that can't be used, which are left out. A `Dataset` then has one more column, `where`,
            for its `check`; an `IterableDataset` has all rows, and `where` and `bad`, for `usable` and `can_use`.

    Raises:
        ValueError: no such folder, split or column (it lists those present); without `bad_rows` also rows that can't
            be used (all of them are listed): lines that are no JSON or no UTF-8, missing audio files, texts that are
            no strings, labels that can't be.
    """
    if entity_tags not in ("combined", "raw", "any"):
        raise ValueError(f"entity_tags: give combined, raw or any, found {entity_tags!r}")
    columns = {"audio": audio_column, "text": text_column, "entity_tags": entity_tags, "lowercase": lowercase}
    rows = _read_rows(dataset, split, columns, config_name, streaming)
    noted = BadRows() if bad_rows is None else bad_rows
    if streaming:
        return rows if bad_rows is not None else noted.stream(rows)
    rows = noted.leave_out(rows)
    if bad_rows is not None:
        return rows
    noted.settle()
    return rows.remove_columns("where")


def _read_rows(dataset: str | Path, split: str, columns: dict, config_name: str | None, streaming: bool):
    """All rows of a split, as `NOTED`."""
    folder = _folder(dataset)
    if folder.is_dir():
        rows = _read_folder(folder, split, columns)
        if rows is not None:
            built = from_rows(rows, NOTED)
            return built.to_iterable_dataset() if streaming else built
    elif folder.is_absolute() or str(dataset).startswith((".", "~")):
        raise ValueError(f"dataset {dataset}: no such folder")
    return _load_with_datasets(dataset, split, columns, config_name, streaming)


def from_rows(rows: list[dict], schema: datasets.Features = SCHEMA) -> datasets.Dataset:
    """A dataset of rows that are in a schema already, such as `SCHEMA`."""
    built = datasets.Dataset.from_list(rows, features=datasets.Features({**schema, "audio": STORED_AUDIO}))
    return built.cast_column("audio", schema["audio"])


def _folder(dataset: str | Path) -> Path:
    """Where it lies, if it is a folder. `~name` of nobody stays as it is, where Path.expanduser raises."""
    return Path(os.path.expanduser(dataset))


def dataset_name(dataset: str | Path) -> tuple[str, bool]:
    """What others know a dataset by: its Hub id, or the own name of its folder; and whether it is on the Hub."""
    folder = _folder(dataset)
    return (folder.resolve().name, False) if folder.exists() else (str(dataset), True)


def first_rows(rows: datasets.Dataset, number: int | None) -> datasets.Dataset:
    """The first so many rows, all by default."""
    return rows.select(range(min(number or len(rows), len(rows))))


def read_stream(rows: datasets.IterableDataset, number: int | None, bad_rows: BadRows) -> datasets.Dataset:
    """The first so many rows of a stream that can be used, all by default, in memory."""
    return from_rows(list(itertools.islice(bad_rows.usable(rows), number)))


def _read_folder(folder: Path, split: str, columns: dict) -> list[dict] | None:
    """Rows of a split of a metadata.jsonl folder or a LibriSpeech tree; None for a folder of another kind."""
    metadata = {path.parent.name: path for path in sorted(folder.glob("*/metadata.jsonl"))}
    if not metadata and (folder / "metadata.jsonl").is_file():
        metadata = {"train": folder / "metadata.jsonl"}
    if metadata:
        _require("split", split, metadata, folder)
        return _read_metadata(metadata[split], columns)
    # One chapter is enough to know a split by, and a full search of LibriSpeech is slow.
    librispeech = [path.name for path in sorted(folder.iterdir()) if next(path.glob("*/*/*.trans.txt"), None)]
    if librispeech:
        _require("split", split, librispeech, folder)
        for kind in ("audio", "text"):
            _require(f"{kind} column", columns[kind], ("audio", "text"), folder)
        return _read_librispeech(folder / split, columns)
    return None


def _require(what: str, name: str, present, where) -> None:
    """Raises ValueError if `name` is not among `present`."""
    if name not in present:
        raise ValueError(f"{where}: no {what} {name!r}; it has {', '.join(map(repr, present)) or 'none'}")


def _read_metadata(path: Path, columns: dict) -> list[dict]:
    """Rows of a metadata.jsonl."""
    lines = list(_parse_lines(path))
    if not lines:
        raise ValueError(f"{path}: it is empty; give at least one line")
    present = dict.fromkeys(name for _, line, error in lines if error is None for name in line)
    audio_column = "file_name" if columns["audio"] == "audio" and "audio" not in present else columns["audio"]
    if present:  # else not one line could be read, and each is a bad row
        _require("audio column", audio_column, present, path)
        _require("text column", columns["text"], present, path)

    def convert(line: dict, error: RowError | None, where: str) -> dict:
        name = line.get(audio_column)
        file = str(path.parent / name) if isinstance(name, str) else None
        audio = {"bytes": None, "path": file}

        def build() -> dict:
            if error is not None:
                raise error
            if not isinstance(name, str):
                raise RowError("wrong_field", audio_column, f"{name!r}; give the path of an audio file")
            part, duration = _part(line, audio, audio_column)
            if part is not audio:  # all rows are held in memory, which is no place for hours of cut audio
                message = f"{line['start_second']}, in a longer recording; cut it, or list it in a CSV file's rows"
                raise RowError("wrong_field", "start_second", message)
            return _to_schema({**line, "duration": duration}, audio, columns, Path(name).stem, audio_column)

        return _noted(build, where, line.get("id") or Path(file or "").stem, file)

    return [convert(line, error, where) for where, line, error in lines]


def _noted(build: Callable[[], dict], where: str, name, file: str | None) -> dict:
    """A row of `NOTED`: what `build` makes, or what is wrong with it."""
    try:
        return {**build(), "where": where, "bad": None}
    except RowError as error:
        row = dict.fromkeys(SCHEMA) | {"id": str(name), "audio": {"bytes": None, "path": file}, "text": ""}
        return {**row, "where": where, "bad": error.problem}


def read_json_lines(path: Path) -> Iterator[dict]:
    """The objects of a JSONL file, one a line; ValueError at a line that is none."""
    for where, row, error in _parse_lines(path):
        if error is not None:
            raise ValueError(f"{where}: {error}") from error
        yield row


def _parse_lines(path: Path) -> Iterator[tuple[str, dict, RowError | None]]:
    """By line of a JSONL file: where it stands, its object, as far as it can be read, and what is wrong with it."""
    with open(path, "rb") as file:  # a bad byte spoils its own line alone
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield f"{path}, line {number}", *_parse_line(line)


def _parse_line(line: bytes) -> tuple[dict, RowError | None]:
    error = None
    try:
        text = line.decode()
    except UnicodeDecodeError as found:
        error = RowError("bad_utf8", None, f"{_bad_byte(found)}; save the line as UTF-8")
        text = line.decode(errors="replace")  # for the names in it
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as found:  # half of a pair of escapes, such as \ud83d, is no letter
        row, error = {}, RowError("bad_utf8", None, f"{found.object[found.start]!r} is no letter; write the line anew")
    except (ValueError, RecursionError) as found:
        row, error = {}, error or RowError("bad_json", None, f"not JSON ({found}); mend the line")
    if isinstance(row, dict):
        return row, error
    return {}, error or RowError("bad_json", None, f"a {type(row).__name__}; give an object in braces")


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8"


def _read_librispeech(folder: Path, columns: dict) -> list[dict]:
    """Rows of one split of a LibriSpeech tree."""
    lines = (
        (transcript, number, line.strip())
        for transcript in sorted(folder.glob("*/*/*.trans.txt"))
        for number, line in enumerate(transcript.read_bytes().splitlines(), 1)
    )
    return [_read_transcript(*line, columns) for line in lines if line[-1]]


def _read_transcript(transcript: Path, number: int, line: bytes, columns: dict) -> dict:
    """The row of a line of a .trans.txt."""
    clip, _, said = line.partition(b" ")
    name = clip.decode(errors="replace")
    file = str(transcript.parent / f"{name}.flac")

    def build() -> dict:
        try:
            row = {"text": said.decode(), "speaker": transcript.parent.parent.name}
        except UnicodeDecodeError as error:
            raise RowError("bad_utf8", "text", f"{_bad_byte(error)}; save the line as UTF-8") from error
        return _to_schema(row, {"bytes": None, "path": file}, columns, name, "audio")

    return _noted(build, f"{transcript}, line {number}", name, file)


def _check_file(audio: dict, field: str):
    """Raises RowError where there is no audio file, or nothing in it."""
    if audio["bytes"] is None:
        file = audio["path"] or ""
        if not os.path.isfile(file):  # False, too, for a name that is too long for the disk, where Path.is_file raises
            raise RowError("missing_file", field, f"{audio['path']}: no such file; put it there, or delete the row")
        size = os.path.getsize(file)
    else:
        size = len(audio["bytes"])
    if not size:
        raise RowError("empty_file", field, f"{audio['path'] or 'audio'}: 0 bytes; get the file again")


def _load_with_datasets(dataset, split: str, columns: dict, config_name: str | None, streaming: bool):
    """A split that the `datasets` library loads, in the schema."""
    folder = _folder(dataset)
    path = str(folder.resolve()) if folder.is_dir() else str(dataset)  # a bare name such as csv is a loader's, too
    is_saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        if is_saved:
            found = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, config_name, split=split, streaming=streaming)
    except (RuntimeError, FileNotFoundError, json.JSONDecodeError, datasets.exceptions.DatasetsError) as error:
        # `datasets` runs no script of a dataset, and finds nothing in a folder of other files.
        raise ValueError(f"dataset {dataset}: `datasets` can't load it ({error})") from error
    source = _choose_split(found, split, dataset, streaming) if is_saved else found
    present = source.column_names or list(next(iter(source)))
    for kind in ("audio", "text"):
        _require(f"{kind} column", columns[kind], present, dataset)
    if source.features is not None:  # others may hold audio and pictures, which `datasets` would decode
        present = [name for name in present if name in {columns["audio"], columns["text"], *READ}]
        source = source.select_columns(present)
    names = {name: kind for name, kind in (source.features or {}).items() if isinstance(kind, datasets.ClassLabel)}

    def convert(row: dict, index: int) -> dict:
        row = {**row, **{name: _class_name(kind, row[name]) for name, kind in names.items()}}
        given = _as_audio(row[columns["audio"]], folder)
        name = Path(given["path"]).stem if given["path"] else f"{split}-{index}"
        # Rows of a stream come in another order each epoch: what is in one tells it from the others.
        number = _digest(row, columns["audio"]) if streaming else index + 1
        where = f"{dataset}, {split}, row {number}"

        def build() -> dict:
            audio, duration = _part(row, _fetch(given, columns["audio"]), columns["audio"])
            return _to_schema({**row, "duration": duration}, audio, columns, name, columns["audio"])

        return _noted(build, where, row.get("id") or name, given["path"])

    if source.features is not None and not isinstance(source.features[columns["audio"]], datasets.Value):
        source = source.cast_column(columns["audio"], datasets.Audio(decode=False))
    # The main process looks at the rows' files each time, and leaves what it found where the others find it.
    # Few rows at a time: an array of arrow holds 2 GB, which a thousand clips may be more than.
    is_main = PartialState().is_main_process
    how = {} if streaming else {"load_from_cache_file": not is_main, "writer_batch_size": 100}
    return source.map(convert, with_indices=True, remove_columns=present, features=NOTED, **how)


def _class_name(kind: datasets.ClassLabel, value: int | None) -> str | None:
    """A class by its name; None where the row has none, which is -1 to many datasets."""
    return None if value is None or value < 0 else kind.int2str(value)


def _as_audio(given: dict | str | bytes | None, folder: Path | None = None) -> dict:
    """Undecoded audio, from bytes, an address, or a path from the dataset's folder."""
    if not isinstance(given, dict):
        given = {"bytes": given, "path": None} if isinstance(given, bytes) else {"bytes": None, "path": given}
    path = given["path"]
    if given["bytes"] is None and path and folder is not None and folder.is_dir() and "://" not in path:
        path = str(folder.resolve() / path)
    return {"bytes": given["bytes"], "path": path}


def _choose_split(saved: datasets.Dataset | datasets.DatasetDict, split: str, dataset, streaming: bool):
    """A split of what was saved. A single one says what it was; without that, or as `train[:10%]`, it is `train`."""
    if not isinstance(saved, datasets.DatasetDict):
        name = str(saved.split)
        saved = {name if saved.split and name.isidentifier() else "train": saved}
    _require("split", split, saved, dataset)
    found = saved[split].with_format(None)  # as Python's numbers, whatever it was saved as
    return found.to_iterable_dataset() if streaming else found


def _digest(row: dict, audio_column: str) -> str:
    """Of what is in a row."""
    audio = _as_audio(row[audio_column])
    rest = {name: value for name, value in row.items() if name != audio_column}
    found = hashlib.sha256(repr((audio["path"], rest)).encode())
    found.update(audio["bytes"] or b"")
    return found.hexdigest()[:16]


def _fetch(audio: dict, field: str) -> dict:
    """Undecoded audio, whose bytes are downloaded if it names a remote file only (streams of a Hub dataset do)."""
    if audio["bytes"] is None and "://" in (audio["path"] or ""):
        try:
            return {"bytes": _download(audio["path"], field), "path": audio["path"]}
        except FileNotFoundError as error:  # another one is the network's, not the row's
            raise RowError("missing_file", field, f"{audio['path']}: no such file; delete the row") from error
    return {"bytes": audio["bytes"], "path": audio["path"]}


def _download(address: str, field: str) -> bytes:
    """What is behind an address in a row. None of the protocols reads files of this machine, or runs anything."""
    links = address.split("::")
    protocols = {link.partition("://")[0] for link in links}
    if foreign := sorted(protocols - REMOTE):
        raise RowError("unreadable", field, f"{address}: {foreign[0]} is none of {', '.join(sorted(REMOTE))}")
    with fsspec.open(address, "rb") as file:
        content = file.read(MAX_DOWNLOAD + 1)
    if len(content) > MAX_DOWNLOAD:
        raise RowError("unreadable", field, f"{address}: more than {MAX_DOWNLOAD:,} bytes; cut it into clips")
    return content


def _part(row: dict, audio: dict, field: str) -> tuple[dict, float | None]:
    """A row's audio and its length: where it says from which second to which, that part."""
    start, end = (_number(row.get(name), name) for name in ("start_second", "end_second"))
    if start is None or end is None:
        return audio, row.get("duration")
    return _cut(audio, start, end, field)


def _cut(audio: dict, start: float, end: float, field: str) -> tuple[dict, float]:
    """
    The audio from `start` to `end`, in seconds, and its length: SLUE-VoxCeleb's utterances are parts of recordings.
    Audio that is no longer than the utterance was cut already.
    """
    if start >= end:
        raise RowError("wrong_field", "start_second", f"{start}, and end_second {end}; give 0 <= start < end")
    if end - start > MAX_SECONDS:  # nor is it read
        message = f"{end - start:.2f} s, the limit is {MAX_SECONDS} s; cut it into shorter clips"
        raise RowError("too_long", field, message)
    _check_file(audio, field)
    source = io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"]
    try:
        with soundfile.SoundFile(source) as file:
            length = file.frames / file.samplerate
            if length < end - start + 0.1:
                return audio, length
            if length < end - 0.1:
                message = f"{end}, but {audio['path'] or 'audio'} ends after {length:.2f} s"
                raise RowError("truncated", "end_second", f"{message}; get it again, or delete the row")
            file.seek(round(start * file.samplerate))
            samples, rate = file.read(round((end - start) * file.samplerate), always_2d=True), file.samplerate
    except (soundfile.SoundFileError, OSError) as error:
        message = f"{audio['path'] or 'audio'} is not readable ({error}); get the file again"
        raise RowError("unreadable", field, message) from error
    mono = samples.mean(axis=1)
    if not math.isfinite(mono.sum()):
        raise RowError("not_finite", field, f"{audio['path'] or 'audio'}: NaN or infinite samples; get the file again")
    cut = io.BytesIO()
    soundfile.write(cut, mono, rate, format="FLAC")
    return {"bytes": cut.getvalue(), "path": audio["path"]}, end - start


def _to_schema(row: dict, audio: dict, columns: dict, name: str, audio_field: str) -> dict:
    """One row of the schema; `name` is its id if it has none. Raises RowError where it can't be one."""
    text = row.get(columns["text"])
    if not isinstance(text, str):
        raise RowError("wrong_field", columns["text"], f"{text!r}; give the transcript as a string")
    text = lower(text) if columns["lowercase"] else text
    entities, sentiment = _entities(row, text, columns), _sentiment(row.get("sentiment"))
    language, duration = row.get("language"), _number(row.get("duration"), "duration")
    if not isinstance(language, str | None):
        raise RowError("wrong_field", "language", f"{language!r}; give a string such as 'en', or none")
    speaker = next((row[name] for name in SPEAKER_COLUMNS if row.get(name) not in (None, "")), None)
    _check_file(audio, audio_field)
    return {
        "id": str(row["id"]) if row.get("id") is not None else name,
        "audio": audio,
        "text": text,
        "entities": entities,
        "sentiment": sentiment,
        "language": language,
        "duration": _seconds(audio) if duration is None else duration,
        "speaker": None if speaker is None else str(speaker),
    }


def _number(value, field: str) -> float | None:
    """Seconds, of a number or a text that holds one."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise RowError("wrong_field", field, f"{value!r}; give seconds, or none")
    return seconds


def _seconds(audio: dict) -> float | None:
    """By the file's header; None where it can't be read: what is wrong with it is said when it is heard."""
    try:
        found = soundfile.info(audio["path"] if audio["bytes"] is None else io.BytesIO(audio["bytes"]))
    except (soundfile.SoundFileError, OSError, TypeError):
        return None
    return found.frames / found.samplerate


def lower(text: str) -> str:
    """Lower case letter by letter, so that the entities' offsets stay right: some letters have two in lower case."""
    return "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in text)


def _entities(row: dict, text: str, columns: dict) -> list[list] | None:
    """[[tag, start, length], ...] from the first column that has them; SLUE on the Hub has objects in their place."""
    for column in ("entities", *ENTITY_COLUMNS.get(columns["text"], {}).get(columns["entity_tags"], ())):
        found = row.get(column)
        if found is None:
            continue
        try:
            if isinstance(found, dict):  # {"type": [...], "start": [...], "length": [...]}
                found = zip(found["type"], found["start"], found["length"])
            entities = [[e["type"], e["start"], e["length"]] if isinstance(e, dict) else list(e) for e in found]
        except (TypeError, KeyError) as error:
            message = f"{row[column]!r}; give a list of [tag, start, length]"
            raise RowError("wrong_entities", column, message) from error
        for entity in entities:
            _check_entity(entity, text, column, columns["text"])
        return combine(entities) if columns["entity_tags"] == "combined" else entities
    return None


def _check_entity(entity: list, text: str, column: str, text_column: str):
    """Raises RowError where an entity can't be one of the text."""
    if (
        len(entity) != 3
        or not all(isinstance(number, int) for number in entity[1:])
        or not 0 <= entity[1] < entity[1] + entity[2] <= len(text)
    ):
        what = f"is no [tag, start, length] within the {len(text)} characters of {text_column}"
        raise RowError("wrong_entities", column, f"{entity} {what}; mend its numbers")
    if not isinstance(entity[0], str) or entity[0] not in ALL_TAGS:
        tags = ", ".join(ALL_TAGS)
        raise RowError("wrong_entities", column, f"{entity} has the tag {entity[0]!r}; tags are {tags}")


def _sentiment(value: str | None) -> str | None:
    """One of `SENTIMENTS`, or None."""
    name = value.strip() if isinstance(value, str) else "" if value is None else str(value)
    if name.capitalize() in SENTIMENTS:
        return name.capitalize()
    if name.lower() in UNDECIDED:
        return None
    raise RowError("wrong_sentiment", "sentiment", f"{value!r}; give one of {', '.join(SENTIMENTS)}, or none")
