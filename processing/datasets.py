"""Corpora of every kind -> rows of one schema, the audio still undecoded (`load_audio` decodes it)."""

import io
import json
from pathlib import Path

import datasets
import fsspec
import soundfile

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
# Where SLUE keeps the entities of each of its text columns, by tag set, the best first; the offsets hold for that
# column alone. From 18 raw tags one gets SLUE's 7, not the other way round.
ENTITY_COLUMNS = {
    "normalized_text": {"combined": ("normalized_combined_ner", "normalized_ner"), "raw": ("normalized_ner",)},
    "raw_text": {"combined": ("raw_combined_ner", "raw_ner"), "raw": ("raw_ner",)},
}
SPEAKER_COLUMNS = ("speaker", "speaker_id")  # the first that a row has
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
            - a folder of `Dataset.save_to_disk`;
            - anything that `datasets.load_dataset` takes: a Hub id, a folder of Parquet files.
        split: such as `train`.
        audio_column: column of the audio; in a metadata.jsonl `audio` stands for `file_name`.
        text_column: column of the transcript. Entities are read from `entities`, or from SLUE's column for that text.
        config_name: configuration of a Hub dataset, such as `voxpopuli` or `voxceleb` of `asapp/slue`.
        entity_tags: `"combined"` (SLUE's 7, to which OntoNotes' tags are mapped) or `"raw"` (as the corpus has them).
        lowercase: transcripts in lower case (LibriSpeech's are in upper case).
        streaming: return an `IterableDataset`, which downloads a Hub dataset as it is read.

    Raises:
        ValueError: no such folder, split or column (it lists those present), audio files that metadata.jsonl names
            and that are missing, or a row with a label that can't be.
    """
    if entity_tags not in ("combined", "raw"):
        raise ValueError(f"entity_tags: give combined or raw, found {entity_tags!r}")
    columns = {"audio": audio_column, "text": text_column, "entity_tags": entity_tags, "lowercase": lowercase}
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        rows = _read_folder(folder, split, columns)
        if rows is not None:
            built = datasets.Dataset.from_list(rows, features=datasets.Features({**SCHEMA, "audio": STORED_AUDIO}))
            built = built.cast_column("audio", SCHEMA["audio"])
            return built.to_iterable_dataset() if streaming else built
    elif folder.is_absolute() or str(dataset).startswith((".", "~")):
        raise ValueError(f"dataset {dataset}: no such folder")
    return _load_with_datasets(dataset, split, columns, config_name, streaming)


def dataset_name(dataset: str | Path) -> tuple[str, bool]:
    """What others know a dataset by: its Hub id, or the own name of its folder; and whether it is on the Hub."""
    folder = Path(dataset).expanduser()
    return (folder.resolve().name, False) if folder.exists() else (str(dataset), True)


def first_rows(rows: datasets.Dataset, number: int | None) -> datasets.Dataset:
    """The first so many rows, all by default."""
    return rows.select(range(min(number or len(rows), len(rows))))


def read_stream(rows: datasets.IterableDataset, number: int | None) -> datasets.Dataset:
    """The first so many rows of a stream, all by default, in memory."""
    first = [{name: row[name] for name in SCHEMA} for row in (rows if number is None else rows.take(number))]
    built = datasets.Dataset.from_list(first, features=datasets.Features({**SCHEMA, "audio": STORED_AUDIO}))
    return built.cast_column("audio", SCHEMA["audio"])


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
    lines = list(read_json_lines(path))
    if not lines:
        raise ValueError(f"{path}: it is empty; give at least one line")
    present = dict.fromkeys(name for line in lines for name in line)
    audio_column = "file_name" if columns["audio"] == "audio" and "audio" not in present else columns["audio"]
    _require("audio column", audio_column, present, path)
    _require("text column", columns["text"], present, path)
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, row {number}"
        file_name = line.get(audio_column)
        if not isinstance(file_name, str):
            raise ValueError(f"{where}: {audio_column} is {file_name!r}; give the path of an audio file")
        file = str(path.parent / file_name)
        rows.append(_to_schema(line, {"bytes": None, "path": file}, columns, Path(file_name).stem, where))
    _require_files(rows, path)
    return rows


def read_json_lines(path: Path):
    """The objects of a JSONL file, one a line."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); mend the line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a {type(row).__name__}; give an object in braces")
            yield row


def _read_librispeech(folder: Path, columns: dict) -> list[dict]:
    """Rows of one split of a LibriSpeech tree."""
    rows = []
    for transcript in sorted(folder.glob("*/*/*.trans.txt")):
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.strip().partition(" ")
            audio = {"bytes": None, "path": str(transcript.parent / f"{name}.flac")}
            row = {"text": text, "speaker": transcript.parent.parent.name}
            rows.append(_to_schema(row, audio, columns, name, str(transcript)))
    _require_files(rows, folder)
    return rows


def _require_files(rows: list[dict], where: Path) -> None:
    """Raises ValueError if audio files of the rows are missing."""
    missing = [path for path in (row["audio"]["path"] for row in rows) if not Path(path).is_file()]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{where}: {len(missing)} of {len(rows)} audio files are missing: {names}")


def _load_with_datasets(dataset, split: str, columns: dict, config_name: str | None, streaming: bool):
    """A split that the `datasets` library loads, in the schema."""
    if (Path(dataset) / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(dataset))
        _require("split", split, splits, dataset)
        source = splits[split].to_iterable_dataset() if streaming else splits[split]
    else:
        source = datasets.load_dataset(str(dataset), config_name, split=split, streaming=streaming)
    present = source.column_names or list(next(iter(source)))
    for kind in ("audio", "text"):
        _require(f"{kind} column", columns[kind], present, dataset)

    def convert(row: dict, index: int) -> dict:
        where = f"{dataset}, {split}, row {index + 1}"
        audio = _fetch(row[columns["audio"]])
        name = Path(audio["path"]).stem if audio["path"] else f"{split}-{index}"
        if row.get("start_second") is not None and row.get("end_second") is not None:
            audio, row["duration"] = _cut(audio, row["start_second"], row["end_second"], where)
        return _to_schema(row, audio, columns, name, where)

    source = source.cast_column(columns["audio"], datasets.Audio(decode=False))
    return source.map(convert, with_indices=True, remove_columns=present, features=SCHEMA)


def _fetch(audio: dict) -> dict:
    """Undecoded audio, whose bytes are downloaded if it names a remote file only (streams of a Hub dataset do)."""
    if audio["bytes"] is None and "://" in (audio["path"] or ""):
        with fsspec.open(audio["path"], "rb") as file:
            return {"bytes": file.read(), "path": audio["path"]}
    return {"bytes": audio["bytes"], "path": audio["path"]}


def _cut(audio: dict, start: float, end: float, where: str) -> tuple[dict, float]:
    """
    The audio from `start` to `end`, in seconds, and its length: SLUE-VoxCeleb's utterances are parts of recordings.
    Audio that is no longer than the utterance was cut already.
    """
    if not 0 <= start < end:
        raise ValueError(f"{where}: start_second {start} and end_second {end}; give 0 <= start < end")
    source = io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"]
    try:
        with soundfile.SoundFile(source) as file:
            length = file.frames / file.samplerate
            if length < end - start + 0.1 or length <= start:
                return audio, length
            file.seek(round(start * file.samplerate))
            samples, rate = file.read(round((end - start) * file.samplerate)), file.samplerate
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(
            f"{where}: {audio['path'] or 'audio'} is not readable ({error}); get the file again"
        ) from error
    cut = io.BytesIO()
    soundfile.write(cut, samples, rate, format="FLAC")
    return {"bytes": cut.getvalue(), "path": audio["path"]}, end - start


def _to_schema(row: dict, audio: dict, columns: dict, name: str, where: str) -> dict:
    """One row of the schema; `name` is its id if it has none, `where` is for the message if a label is wrong."""
    text = row.get(columns["text"])
    if not isinstance(text, str):
        raise ValueError(f"{where}: {columns['text']} is {text!r}; give the transcript as a string")
    text = lower(text) if columns["lowercase"] else text
    duration = row.get("duration")
    speaker = next((row[name] for name in SPEAKER_COLUMNS if row.get(name) not in (None, "")), None)
    return {
        "id": str(row["id"]) if row.get("id") is not None else name,
        "audio": audio,
        "text": text,
        "entities": _entities(row, text, columns, where),
        "sentiment": _sentiment(row.get("sentiment"), where),
        "language": row.get("language"),
        "duration": _seconds(audio) if duration is None else float(duration),
        "speaker": None if speaker is None else str(speaker),
    }


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


def _entities(row: dict, text: str, columns: dict, where: str) -> list[list] | None:
    """[[tag, start, length], ...] from the first column that has them; SLUE on the Hub has objects in their place."""
    for column in ("entities", *ENTITY_COLUMNS.get(columns["text"], {}).get(columns["entity_tags"], ())):
        found = row.get(column)
        if found is None:
            continue
        if isinstance(found, dict):  # {"type": [...], "start": [...], "length": [...]}
            found = zip(found["type"], found["start"], found["length"])
        entities = [[e["type"], e["start"], e["length"]] if isinstance(e, dict) else list(e) for e in found]
        for entity in entities:
            if len(entity) != 3 or not (0 <= entity[1] < entity[1] + entity[2] <= len(text)):
                raise ValueError(
                    f"{where}: {column} has {entity}, which is no [tag, start, length] within the "
                    f"{len(text)} characters of {columns['text']}"
                )
            if entity[0] not in ALL_TAGS:
                raise ValueError(
                    f"{where}: {column} has the tag {entity[0]!r}; tags are {', '.join(sorted(ALL_TAGS))}"
                )
        return combine(entities) if columns["entity_tags"] == "combined" else entities
    return None


def _sentiment(value: str | None, where: str) -> str | None:
    """One of `SENTIMENTS`, or None."""
    name = (value or "").strip()
    if name.capitalize() in SENTIMENTS:
        return name.capitalize()
    if name.lower() in UNDECIDED:
        return None
    raise ValueError(f"{where}: sentiment is {value!r}; give one of {', '.join(SENTIMENTS)}, or none")
