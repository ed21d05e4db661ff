"""The frozen encoder's pooled output, computed once and kept on disk: training from it skips the encoder."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .augmentation import change_speed, check_speeds
from .processing_sense import MAX_SECONDS, SenseProcessor, load_audio


STORAGE = {"float16": torch.float16, "int8": torch.int8}


class Shard:
    """Pooled features of some clips, one below the other, in a safetensors file that is mapped into memory."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.keys = json.loads(file.metadata()["clips"])
            self.pooled = file.get_tensor("pooled")
            self.scale = file.get_tensor("scale") if "scale" in file.keys() else None
            self.starts = file.get_tensor("starts").tolist()

    def get(self, at: int) -> torch.Tensor:
        """`(tokens, d_model)`, fp16."""
        rows = slice(self.starts[at], self.starts[at + 1])
        if self.scale is None:
            return self.pooled[rows]
        return (self.pooled[rows].float() * self.scale[rows, None]).half()


def write_shard(folder: Path, keys: Sequence[str], clips: Sequence[torch.Tensor], storage: str):
    """
    Writes the features of clips, each `(tokens, d_model)`, under a name made of their keys: the same clips make the
    same file. `int8` keeps a scale for each token, the largest of its values over 127.
    """
    pooled = torch.cat(list(clips)).float()
    starts = torch.tensor([0, *(len(clip) for clip in clips)]).cumsum(0)
    tensors = {"starts": starts, "pooled": pooled.half()}
    if storage == "int8":
        scale = pooled.abs().amax(1).clamp(min=1e-8) / 127
        tensors |= {"pooled": (pooled / scale[:, None]).round().to(torch.int8), "scale": scale}
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:32]
    temporary = folder / f"{name}.{os.getpid()}.tmp"
    # One field of metadata alone: safetensors writes several in any order.
    save_file(tensors, temporary, metadata={"clips": json.dumps(list(keys))})
    os.replace(temporary, folder / f"{name}.safetensors")


class EncoderCache:
    """
    Pooled features of a dataset's clips. `variants` is the number of versions kept of each (one per speed).

    Args:
        folder: with the shards of one encoder.
        keys: by row, by variant, see `clip_key`.
    """

    def __init__(self, folder: Path, keys: list[list[str]]):
        self.variants = len(keys[0])
        shards = [Shard(path) for path in sorted(folder.glob("*.safetensors"))]
        found = {key: (shard, at) for shard in shards for at, key in enumerate(shard.keys)}
        self.places = [[found[key] for key in of_clip] for of_clip in keys]

    def get(self, index: int, variant: int = 0) -> torch.Tensor:
        """Pooled features `(tokens, d_model)` of clip `index`; variant 0 is the clip as it is."""
        shard, at = self.places[index][variant]
        return shard.get(at)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def lengths(self) -> list[int]:
        """Audio tokens of each clip as it is."""
        return [shard.starts[at + 1] - shard.starts[at] for shard, at in (places[0] for places in self.places)]

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`pooled_features` `(clips, tokens, d_model)` of clips as they are, padded, and `pooled_features_mask`."""
        return pad([self.get(index) for index in indices])


def pad(clips: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Features `(tokens, d_model)` of several clips as the model takes them."""
    lengths = torch.tensor([len(clip) for clip in clips])
    pooled = torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True)
    return {"pooled_features": pooled, "pooled_features_mask": torch.arange(pooled.shape[1]) < lengths[:, None]}


def build_cache(
    model,
    processor: SenseProcessor,
    dataset,
    folder: str | os.PathLike,
    speeds=(1.0,),
    *,
    storage: str = "float16",
    batch_size: int = 8,
    shard_clips: int = 256,
) -> EncoderCache:
    """
    Encodes the clips of `dataset` that `folder` does not hold yet, once per speed; several processes share them out.
    Every shard is written as soon as it is whole: a build that was interrupted goes on when started again. A shard
    that can't be read is made anew.

    A clip is found by its own bytes, in a folder named by the encoder's weights, mel settings and pooling. So stages,
    tasks and subsets of a corpus share what is there, and a stale or a foreign entry is never read.

    Args:
        model: `SenseForConditionalGeneration`; its encoder runs in the dtype it is held in, on the process's device.
        dataset: rows in the project's schema.
        folder: where caches are kept.
        speeds: the first must be 1.0, the clip as it is. So is one that would last more than 30 s if it were slower.
        storage: `"float16"`, or `"int8"`: half as large, each value within 1/254 of its token's largest one.
        batch_size: clips that are encoded at a time.
        shard_clips: versions of clips in a file.

    Raises:
        ValueError: speeds that do not begin with 1.0 or are not above 0, or another storage.
    """
    check_speeds(speeds)
    if storage not in STORAGE:
        raise ValueError(f"encoder cache: give float16 or int8, found {storage!r}")
    folder = Path(folder) / encoder_key(model, processor, storage)
    folder.mkdir(parents=True, exist_ok=True)
    keys = [[clip_key(digest, speed) for speed in speeds] for digest in hash_clips(dataset)]
    state = PartialState()
    if state.is_main_process:
        clean_up(folder)
    state.wait_for_everyone()
    # The main process's list is everyone's: another run may write shards meanwhile.
    missing = broadcast_object_list([_find_missing(folder, keys, speeds) if state.is_main_process else None])[0]
    groups = [missing[i : i + shard_clips] for i in range(0, len(missing), shard_clips)]
    if missing and state.is_main_process:
        size = _megabytes(model, processor, dataset, missing, storage)
        print(f"encoding {len(missing)} clips once, about {size:,.0f} MB of {storage}, into {folder}", flush=True)
    mine = groups[state.process_index :: state.num_processes]
    total = sum(map(len, mine))
    with tqdm(total=total, desc="encoding", unit="clip", disable=not (total and state.is_main_process)) as bar:
        for group in mine:
            clips = _encode(model, processor, dataset, group, batch_size, bar)
            write_shard(folder, [key for key, _, _ in group], list(clips), storage)
    state.wait_for_everyone()
    return EncoderCache(folder, keys)


def _find_missing(folder: Path, keys: list[list[str]], speeds) -> list[tuple[str, int, float]]:
    """`(key, row, speed)` of each version of a clip that no shard holds."""
    held = {key for path in folder.glob("*.safetensors") for key in Shard(path).keys}
    wanted = {key: (row, speed) for row, of_clip in enumerate(keys) for key, speed in zip(of_clip, speeds)}
    return [(key, *place) for key, place in wanted.items() if key not in held]


def clean_up(folder: Path):
    """Removes what can't be read, to be encoded again, and what builds that were killed left unfinished."""
    for path in folder.glob("*.safetensors"):
        try:
            Shard(path)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            print(f"encoder cache: {path} can't be read ({error}); its clips are encoded again", flush=True)
            path.unlink()
    for path in folder.glob("*.tmp"):
        try:
            written = path.stat().st_mtime
        except FileNotFoundError:  # another run gave it its name
            continue
        if time.time() - written > 3600:  # another run may be writing its own, for seconds
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def on_device(module: torch.nn.Module, device):
    """A part of a model is there within, and afterwards where it was."""
    home = next(module.parameters()).device
    with torch.inference_mode(False):  # in it, a weight that is moved could not be trained any more
        module.to(device)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            module.to(home)


@torch.inference_mode()
def _encode(model, processor, dataset, group, batch_size: int, bar: tqdm) -> Iterator[torch.Tensor]:
    """Features `(tokens, d_model)` of the clips of a group of `(key, row, speed)`, on the CPU."""
    device = PartialState().device
    with on_device(model.model.audio_tower, device):
        for first in range(0, len(group), batch_size):
            part = group[first : first + batch_size]
            waves = [_at_speed(load_audio(dataset[row]["audio"]), speed) for _, row, speed in part]
            pooled, mask = model.model.get_pooled_features(**processor.audio_features(waves).to(device))
            yield from (clip[valid].cpu() for clip, valid in zip(pooled, mask))
            bar.update(len(part))


def _at_speed(clip: np.ndarray, speed: float) -> np.ndarray:
    """A clip at 16 kHz. Where it would be longer than Whisper hears, it stays: cut, it would lack words."""
    changed = change_speed(clip, speed)
    return changed if len(changed) <= MAX_SECONDS * 16000 else clip


def encoder_key(model, processor: SenseProcessor, storage: str) -> str:
    """What the features of a clip depend on beside the clip: encoder, mel features, pooling, and how they are kept."""
    digest, encoder = hashlib.sha256(), model.model.audio_tower
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    settings = [model.config.num_audio_tokens, model.config.audio_tokens, str(encoder.dtype), storage]
    digest.update(json.dumps([settings, processor.feature_extractor.to_dict()], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def clip_key(digest: str, speed: float) -> str:
    """Of a version of a clip."""
    return digest if speed == 1.0 else f"{digest}@{speed:g}"


def hash_clips(dataset) -> list[str]:
    """SHA-256 of every clip's bytes, in row order; several processes share them out."""
    state = PartialState()
    audio = dataset.select_columns("audio")
    mine = range(state.process_index, len(audio), state.num_processes)
    found = []
    for row in tqdm(mine, desc="hashing clips", unit="clip", leave=False, disable=not state.is_main_process):
        clip = audio[row]["audio"]
        found.append((row, hashlib.sha256(clip["bytes"] or Path(clip["path"]).read_bytes()).hexdigest()[:32]))
    everyone = gather_object(found) if state.num_processes > 1 else found
    return [digest for _, digest in sorted(everyone)]


def _megabytes(model, processor, dataset, missing, storage: str) -> float:
    """Of the features to come, from the clips' durations; of unknown ones, the most there can be."""
    durations = dataset["duration"]
    rate = processor.feature_extractor.sampling_rate
    seconds = [min(MAX_SECONDS, (durations[row] or MAX_SECONDS) / speed) for _, row, speed in missing]
    tokens = sum(processor.num_tokens(max(1, int(s * rate))) for s in seconds)
    return tokens * model.config.audio_config.d_model * STORAGE[storage].itemsize / 1e6
