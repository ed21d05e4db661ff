"""Systems to train: the projector alone learns, encoder and language model are frozen."""

import math

import torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    GraniteSpeechConfig,
    GraniteSpeechEncoderConfig,
    GraniteSpeechForConditionalGeneration,
    LlamaForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    VoxtralConfig,
    VoxtralEncoderConfig,
    VoxtralForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from modeling_sense import SenseConfig, SenseForConditionalGeneration

from .setting import AUDIO_SIZES, MEL_BINS, WINDOW, Setting, llama_config, mel, mel_mask, new, tokens, whisper_config


STACKED, SLAM_WIDTH = 5, 2048  # of SLAM-ASR: frames in one token, width of its projector
GRANITE_WINDOW, GRANITE_QUERIES = 15, 3  # its own defaults: 15 frames become 3 tokens


def train_step(model: nn.Module, inputs: dict) -> torch.Tensor:
    """Forward and backward; gradients are in what is trained alone. Returns the loss."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss


def train_only(model: nn.Module, trained: nn.Module, encoder: nn.Module) -> nn.Module:
    """Freezes all but `trained`, which becomes float32; the frozen encoder stays in evaluation mode, as SENSE's."""
    model.requires_grad_(False)
    trained.float().requires_grad_(True)
    trained.register_forward_pre_hook(lambda module, args: tuple(arg.float() for arg in args))
    model.train()
    encoder.eval()
    return model


def tie(model: nn.Module) -> nn.Module:
    """Ties the output layer to the embeddings where the language model does: some peers would hold it twice."""
    if model.config.text_config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model


# ------------------------------------------------------------------ SENSE


def build_sense(s: Setting) -> nn.Module:
    sizes = {"audio_config": whisper_config(s), "text_config": llama_config(s)}
    model = new(SenseForConditionalGeneration, SenseConfig(**sizes, audio_token_id=s.audio_token_id), s)
    model.model.multi_modal_projector.float()
    return model.eval()


def build_sense_to_train(s: Setting) -> nn.Module:
    return build_sense(s).train()


def build_sense_cached(s: Setting) -> nn.Module:
    """As train_sense.py trains from its cache: the encoder is away."""
    model = build_sense_to_train(s)
    model.detach_encoder()
    return model


def sense_tokens(s: Setting) -> int:
    return math.ceil(s.frames * 250 / 1500)  # 120 ms each, a part of one counts


def cached_inputs(s: Setting) -> dict:
    """Pooled features as `EncoderCache` keeps them, fp16, `(batch, tokens, d_model)`."""
    shape = (s.batch, sense_tokens(s))
    pooled = torch.randn(*shape, AUDIO_SIZES[s.audio][0], generator=torch.Generator().manual_seed(2))
    mask = torch.ones(shape, dtype=torch.bool)
    audio = {"pooled_features": pooled.half().to(s.device), "pooled_features_mask": mask.to(s.device)}
    return {**tokens(s, sense_tokens(s), s.labels), **audio}


def sense_inputs(s: Setting) -> dict:
    audio = {"input_features": mel(s), "input_features_mask": mel_mask(s)}
    return {**tokens(s, sense_tokens(s), s.labels), **audio}


# ------------------------------------------------------------------ peers


def build_qwen2_audio(s: Setting) -> nn.Module:
    width, layers, heads, ffn = AUDIO_SIZES[s.audio]
    audio = Qwen2AudioEncoderConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        num_mel_bins=MEL_BINS,
    )
    config = Qwen2AudioConfig(audio_config=audio, text_config=llama_config(s), audio_token_index=s.audio_token_id)
    model = tie(new(Qwen2AudioForConditionalGeneration, config, s))
    return train_only(model, model.model.multi_modal_projector, model.model.audio_tower)


def qwen2_audio_inputs(s: Setting) -> dict:
    audio = {"input_features": mel(s), "feature_attention_mask": mel_mask(s)}
    return {**tokens(s, s.frames // 2, s.labels), **audio}  # its encoder averages pairs of frames


def build_voxtral(s: Setting) -> nn.Module:
    width, layers, heads, ffn = AUDIO_SIZES[s.audio]
    audio = VoxtralEncoderConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        num_mel_bins=MEL_BINS,
    )
    config = VoxtralConfig(audio_config=audio, text_config=llama_config(s), audio_token_id=s.audio_token_id)
    model = tie(new(VoxtralForConditionalGeneration, config, s))
    return train_only(model, model.model.multi_modal_projector, model.model.audio_tower)


def voxtral_tokens(s: Setting) -> int:
    """Of the whole window, trimmed to nothing shorter: 1500 frames, stacked to the width of the feed-forward part."""
    width, _, _, ffn = AUDIO_SIZES[s.audio]
    return WINDOW // 2 * width // ffn


def voxtral_inputs(s: Setting) -> dict:
    return {**tokens(s, voxtral_tokens(s), s.labels), "input_features": mel(s)}


def build_granite_speech(s: Setting) -> nn.Module:
    """Its encoder is a conformer (CTC): of Whisper's width, layers and heads. Two Q-Former layers, as released."""
    width, layers, heads, ffn = AUDIO_SIZES[s.audio]
    encoder = GraniteSpeechEncoderConfig(
        input_dim=2 * MEL_BINS,
        hidden_dim=width,
        num_layers=layers,
        num_heads=heads,
        feedforward_mult=ffn // width,
    )
    projector = Blip2QFormerConfig(
        hidden_size=width,
        encoder_hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=ffn,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,  # no system has dropout here
        attention_probs_dropout_prob=0.0,
    )
    text = llama_config(s)
    config = GraniteSpeechConfig(
        text_config=text,
        encoder_config=encoder,
        projector_config=projector,
        audio_token_index=s.audio_token_id,
        has_lora_adapter=False,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model = tie(new(GraniteSpeechForConditionalGeneration, config, s))
    return train_only(model, model.model.projector, model.model.encoder)


def granite_speech_inputs(s: Setting) -> dict:
    """Pairs of mel steps of the clip alone, for it does not pad to a window: `(batch, frames, 160)`."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(s.batch, s.frames, 2 * MEL_BINS, generator=generator)
    audio_tokens = math.ceil(s.frames / GRANITE_WINDOW) * GRANITE_QUERIES
    return {
        **tokens(s, audio_tokens, s.labels),
        "input_features": features.to(s.device, getattr(torch, s.dtype)),
    }


class SlamASR(nn.Module):
    """SLAM-ASR's projector (arXiv 2402.08846) over the same encoder and LLM: 5 frames to a token, two layers."""

    def __init__(self, s: Setting):
        super().__init__()
        self.audio_token_id = s.audio_token_id
        self.encoder = new(WhisperEncoder, whisper_config(s), s)
        self.llm = new(LlamaForCausalLM, llama_config(s), s)
        wide, hidden = STACKED * self.encoder.config.d_model, self.llm.config.hidden_size
        layers = nn.Linear(wide, SLAM_WIDTH), nn.ReLU(), nn.Linear(SLAM_WIDTH, hidden)
        self.projector = nn.Sequential(*layers).to(s.device)

    def forward(self, input_ids, attention_mask, labels, input_features, frames: int, use_cache=None):
        """As the models of transformers; `frames` is how many of the encoder's hold speech, a multiple of 5."""
        with torch.no_grad():
            encoded = self.encoder(input_features).last_hidden_state[:, :frames]
        audio = self.projector(encoded.unflatten(1, (-1, STACKED)).flatten(2))
        embeds = self.llm.get_input_embeddings()(input_ids)
        mask = (input_ids == self.audio_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(mask, audio.to(embeds.dtype))
        return self.llm(
            inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, use_cache=use_cache, return_dict=True
        )


def build_slam_asr(s: Setting) -> nn.Module:
    model = SlamASR(s)
    return train_only(model, model.projector, model.encoder)


def slam_asr_inputs(s: Setting) -> dict:
    """Trimmed to the speech, which its authors' recipe does not do: in its favour."""
    number = s.frames // STACKED
    return {**tokens(s, number, s.labels), "input_features": mel(s), "frames": number * STACKED}


# ------------------------------------------------------------------ the limit


class BareLLM(nn.Module):
    """The limit: the LLM alone, on SENSE's sequence, with the audio embeddings as a leaf that wants a gradient."""

    def __init__(self, s: Setting):
        super().__init__()
        self.audio_token_id = s.audio_token_id
        self.llm = new(LlamaForCausalLM, llama_config(s), s).requires_grad_(False)
        hidden = self.llm.config.hidden_size
        leaf = torch.randn(s.batch * sense_tokens(s), hidden, dtype=self.llm.dtype) * self.llm.config.initializer_range
        self.audio_embeds = nn.Parameter(leaf.to(s.device))

    def forward(self, input_ids, attention_mask, labels, use_cache=None):
        """Logits where a label stands only: no step can have fewer."""
        embeds = self.llm.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter((input_ids == self.audio_token_id).unsqueeze(-1), self.audio_embeds)
        hidden = self.llm.model(
            inputs_embeds=embeds, attention_mask=attention_mask, use_cache=use_cache
        ).last_hidden_state
        targets = labels[:, 1:]
        keep = targets != -100
        logits = self.llm.lm_head(hidden[:, :-1][keep])
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.float(), targets[keep]))


def bare_inputs(s: Setting) -> dict:
    return tokens(s, sense_tokens(s), s.labels)
