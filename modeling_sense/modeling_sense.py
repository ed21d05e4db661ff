"""SENSE: a frozen Whisper encoder, a pooling adapter and a Llama-like language model (arXiv 2509.04473)."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    WhisperModel,
)
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import (
    TRANSFORMERS_DYNAMIC_MODULE_NAME,
    can_return_tuple,
    resolve_revision,
    torch_compilable_check,
)
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.quantization_config import GgufConfig

from .configuration_sense import SenseConfig, check_classifier, check_lora
from .quantization_sense import (
    keep_unpacked,
    name_of,
    of_language_model,
    quantization_config,
    quantize_in_place,
    settle,
)


AUDIO_TOKEN = "<|audio|>"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "sense_adapter.json"
ADAPTER_FIELDS = ("lora", "classifier", "num_audio_tokens", "audio_tokens")  # of SenseConfig, kept with an adapter
DTYPES = ("float32", "bfloat16", "float16", "float64")
LORA_TARGETS = r".*\.(q_proj|k_proj|v_proj)"  # matched within the language model only, never in Whisper
AUDIO_INPUTS = ("input_features", "input_features_mask", "pooled_features", "pooled_features_mask")
WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only")  # arguments of from_pretrained


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


class SenseClassifier(nn.Module):
    """
    Regularises the adapter in training (paper: classifier, a 3-layer 2D CNN on the adapter's output): says which
    entity tags occur in a clip, or which class it has. Kernels, strides and pooling are our choice. It is no part of
    inference.
    """

    KERNEL, STRIDE, PADDING = 5, (2, 4), 2  # over (time, hidden size)

    def __init__(self, config: SenseConfig):
        super().__init__()
        settings = config.classifier
        self.multi_label = settings["multi_label"]
        self.norm = nn.LayerNorm(config.text_config.hidden_size)
        self.convolutions = nn.ModuleList()
        channels, width = 1, config.text_config.hidden_size
        for wider in settings["channels"]:
            self.convolutions.append(nn.Conv2d(channels, wider, self.KERNEL, self.STRIDE, self.PADDING))
            channels, width = wider, -(-width // self.STRIDE[1])
        self.head = nn.Linear(channels * width, len(settings["labels"]))

    def forward(self, audio_embeds: torch.Tensor, lengths: torch.LongTensor) -> torch.Tensor:
        """
        Args:
            audio_embeds (`torch.Tensor` of shape `(clips, audio_tokens, hidden_size)`): the adapter's output, padded.
            lengths (`torch.LongTensor` of shape `(clips,)`): each clip's audio tokens, one at least.

        Returns:
            logits `(clips, labels)`; how far a clip is padded does not change them.
        """
        hidden = self.norm(audio_embeds.to(self.head.weight.dtype)).unsqueeze(1)  # B x 1 x T x H
        hidden = hidden * self._mask(hidden, lengths)
        for convolution in self.convolutions:
            lengths = -(-lengths // self.STRIDE[0])
            hidden = nn.functional.gelu(convolution(hidden))
            hidden = hidden * self._mask(hidden, lengths)  # else the bias would leak in from the padding
        pooled = hidden.sum(2) / lengths.view(-1, 1, 1)  # mean over the clip's own time: B x C x W
        return self.head(pooled.flatten(1))

    @staticmethod
    def _mask(hidden: torch.Tensor, lengths: torch.LongTensor) -> torch.Tensor:
        valid = torch.arange(hidden.shape[2], device=hidden.device) < lengths[:, None]
        return valid[:, None, :, None].to(hidden.dtype)

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None = None,
        num_clips: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """
        Binary cross-entropy of each tag (present or not), or cross-entropy of the class; mean over the clips.

        Args:
            logits (`torch.Tensor` of shape `(clips, labels)`): as `forward` gives them.
            labels (`torch.Tensor`): 0 or 1 of shape `(clips, labels)`, or the class of shape `(clips,)`;
                -100 for a clip without a label, which does not count.
            weights (`torch.Tensor` of shape `(labels,)`, *optional*): of the tags where they are present, or of the
                classes.
            num_clips (*optional*): labelled clips in all parts of an accumulated batch, on all processes; those of
                this batch by default.
        """
        known = (labels[:, 0] if self.multi_label else labels) != -100
        logits, labels = logits[known], labels[known]
        if self.multi_label:
            # `weights` is on the present tags alone: weighing their absence too would teach "absent" all the more.
            losses = nn.functional.binary_cross_entropy_with_logits(
                logits, labels.to(logits.dtype), pos_weight=weights, reduction="none"
            ).mean(1)
        else:
            losses = nn.functional.cross_entropy(logits, labels.long(), weight=weights, reduction="none")
        return losses.sum() / (known.sum().clamp(min=1) if num_clips is None else num_clips)


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
    _skip_keys_device_placement = ["cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # What is trained stays in fp32 beside a bf16 backbone: Adam's small steps vanish in bf16.
    _keep_in_fp32_modules_strict = ["multi_modal_projector", "lora_A", "lora_B", "classifier"]
    loaded_how: dict = {}  # of what `from_pretrained` was told, what finds the processor, which lies there too

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As [`~PreTrainedModel.from_pretrained`]; the backbones come back frozen, as they were saved. A
        `quantization_config` holds for the linear layers of the language model, and for nothing else.

        Raises:
            ValueError: the checkpoint is quantised already, in another way, or has no weights in safetensors.
        """
        asked = kwargs.get("quantization_config")
        if asked is not None:
            asked = kwargs["quantization_config"] = of_language_model(asked)
        loaded = load_safely(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.loaded_how = {name: kwargs[name] for name in WHERE if name in kwargs}
        if asked is not None and model.quantization != name_of(asked):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds {model.quantization} weights: it can't be loaded as "
                f"{name_of(asked)}"
            )
        if model.quantization is not None:
            settle(model)
        model.freeze_backbones()
        return loaded

    @property
    def quantization(self) -> str | None:
        """What the language model's linear layers are held in: `"int8"`, `"int4"`; None where they are floats."""
        quantizer = getattr(self, "hf_quantizer", None)
        return None if quantizer is None else name_of(quantizer.quantization_config)

    @torch.no_grad()
    def initialize_weights(self):
        super().initialize_weights()
        # The language model's rule for linear layers makes noise of new LoRA, which must change nothing.
        for name, parameter in self.named_parameters():
            if ".lora_B." in name:
                init.zeros_(parameter)  # unless it was loaded

    def freeze_backbones(self):
        """Leaves the adapter and, where there are, LoRA and classifier trainable; everything else frozen."""
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
        if mode:
            keep_unpacked(self.language_model)
        if self.audio_tower is not None:
            self.audio_tower.eval()  # frozen: no dropout or layer drop, the same features every epoch
        return self

    @torch.no_grad()
    def encode(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[BaseModelOutput, torch.Tensor | None]:
        """
        The only place where the encoder runs.

        Args:
            input_features (`torch.Tensor` of shape `(clips, mel_bins, 3000)`): log-mel, 10 ms a step.
            input_features_mask (`torch.Tensor` of shape `(clips, 3000)`, *optional*): 1 where there is speech.
            kwargs: for the encoder, such as `output_hidden_states`.

        Returns:
            the encoder's output, whose `last_hidden_state` `(clips, 1500, d_model)` holds frames of 20 ms, and their
            mask `(clips, 1500)` or None.

        Raises:
            ValueError: the encoder was taken away.
        """
        if self.audio_tower is None:
            raise ValueError("this model's encoder was detached: give pooled_features, or attach_encoder() first")
        features = input_features.to(self.audio_tower.conv1.weight.dtype)
        encoded = self.audio_tower(features, return_dict=True, **kwargs)
        if input_features_mask is None:
            return encoded, None
        # The encoder's second convolution has stride 2: frame i starts at mel step 2 i.
        return encoded, input_features_mask[:, ::2].to(encoded.last_hidden_state.device)

    def get_pooled_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """
        Encodes and pools; arguments and errors as of `encode`.

        Returns:
            the adapter's input `(clips, num_audio_tokens, d_model)` and its mask `(clips, num_audio_tokens)`.
        """
        encoded, frame_mask = self.encode(input_features, input_features_mask)
        return self.multi_modal_projector.pool(encoded.last_hidden_state, frame_mask)

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
            projected embeddings of the valid tokens, clip after clip, `(audio tokens, hidden_size)`; the encoder's
            `hidden_states` and `attentions` if asked for.
        """
        encoded = BaseModelOutput()
        if pooled_features is None:
            encoded, frame_mask = self.encode(input_features, input_features_mask, **kwargs)
            pooled_features, pooled_features_mask = self.multi_modal_projector.pool(
                encoded.last_hidden_state, frame_mask
            )
        if pooled_features_mask is None:
            valid = pooled_features.flatten(0, 1)
        else:
            valid = pooled_features[pooled_features_mask.bool()]
        return BaseModelOutputWithPooling(
            last_hidden_state=pooled_features,
            pooler_output=self.multi_modal_projector(valid),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
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
        return mask.unsqueeze(-1).to(inputs_embeds.device)  # of a model over several devices

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
        cache=None,
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
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return SenseModelOutputWithPast(**outputs, audio_hidden_states=audio_embeds)


class SenseForConditionalGeneration(SensePreTrainedModel, GenerationMixin):
    """SENSE with a language modelling head: hears speech, answers in text."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _dtype_of_fingerprint: str | None = None  # where the frozen weights were cast since

    def __init__(self, config: SenseConfig):
        super().__init__(config)
        self.model = SenseModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.classifier = None if config.classifier is None else SenseClassifier(config)
        self.generation_config.suppress_tokens = [config.audio_token_id]  # no answer holds a placeholder
        # Language models do not agree on the table's name.
        table = next(name for name, part in self.named_modules() if part is self.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"{table}.weight"}
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
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        classifier_labels: torch.Tensor | None = None,
        num_clips_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        As [`SenseModel.forward`], with logits and, given `labels`, the loss.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): -100 where nothing is to be learnt.
            classifier_labels (`torch.Tensor`, *optional*):
                See [`SenseClassifier.loss`]. Used in training alone, by a model that has a classifier, with one clip
                a prompt: the loss is then `(1 - alpha) * LLM + alpha * classifier` (paper: L).
            num_clips_in_batch (*optional*):
                Clips with such a label in the whole accumulated batch; `num_items_in_batch` is the same of tokens.
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
            cache=cache,
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
            if self.training and self.classifier is not None and classifier_labels is not None:
                counts = (input_ids == self.config.audio_token_id).sum(1)
                extra = self._classifier_loss(
                    outputs.audio_hidden_states, counts, classifier_labels, num_clips_in_batch
                )
                alpha = self.config.classifier["alpha"]
                loss = (1 - alpha) * loss + alpha * extra.to(loss.device)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
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

    def _classifier_loss(self, audio_embeds, counts, labels, num_clips) -> torch.Tensor:
        """`audio_embeds` are the clips' embeddings one below the other, `counts` of them each."""
        assert self.classifier is not None
        clips = nn.utils.rnn.pad_sequence(audio_embeds.split(counts.tolist()), batch_first=True)
        weights = self.config.classifier["weights"]
        if weights is not None:
            weights = torch.tensor(weights, device=clips.device, dtype=self.classifier.head.weight.dtype)
        return self.classifier.loss(self.classifier(clips, counts), labels, weights, num_clips)

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def generate(self, inputs=None, generation_config: GenerationConfig | None = None, **kwargs):
        """
        As [`~GenerationMixin.generate`], but each clip is encoded once, and its prompt prefilled once, whatever
        `num_beams` and `num_return_sequences` are. Returns prompt and answer, as text models do.

        Given a `cache` that has read the clips, it goes on from there.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is not None and input_ids.is_floating_point():
            raise ValueError(
                "generate() got audio features and no prompt; make inputs with SenseProcessor.apply_request(), or use "
                'pipeline("spoken-language-understanding", model=...) in place of "automatic-speech-recognition"'
            )
        kwargs = self._at_home(kwargs | {"input_ids": input_ids})
        input_ids = kwargs["input_ids"]
        if self._has_read_audio(kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in AUDIO_INPUTS}
        if kwargs.get("input_features") is not None:
            kwargs["pooled_features"], kwargs["pooled_features_mask"] = self.model.get_pooled_features(
                kwargs.pop("input_features"), kwargs.pop("input_features_mask", None)
            )
        if kwargs.get("pooled_features") is not None:
            resolved, _ = self._prepare_generation_config(generation_config, **kwargs)
            copies = max(resolved.num_beams, resolved.num_return_sequences)
            prompts = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else input_ids
            if self._can_prefill_once(resolved, kwargs):
                if kwargs.get("attention_mask") is None:  # as transformers infers it
                    self._prepare_special_tokens(resolved, False, input_ids.device, len(input_ids))
                    kwargs["attention_mask"] = self._prepare_attention_mask_for_generation(input_ids, resolved, {})
                self._prefill_once(copies, kwargs)
            elif copies > 1 and prompts is not None and len(kwargs["pooled_features"]) != len(prompts):
                raise ValueError(
                    f"{len(kwargs['pooled_features'])} clips for {len(prompts)} prompts: this way of generating "
                    f"{copies} sequences takes one clip a prompt; use the default cache."
                )
        return super().generate(generation_config=generation_config, **kwargs)

    def _at_home(self, inputs: dict) -> dict:
        """
        Inputs where the model is: `generate` of transformers takes them from the CPU. Of a model on the disk the parts
        fetch them.
        """
        if self.device.type == "meta":
            return inputs
        return {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in inputs.items()}

    def _has_read_audio(self, kwargs: dict) -> bool:
        """Whether all placeholders of the prompts stand in the part that a given cache holds."""
        cache, input_ids, mask = kwargs.get("cache"), kwargs["input_ids"], kwargs.get("attention_mask")
        if cache is None or input_ids is None or not (read := cache.get_seq_length()):
            return False
        # As in transformers, the ids may also be the new ones alone, with a mask of all.
        whole = mask is None or mask.shape[1] == input_ids.shape[1]
        return not (input_ids[:, read:] if whole else input_ids).eq(self.config.audio_token_id).any()

    def _can_prefill_once(self, resolved: GenerationConfig, kwargs: dict) -> bool:
        mode = resolved.get_generation_mode(kwargs.get("assistant_model"))
        input_ids = kwargs["input_ids"]
        states = resolved.output_hidden_states or resolved.output_attentions  # the prompt's are part of the first step
        return (
            resolved.use_cache
            and resolved.cache_implementation is None
            and mode != GenerationMode.ASSISTED_GENERATION
            and kwargs.get("custom_generate") is None
            and kwargs.get("cache") is None
            and kwargs.get("inputs_embeds") is None
            and not (resolved.return_dict_in_generate and states)
            and input_ids is not None
            and not input_ids[:, -1].eq(self.config.audio_token_id).any()  # the last token is not prefilled
        )

    def _prefill_once(self, copies: int, kwargs: dict):
        """Puts all of the prompt but its last token into a cache, then copies the cache for the beams."""
        audio = {name: kwargs.pop(name, None) for name in AUDIO_INPUTS}
        cache = self._read_into_cache(kwargs["input_ids"][:, :-1], kwargs["attention_mask"][:, :-1], **audio)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        kwargs["cache"] = cache

    def _read_into_cache(self, input_ids, attention_mask, cache: DynamicCache | None = None, **audio) -> DynamicCache:
        """The cache, a new one by default, with these tokens behind those in it; the mask is of all of them."""
        if cache is None:
            cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[
            :, attention_mask.shape[1] - input_ids.shape[1] :
        ]
        self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            cache=cache,
            use_cache=True,
            **audio,
        )
        return cache

    @torch.no_grad()
    def generate_branches(
        self,
        prompts: list[list[list[int]]],
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        pooled_features: torch.Tensor | None = None,
        pooled_features_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> list[list[torch.LongTensor]]:
        """
        Answers several prompts about each clip from one listen: each clip is encoded once, what its prompts have in
        common at their beginning (the audio stands there) is prefilled once, and all go on from there as one batch.
        The answers are those of a `generate` for each.

        Args:
            prompts: by clip, by prompt the token ids, placeholders expanded; as many prompts for each clip.
            input_features, input_features_mask, pooled_features, pooled_features_mask: as in `forward`, one clip each.
            kwargs: as for `generate`, but one sequence a prompt. Its batch is clip after clip, in each prompt after
                prompt: stopping criteria see that order, and all beams of a row side by side.

        Returns:
            by clip, by prompt the new tokens, padded to the same length.

        Raises:
            ValueError: clips with different numbers of prompts, prompts without a common beginning, or a way of
                generating that takes another cache (drafts, `cache_implementation`, `custom_generate`).
        """
        branches = len(prompts[0])
        if not branches or any(len(of_clip) != branches for of_clip in prompts):
            raise ValueError(f"give as many prompts for each clip, found {[len(of_clip) for of_clip in prompts]}")
        config, _ = self._prepare_generation_config(generation_config, **kwargs)
        if config.num_return_sequences != 1:
            raise ValueError(f"num_return_sequences is {config.num_return_sequences}; branches take 1")
        assisted = config.get_generation_mode(kwargs.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION
        if assisted or config.cache_implementation is not None or kwargs.get("custom_generate") is not None:
            raise ValueError(
                "branches go on from a cache of their own: leave drafts, cache_implementation and custom_generate "
                "out, or call generate() for each task"
            )
        if not config.use_cache:
            kwargs["use_cache"] = True
        given = (input_features, input_features_mask, pooled_features, pooled_features_mask)
        audio = self._at_home(dict(zip(AUDIO_INPUTS, given)))
        if input_features is not None:
            audio["pooled_features"], audio["pooled_features_mask"] = self.model.get_pooled_features(
                audio.pop("input_features"), audio.pop("input_features_mask")
            )
        shared = [_common_beginning(of_clip) for of_clip in prompts]
        if not all(shared):
            raise ValueError("the prompts of a clip begin with different tokens: put the audio first")
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        pooled = audio["pooled_features"]
        device = self.device if pooled is None else pooled.device  # placed models' own is none
        ids, mask = _pad_left([of_clip[0][:n] for of_clip, n in zip(prompts, shared)], pad, device)
        cache = self._read_into_cache(ids, mask, **audio)
        rest = [prompt[n:] for of_clip, n in zip(prompts, shared) for prompt in of_clip]
        rest_ids, rest_mask = _pad_left(rest, pad, device)
        # Padding between beginning and rest: masked, and not counted in the positions.
        ids = torch.cat([ids.repeat_interleave(branches, 0), rest_ids], 1)
        mask = torch.cat([mask.repeat_interleave(branches, 0), rest_mask], 1)
        cache.batch_repeat_interleave(branches)
        if rest_ids.shape[1] > 1:
            self._read_into_cache(rest_ids[:, :-1], mask[:, :-1], cache)
        cache.batch_repeat_interleave(config.num_beams)
        output = super().generate(
            input_ids=ids, attention_mask=mask, cache=cache, generation_config=generation_config, **kwargs
        )
        answers = list(getattr(output, "sequences", output)[:, ids.shape[1] :])  # return_dict_in_generate
        return [answers[i : i + branches] for i in range(0, len(answers), branches)]

    @torch.no_grad()
    def score_choices(
        self, prompts: list[list[int]], choices: list[list[int]], pooled_features=None, pooled_features_mask=None
    ) -> torch.Tensor:
        """
        How likely each of a few answers is, where only these can be right.

        Args:
            prompts: one a clip, its token ids with the placeholders expanded.
            choices: token ids of the answers, their end included.
            pooled_features, pooled_features_mask: as in `forward`, one clip a prompt.

        Returns:
            the log-probability of each choice, `(clips, choices)`.
        """
        audio = self._at_home({"pooled_features": pooled_features, "pooled_features_mask": pooled_features_mask})
        device = self.device if pooled_features is None else audio["pooled_features"].device
        ids, mask = _pad_left(prompts, 0, device)
        cache = self._read_into_cache(ids[:, :-1], mask[:, :-1], **audio)
        cache.batch_repeat_interleave(len(choices))
        length = max(map(len, choices))
        answers = torch.tensor([choice + [0] * (length - len(choice)) for choice in choices], device=device)
        answers = answers.repeat(len(prompts), 1)
        rows = torch.cat([ids[:, -1:].repeat_interleave(len(choices), 0), answers[:, :-1]], 1)
        seen = torch.cat([mask.repeat_interleave(len(choices), 0), torch.ones_like(answers[:, :-1])], 1)
        positions = (seen.cumsum(-1) - 1)[:, -rows.shape[1] :]
        hidden = self.model(
            input_ids=rows, attention_mask=seen, position_ids=positions, cache=cache, use_cache=True
        ).last_hidden_state
        scores = self.lm_head(hidden).float().log_softmax(-1).to(device)
        found = scores.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
        real = torch.tensor([[i < len(choice) for i in range(length)] for choice in choices], device=device)
        return (found * real.repeat(len(prompts), 1)).sum(-1).view(len(prompts), len(choices))

    def understand(
        self, audio, tasks=("asr", "ner", "sa"), *, processor=None, sampling_rate: int | None = None, **kwargs
    ) -> dict[str, list[str]]:
        """
        What the model makes of clips: its answers to several tasks, from one listen (see `generate_branches`).

        Args:
            audio: one clip or a list of them, as the processor takes them: paths, arrays, bytes.
            tasks: names of the processor's prompts.
            processor: the model's `SenseProcessor`; by default the one that was saved beside the model.
            sampling_rate: of clips that are arrays, in Hz; 16000 if not given.
            kwargs: as for `generate`; `max_new_tokens` is the processor's `longest_answer` by default.

        Returns:
            by task, an answer for each clip.

        Raises:
            ValueError: a task that the model has no prompt for.
        """
        if processor is None:
            # Code that came with the model is trusted already.
            from_hub = type(self).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)
            processor = AutoProcessor.from_pretrained(self.name_or_path, **self.loaded_how, trust_remote_code=from_hub)
        inputs = processor.apply_requests(audio, tasks, sampling_rate)
        answers = self.generate_branches(**inputs, **{"max_new_tokens": processor.longest_answer, **kwargs})
        texts = [processor.batch_decode(of_clip, skip_special_tokens=True) for of_clip in answers]
        return {task: [of_clip[t].strip() for of_clip in texts] for t, task in enumerate(tasks)}

    def prepare_inputs_for_generation(
        self, input_ids, is_first_iteration: bool = False, inputs_embeds: torch.Tensor | None = None, **kwargs
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
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
        gguf_file: str | None = None,
        quantize: str | None = None,
        **config_kwargs,
    ) -> "SenseForConditionalGeneration":
        """
        Composes a model of a Whisper checkpoint's encoder and a decoder-only language model; the adapter is new.

        Args:
            audio: Hub id or folder of a Whisper model (whole, or its encoder alone).
            text: Hub id or folder of a causal language model with its tokenizer.
            revisions: Hub revisions, `{"audio": ..., "text": ...}`.
            dtype: of the frozen backbones. What is trained stays in fp32.
            gguf_file: a GGUF file in `text`, with the language model and its tokenizer; it is unpacked to `dtype`.
            quantize: `"int8"` or `"int4"`, see [`~SenseForConditionalGeneration.quantize`].
            config_kwargs: `num_audio_tokens` and `audio_tokens` of [`SenseConfig`]; LoRA and a classifier come by
                `add_lora` and `add_classifier`.

        Raises:
            ValueError: `audio` is not a Whisper model, `text` not a decoder-only language model, one of them has no
                weights in safetensors or wants its own code to run, `quantize` is neither of the two, or LoRA or a
                classifier is among `config_kwargs`.
            TypeError: an argument that is none of these.
            OSError: there is no `gguf_file` in `text`.
            ImportError: the library that `quantize` takes is not installed.
        """
        for name in ("lora", "classifier"):
            if config_kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} is no field of new backbones: compose the model, then call add_{name}")
        # A configuration takes, and saves, whatever it is given: a token, too.
        if foreign := sorted(config_kwargs.keys() - {"num_audio_tokens", "audio_tokens"}):
            raise TypeError(f"from_backbones() has no argument {', '.join(foreign)}")
        if quantize is not None:
            quantization_config(quantize)  # a wrong name or a missing library should not wait for the weights
        sources, revisions = {"audio": audio, "text": text}, revisions or {}
        commits = {name: _commit_of(source, revisions.get(name)) for name, source in sources.items()}
        shared = {"dtype": dtype or torch.float32}
        encoder = _load_encoder(audio, commits["audio"], shared)
        lm, audio_token_id = _load_language_model(text, commits["text"], shared, gguf_file)
        config = SenseConfig(
            audio_config=encoder.config,
            text_config=lm.config,
            audio_token_id=audio_token_id,
            backbones={name: {"id": str(source), "revision": commits[name]} for name, source in sources.items()},
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
        if gguf_file is not None:
            config.backbones["text"]["gguf_file"] = gguf_file
        if quantize is not None:
            model.quantize(quantize)
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
        self.model.language_model.train(self.training)  # new dropout is in training
        self.config.lora = lora
        self.freeze_backbones()

    def quantize(self, how: str):
        """
        Holds the linear layers of the language model in 8 or 4 bits from now on; all else stays as it is, and
        adapter and LoRA can be trained. The fingerprint of the backbones stays that of the weights before.

        Args:
            how: `"int8"` (torchao's weights in 8 bits, a scale a row) or `"int4"` (bitsandbytes' NF4).

        Raises:
            ValueError: another name, or the model is quantised already.
            ImportError: the library that it takes is not installed.
        """
        if self.quantization is not None:
            raise ValueError(f"this model is {self.quantization} already: it can't be made {how}")
        config = quantization_config(how)
        self.config.backbones = {**(self.config.backbones or {}), "fingerprint": self.backbone_fingerprint()}
        quantize_in_place(self, config)
        settle(self)

    def merge_adapter(self):
        """
        Adds LoRA's product to the language model's weights and drops its layers: one matrix less to multiply by. From
        now on the language model is another one than the backbone, so that only `save_pretrained` can keep it.

        Raises:
            ValueError: there is no LoRA to merge, or the language model is quantised: rounding would eat it.
        """
        if self.config.lora is None:
            raise ValueError("this model has no LoRA to merge")
        if self.quantization is not None:
            raise ValueError(f"LoRA can't be merged into {self.quantization} weights: merge it, then quantize()")
        try:
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise ImportError("this model has LoRA weights: pip install peft") from error

        for name, module in list(self.model.language_model.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge(safe_merge=True)
                self.model.language_model.set_submodule(name, module.get_base_layer())
        self.config.backbones = {**(self.config.backbones or {}), "merged_lora": self.config.lora}
        self.config.lora = None
        self._fingerprint = None

    def add_classifier(
        self,
        labels: list[str],
        multi_label: bool = True,
        weights: list[float] | None = None,
        alpha: float = 0.2,
        channels: tuple[int, int, int] = (16, 32, 32),
    ):
        """
        Puts a new [`SenseClassifier`] on the adapter's output, for training; one that is there is replaced.

        Args:
            labels: entity tags, or the classes of the sentiment.
            multi_label: any number of `labels` holds for a clip (tags), not exactly one (classes).
            weights: one a label, see [`SenseClassifier.loss`].
            alpha: the classifier's share of the loss. The paper's is 0.2.
            channels: of its three convolutions.

        Raises:
            ValueError: no labels or more than 256, not a weight for each, an alpha outside 0 to 1, or channels that
                are not three numbers up to 256.
        """
        settings = {"labels": list(labels), "multi_label": multi_label, "weights": weights}
        settings |= {"alpha": alpha, "channels": list(channels)}
        check_classifier(settings)
        self.config.classifier = settings
        self.classifier = SenseClassifier(self.config).to(self.device)

    def remove_classifier(self):
        """Drops the classifier, for inference needs none."""
        self.config.classifier = self.classifier = None

    def detach_encoder(self) -> nn.Module:
        """
        Takes the encoder out and returns it: a model that learns from cached `pooled_features` needs no memory for it.
        Before it can hear or be saved as a whole again, `attach_encoder` puts it back.
        """
        self.backbone_fingerprint()  # of all backbones; known from now on
        encoder, self.model.audio_tower = self.model.audio_tower, None
        return encoder

    def attach_encoder(self, encoder: nn.Module):
        """Puts back what `detach_encoder` returned, on the model's device."""
        self.model.audio_tower = encoder.to(self.device)

    def save_pretrained(self, *args, **kwargs):
        """
        Raises:
            ValueError: the encoder was detached, so that what is loaded would have a random one.
        """
        if self.model.audio_tower is None:
            raise ValueError("the encoder was detached: attach_encoder() it first, or save_adapter()")
        return super().save_pretrained(*args, **kwargs)

    def trained_state_dict(self, inference: bool = False) -> dict[str, torch.Tensor]:
        """
        The weights that training changes, by name: adapter, LoRA and, unless for `inference`, classifier. Where they
        are sharded, all processes must ask for them together.
        """
        return {
            name: _whole(parameter.detach()).cpu().contiguous()
            for name, parameter in self.named_parameters()
            if is_trained(name) and not (inference and name.startswith("classifier."))
        }

    def backbone_fingerprint(self) -> str:
        """
        SHA-256 over the frozen weights rounded to bf16, so that the dtype they are held in does not matter. Of a
        quantised model it is that of the weights that `quantize` found.

        Raises:
            ValueError: the model was quantised as it was loaded, so that nobody has seen those weights.
        """
        if self.quantization is not None:
            if "fingerprint" not in (self.config.backbones or {}):
                raise ValueError(
                    f"this model was made {self.quantization} while it was loaded, so its backbones can't be told "
                    "from others: load it without quantization_config, then quantize() it"
                )
            return self.config.backbones["fingerprint"]
        if getattr(self, "_fingerprint", None) is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.named_parameters()):
                if not is_trained(name):
                    digest.update(f"{name.replace('.base_layer', '')}{tuple(tensor.shape)}".encode())
                    raw = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
                    digest.update(memoryview(raw.numpy()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _cast_backbones(self, dtype: torch.dtype | str):
        """Holds the frozen weights in another dtype; the fingerprint stays that of those before."""
        self.backbone_fingerprint()
        self._dtype_of_fingerprint = str(self.lm_head.weight.dtype).removeprefix("torch.")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, parameter in self.named_parameters():
            if not is_trained(name):
                parameter.data = parameter.data.to(dtype)

    def save_adapter(self, folder: str | os.PathLike, inference: bool = False):
        """
        Writes what was trained only (adapter, LoRA, classifier), with the backbones' ids, revisions and fingerprint.

        Args:
            inference: leave the classifier out.

        Raises:
            ValueError: LoRA was merged into the language model.
        """
        from safetensors.torch import save_file

        if "merged_lora" in (self.config.backbones or {}):
            raise ValueError("LoRA was merged into the language model, which an adapter can't hold: save_pretrained()")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"backbones": self.config.backbones, "fingerprint": self.backbone_fingerprint()}
        about["dtype"] = self._dtype_of_fingerprint or str(self.lm_head.weight.dtype).removeprefix("torch.")
        about["quantization"] = self.quantization
        about |= {field: getattr(self.config, field) for field in ADAPTER_FIELDS}
        if inference:
            about["classifier"] = None
        weights, settings = folder / f".{ADAPTER_WEIGHTS}.tmp", folder / f".{ADAPTER_CONFIG}.tmp"
        save_file(self.trained_state_dict(inference), weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(about, indent=2) + "\n")
        os.replace(weights, folder / ADAPTER_WEIGHTS)
        os.replace(settings, folder / ADAPTER_CONFIG)

    @classmethod
    def from_adapter(
        cls,
        folder: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | None = None,
        backbones: dict[str, str] | None = None,
        dtype: torch.dtype | str | None = None,
        **kwargs,
    ) -> "SenseForConditionalGeneration":
        """
        Composes the backbones that an adapter was trained on, and loads it, in eval mode.

        Args:
            folder: what `save_adapter` wrote, a folder or a Hub id.
            revision: of the adapter on the Hub: branch, tag or commit.
            token: for the Hub, where the adapter is private.
            backbones: `{"audio": ..., "text": ...}`, ids or folders to take in place of those that the adapter
                names: copies of the same weights.
            dtype: to hold the frozen weights in; by default (and with `"auto"`) the one of training. What is trained
                stays in fp32.
            kwargs: as for `from_backbones`, such as `attn_implementation` and `quantize`, which by default is as in
                training.

        Raises:
            ValueError: no adapter there, one from the Hub that names a folder as its backbone, backbones with other
                weights, or what `load_adapter` refuses.
        """
        source, folder = str(folder), fetch_adapter(folder, revision, token)
        about, backbones = read_adapter_config(folder), backbones or {}
        sources, revisions = dict(backbones), {}
        for part in ("audio", "text"):
            if part in backbones:
                continue
            try:
                sources[part], revisions[part] = (about["backbones"][part][key] for key in ("id", "revision"))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{folder / ADAPTER_CONFIG}: it names no {part} backbone; give backbones") from error
            if not Path(source).is_dir():
                _require_hub_id(sources[part], f"{source}: {ADAPTER_CONFIG}, {part} backbone")
        settings = {field: about[field] for field in ("num_audio_tokens", "audio_tokens")}
        if "text" not in backbones:
            settings["gguf_file"] = about["backbones"]["text"].get("gguf_file")
        # As it was trained, unless it is asked for otherwise.
        quantize = kwargs.pop("quantize", about["quantization"])
        if quantize is not None:
            quantization_config(quantize)  # a wrong name or a missing library should not wait for the weights
        trained_in = about["dtype"] or "float32"
        model = cls.from_backbones(**sources, revisions=revisions, dtype=trained_in, **settings | kwargs)
        if dtype not in (None, "auto"):
            model._cast_backbones(dtype)
        if quantize is not None:
            model.quantize(quantize)
        model.load_adapter(folder)
        # Not where copies of them lie on this machine; of rounded weights the fingerprint stays.
        model.config.backbones = {**(model.config.backbones or {}), **(about["backbones"] or {})}
        model.name_or_path = str(folder)  # the processor lies there too
        return model.eval()

    def load_adapter(
        self,
        folder: str | os.PathLike,
        adapter_name: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        **of_peft,
    ):
        """
        Reads what `save_adapter` wrote, in a folder or on the Hub, into this model, strictly. LoRA and a classifier
        that are there and not in this model are added to it. What was trained beside full weights fits any quantised
        form of them; what was trained beside quantised ones fits those alone.

        Args:
            revision: on the Hub: branch, tag or commit.
            token: for the Hub, where the adapter is private.
            adapter_name, of_peft: of an adapter that PEFT saved, which goes to transformers' own `load_adapter`.

        Raises:
            ValueError: other backbones, quantisation or settings, or a tensor that is missing, unexpected or of
                another shape.
        """
        if adapter_name is not None or of_peft:  # as `from_pretrained` calls it for a folder with adapter_config.json
            return super().load_adapter(folder, adapter_name, **of_peft)
        folder = fetch_adapter(folder, revision, token)
        about, state = read_adapter_config(folder), _read_adapter_weights(folder)
        if about["fingerprint"] != self.backbone_fingerprint():
            raise ValueError(f"{folder} was trained on other backbone weights: {about['backbones']}")
        if about["quantization"] not in (None, self.quantization):
            raise ValueError(
                f"{folder} was trained on {about['quantization']} weights, this model's are "
                f"{self.quantization or 'full'}: compose it with quantize={about['quantization']!r}"
            )
        new = [name for name in ("lora", "classifier") if about[name] and getattr(self.config, name) is None]
        for field in ADAPTER_FIELDS:
            if field not in new and about[field] != getattr(self.config, field):
                raise ValueError(
                    f"{folder}: {field} is {about[field]!r} there, {getattr(self.config, field)!r} in this model"
                )
        if "lora" in new:
            self.add_lora(**about["lora"])
        if "classifier" in new:
            self.add_classifier(**about["classifier"])
        mine = self.trained_state_dict()
        missing, unexpected = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        shapes = [k for k in state.keys() & mine.keys() if state[k].shape != mine[k].shape]
        if missing or unexpected or shapes:
            raise ValueError(f"{folder}: missing {missing}, unexpected {unexpected}, of another shape {shapes}")
        mine = dict(self.named_parameters())
        self.load_state_dict({name: _sharded_like(mine[name], value) for name, value in state.items()}, strict=False)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is sharded over the processes (FSDP2), put together; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _sharded_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` in shards where `parameter` is."""
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _common_beginning(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own at least."""
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if len({prompt[i] for prompt in prompts}) > 1), most)


def _pad_left(rows: list[list[int]], pad: int, device) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Rows of one length, and the mask of what is no padding."""
    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def fetch_adapter(folder: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """
    The folder of an adapter: `folder` itself where there is one, else the files of that Hub id, fetched.

    Raises:
        ValueError: neither a folder nor a Hub id that can be read.
    """
    if Path(folder).is_dir():
        return Path(folder)
    try:
        # The adapter and the processor beside it; never pickles, nor the weights of a whole model.
        wanted = [ADAPTER_WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
        return Path(snapshot_download(str(folder), revision=revision, token=token, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{folder} is no adapter folder, and no Hub id that can be read{at} ({_first_line(error)})"
        ) from error


def read_adapter_config(folder: str | os.PathLike) -> dict:
    """
    What `save_adapter` says of an adapter: backbones, fingerprint and settings.

    Raises:
        ValueError: `folder` is no adapter folder, or its settings can't be read.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no adapter folder: it has no {ADAPTER_CONFIG}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path}: a {type(about).__name__}; write it with save_adapter")
    if missing := sorted({"backbones", "fingerprint", "lora", "num_audio_tokens", "audio_tokens"} - set(about)):
        raise ValueError(f"{path}: it lacks {', '.join(missing)}; write it with save_adapter")
    about = {"classifier": None, "dtype": None, "quantization": None, **about}  # older folders do not know of these
    _check_adapter_config(about, path)
    return about


def _check_adapter_config(about: dict, path: Path):
    """Raises ValueError for settings that `save_adapter` never writes: the file may be a stranger's."""
    names: dict[str, Any] = {"fingerprint": str, "audio_tokens": str, "num_audio_tokens": int}
    names |= {"dtype": str | None, "quantization": str | None, "backbones": dict | None}
    for field, kind in names.items():
        if not isinstance(about[field], kind):
            raise ValueError(f"{path}: {field} is {about[field]!r}; write it with save_adapter")
    if about["dtype"] not in (None, *DTYPES):
        raise ValueError(f"{path}: dtype is {about['dtype']!r}; it is one of {', '.join(DTYPES)}")
    for part in {"audio", "text"} & (about["backbones"] or {}).keys():
        _check_backbone(about["backbones"][part], f"{path}: {part} backbone")
    try:
        for check, field in ((check_lora, "lora"), (check_classifier, "classifier")):
            if about[field] is not None:
                check(about[field])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_backbone(found: dict, where: str):
    """Raises ValueError for what is no `{"id", "revision"}`, with a `gguf_file` in its folder or without."""
    texts = [found.get(key) for key in ("id", "revision", "gguf_file")] if isinstance(found, dict) else [None]
    if not isinstance(texts[0], str) or not all(isinstance(text, str | None) for text in texts):
        raise ValueError(f"{where} is {found!r}; write it with save_adapter")
    file = Path(texts[2] or "")
    if file.is_absolute() or ".." in file.parts:
        raise ValueError(f"{where}: gguf_file is {texts[2]!r}, which is not in the backbone's own folder")


def _read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder; pickled ones, which can run code, are not read."""
    from safetensors.torch import load_file

    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} is no adapter folder: it has no {ADAPTER_WEIGHTS}, and no other format is read")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not readable as safetensors ({error})") from error


def _require_hub_id(name: str, where: str):
    """Raises ValueError for what is a folder: an adapter from elsewhere does not choose files of this machine."""
    if not is_hub_id(name):
        reason = "which is a file or folder here too" if Path(name).exists() else "which is no Hub id"
        raise ValueError(f"{where}: {name!r}, {reason}; say in backbones what to take")


def is_hub_id(name: str) -> bool:
    """Whether a backbone's name is a Hub id: what can't be one, or is there on this machine, is a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def is_trained(name: str) -> bool:
    """Whether training changes the parameter of this name (adapter, LoRA, classifier); all others are backbone."""
    return "multi_modal_projector." in name or ".lora_" in name or name.startswith("classifier.")


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


def _commit_of(source: str | os.PathLike, revision: str | None) -> str | None:
    """The Hub's commit of a branch or tag, by default of the main branch; of a folder what was given."""
    found = resolve_revision(source, revision)
    return getattr(found, "resolved", found)


def load_safely(load, source: str | os.PathLike, *args, **kwargs):
    """
    What a `from_pretrained` of transformers loads, from safetensors only: pickled weights can run code.

    Raises:
        ValueError: there are no weights in safetensors.
    """
    try:
        return load(source, *args, **{**kwargs, "use_safetensors": True})
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"{source} has no weights in safetensors, and no other format is read: pickled ones, such as "
            f"pytorch_model.bin, can run code. Save the model anew with save_pretrained ({_first_line(error)})"
        ) from error


def _load_encoder(audio: str | os.PathLike, revision: str | None, kwargs: dict) -> WhisperEncoder:
    """The encoder of a whole Whisper checkpoint, or of an encoder-only one; no weight may be missing."""
    config = AutoConfig.from_pretrained(audio, revision=revision, trust_remote_code=False)
    if config.model_type != "whisper":
        raise ValueError(f"the audio encoder must be a Whisper model, found {config.model_type!r} in {str(audio)!r}")
    encoder_only = config.architectures == ["WhisperEncoder"]
    loader = WhisperEncoder if encoder_only else WhisperModel
    model, info = load_safely(loader.from_pretrained, audio, revision=revision, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(f"{audio} lacks weights of the audio encoder: {sorted(info['missing_keys'])[:5]} ...")
    return model if encoder_only else model.encoder


def _load_language_model(text: str | os.PathLike, revision: str | None, kwargs: dict, gguf_file: str | None = None):
    """The causal language model with a row for the audio placeholder, and the placeholder's id."""
    where = {"revision": revision, "trust_remote_code": False}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
        kwargs = {**kwargs, "quantization_config": GgufConfig(dequantize=True)}
    config = AutoConfig.from_pretrained(text, **where)
    if config.is_encoder_decoder or config.model_type == "whisper":
        raise ValueError(
            f"the language model must be a decoder-only text model, found {config.model_type!r} in {str(text)!r}"
        )
    lm = load_safely(AutoModelForCausalLM.from_pretrained, text, **where, **kwargs)
    _require_plain_head(lm, text)
    tokenizer = AutoTokenizer.from_pretrained(text, **where)
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


@torch.no_grad()
def _require_plain_head(lm: PreTrainedModel, text: str | os.PathLike):
    """Raises ValueError where logits are more than a linear layer without bias makes: scaled, say, or capped."""
    head = lm.get_output_embeddings()
    ids = torch.tensor([[0, 1, 2]], device=lm.device)
    plain = head(getattr(lm, lm.base_model_prefix)(input_ids=ids).last_hidden_state).float()
    if getattr(head, "bias", None) is not None or not torch.allclose(lm(input_ids=ids).logits.float(), plain):
        raise ValueError(
            f"{str(text)!r}: SENSE answers by a linear head without bias, and {lm.config.model_type!r} makes its "
            "logits otherwise (a bias, a scale or a cap): take another language model, such as a Llama or a Qwen"
        )


def _generation_config(lm: PreTrainedModel, audio_token_id: int) -> GenerationConfig:
    """Greedy by default, whatever the chat model's own sampling settings are; never answers with a placeholder."""
    ours = GenerationConfig.from_model_config(lm.config)
    theirs = lm.generation_config
    ours.bos_token_id, ours.eos_token_id = theirs.bos_token_id, theirs.eos_token_id
    ours.pad_token_id = theirs.pad_token_id
    ours.use_cache = True  # configurations of models that Trainer saved say False
    ours.suppress_tokens = [audio_token_id]
    return ours


SenseModel.register_for_auto_class("AutoModel")
SenseForConditionalGeneration.register_for_auto_class("AutoModelForSpeechSeq2Seq")

__all__ = ["SenseAdapter", "SenseClassifier", "SenseForConditionalGeneration", "SenseModel", "SensePreTrainedModel"]
