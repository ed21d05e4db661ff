"""A SENSE of a few kilobytes: an encoder of 60 frames, at most 10 audio tokens, two layers on each side."""

import pytest
import torch
from transformers import LlamaConfig, WhisperConfig

from modeling_sense import SenseConfig, SenseForConditionalGeneration


VOCABULARY, AUDIO_TOKEN_ID, PAD = 99, 98, 0
AUDIO_TOKENS = [10, 4, 7]  # of the three clips in `tiny_inputs`
LORA = {"r": 2, "target_modules": r".*\.(q_proj|k_proj|v_proj)"}
CLASSIFIER = {"labels": ["a", "b"], "multi_label": True, "weights": None, "channels": [2, 2, 2], "alpha": 0.2}


def tiny_config(tied: bool = False, layers: int = 2, initializer_range: float = 0.3, **kwargs) -> SenseConfig:
    """Weights are drawn wide: with 0.02 in so narrow a model, all answers would be alike."""
    audio_config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=24,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=60,
        max_target_positions=20,
        init_std=0.1,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    text_config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=initializer_range,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    fields = {"audio_token_id": AUDIO_TOKEN_ID, "num_audio_tokens": 10, **kwargs}
    return SenseConfig(audio_config=audio_config, text_config=text_config, **fields)


def tiny_model(config: SenseConfig | None = None, model_class=SenseForConditionalGeneration, seed: int = 0):
    torch.manual_seed(seed)
    return model_class(config or tiny_config()).eval()


def tiny_inputs(*clips: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts, each with one clip and eight tokens after it; of all three clips, or of those named."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for tokens in AUDIO_TOKENS:
        text = torch.randint(3, AUDIO_TOKEN_ID, (8,), generator=generator)
        mask = (torch.arange(120) < 12 * tokens).long()  # 120 mel steps, 60 frames, 10 tokens
        rows.append((torch.randn(8, 120, generator=generator), mask, tokens, text))
    rows = [rows[clip] for clip in clips or range(len(rows))]
    longest = max(tokens for _, _, tokens, _ in rows)
    pads = [longest - tokens for _, _, tokens, _ in rows]
    ids = [
        torch.tensor([PAD] * pad + [1] + [AUDIO_TOKEN_ID] * tokens + text.tolist())
        for pad, (_, _, tokens, text) in zip(pads, rows)
    ]
    input_ids = torch.stack(ids)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.stack([(torch.arange(input_ids.shape[1]) >= pad).long() for pad in pads]),
        "input_features": torch.stack([features for features, _, _, _ in rows]),
        "input_features_mask": torch.stack([mask for _, mask, _, _ in rows]),
    }


@pytest.fixture
def model() -> SenseForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return tiny_inputs()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of `tiny_model()`."""
    folder = tmp_path_factory.mktemp("sense")
    tiny_model().save_pretrained(folder)
    return folder
