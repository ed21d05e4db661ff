"""SENSE: a frozen Whisper encoder, a pooling adapter and a Llama-like language model (arXiv 2509.04473)."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    WhisperModel,
)
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import can_return_tuple, torch_compilable_check

from .configuration_sense import SenseConfig


AUDIO_TOKEN = "<|audio|>"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "sense_adapter.json"
LORA_TARGETS = r".*\.(q_proj|k_proj|v_proj)"  # matched within the language model only, never in Whisper
AUDIO_INPUTS = ("input_features", "input_features_mask", "pooled_features", "pooled_features_mask")


class SenseAdapter(nn.Module):
    """Pools encoder frames to audio tokens, normalises and projects them to the language model (paper: adapter)."""

    def __init__(self, config: SenseConfig):
        super().__init__()
        self.num_audio_tokens = config.num_audio_tokens
        self.trim = config.audio_tokens == "trim"
        self.norm = nn.LayerNorm(config.audio_config.d_model)
        self.linear = nn.Linear(config.audio_config.d_model, config.text_config.hidden_size)

    def pool(
        self, frames: torch.Tensor, frame_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """
        Adaptive average pooling over time, over the frames that hold speech where the config says "trim".

        Args:
            frames (`torch.Tensor` of shape `(batch, frames, d_model)`): encoder output.
            frame_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 where there is speech.

        Returns:
            pooled features `(batch, num_audio_tokens, d_model)` and the mask of valid tokens
            `(batch, num_audio_tokens)`.
        """
        if not self.trim or frame_mask is None:
            pooled = nn.functional.adaptive_avg_pool1d(frames.transpose(1, 2), self.num_audio_tokens).transpose(1, 2)
            return pooled, torch.ones(pooled.shape[:2], dtype=torch.bool, device=pooled.device)
        weights = frame_mask.to(frames.dtype).unsqueeze(1)  # B x 1 x F
        sums = nn.functional.adaptive_avg_pool1d(frames.transpose(1, 2) * weights, self.num_audio_tokens)
        share = nn.functional.adaptive_avg_pool1d(weights.float(), self.num_audio_tokens)  # of each window: speech
        pooled = sums / share.clamp(min=1e-6).to(sums.dtype)
        return pooled.transpose(1, 2), share.squeeze(1) > 0

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """`(..., d_model)` -> `(..., hidden_size)`, computed in the adapter's own dtype."""
        return self.linear(self.norm(pooled.to(self.linear.weight.dtype)))


@dataclass
class SenseModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` and `audio_hidden_states` `(audio tokens in the batch, hidden_size)`."""

    audio_hidden_states: torch.Tensor | None = None


class SensePreTrainedModel(PreTrainedModel):
    config: SenseConfig
    config_class = SenseConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # What is trained stays in fp32 beside a bf16 backbone: Adam's small steps vanish in bf16.
    _keep_in_fp32_modules_strict = ["multi_modal_projector", "lora_A", "lora_B"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As [`~PreTrainedModel.from_pretrained`]; the backbones come back frozen, as they were saved."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_backbones()
        return loaded

    def freeze_backbones(self):
        """Leaves the adapter and, where there is one, LoRA trainable; everything else frozen."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_trained(name))


class SenseModel(SensePreTrainedModel):
    """Whisper encoder, adapter and language model, without a language modelling head."""

    def __init__(self, config: SenseConfig):
        super().__init__(config)
        self.audio_tower = WhisperEncoder(config.audio_config)
        self.multi_modal_projector = SenseAdapter(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.lora is not None:
            inject_lora(self.language_model, config.lora)
        self.post_init()
        self.freeze_backbones()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True):
        super().train(mode)
        self.audio_tower.eval()  # frozen: no dropout or layer drop, the same features every epoch
        return self

    @torch.no_grad()
    def get_pooled_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """
        Encodes and pools: the only place where the encoder runs.

        Args:
            input_features (`torch.Tensor` of shape `(clips, mel_bins, 3000)`): log-mel, 10 ms a step.
            input_features_mask (`torch.Tensor` of shape `(clips, 3000)`, *optional*): 1 where there is speech.

        Returns:
            the adapter's input `(clips, num_audio_tokens, d_model)` and its mask `(clips, num_audio_tokens)`.
        """
        frames = self.audio_tower(input_features.to(self.audio_tower.conv1.weight.dtype)).last_hidden_state
        # The encoder's second convolution has stride 2: frame i starts at mel step 2 i.
        frame_mask = None if input_features_mask is None else input_features_mask[:, ::2]
        return self.multi_modal_projector.pool(frames, frame_mask)

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pooled_features: torch.Tensor | None = None,
        pooled_features_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Audio embeddings from mel features, or from `pooled_features` (then the encoder does not run).

        Returns:
            `last_hidden_state`: pooled features `(clips, num_audio_tokens, d_model)`; `pooler_output`: the
            projected embeddings of the valid tokens, clip after clip, `(audio tokens, hidden_size)`.
        """
        if pooled_features is None:
            pooled_features, pooled_features_mask = self.get_pooled_features(input_features, input_features_mask)
        if pooled_features_mask is None:
            valid = pooled_features.flatten(0, 1)
        else:
            valid = pooled_features[pooled_features_mask.bool()]
        return BaseModelOutputWithPooling(
            last_hidden_state=pooled_features, pooler_output=self.multi_modal_projector(valid)
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, audio_features: torch.Tensor
    ) -> torch.BoolTensor:
        """Mask `(batch, length, 1)` of the audio placeholders; raises where their number is not the features'."""
        if input_ids is None:
            audio_id = torch.tensor(self.config.audio_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(audio_id)).all(-1)
        else:
            mask = input_ids == self.config.audio_token_id
        torch_compilable_check(
            mask.sum() == audio_features.shape[0],
            lambda: (
                f"Audio features and audio tokens do not match, tokens: {int(mask.sum())}, "
                f"features: {audio_features.shape[0]}. Let SenseProcessor expand {AUDIO_TOKEN}."
            ),
        )
        return mask.unsqueeze(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pooled_features: torch.Tensor | None = None,
        pooled_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SenseModelOutputWithPast:
        """
        As a decoder-only model of transformers, with audio in place of the placeholders in `input_ids`.

        Args:
            input_features (`torch.Tensor` of shape `(clips, mel_bins, 3000)`, *optional*): log-mel, 10 ms a step.
            input_features_mask (`torch.Tensor` of shape `(clips, 3000)`, *optional*):
                1 where a mel step holds speech. With `audio_tokens="trim"` only these become audio tokens.
            pooled_features (`torch.Tensor` of shape `(clips, audio_tokens, d_model)`, *optional*):
                The adapter's input, as `get_pooled_features` gives it: the encoder is skipped.
            pooled_features_mask (`torch.Tensor` of shape `(clips, audio_tokens)`, *optional*):
                1 where `pooled_features` is valid.

        Raises:
            ValueError: the placeholders are not as many as the audio tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        audio_embeds = None
        if input_features is not None or pooled_features is not None:
            audio_embeds = self.get_audio_features(
                input_features, input_features_mask, pooled_features, pooled_features_mask, return_dict=True
            ).pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, audio_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(mask, audio_embeds)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return SenseModelOutputWithPast(**outputs, audio_hidden_states=audio_embeds)


class SenseForConditionalGeneration(SensePreTrainedModel, GenerationMixin):
    """SENSE with a language modelling head: hears speech, answers in text."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: SenseConfig):
        super().__init__(config)
        self.model = SenseModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self.freeze_backbones()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_audio_features(self, *args, **kwargs):
        return self.model.get_audio_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pooled_features: torch.Tensor | None = None,
        pooled_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        As [`SenseModel.forward`], with logits and, given `labels`, the loss.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): -100 where nothing is to be learnt.
            logits_to_keep (`int` or `torch.Tensor`, *optional*): the last so many positions; 0 for all.
            skip_logits (`bool`, *optional*):
                With `labels`, compute logits where a label stands only, and return none. Defaults to True in training.
        """
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            pooled_features=pooled_features,
            pooled_features_mask=pooled_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **{k: v for k, v in kwargs.items() if k != "num_items_in_batch"},
        )
        hidden_states = outputs.last_hidden_state
        skip_logits = labels is not None and (self.training if skip_logits is None else skip_logits)
        loss = logits = None
        if not skip_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
        if labels is not None:
            loss = self._label_loss(hidden_states, labels, kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _label_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """Next-token cross-entropy; logits only where a label stands: 250 audio positions have none."""
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].to(hidden_states.device)
        keep = shifted != -100
        return self.loss_function(
            logits=self.lm_head(hidden_states[keep]),
            labels=None,
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            shift_labels=shifted[keep],
        )

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, inputs=None, generation_config: GenerationConfig | None = None, **kwargs):
        """
        As [`~GenerationMixin.generate`], but each clip is encoded once, and its prompt prefilled once, whatever
        `num_beams` and `num_return_sequences` are. Returns prompt and answer, as text models do.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        kwargs["input_ids"] = input_ids
        if kwargs.get("input_features") is not None:
            kwargs["pooled_features"], kwargs["pooled_features_mask"] = self.model.get_pooled_features(
                kwargs.pop("input_features"), kwargs.pop("input_features_mask", None)
            )
        if kwargs.get("pooled_features") is not None:
            resolved, _ = self._prepare_generation_config(generation_config, **kwargs)
            if self._can_prefill_once(resolved, kwargs):
                self._prefill_once(max(resolved.num_beams, resolved.num_return_sequences), kwargs)
            elif len(kwargs["pooled_features"]) != len(input_ids):
                raise ValueError(
                    f"{len(kwargs['pooled_features'])} clips for {len(input_ids)} prompts: this way of generating "
                    "takes one clip a prompt; use the default cache."
                )
        return super().generate(generation_config=generation_config, **kwargs)

    @staticmethod
    def _can_prefill_once(resolved: GenerationConfig, kwargs: dict) -> bool:
        mode = resolved.get_generation_mode(kwargs.get("assistant_model"))
        return (
            resolved.use_cache
            and resolved.cache_implementation is None
            and resolved.prefill_chunk_size is None
            and mode != GenerationMode.ASSISTED_GENERATION
            and kwargs.get("past_key_values") is None
            and kwargs.get("inputs_embeds") is None
        )

    def _prefill_once(self, copies: int, kwargs: dict):
        """Puts all of the prompt but its last token into a cache, then copies the cache for the beams."""
        input_ids = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = kwargs["attention_mask"] = torch.ones_like(input_ids)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        self.model(
            input_ids=input_ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
            **{name: kwargs.pop(name, None) for name in AUDIO_INPUTS},
        )
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        kwargs["past_key_values"] = cache

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration: bool = False, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):  # the audio is in the cache by now
            for name in AUDIO_INPUTS:
                model_inputs.pop(name, None)
        return model_inputs

    # ---------------------------------------------------------------- composing, LoRA, adapter files

    @classmethod
    def from_backbones(
        cls,
        audio: str | os.PathLike,
        text: str | os.PathLike,
        *,
        revisions: dict[str, str] | None = None,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str | None = None,
        **config_kwargs,
    ) -> "SenseForConditionalGeneration":
        """
        Composes a model of a Whisper checkpoint's encoder and a decoder-only language model; the adapter is new.

        Args:
            audio: Hub id or folder of a Whisper model (whole, or its encoder alone).
            text: Hub id or folder of a causal language model with its tokenizer.
            revisions: Hub revisions, `{"audio": ..., "text": ...}`.
            dtype: of the frozen backbones. What is trained stays in fp32.
            config_kwargs: further fields of [`SenseConfig`], such as `num_audio_tokens` and `audio_tokens`.

        Raises:
            ValueError: `audio` is not a Whisper model, or `text` not a decoder-only language model.
        """
        revisions = revisions or {}
        shared = {"dtype": dtype or torch.float32}
        encoder = _load_encoder(audio, revisions.get("audio", "main"), shared)
        lm, audio_token_id = _load_language_model(text, revisions.get("text", "main"), shared)
        sources = {"audio": audio, "text": text}
        config = SenseConfig(
            audio_config=encoder.config,
            text_config=lm.config,
            audio_token_id=audio_token_id,
            backbones={k: {"id": str(v), "revision": revisions.get(k)} for k, v in sources.items()},
            **config_kwargs,
        )
        # Built on the meta device, then given the real parts: no second copy of the weights is ever made.
        with torch.device("meta"):
            model = cls(config)
        model.model.audio_tower = encoder
        model.model.multi_modal_projector = SenseAdapter(config)
        model.model.language_model = getattr(lm, lm.base_model_prefix)
        model.lm_head = lm.get_output_embeddings()
        model.generation_config = _generation_config(lm, audio_token_id)
        model.freeze_backbones()
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model.eval()

    def add_lora(
        self, r: int = 32, lora_alpha: int = 32, lora_dropout: float = 0.0, target_modules: str = LORA_TARGETS
    ):
        """
        Adds LoRA to the language model through peft; trainable from now on, beside the adapter.

        Args:
            r, lora_alpha, lora_dropout: as in `peft.LoraConfig`. The paper's r and alpha are 32.
            target_modules: regular expression on module names within the language model.

        Raises:
            ValueError: the model has LoRA already, or the expression matches nothing.
        """
        if self.config.lora is not None:
            raise ValueError(f"this model has LoRA already: {self.config.lora}")
        lora = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "target_modules": target_modules}
        inject_lora(self.model.language_model, lora)
        self.config.lora = lora
        self.freeze_backbones()

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights that training changes: adapter and LoRA, by name."""
        return {k: v.detach().cpu().contiguous() for k, v in self.named_parameters() if is_trained(k)}

    def backbone_fingerprint(self) -> str:
        """SHA-256 over the frozen weights rounded to bf16, so that the dtype they are held in does not matter."""
        if not hasattr(self, "_fingerprint"):
            digest = hashlib.sha256()
            for name, tensor in sorted(self.named_parameters()):
                if not is_trained(name):
                    digest.update(f"{name.replace('.base_layer', '')}{tuple(tensor.shape)}".encode())
                    raw = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
                    digest.update(memoryview(raw.numpy()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def save_adapter(self, folder: str | os.PathLike):
        """Writes what was trained only (adapter, LoRA), with the backbones' ids, revisions and fingerprint."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "backbones": self.config.backbones,
            "fingerprint": self.backbone_fingerprint(),
            "lora": self.config.lora,
            "num_audio_tokens": self.config.num_audio_tokens,
            "audio_tokens": self.config.audio_tokens,
        }
        weights, settings = folder / f".{ADAPTER_WEIGHTS}.tmp", folder / f".{ADAPTER_CONFIG}.tmp"
        save_file(self.trained_state_dict(), weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(about, indent=2) + "\n")
        os.replace(weights, folder / ADAPTER_WEIGHTS)
        os.replace(settings, folder / ADAPTER_CONFIG)

    def load_adapter(self, folder: str | os.PathLike):
        """
        Reads what `save_adapter` wrote into this model, strictly.

        Raises:
            ValueError: other backbones or settings, or a tensor that is missing, unexpected or of another shape.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is no adapter folder: it has no {name}")
        about = json.loads((folder / ADAPTER_CONFIG).read_text())
        if about["lora"] is not None and self.config.lora is None:
            self.add_lora(**about["lora"])
        for field in ("lora", "num_audio_tokens", "audio_tokens"):
            if about[field] != getattr(self.config, field):
                raise ValueError(
                    f"{folder}: {field} is {about[field]!r} there, {getattr(self.config, field)!r} in this model"
                )
        if about["fingerprint"] != self.backbone_fingerprint():
            raise ValueError(f"{folder} was trained on other backbone weights: {about['backbones']}")
        state, mine = load_file(folder / ADAPTER_WEIGHTS), self.trained_state_dict()
        missing, unexpected = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        shapes = [k for k in state.keys() & mine.keys() if state[k].shape != mine[k].shape]
        if missing or unexpected or shapes:
            raise ValueError(f"{folder}: missing {missing}, unexpected {unexpected}, of another shape {shapes}")
        self.load_state_dict(state, strict=False)


def is_trained(name: str) -> bool:
    """Whether training changes the parameter of this name (adapter, LoRA); all others are backbone."""
    return "multi_modal_projector." in name or ".lora_" in name


def inject_lora(language_model: nn.Module, lora: dict):
    """Puts LoRA layers into the language model, in place; they stay in fp32 beside a bf16 base."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("this model has LoRA weights: pip install peft") from error

    inject_adapter_in_model(LoraConfig(**lora), language_model)
    for name, parameter in language_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _load_encoder(audio: str | os.PathLike, revision: str, kwargs: dict) -> WhisperEncoder:
    """The encoder of a whole Whisper checkpoint, or of an encoder-only one; no weight may be missing."""
    config = AutoConfig.from_pretrained(audio, revision=revision)
    if config.model_type != "whisper":
        raise ValueError(f"the audio encoder must be a Whisper model, found {config.model_type!r} in {str(audio)!r}")
    encoder_only = config.architectures == ["WhisperEncoder"]
    loader = WhisperEncoder if encoder_only else WhisperModel
    model, info = loader.from_pretrained(audio, revision=revision, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(f"{audio} lacks weights of the audio encoder: {sorted(info['missing_keys'])[:5]} ...")
    return model if encoder_only else model.encoder


def _load_language_model(text: str | os.PathLike, revision: str, kwargs: dict):
    """The causal language model with a row for the audio placeholder, and the placeholder's id."""
    config = AutoConfig.from_pretrained(text, revision=revision)
    if config.is_encoder_decoder or config.model_type == "whisper":
        raise ValueError(
            f"the language model must be a decoder-only text model, found {config.model_type!r} in {str(text)!r}"
        )
    lm = AutoModelForCausalLM.from_pretrained(text, revision=revision, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(text, revision=revision)
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        # A multiple of 8 keeps the GPU's matrix kernels fast. The new rows are the mean of the others rounded to
        # bf16: the same value whatever dtype the backbone is held in, as the fingerprint wants it.
        lm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
        for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            weight = layer.weight.data
            weight[rows:] = weight[:rows].bfloat16().double().mean(0).bfloat16().to(weight.dtype)
    return lm, tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)


def _generation_config(lm: PreTrainedModel, audio_token_id: int) -> GenerationConfig:
    """Greedy by default, whatever the chat model's own sampling settings are; never answers with a placeholder."""
    ours = GenerationConfig.from_model_config(lm.config)
    theirs = lm.generation_config
    ours.bos_token_id, ours.eos_token_id = theirs.bos_token_id, theirs.eos_token_id
    ours.pad_token_id = theirs.pad_token_id
    ours.suppress_tokens = [audio_token_id]
    return ours


__all__ = ["SenseAdapter", "SenseForConditionalGeneration", "SenseModel", "SensePreTrainedModel"]
