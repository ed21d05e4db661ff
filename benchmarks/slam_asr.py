"""
Trains and scores SENSE with SLAM-ASR's projector (arXiv 2402.08846) where the adapter stands, all else being equal.

    python -m benchmarks.slam_asr train RECIPE --warm_start false --encoder_cache FOLDER
    python -m benchmarks.slam_asr eval --model OUT --dataset DIR [options of eval_sense.py]

Five frames of the encoder are put side by side to a token, and two layers with a ReLU between them project it: 300
tokens for 30 s, and many times the parameters. FOLDER must be one of its own: what the cache holds is another thing.
"""

import sys
from unittest import mock

import torch
from torch import nn

import eval_sense
import train_sense
from modeling_sense import SenseConfig, modeling_sense


STACKED, WIDTH = 5, 2048  # frames in a token, width of the hidden layer
TOKENS = 1500 // STACKED  # for 30 s


class SlamProjector(nn.Module):
    """In the place of `SenseAdapter`, with its arguments and results; `d_model` is five times as wide."""

    def __init__(self, config: SenseConfig):
        super().__init__()
        if config.num_audio_tokens != TOKENS:
            raise ValueError(f"SLAM-ASR's projector: num_audio_tokens is {TOKENS}, found {config.num_audio_tokens}")
        self.num_audio_tokens = TOKENS
        self.linear1 = nn.Linear(STACKED * config.audio_config.d_model, WIDTH)
        self.linear2 = nn.Linear(WIDTH, config.text_config.hidden_size)

    def pool(self, frames: torch.Tensor, frame_mask: torch.Tensor | None = None):
        stacked = frames.unflatten(1, (TOKENS, STACKED)).flatten(2)
        if frame_mask is None:
            return stacked, torch.ones(stacked.shape[:2], dtype=torch.bool, device=stacked.device)
        return stacked, frame_mask.bool().unflatten(1, (TOKENS, STACKED)).any(2)

    def forward(self, stacked: torch.Tensor) -> torch.Tensor:
        return self.linear2(nn.functional.relu(self.linear1(stacked.to(self.linear1.weight.dtype))))


def main(argv: list[str]):
    scripts = {"train": train_sense, "eval": eval_sense}
    if not argv or argv[0] not in scripts:
        raise SystemExit(__doc__)
    arguments = argv[1:] + (["--num_audio_tokens", str(TOKENS)] if argv[0] == "train" else [])
    with mock.patch.object(modeling_sense, "SenseAdapter", SlamProjector):
        return scripts[argv[0]].main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
