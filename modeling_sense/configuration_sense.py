"""Configuration of SENSE: a Whisper encoder, a pooling adapter and a Llama-like language model."""

import copy
import re

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


AUDIO_TOKEN_MODES = ("trim", "fixed")
LORA_FIELDS = {"r", "lora_alpha", "lora_dropout", "target_modules"}
MAX_LORA_RANK = 4096
MAX_CLASSIFIER_SIZE = 256  # labels, and channels of a convolution
LORA_EXPRESSION = r"(\.\*|\\\.|\||\w|\(\w+(\|\w+)*\))+"  # of a regular expression: any text, dots, names, one of names
CLASSIFIER_FIELDS = {"labels", "multi_label", "weights", "channels", "alpha"}
# Where the Auto classes find the code that `save_pretrained` writes beside the weights (`trust_remote_code=True`).
AUTO_MAP = {
    "AutoConfig": "configuration_sense.SenseConfig",
    "AutoModel": "modeling_sense.SenseModel",
    "AutoModelForSpeechSeq2Seq": "modeling_sense.SenseForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_sense.SenseForConditionalGeneration",
}
_PIPELINE = {
    "impl": "pipeline_sense.SpokenLanguageUnderstandingPipeline",
    "pt": ["AutoModelForSpeechSeq2Seq"],
    "type": "audio",
}
# transformers' own pipeline for speech recognition knows no prompt: ours takes its name, too.
CUSTOM_PIPELINES = dict.fromkeys(("spoken-language-understanding", "automatic-speech-recognition"), _PIPELINE)


@strict
class SenseConfig(PreTrainedConfig):
    r"""
    Configuration of [`SenseModel`] and [`SenseForConditionalGeneration`].

    Args:
        audio_config (`dict` or `WhisperConfig`, *optional*):
            The speech encoder. Only the encoder half of Whisper is built. Defaults to whisper-small's sizes.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            The language model, any decoder-only architecture that `AutoModel` knows. Defaults to TinyLlama's sizes.
        audio_token_id (`int`, *optional*, defaults to 32000):
            Id of the placeholder `<|audio|>`. Each occurrence in `input_ids` is replaced by one audio embedding.
        num_audio_tokens (`int`, *optional*, defaults to 250):
            Steps that a whole encoder window (1500 frames, 30 s) is pooled to. The paper's value is 250: 120 ms each.
        audio_tokens (`str`, *optional*, defaults to `"trim"`):
            `"trim"` keeps the steps that hold speech (our choice), `"fixed"` all of them (the paper's).
        lora (`dict`, *optional*):
            Arguments of `peft.LoraConfig` for the language model, or None. Set by `add_lora`: `r`, `lora_alpha`,
            `lora_dropout`, and `target_modules`, a regular expression.
        classifier (`dict`, *optional*):
            The regulariser of [`SenseClassifier`], or None. Set by `add_classifier`: `labels` (names), `multi_label`,
            `weights` (one a label, or None), `channels` (of its three convolutions), `alpha` (its share of the loss).
        backbones (`dict`, *optional*):
            Where the frozen weights came from: `{"audio": {"id", "revision"}, "text": {"id", "revision"}}`, and
            `gguf_file` beside the latter where it was one; set by `from_backbones`. `fingerprint`: that of the
            weights before they were quantised; set by `quantize`.

    Raises:
        ValueError: `audio_tokens` is neither `"trim"` nor `"fixed"`, `num_audio_tokens` is not within 1 and the
            encoder's number of frames, `classifier` is none that `add_classifier` makes, or `lora` none that
            `add_lora` makes.
    """

    model_type = "sense"
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="whisper",
            init_kwargs={
                "d_model": 768,
                "encoder_layers": 12,
                "encoder_attention_heads": 12,
                "encoder_ffn_dim": 3072,
                "num_mel_bins": 80,
            },
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="llama",
            init_kwargs={
                "vocab_size": 32008,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 22,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
            },
        ),
    }

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 32000
    num_audio_tokens: int = 250
    audio_tokens: str = "trim"
    lora: dict | None = None
    classifier: dict | None = None
    backbones: dict | None = None

    def __post_init__(self, **kwargs):
        if not __name__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            for name in ("auto_map", "custom_pipelines"):  # of the code beside the weights: this is the installed one
                kwargs.pop(name, None)
        super().__post_init__(**kwargs)
        # The composite ties what its language model ties.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.hidden_size = self.text_config.hidden_size
        if self.audio_tokens not in AUDIO_TOKEN_MODES:
            raise ValueError(f"audio_tokens must be one of {AUDIO_TOKEN_MODES}, found {self.audio_tokens!r}")
        frames = self.audio_config.max_source_positions
        if not 1 <= self.num_audio_tokens <= frames:
            raise ValueError(f"num_audio_tokens must be within 1 and {frames}, found {self.num_audio_tokens}")
        if self.classifier is not None:
            check_classifier(self.classifier)
        if self.lora is not None:
            check_lora(self.lora)

    def save_pretrained(self, save_directory, **kwargs):
        """As [`~PreTrainedConfig.save_pretrained`], naming what the Auto classes and `pipeline` find beside it."""
        saved = copy.deepcopy(self)
        saved.audio_config.name_or_path = saved.text_config.name_or_path = ""  # a path here; `backbones` has the ids
        saved.auto_map, saved.custom_pipelines = AUTO_MAP, CUSTOM_PIPELINES
        super(SenseConfig, saved).save_pretrained(save_directory, **kwargs)


SenseConfig.register_for_auto_class()


def check_lora(lora: dict):
    """
    Raises ValueError for settings that `add_lora` does not make. They may come from a stranger's file: peft matches
    `target_modules` against every module, and an expression can take for ever.
    """
    if not isinstance(lora, dict) or not {"r"} <= lora.keys() <= LORA_FIELDS:
        raise ValueError(f"lora must have r and may have {sorted(LORA_FIELDS - {'r'})}, found {lora!r}")
    r, targets = lora["r"], lora.get("target_modules", "")
    if type(r) is not int or not 1 <= r <= MAX_LORA_RANK:
        raise ValueError(f"lora: r must be within 1 and {MAX_LORA_RANK}, found {r!r}")
    for name, highest in (("lora_alpha", 1e6), ("lora_dropout", 1)):
        value = lora.get(name, 0)
        if type(value) not in (int, float) or not 0 <= value <= highest:
            raise ValueError(f"lora: {name} must be within 0 and {highest:g}, found {value!r}")
    is_text = isinstance(targets, str) and len(targets) <= 1000
    if not is_text or max(map(targets.count, "*(")) > 3 or targets and not re.fullmatch(LORA_EXPRESSION, targets):
        raise ValueError(
            "lora: target_modules must be a regular expression of names, \\., and at most three each of .* and "
            f"(one|other), found {targets!r}"
        )


def check_classifier(classifier: dict):
    """Raises ValueError for settings of which no [`SenseClassifier`] can be built, or a huge one: see `check_lora`."""
    if not isinstance(classifier, dict):
        raise ValueError(f"classifier must be a mapping, found {classifier!r}")
    if classifier.keys() != CLASSIFIER_FIELDS:
        raise ValueError(f"classifier must have the fields {sorted(CLASSIFIER_FIELDS)}, found {sorted(classifier)}")
    labels, weights, channels = (classifier[field] for field in ("labels", "weights", "channels"))
    if not _all(labels, str) or not 1 <= len(labels) <= MAX_CLASSIFIER_SIZE:
        raise ValueError(f"classifier: labels must be 1 to {MAX_CLASSIFIER_SIZE} names, found {labels!r}")
    if weights is not None and not (_all(weights, float, int) and len(weights) == len(labels)):
        raise ValueError(f"classifier: weights must be a number for each of {len(labels)} labels, found {weights!r}")
    if type(classifier["alpha"]) not in (int, float) or not 0 <= classifier["alpha"] <= 1:
        raise ValueError(f"classifier: alpha must be within 0 and 1, found {classifier['alpha']!r}")
    if not _all(channels, int) or len(channels) != 3 or not all(1 <= n <= MAX_CLASSIFIER_SIZE for n in channels):
        raise ValueError(f"classifier: channels must be 3 numbers up to {MAX_CLASSIFIER_SIZE}, found {channels!r}")
    if type(classifier["multi_label"]) is not bool:
        raise ValueError(f"classifier: multi_label must be true or false, found {classifier['multi_label']!r}")


def _all(values, *kinds: type) -> bool:
    """Whether they are a list of such; True is no number."""
    return isinstance(values, list | tuple) and all(type(value) in kinds for value in values)


__all__ = ["SenseConfig"]
