"""The result of a run as a dataset folder that train_sense.py reads, with what fell and where it all came from."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from ..datasets import SCHEMA
from ..report import write_text
from .prompting import Labels


def write_dataset(
    folder: Path, splits: dict[str, datasets.Dataset], results: dict[str, list[Labels | str]], provenance: dict
) -> dict:
    """
    Writes `{split}/metadata.jsonl` (schema of the project, and `annotated`: what the annotator wrote), rejected.jsonl
    (every drop with its reason) and, last, provenance.json.

    Args:
        folder: where to.
        splits: rows of the project's schema, by split. Audio files are referred to where they lie, by their path from
            the folder; audio that is no file is written beside the metadata.
        results: by split, one a row: `Labels`, or why there are none. Such a row stays, without this label.
        provenance: what is known already.

    Returns:
        the provenance with the counts.
    """
    counts: Counter[str] = Counter()
    rejected = []
    for split, rows in splits.items():
        lines = []
        for row, result in zip(tqdm(rows, desc=f"writing {split}", unit="row"), results[split]):
            where = {"split": split, "id": row["id"]}
            columns, fallen = _columns(provenance["column"], result)
            rejected += [where | drop for drop in fallen]
            counts.update(_count(result, provenance["column"]))
            name = _place_audio(folder / split, row["audio"])
            kept = {name: row[name] for name in SCHEMA if name != "audio"}
            lines.append(json.dumps({"file_name": name, **kept, **columns}, ensure_ascii=False) + "\n")
        (folder / split).mkdir(parents=True, exist_ok=True)
        write_text(folder / split / "metadata.jsonl", "".join(lines))
    write_text(folder / "rejected.jsonl", "".join(json.dumps(drop, ensure_ascii=False) + "\n" for drop in rejected))
    provenance = provenance | {"counts": dict(counts)}
    write_text(folder / "provenance.json", json.dumps(provenance, indent=2, ensure_ascii=False) + "\n")
    return provenance


def _columns(column: str, result: Labels | str) -> tuple[dict, list[dict]]:
    """Columns of a row's metadata, and what is to be said about it in rejected.jsonl."""
    if isinstance(result, str):
        return {column: None, "annotated": None}, [{"reason": result}]
    return {**result.columns, "annotated": result.annotated}, result.filtered.rejected


def _count(result: Labels | str, column: str) -> Counter:
    if isinstance(result, str):
        return Counter({"rows": 1, f"rows without labels: {result.partition(':')[0]}": 1})
    counts = Counter({"rows": 1, "rows with labels": int(result.columns[column] is not None)})
    if column == "entities":
        counts["entities kept"] = len(result.filtered.entities)
        counts["tags mapped"] = len(result.filtered.mapped)
    counts.update(f"dropped: {drop['reason']}" for drop in result.filtered.rejected)
    return counts


def _place_audio(folder: Path, audio: dict) -> str:
    """The audio file's path from the folder; audio in memory is written there, under the hash of its bytes."""
    if audio["bytes"] is None:
        return os.path.relpath(Path(audio["path"]).resolve(), folder.resolve())
    suffix = Path(audio["path"] or "").suffix or ".flac"
    name = f"audio/{hashlib.sha256(audio['bytes']).hexdigest()[:24]}{suffix}"
    if not (folder / name).is_file():
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        temporary = (folder / name).with_suffix(".tmp")
        temporary.write_bytes(audio["bytes"])
        os.replace(temporary, folder / name)
    return name
