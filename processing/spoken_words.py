"""
The word loss: at each audio token the language model also learns which token was just said.

Answers alone teach slowly what the audio holds: a model must find out where in it each word is before it can learn
from the word. Laid along the clip (processing/alignment.py), the transcript tells it at once. Inference is unchanged.
Our own addition: the paper learns from answers, and from a classifier of the clip.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .alignment import word_times
from .encoder_cache import EncoderCache
from .processing_sense import MAX_SECONDS
from .warm_start import spoken_tokens


FILE = "spoken_words.safetensors"
DELAY = (
    0.24  # seconds after its place at which a token is asked for: the model looks back only, and must have heard it
)


class SpokenWords:
    """
    Of each clip and variant of an encoder cache, the token that is said at each audio token.

    Args:
        tokens: of all clips, one after the other.
        starts: where each variant of each clip begins, and the end.
        variants: of each clip.
    """

    def __init__(self, tokens: torch.Tensor, starts: torch.Tensor, variants: int):
        self.tokens, self.starts, self.variants = tokens, starts, variants

    def get(self, index: int, variant: int = 0) -> torch.Tensor:
        """`(audio tokens,)` of clip `index`."""
        at = index * self.variants + variant
        return self.tokens[self.starts[at] : self.starts[at + 1]]

    def save(self, path: Path):
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({"tokens": self.tokens, "starts": self.starts, "variants": torch.tensor(self.variants)}, temporary)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "SpokenWords":
        """Raises ValueError: not there, or not whole."""
        try:
            found = load_file(path)
            return cls(found["tokens"], found["starts"], int(found["variants"]))
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"{path}: can't be read ({error}); the run that began with it can't go on: train into a new folder"
            ) from error


@torch.inference_mode()
def find_spoken_words(model, tokenizer, texts: list[str], cache: EncoderCache) -> SpokenWords:
    """
    Lays each transcript along its clip, in every variant of the cache, by the adapter as it is: after a warm start or
    an earlier stage. One that holds no word says nothing: -100 at every audio token.
    """
    adapter, embeddings = model.model.multi_modal_projector, model.get_input_embeddings().weight
    found, device = [], adapter.linear.weight.device
    for index, text in enumerate(tqdm(texts, desc="spoken words", unit="clip")):
        for variant in range(cache.variants):
            pooled = cache.get(index, variant)
            times = word_times(adapter(pooled.to(device)), text.split(), tokenizer, embeddings, seconds_per_frame=1)
            said = spoken_tokens(
                text,
                [round(end) for _, end in times],
                num_tokens=len(pooled),
                frames_per_token=1,
                tokenizer=tokenizer,
            )
            found.append(torch.full((len(pooled),), -100) if said is None else said)
    starts = torch.tensor([0, *(len(said) for said in found)]).cumsum(0)
    return SpokenWords(torch.cat(found).int(), starts, cache.variants)


def delayed(said: torch.Tensor, num_audio_tokens: int) -> list[int]:
    """What is to be said at each audio token, DELAY later than it is heard; -100 at the first ones."""
    steps = min(max(1, round(DELAY * num_audio_tokens / MAX_SECONDS)), len(said))
    return [-100] * steps + said[: len(said) - steps].tolist()


__all__ = ["FILE", "SpokenWords", "delayed", "find_spoken_words"]
