"""What must hold whatever comes in, for test_hostile_input.py and fuzz_parsers.py; and files made to do harm."""

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import soundfile

from modeling_sense.modeling_sense import ADAPTER_CONFIG, read_adapter_config
from processing import datasets, recipe
from processing.annotation.prompting import ANNOTATIONS, Unreadable
from processing.long_audio import read_blocks
from processing.processing_sense import LOUDEST, load_audio, open_audio
from processing.tasks import ALL_TAGS, SENTIMENTS, make_tasks, phrases, read_tags, write_tags


TASKS = make_tasks({"asr": "Transcribe.", "ner": "Tag.", "sa": "Sentiment?"})
SECONDS = 5  # that anything may take
COLUMNS = {"audio": "audio", "text": "text", "entity_tags": "combined", "lowercase": False}
TAGS = sorted(ALL_TAGS)


class TooSlow(AssertionError):
    pass


def in_time(check):
    """A check that also fails where it takes more than `SECONDS`."""

    def timed(*args):
        begin = time.process_time()
        try:
            return check(*args)
        finally:
            took = time.process_time() - begin
            if took > SECONDS:
                raise TooSlow(f"{check.__name__} took {took:.1f} s")

    return timed


# ------------------------------------------------------------------ what must hold


@in_time
def answers_are_read(answer: str):
    for task in TASKS.values():
        read = task.parse(answer)
        assert read.malformed >= 0 and read.sentiment in (None, *SENTIMENTS)
        if read.entities is not None:
            found = phrases(read.text, read.entities)
            assert all(tag in ALL_TAGS and phrase and phrase == phrase.strip() for tag, phrase in found)


@in_time
def targets_are_read_back(text: str, numbers: list[int]):
    """Of any text, with entities that `numbers` place in it, the target says these entities and no others."""
    entities = []
    for a, b in zip(numbers[::2], numbers[1::2]):
        if text:
            start = a % len(text)
            entities.append([TAGS[a % len(TAGS)], start, 1 + b % (len(text) - start)])
    read = read_tags(write_tags(text, entities))
    kept, at = [], 0
    for tag, start, length in sorted(entities, key=lambda e: (e[1], -e[2])):
        if start >= at and text[start : start + length].strip():
            kept.append(tag)
            at = start + length
    assert read.malformed == 0 and [tag for tag, _, _ in read.entities] == kept


@in_time
def annotations_are_read(answer: str):
    for kind in ANNOTATIONS.values():
        try:
            labels = kind().finish("anna left moscow", kind().read(answer))
        except Unreadable:
            continue
        for tag, start, length in labels.columns.get("entities", []):
            assert tag in ALL_TAGS and 0 <= start < start + length <= 16


@in_time
def recipes_are_read(content: bytes, folder: Path):
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    try:
        recipe.read_recipe(path)
    except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 10_000 + 10 * len(content)


@in_time
def metadata_is_read(content: bytes, folder: Path):
    path = folder / "metadata.jsonl"
    path.write_bytes(content)
    try:
        rows = datasets._read_metadata(path, COLUMNS)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(row["bad"] is None or row["bad"]["kind"] for row in rows)


@in_time
def librispeech_is_read(content: bytes, folder: Path):
    chapter = folder / "dev" / "1" / "2"
    chapter.mkdir(parents=True, exist_ok=True)
    (chapter / "1-2.trans.txt").write_bytes(content)
    assert all(row["bad"] is None or row["bad"]["kind"] for row in datasets._read_librispeech(folder / "dev", COLUMNS))


@in_time
def adapter_settings_are_read(content: bytes, folder: Path):
    (folder / ADAPTER_CONFIG).write_bytes(content)
    try:
        read_adapter_config(folder)
    except ValueError as error:
        assert ADAPTER_CONFIG in str(error)


@in_time
def audio_is_read(content: bytes):
    try:
        samples = load_audio(content)
    except ValueError as error:
        assert "audio (bytes)" in str(error)
    else:
        assert samples.dtype == np.float32 and samples.ndim == 1 and 1 <= len(samples) <= 480_000
        assert np.abs(samples).max() <= LOUDEST
    try:
        source, rate, name = open_audio(content)
        if source.frames <= 100 * rate:
            for block in read_blocks(source, rate, name):
                assert np.isfinite(block).all()
    except ValueError as error:
        assert "audio (bytes)" in str(error)


# ------------------------------------------------------------------ files


def riff(samples: bytes, claimed: int | None = None, channels: int = 1, rate: int = 16000, bits: int = 16) -> bytes:
    """A WAV whose header claims so many bytes of samples."""
    claimed, frame = len(samples) if claimed is None else claimed, channels * bits // 8
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * frame % 2**32, frame % 2**16, bits)
    return (
        b"RIFF"
        + struct.pack("<I", min(claimed + 36, 2**32 - 1))
        + b"WAVEfmt "
        + head
        + b"data"
        + struct.pack("<I", claimed)
        + samples
    )


def flac(samples, claimed: int | None = None, rate: int = 16000) -> bytes:
    """A FLAC whose header claims so many samples."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC")
    content = bytearray(file.getvalue())
    if claimed is not None:  # the last 36 bits of the eight bytes from 18 on
        kept = int.from_bytes(content[18:26]) >> 36 << 36
        content[18:26] = (kept | claimed).to_bytes(8)
    return bytes(content)


def silence(path: Path, seconds: int, rate: int = 16000, channels: int = 1, subtype: str | None = None) -> Path:
    """A file of silence, written second by second: hours of it are kilobytes of FLAC or OGG."""
    with soundfile.SoundFile(path, "w", rate, channels, subtype) as file:
        second = np.zeros((60 * rate, channels), np.int16)
        for left in range(seconds, 0, -60):
            file.write(second[: min(60, left) * rate])
    return path


def gzip_bomb(megabytes: int) -> bytes:
    """So many megabytes of zeros as gzip: a thousandth of that."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


def memory(run) -> float:
    """Megabytes that a call takes at its peak, beyond what the process holds before."""

    def held(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    run()
    return (held("VmHWM") - before) / 1024
