"""Corpora of every kind -> rows of one schema, the audio still undecoded (`load_audio` decodes it)."""

import json
from pathlib import Path

import datasets
import fsspec


SCHEMA = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": datasets.Audio(decode=False),  # {"bytes", "path"}
        "text": datasets.Value("string"),
        "entities": datasets.Json(),  # [[tag, first character, number of characters], ...], offsets into the text
        "sentiment": datasets.Value("string"),
        "language": datasets.Value("string"),
        "duration": datasets.Value("float64"),  # seconds
    }
)
# Audio(decode=False) on disk. Rows are built with it, because `datasets` asks for torchcodec to build audio columns.
STORED_AUDIO = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
# Where SLUE keeps the entities of each of its text columns; the offsets hold for that column alone.
ENTITY_COLUMNS = {
    "normalized_text": ("normalized_combined_ner", "normalized_ner"),
    "raw_text": ("raw_combined_ner", "raw_ner"),
}


def load_corpus(
    dataset: str | Path,
    split: str,
    *,
    audio_column: str = "audio",
    text_column: str = "text",
    config_name: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Loads one split of a corpus as rows of `SCHEMA`: `id, audio {bytes, path}, text, entities [[tag, start, length]],
    sentiment, language, duration` in seconds. What the corpus does not know is None, or [] for entities.

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
        config_name: configuration of a Hub dataset.
        streaming: return an `IterableDataset`, which downloads a Hub dataset as it is read.

    Raises:
        ValueError: no such folder, split or column (it lists those present), or audio files that metadata.jsonl
            names and that are missing.
    """
    folder = Path(dataset).expanduser()
    if folder.is_dir():
        rows = _read_folder(folder, split, audio_column, text_column)
        if rows is not None:
            built = datasets.Dataset.from_list(rows, features=datasets.Features({**SCHEMA, "audio": STORED_AUDIO}))
            built = built.cast_column("audio", SCHEMA["audio"])
            return built.to_iterable_dataset() if streaming else built
    elif folder.is_absolute() or str(dataset).startswith((".", "~")):
        raise ValueError(f"dataset {dataset}: no such folder")
    return _load_with_datasets(dataset, split, audio_column, text_column, config_name, streaming)


def _read_folder(folder: Path, split: str, audio_column: str, text_column: str) -> list[dict] | None:
    """Rows of a split of a metadata.jsonl folder or a LibriSpeech tree; None for a folder of another kind."""
    metadata = {path.parent.name: path for path in sorted(folder.glob("*/metadata.jsonl"))}
    if not metadata and (folder / "metadata.jsonl").is_file():
        metadata = {"train": folder / "metadata.jsonl"}
    if metadata:
        _require("split", split, metadata, folder)
        return _read_metadata(metadata[split], audio_column, text_column)
    # One chapter is enough to know a split by, and a full search of LibriSpeech is slow.
    librispeech = [path.name for path in sorted(folder.iterdir()) if next(path.glob("*/*/*.trans.txt"), None)]
    if librispeech:
        _require("split", split, librispeech, folder)
        _require("audio column", audio_column, ("audio", "text"), folder)
        _require("text column", text_column, ("audio", "text"), folder)
        return _read_librispeech(folder / split)
    return None


def _require(what: str, name: str, present, where) -> None:
    """Raises ValueError if `name` is not among `present`."""
    if name not in present:
        raise ValueError(f"{where}: no {what} {name!r}; it has {', '.join(map(repr, present)) or 'none'}")


def _read_metadata(path: Path, audio_column: str, text_column: str) -> list[dict]:
    """Rows of a metadata.jsonl."""
    lines = list(_read_json_lines(path))
    if not lines:
        raise ValueError(f"{path}: it is empty; give at least one line")
    columns = dict.fromkeys(name for line in lines for name in line)
    audio_column = "file_name" if audio_column == "audio" and "audio" not in columns else audio_column
    _require("audio column", audio_column, columns, path)
    _require("text column", text_column, columns, path)
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, row {number}"
        file_name = line.get(audio_column)
        if not isinstance(file_name, str):
            raise ValueError(f"{where}: {audio_column} is {file_name!r}; give the path of an audio file")
        file = str(path.parent / file_name)
        rows.append(_to_schema(line, {"bytes": None, "path": file}, text_column, Path(file_name).stem, where))
    _require_files(rows, path)
    return rows


def _read_json_lines(path: Path):
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


def _read_librispeech(folder: Path) -> list[dict]:
    """Rows of one split of a LibriSpeech tree."""
    rows = []
    for transcript in sorted(folder.glob("*/*/*.trans.txt")):
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.strip().partition(" ")
            audio = {"bytes": None, "path": str(transcript.parent / f"{name}.flac")}
            rows.append(_to_schema({"text": text}, audio, "text", name, str(transcript)))
    _require_files(rows, folder)
    return rows


def _require_files(rows: list[dict], where: Path) -> None:
    """Raises ValueError if audio files of the rows are missing."""
    missing = [path for path in (row["audio"]["path"] for row in rows) if not Path(path).is_file()]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{where}: {len(missing)} of {len(rows)} audio files are missing: {names}")


def _load_with_datasets(
    dataset, split: str, audio_column: str, text_column: str, config_name: str | None, streaming: bool
):
    """A split that the `datasets` library loads, in the schema."""
    if (Path(dataset) / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(dataset))
        _require("split", split, splits, dataset)
        source = splits[split].to_iterable_dataset() if streaming else splits[split]
    else:
        source = datasets.load_dataset(str(dataset), config_name, split=split, streaming=streaming)
    columns = source.column_names or list(next(iter(source)))
    _require("audio column", audio_column, columns, dataset)
    _require("text column", text_column, columns, dataset)

    def convert(row: dict, index: int) -> dict:
        audio = _fetch(row[audio_column])
        name = Path(audio["path"]).stem if audio["path"] else f"{split}-{index}"
        return _to_schema(row, audio, text_column, name, f"{dataset}, {split}, row {index + 1}")

    source = source.cast_column(audio_column, datasets.Audio(decode=False))
    return source.map(convert, with_indices=True, remove_columns=columns, features=SCHEMA)


def _fetch(audio: dict) -> dict:
    """Undecoded audio, whose bytes are downloaded if it names a remote file only (streams of a Hub dataset do)."""
    if audio["bytes"] is None and "://" in (audio["path"] or ""):
        with fsspec.open(audio["path"], "rb") as file:
            return {"bytes": file.read(), "path": audio["path"]}
    return {"bytes": audio["bytes"], "path": audio["path"]}


def _to_schema(row: dict, audio: dict, text_column: str, name: str, where: str) -> dict:
    """One row of the schema; `name` is its id if it has none, `where` is for the message if its text is wrong."""
    text = row.get(text_column)
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_column} is {text!r}; give the transcript as a string")
    duration = row.get("duration")
    return {
        "id": str(row["id"]) if row.get("id") is not None else name,
        "audio": audio,
        "text": text,
        "entities": _entities(row, text_column),
        "sentiment": row.get("sentiment"),
        "language": row.get("language"),
        "duration": None if duration is None else float(duration),
    }


def _entities(row: dict, text_column: str) -> list[list]:
    """[[tag, start, length], ...] from the first column that has them; SLUE on the Hub has objects in their place."""
    for column in ("entities", *ENTITY_COLUMNS.get(text_column, ())):
        found = row.get(column)
        if isinstance(found, dict):  # {"type": [...], "start": [...], "length": [...]}
            return [list(entity) for entity in zip(found["type"], found["start"], found["length"])]
        if found is not None:
            return [[e["type"], e["start"], e["length"]] if isinstance(e, dict) else list(e) for e in found]
    return []
