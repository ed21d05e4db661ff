"""Changes to training examples: speed of the waveform, length and hidden spans of the pooled features, wrong words."""

import random
from collections.abc import Sequence

import numpy as np
import torch
import torchaudio


def change_speed(waveform: np.ndarray, factor: float, sampling_rate: int = 16000) -> np.ndarray:
    """
    Plays `waveform` (`(samples,)`) `factor` times as fast, pitch included: 0.9, 1.0, 1.1 is the usual triple
    (Ko et al. 2015, "Audio augmentation for speech recognition").
    """
    if factor == 1.0:
        return waveform
    faster, _ = torchaudio.functional.speed(torch.from_numpy(waveform), sampling_rate, factor)
    return faster.numpy()


def check_speeds(speeds):
    """Raises ValueError unless they begin with 1.0, the clip as it is, and are above 0."""
    if not speeds or speeds[0] != 1.0 or min(speeds) <= 0:
        raise ValueError(f"speeds must begin with 1.0 (the clip as it is) and be above 0, found {list(speeds)}")


def mask_time(pooled: torch.Tensor, share: float, draws: random.Random, longest: int = 4) -> torch.Tensor:
    """
    Hides about `share` of the steps of `pooled` (`(tokens, d_model)`) in spans of 1 to `longest` steps, replaced by
    the clip's mean, as SpecAugment does with time steps (Park et al. 2019). `draws` says where.
    """
    pooled, mean = pooled.clone(), pooled.mean(0)
    hidden = 0
    while hidden < share * len(pooled):
        span = draws.randint(1, longest)
        start = draws.randrange(len(pooled))
        pooled[start : start + span] = mean
        hidden += span
    return pooled


def stretch_time(pooled: torch.Tensor, most: float, draws: random.Random, longest: int) -> torch.Tensor:
    """
    `pooled` (`(tokens, d_model)`) in up to `1 - most` to `1 + most` times as many steps, no more than `longest`, by
    linear interpolation: another rate of speech, without the encoder. `draws` says how many.
    """
    steps = min(longest, max(1, round(len(pooled) * draws.uniform(1 - most, 1 + most))))
    stretched = torch.nn.functional.interpolate(pooled.T[None].float(), size=steps, mode="linear")
    return stretched[0].T.to(pooled.dtype)


def replace_tokens(ids: list[int], share: float, draws: random.Random, others: Sequence[int]) -> list[int]:
    """Token ids of which about `share`, as `draws` says, are some of the `others`."""
    return [draws.choice(others) if draws.random() < share else token for token in ids]
