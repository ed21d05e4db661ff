"""Systems to ask: one answer by beam search, or three answers about each clip. Each has its full length, forced."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import GenerationMixin, WhisperForConditionalGeneration

from .setting import TASKS, Setting, mel, mel_mask, new, tokens, whisper_config
from .training import build_voxtral, sense_tokens, voxtral_tokens


PAD, EOS = 0, 2
TRANSCRIPT = "Anna Karenina left Moscow on Monday and was very happy to meet the count in Saint Petersburg again"


def build_voxtral_to_ask(s: Setting) -> nn.Module:
    return build_voxtral(s).eval()


def answer_length(s: Setting) -> dict:
    """Arguments of `generate`: exactly `new_tokens`, without sampling."""
    length = {"max_new_tokens": s.new_tokens, "min_new_tokens": s.new_tokens}
    return {**length, "num_beams": s.beams, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}


def ask_sense_inputs(s: Setting, task: int = 0) -> dict:
    audio = {"input_features": mel(s), "input_features_mask": mel_mask(s)}
    return {**tokens(s, sense_tokens(s), 0, task), **audio, **answer_length(s)}


def ask_voxtral_inputs(s: Setting) -> dict:
    return {**tokens(s, voxtral_tokens(s), 0), "input_features": mel(s), **answer_length(s)}


def ask(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model.generate(**inputs)


def ask_encoding_per_beam(model: nn.Module, inputs: dict) -> torch.Tensor:
    """What transformers does by itself: the inputs are repeated for the beams ahead of the first forward."""
    return GenerationMixin.generate(model, **inputs)


def branches_inputs(s: Setting) -> dict:
    """`prompts`: by clip, by question the token ids."""
    ids = [tokens(s, sense_tokens(s), 0, task)["input_ids"].tolist() for task in range(TASKS)]
    audio = {"input_features": mel(s), "input_features_mask": mel_mask(s)}
    return {"prompts": [list(of_clip) for of_clip in zip(*ids)], **audio, **answer_length(s)}


def ask_all_at_once(model: nn.Module, inputs: dict) -> list:
    """What `understand` does between its processor and its tokenizer."""
    return model.generate_branches(**inputs)


def three_calls_inputs(s: Setting) -> dict:
    return {"calls": [ask_sense_inputs(s, task) for task in range(TASKS)]}


def ask_one_by_one(model: nn.Module, inputs: dict) -> list:
    return [model.generate(**call) for call in inputs["calls"]]


class WhisperPipeline(nn.Module):
    """
    The usual three programs: Whisper writes, spaCy tags, VADER rates. Whisper's words are noise here, so that the
    other two read a fixed sentence of a like length. `note` says what they are.
    """

    def __init__(self, s: Setting):
        super().__init__()
        self.model = new(WhisperForConditionalGeneration, whisper_config(s), s).eval()
        self.tag, self.rate, self.note = text_tools()

    def forward(self, input_features, **how):
        written = self.model.generate(input_features, **how)
        texts = [TRANSCRIPT] * len(input_features)
        return written, self.tag(texts), self.rate(texts)


def text_tools() -> tuple[Callable, Callable, str]:
    """spaCy and VADER as far as they are here, as functions of a list of texts, and a note of what they are."""
    from processing.backbones import cache_folder
    from processing.controls import SPACY_MODEL, SpacyTagger, VaderSentiment

    tag = rate = len  # no work
    try:
        import spacy

        if spacy.util.is_package(SPACY_MODEL) or (cache_folder() / SPACY_MODEL).is_dir():
            tag, note = SpacyTagger.from_pretrained().tag, f"spaCy {SPACY_MODEL}"
        else:
            blank = spacy.blank("en")
            tag, note = (lambda texts: list(blank.pipe(texts))), "a blank spaCy pipeline (it splits words, no more)"
    except ImportError:
        note = "spaCy skipped: not installed"
    try:
        rate, note = VaderSentiment().classify, f"{note}, VADER"
    except ImportError:
        note += ", VADER skipped: not installed"
    return tag, rate, note


def whisper_inputs(s: Setting) -> dict:
    length = {"max_new_tokens": s.new_tokens, "min_new_tokens": s.new_tokens}
    return {"input_features": mel(s), **length, "num_beams": s.beams, "do_sample": False}


@torch.no_grad()
def call(model: nn.Module, inputs: dict):
    return model(**inputs)
