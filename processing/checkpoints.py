"""Checkpoints of a training: written whole or not at all, and found whole when it goes on."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from .report import write_text


CHECKSUMS = "checksums.json"
UNFINISHED = "_unfinished"  # beside the checkpoints; Trainer uploads nothing whose name begins so
SMALL_FILES = 20_000_000  # bytes for tokenizer and logs, rather too many


@contextmanager
def unfinished(output_dir: str | os.PathLike, what: str, count_bytes: Callable[[], int]) -> Iterator[Path]:
    """
    A new folder in `output_dir` to write to; each node's first process makes it. What is left in it afterwards is
    removed, so is what an earlier run that was killed left there.

    Args:
        what: is written, for the message.
        count_bytes: how many the tensors of it have.

    Raises:
        OSError: something could not be written. It names the path, the cause, and the space that is needed and free.
            What is raised within for another reason comes out as it is.
    """
    output_dir, state = Path(output_dir), PartialState()
    folder = output_dir / UNFINISHED
    if state.is_local_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except Exception as error:  # torch, safetensors and tokenizers have a kind of their own each for a full disk
        if state.is_local_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        needed, free = count_bytes() + SMALL_FILES, shutil.disk_usage(output_dir).free
        if not isinstance(error, OSError) and free >= needed:
            raise
        raise OSError(
            f"{output_dir / what} could not be written ({type(error).__name__}: {error}). It needs up to "
            f"{needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free there. Nothing of it was kept, checkpoints before "
            "it are whole: make room and start the same command again"
        ) from error
    if state.is_local_main_process:
        shutil.rmtree(folder, ignore_errors=True)


def seal(checkpoint: Path):
    """Writes the size and SHA-256 of each file of a checkpoint beside them; all of it is on the disk afterwards."""
    found = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        found[path.relative_to(checkpoint).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        sync(path)
    write_text(checkpoint / CHECKSUMS, json.dumps(found, indent=2) + "\n")
    for path in (checkpoint / CHECKSUMS, *(path for path in checkpoint.rglob("*") if path.is_dir()), checkpoint):
        sync(path)


def publish(folder: Path, target: Path):
    """
    Gives a finished folder its name, on the disk, too: older ones may be deleted afterwards. One that has the name
    already, a broken checkpoint, moves to where the folder was.
    """
    if target.exists():
        os.replace(target, folder.with_name(f"old-{target.name}"))
    os.replace(folder, target)
    sync(target.parent)


def sync(path: Path):
    """Returns when a file's content, or a folder's names, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def find_fault(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with the files of a checkpoint, None where all are as they were written."""
    checkpoint = Path(checkpoint)
    try:
        written = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        for name, about in written.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != about["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, {about['bytes']:,} were written"
            if _sha256(path) != about["sha256"]:
                return f"{name} is not what was written, its SHA-256 is another"
    except FileNotFoundError:
        return f"{CHECKSUMS}, which is written last, is missing"
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        return f"{CHECKSUMS} can't be read ({type(error).__name__}: {error})"
    return None


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The last whole checkpoint in an output folder, None where there is not one, whole or not. Those that are passed
    over are named.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    numbers = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    steps = {path: int(number[1]) for path, number in numbers.items() if number and path.is_dir()}
    faults = []
    for checkpoint in sorted(steps, key=lambda path: steps[path], reverse=True):
        fault = find_fault(checkpoint)
        if fault is None:
            return str(checkpoint)
        faults.append(f"{checkpoint}: {fault}")
        if PartialState().is_main_process:
            print(f"not going on from {faults[-1]}; trying the one before it", flush=True)
    if faults:
        raise ValueError(
            f"none of the checkpoints in {output_dir} is whole ({'; '.join(faults)}). To start afresh, remove them or "
            f"give another output_dir; to go on from one without {CHECKSUMS}, name it with --resume_from_checkpoint"
        )
    return None


def require_whole(checkpoint: str):
    """
    For a checkpoint that the user names. One without checksums is taken as it is.

    Raises:
        ValueError: it is not there, or one of its files is not as it was written.
    """
    if not Path(checkpoint).is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {checkpoint}")
    fault = find_fault(checkpoint) if (Path(checkpoint) / CHECKSUMS).exists() else None
    if fault:
        raise ValueError(f"resume_from_checkpoint: {checkpoint}: {fault}; name one before it")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
