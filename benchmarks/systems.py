"""All systems by section and name."""

from torch import nn

from .asking import (
    WhisperPipeline,
    ask,
    ask_all_at_once,
    ask_encoding_per_beam,
    ask_one_by_one,
    ask_sense_inputs,
    ask_voxtral_inputs,
    branches_inputs,
    build_voxtral_to_ask,
    call,
    three_calls_inputs,
    whisper_inputs,
)
from .setting import System
from .training import (
    BareLLM,
    bare_inputs,
    build_granite_speech,
    build_qwen2_audio,
    build_sense,
    build_sense_cached,
    build_sense_to_train,
    build_slam_asr,
    build_voxtral,
    cached_inputs,
    granite_speech_inputs,
    qwen2_audio_inputs,
    sense_inputs,
    slam_asr_inputs,
    train_step,
    voxtral_inputs,
)


CACHED, ENCODING, BARE = "SENSE from cache", "SENSE encoding each time", "bare LLM (the limit)"
BEAMS, PER_BEAM = "SENSE", "SENSE, encode per beam"
AT_ONCE, THREE_CALLS, PIPELINE = "understand", "three calls of generate", "Whisper + spaCy + VADER"

SYSTEMS = {
    "train": {
        CACHED: System(build_sense_cached, cached_inputs, train_step),
        ENCODING: System(build_sense_to_train, sense_inputs, train_step),
        "Qwen2-Audio": System(build_qwen2_audio, qwen2_audio_inputs, train_step),
        "Voxtral": System(build_voxtral, voxtral_inputs, train_step),
        "Granite Speech": System(build_granite_speech, granite_speech_inputs, train_step),
        "SLAM-ASR projector": System(build_slam_asr, slam_asr_inputs, train_step),
        BARE: System(BareLLM, bare_inputs, train_step),
    },
    "beams": {
        BEAMS: System(build_sense, ask_sense_inputs, ask),
        PER_BEAM: System(build_sense, ask_sense_inputs, ask_encoding_per_beam),
        "Voxtral": System(build_voxtral_to_ask, ask_voxtral_inputs, ask),
    },
    "understand": {
        AT_ONCE: System(build_sense, branches_inputs, ask_all_at_once),
        THREE_CALLS: System(build_sense, three_calls_inputs, ask_one_by_one),
        PIPELINE: System(WhisperPipeline, whisper_inputs, call),
    },
}
PEERS = ("Qwen2-Audio", "Voxtral", "Granite Speech", "SLAM-ASR projector", PIPELINE)


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The speech encoder, whatever a system calls it; None of the bare LLM."""
    names = ("model.audio_tower", "model.encoder", "model.model.encoder", "encoder")
    modules = dict(model.named_modules())
    return next((modules[name] for name in names if name in modules), None)
