"""The SENSE network. Importing this package registers it with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq

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
