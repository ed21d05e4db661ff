"""A tiny SENSE for what stands around the network."""

import pytest
import torch

from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor


@pytest.fixture
def sense(tiny_whisper, tiny_llama):
    torch.manual_seed(0)
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama)
    return model, SenseProcessor.from_backbones(tiny_whisper, tiny_llama)
