"""The SENSE network. Importing this package registers it with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from .configuration_sense import SenseConfig
from .modeling_sense import (
    SenseAdapter,
    SenseClassifier,
    SenseForConditionalGeneration,
    SenseModel,
    SensePreTrainedModel,
)
from .quantization_sense import QUANTIZATIONS, quantization_config


AutoConfig.register("sense", SenseConfig)
AutoModel.register(SenseConfig, SenseModel)
AutoModelForSpeechSeq2Seq.register(SenseConfig, SenseForConditionalGeneration)
AutoModelForMultimodalLM.register(SenseConfig, SenseForConditionalGeneration)
# By this list transformers' own pipeline for speech recognition knows that the model generates; it then gets as far as
# `generate`, which names the pipeline to use.
MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES["sense"] = "SenseForConditionalGeneration"

__all__ = [
    "QUANTIZATIONS",
    "SenseAdapter",
    "SenseClassifier",
    "SenseConfig",
    "SenseForConditionalGeneration",
    "SenseModel",
    "SensePreTrainedModel",
    "quantization_config",
]
