"""Changes to training audio: speed of the waveform, hidden spans of the pooled features."""

import random

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
