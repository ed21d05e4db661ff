"""
Closed-form warm start of the adapter: one ridge regression from the pooled audio to the word being spoken.

Each audio token is paired with the input embedding of the LLM token that is spoken at its centre. Word times come from
Whisper's own cross-attention (its alignment heads, teacher-forced with the transcript); where the checkpoint has no
decoder, the words are spread evenly over the clip. Our own addition: the paper starts from a random adapter.
"""

import math
import os
from collections.abc import Callable, Iterator

import torch
from accelerate import PartialState
from accelerate.utils import reduce, send_to_device
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from transformers.utils import logging

from modeling_sense.modeling_sense import load_safely

from .alignment import monotonic_path, standardize, word_pieces
from .encoder_cache import on_device
from .processing_sense import SenseProcessor, load_audio, text_ids


logger = logging.get_logger(__name__)


def across_processes(operation: Callable, tensors, *how):
    """
    What an operation of `accelerate.utils` makes of the tensors of all processes, on the CPU. NCCL takes none that are
    there.
    """
    return send_to_device(operation(send_to_device(tensors, PartialState().device), *how), "cpu")


class RidgeRegression:
    """Streaming ridge regression with a bias, by normal equations in float64."""

    def __init__(self, inputs: int, outputs: int):
        sizes = {"xx": (inputs + 1, inputs + 1), "xy": (inputs + 1, outputs), "y": (outputs,), "yy": (), "rows": ()}
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}

    @property
    def rows(self) -> int:
        return int(self.sums["rows"])

    def add(self, x: torch.Tensor, y: torch.Tensor):
        """`x` `(rows, inputs)`, `y` `(rows, outputs)`."""
        x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
        y = y.double()
        found = {"xx": x.T @ x, "xy": x.T @ y, "y": y.sum(0), "yy": y.square().sum(), "rows": torch.tensor(len(x))}
        for name, value in found.items():
            self.sums[name] += value

    def gather(self):
        """Adds the rows of all processes, on each of them."""
        if PartialState().num_processes > 1:
            self.sums = across_processes(reduce, self.sums, "sum")

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Weight `(outputs, inputs)`, bias `(outputs,)` and R2 on the rows seen; `ridge` is per row."""
        xx, xy, yy = self.sums["xx"], self.sums["xy"], self.sums["yy"]
        penalty = ridge * self.rows * torch.eye(len(xx), dtype=torch.float64)
        penalty[-1, -1] = 0  # the bias is free
        solution = torch.linalg.solve(xx + penalty, xy)
        residual = yy - 2 * (solution * xy).sum() + (solution * (xx @ solution)).sum()
        total = yy - self.sums["y"].square().sum() / self.rows
        return solution[:-1].T, solution[-1], float(1 - residual / total)


@torch.inference_mode()
def warm_start(
    model,
    processor: SenseProcessor,
    dataset,
    whisper: str | os.PathLike,
    *,
    gain: float = 1.5,
    ridge: float = 1e-3,
    max_clips: int | None = None,
) -> dict:
    """
    Sets the adapter's linear layer from up to `max_clips` rows of `dataset` (default: all); processes share them.

    Args:
        model: `SenseForConditionalGeneration`.
        whisper: Hub id or folder of the checkpoint whose encoder the model uses.
        gain: factor on the regression's output, whose length falls short of real embeddings.
        ridge: penalty per row.

    Returns:
        `{"clips", "audio_tokens", "r2", "word_times"}`, the last "attention" or "even".
    """
    aligner = WordAligner.from_pretrained(whisper, PartialState().device)
    adapter, embed = model.model.multi_modal_projector, model.get_input_embeddings()
    regression = RidgeRegression(adapter.linear.in_features, adapter.linear.out_features)
    clips = min(len(dataset), max_clips or len(dataset))
    for speech, tokens in heard_clips(model, processor, aligner, dataset, clips, "warm start"):
        regression.add(speech, embed(tokens.to(embed.weight.device)).float().cpu())  # some models scale their table
    regression.gather()
    weight, bias, r2 = regression.solve(ridge)
    adapter.linear.weight.copy_(gain * weight)
    adapter.linear.bias.copy_(gain * bias)
    return {"clips": clips, "audio_tokens": regression.rows, "r2": r2, "word_times": aligner.kind}


def heard_clips(model, processor: SenseProcessor, aligner: "WordAligner", dataset, clips: int, label: str) -> Iterator:
    """
    `speech_and_tokens`, on the CPU, of this process's share of the first `clips` rows that have words. They are heard
    where training will be; the `aligner` is there.
    """
    state, parts = PartialState(), model.model
    mine = dataset.select(range(state.process_index, clips, state.num_processes))
    with on_device(parts.audio_tower, state.device), on_device(parts.multi_modal_projector, state.device):
        for row in tqdm(mine, desc=label, unit="clip", disable=not state.is_main_process):
            heard = speech_and_tokens(model, processor, aligner, row)
            if heard is not None:
                yield tuple(part.cpu() for part in heard)


@torch.inference_mode()
def speech_and_tokens(model, processor: SenseProcessor, aligner: "WordAligner", row: dict):
    """
    Of a clip's audio tokens, the adapter's linear layer's input `(num_tokens, d_model)` and the LLM tokens that are
    spoken, `(num_tokens,)`, as far as the clip reaches; None for an empty text.
    """
    adapter = model.model.multi_modal_projector
    features = processor.audio_features([load_audio(row["audio"])]).to(adapter.linear.weight.device)
    encoded, frame_mask = model.model.encode(**features)
    frames = encoded.last_hidden_state
    pooled, mask = adapter.pool(frames, frame_mask)
    frames_per_token = frames.shape[1] / adapter.num_audio_tokens
    tokens = spoken_tokens(
        row["text"],
        aligner.word_times(frames, row["text"], int(frame_mask.sum()), row["language"]),
        # Without trimming the mask has all of 30 s: nothing is said after the clip.
        num_tokens=min(int(mask.sum()), math.ceil(int(frame_mask.sum()) / frames_per_token)),
        frames_per_token=frames_per_token,
        tokenizer=processor.tokenizer,
    )
    return None if tokens is None else (adapter.norm(pooled[mask][: len(tokens)].float()), tokens)


def spoken_tokens(
    text: str, word_ends: list[int] | None, *, num_tokens: int, frames_per_token: float, tokenizer
) -> torch.LongTensor | None:
    """
    The LLM token that is spoken at the centre of each audio token: `(num_tokens,)`, or None for an empty text.

    A word of several tokens is spread evenly over its frames. `word_ends` holds each word's first frame after it, or
    None: the words then share the clip evenly, by their letters.
    """
    words = text.split()
    if not words:
        return None
    if word_ends is None:
        letters = torch.tensor([len(word) + 1 for word in words]).cumsum(0)
        word_ends = (letters / letters[-1] * num_tokens * frames_per_token).tolist()
    ids = word_pieces(words, tokenizer)
    centres = (torch.arange(num_tokens) + 0.5) * frames_per_token
    which = torch.searchsorted(torch.tensor(word_ends, dtype=centres.dtype), centres, right=True)
    spoken = []
    for centre, index in zip(centres.tolist(), which.clamp(max=len(words) - 1).tolist()):
        start = word_ends[index - 1] if index else 0.0
        share = (centre - start) / max(word_ends[index] - start, 1e-6)
        spoken.append(ids[index][min(int(share * len(ids[index])), len(ids[index]) - 1)])
    return torch.tensor(spoken)


def whisper_language(settings, language: str | None) -> str | None:
    """
    What a Whisper checkpoint with these generation settings is told of a row's `language`, `de`, `de-DE` or `German`:
    English where the row does not say, or the checkpoint does not know it. None for a checkpoint of English alone.
    """
    if not getattr(settings, "is_multilingual", False):
        return None
    return language_code(language) if knows_language(settings, language) else "en"


def language_code(language: str | None) -> str:
    """Whisper's code of a language, `de` of `de-DE` or `German`; English by default."""
    name = (language or "en").strip().lower()
    return TO_LANGUAGE_CODE.get(name, name.replace("_", "-").split("-")[0])


def knows_language(settings, language: str | None) -> bool:
    """Whether a Whisper checkpoint with these generation settings writes a language."""
    code = language_code(language)
    return f"<|{code}|>" in settings.lang_to_id if getattr(settings, "is_multilingual", False) else code == "en"


class WordAligner:
    """Word ends from the cross-attention of a Whisper checkpoint's decoder; None each where there is no decoder."""

    def __init__(self, whisper: WhisperForConditionalGeneration | None, tokenizer=None):
        self.whisper, self.tokenizer = whisper, tokenizer
        self.kind = "even" if whisper is None else "attention"

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, device) -> "WordAligner":
        """`source` is a Hub id or folder of a Whisper checkpoint, with its decoder or without."""
        if AutoConfig.from_pretrained(source).architectures == ["WhisperEncoder"]:
            logger.warning(f"{source} has no decoder: the words' times are spread evenly over each clip")
            return cls(None)
        # Eager attention is the one that returns its weights.
        how = {"dtype": torch.float32, "attn_implementation": "eager"}
        whisper = load_safely(WhisperForConditionalGeneration.from_pretrained, source, **how)
        if not getattr(whisper.generation_config, "alignment_heads", None):
            logger.warning(f"{source} names no alignment heads: the words' times are spread evenly over each clip")
            return cls(None)
        return cls(whisper.to(device).eval(), AutoTokenizer.from_pretrained(source))

    def word_times(
        self, frames: torch.Tensor, text: str, num_frames: int, language: str | None = None
    ) -> list[int] | None:
        """
        Each word's first frame after it (20 ms a frame) in encoder output `frames` `(1, 1500, d_model)`, of which
        the first `num_frames` hold speech in `language` (see `whisper_language`).
        """
        words = text.split()
        if self.whisper is None or not words:
            return None
        pieces = text_ids([f" {word}" for word in words], self.tokenizer)
        tokens = [token for piece in pieces for token in piece]
        start = self._start_tokens(language)
        if len(start) + len(tokens) + 1 > self.whisper.config.max_target_positions or len(tokens) > num_frames:
            return None
        attention = self._attention(frames, start, tokens)[:, :num_frames]
        token_spans = monotonic_path(attention.numpy())
        lasts = torch.tensor([len(piece) for piece in pieces]).cumsum(0) - 1
        return [token_spans[last][1] for last in lasts.tolist()]

    def _start_tokens(self, language: str | None) -> list[int]:
        ids = self.tokenizer.convert_tokens_to_ids
        spoken = whisper_language(self.whisper.generation_config, language)
        task = [f"<|{spoken}|>", "<|transcribe|>"] if spoken else []
        return ids(["<|startoftranscript|>", *task, "<|notimestamps|>"])

    def _attention(self, frames: torch.Tensor, start: list[int], tokens: list[int]) -> torch.Tensor:
        """Attention `(tokens, frames)` of the token to be said next, averaged over the alignment heads."""
        ids = torch.tensor([start + tokens], device=frames.device)
        outputs = self.whisper.model.decoder(
            input_ids=ids, encoder_hidden_states=frames.float(), output_attentions=True, use_cache=False
        )
        heads = [
            outputs.cross_attentions[layer][0, head] for layer, head in self.whisper.generation_config.alignment_heads
        ]
        attention = torch.stack(heads)[:, len(start) - 1 : -1].float()  # the row that predicts a token looks at it
        return standardize(attention, 1).mean(0).detach().cpu()


__all__ = [
    "RidgeRegression",
    "WordAligner",
    "across_processes",
    "heard_clips",
    "speech_and_tokens",
    "spoken_tokens",
    "warm_start",
]
