"""Everything between files on disk and tensors, both ways."""

from transformers import AutoProcessor

from modeling_sense.configuration_sense import SenseConfig

from .pipeline_sense import SpokenLanguageUnderstandingPipeline
from .processing_sense import SenseProcessor, load_audio


AutoProcessor.register(SenseConfig, SenseProcessor, exist_ok=True)

__all__ = ["SenseProcessor", "SpokenLanguageUnderstandingPipeline", "load_audio"]
