"""The frozen encoder's pooled output, computed once and kept on disk: training from it skips the encoder."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .augmentation import change_speed
from .processing_sense import SenseProcessor, load_audio


class EncoderCache:
    """
    Pooled features of a dataset's clips in one safetensors file, fp16, memory-mapped.

    `variants` is the number of versions kept of each clip (one per speed).
    """

    def __init__(self, path: str | os.PathLike):
        with safe_open(path, "pt") as file:
            about = file.metadata()
            self.pooled = file.get_tensor("pooled")  # all clips' tokens, one below the other
            self.starts = file.get_tensor("starts").tolist()
        self.variants = int(about["variants"])

    def get(self, index: int, variant: int = 0) -> torch.Tensor:
        """Pooled features `(tokens, d_model)` of clip `index`; variant 0 is the clip as it is."""
        at = index * self.variants + variant
        return self.pooled[self.starts[at] : self.starts[at + 1]]

    def __len__(self) -> int:
        return (len(self.starts) - 1) // self.variants

    @property
    def lengths(self) -> list[int]:
        """Audio tokens of each clip as it is."""
        return [len(self.get(i)) for i in range(len(self))]


def build_cache(model, processor: SenseProcessor, dataset, folder: str | os.PathLike, speeds=(1.0,), batch_size=8):
    """
    Encodes every clip of `dataset`, once per speed, unless `folder` holds that already.

    The file's name is a hash of the encoder's weights, the pooling, the speeds and every clip's bytes: a stale or a
    foreign cache is never read.

    Args:
        model: `SenseForConditionalGeneration`; its encoder runs in the dtype it is held in.
        dataset: rows in the project's schema.
        folder: where caches are kept.
        speeds: the first must be 1.0, the clip as it is.

    Returns:
        [`EncoderCache`]
    """
    if speeds[0] != 1.0:
        raise ValueError(f"speeds must begin with 1.0 (the clip as it is), found {list(speeds)}")
    path = Path(folder) / f"{_key(model, dataset, speeds)}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        pooled, starts = _encode(model, processor, dataset, speeds, batch_size)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"pooled": pooled, "starts": starts}, temporary, metadata={"variants": str(len(speeds))})
        os.replace(temporary, path)
    return EncoderCache(path)


@torch.inference_mode()
def _encode(model, processor, dataset, speeds, batch_size) -> tuple[torch.Tensor, torch.Tensor]:
    clips, starts = [], [0]
    for first in tqdm(range(0, len(dataset), batch_size), desc="encoding speech once", unit="batch"):
        rows = dataset.select(range(first, min(first + batch_size, len(dataset))))
        waves = [change_speed(load_audio(row["audio"]), speed) for row in rows for speed in speeds]
        features = processor.audio_features(waves).to(model.device)
        pooled, mask = model.model.get_pooled_features(**features)
        for clip, valid in zip(pooled, mask):
            clips.append(clip[valid].to("cpu", torch.float16))
            starts.append(starts[-1] + len(clips[-1]))
    return torch.cat(clips), torch.tensor(starts)


def _key(model, dataset, speeds) -> str:
    digest = hashlib.sha256()
    encoder = model.model.audio_tower
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    pooling = [model.config.num_audio_tokens, model.config.audio_tokens, list(speeds), str(encoder.dtype)]
    digest.update(json.dumps(pooling).encode())
    for audio in tqdm(dataset["audio"], desc="hashing clips", unit="clip", leave=False):
        digest.update(hashlib.sha256(audio["bytes"] or Path(audio["path"]).read_bytes()).digest())
    return digest.hexdigest()[:32]
