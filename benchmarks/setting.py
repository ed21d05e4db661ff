"""
What is compared at which sizes, and what all systems have in common: configurations, random weights, text and audio.

All systems of a comparison have the same sizes of encoder and language model, the same text and clips of the same
length. Token ids are random as well.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import LlamaConfig, WhisperConfig


# Width, layers, heads, width of the feed-forward part.
AUDIO_SIZES = {
    "tiny": (32, 2, 2, 128),
    "whisper-base": (512, 6, 8, 2048),
    "whisper-small": (768, 12, 12, 3072),
}
TEXT_SIZES = {
    "tiny": {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True},
    "SmolLM2-135M": {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True},
    "TinyLlama": {"vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32,
                  "num_key_value_heads": 4, "intermediate_size": 5632, "tie_word_embeddings": False},
}  # fmt: skip
MEL_BINS, WINDOW, FRAME_RATE = 80, 3000, 50  # mel steps in Whisper's 30 s; encoder frames a second
HEADER, TASKS = 4, 3  # prompt tokens ahead of the audio; questions put to a clip


@dataclass(frozen=True)
class Setting:
    """Sizes, shapes and arithmetic of a measurement; equal for all systems that are compared."""

    audio: str = "whisper-base"
    text: str = "SmolLM2-135M"
    batch: int = 8
    seconds: float = 10
    prompt: int = 20  # text tokens that are not learnt
    labels: int = 30
    beams: int = 1
    new_tokens: int = 32
    device: str = "cpu"
    dtype: str = "float32"  # of frozen weights; what is trained is float32
    attn: str = "sdpa"

    @property
    def frames(self) -> int:
        """Encoder frames of a clip, 20 ms each, that hold speech."""
        return round(self.seconds * FRAME_RATE)

    @property
    def audio_token_id(self) -> int:
        return TEXT_SIZES[self.text]["vocab_size"]

    def describe(self) -> dict:
        return {**asdict(self), "audio_sizes": AUDIO_SIZES[self.audio], "text_sizes": TEXT_SIZES[self.text]}


@dataclass(frozen=True)
class System:
    """`run(build(setting), inputs(setting))` is what is timed; building and inputs are not."""

    build: Callable[[Setting], nn.Module]
    inputs: Callable[[Setting], dict]
    run: Callable[[nn.Module, dict], object]


def whisper_config(s: Setting) -> WhisperConfig:
    width, layers, heads, ffn = AUDIO_SIZES[s.audio]
    encoder = {"encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": ffn}
    decoder = {"decoder_layers": layers, "decoder_attention_heads": heads, "decoder_ffn_dim": ffn}
    return WhisperConfig(d_model=width, num_mel_bins=MEL_BINS, **encoder, **decoder)


def llama_config(s: Setting) -> LlamaConfig:
    sizes = TEXT_SIZES[s.text]
    return LlamaConfig(**{**sizes, "vocab_size": sizes["vocab_size"] + 8})  # a row for the audio placeholder


def new(cls, config, s: Setting) -> nn.Module:
    """A model of random weights in the setting's dtype, on its device."""
    torch.manual_seed(0)
    with torch.device(s.device):
        return cls._from_config(config, dtype=getattr(torch, s.dtype), attn_implementation=s.attn)


def tokens(s: Setting, audio_tokens: int, labels: int, task: int = 0) -> dict:
    """
    `<header><audio placeholders><question><answer>`: `input_ids`, `attention_mask` and, with an answer of `labels`
    tokens, `labels`; each `(batch, length)`. The text is the same whatever number of audio tokens a system needs.
    """
    generator = torch.Generator().manual_seed(1)
    highest = s.audio_token_id
    header = torch.randint(3, highest, (s.batch, HEADER), generator=generator)
    questions = torch.randint(3, highest, (TASKS, s.batch, s.prompt - HEADER), generator=generator)
    questions[:, :, 0] = torch.arange(3, 3 + TASKS)[:, None]  # they differ from the first token on
    answer = torch.randint(3, highest, (s.batch, labels), generator=generator)
    audio = torch.full((s.batch, audio_tokens), s.audio_token_id)
    input_ids = torch.cat([header, audio, questions[task], answer], 1)
    fed = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if labels:
        fed["labels"] = input_ids.clone()
        fed["labels"][:, :-labels] = -100
    return {name: tensor.to(s.device) for name, tensor in fed.items()}


def mel(s: Setting) -> torch.Tensor:
    """Noise in place of a log-mel spectrogram, `(batch, mel bins, 3000)`: Whisper's window is 30 s, always."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(s.batch, MEL_BINS, WINDOW, generator=generator)
    return features.to(s.device, getattr(torch, s.dtype))


def mel_mask(s: Setting) -> torch.LongTensor:
    """1 where a mel step, 10 ms each, holds speech: `(batch, 3000)`."""
    return (torch.arange(WINDOW) < 2 * s.frames).long().repeat(s.batch, 1).to(s.device)
