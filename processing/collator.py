"""Rows -> batch: the prompt with its audio, the answer and its labels."""

import random

import torch
from transformers import BatchFeature

from .augmentation import mask_time
from .encoder_cache import EncoderCache
from .processing_sense import SenseProcessor, load_audio


class SenseCollator:
    """
    Builds training batches, left-padded: `<chat prompt with the audio first><answer><eos>`; labels on the answer only.

    Args:
        processor: the model's processor.
        prompt: the instruction, such as "Transcribe the speech.".
        cache: pooled encoder output of the same rows (their `cache_index` column), or None: rows are then decoded
            and their mel features computed here.
        time_mask: share of each clip's audio tokens that training hides, in spans (needs the cache); 0 for none.
    """

    def __init__(
        self, processor: SenseProcessor, prompt: str, cache: EncoderCache | None = None, time_mask: float = 0.0
    ):
        self.processor = processor
        self.prompt = processor.build_prompt(prompt)
        self.cache = cache
        self.time_mask = time_mask

    def __call__(self, rows: list[dict]) -> BatchFeature:
        """
        Returns:
            `input_ids`, `attention_mask`, `labels` of shape `(batch, length)`, and either `input_features`
            `(batch, mel_bins, 3000)` with `input_features_mask`, or `pooled_features` `(batch, tokens, d_model)` with
            `pooled_features_mask`.
        """
        audio, num_tokens = self._pooled(rows) if self.cache else self._features(rows)
        prompts = [self.processor.expand_audio(self.prompt, [n]) for n in num_tokens]
        return BatchFeature({**self._tokens(prompts, [row["text"] for row in rows]), **audio})

    def _features(self, rows: list[dict]) -> tuple[dict, list[int]]:
        clips = [load_audio(row["audio"]) for row in rows]
        features = self.processor.audio_features(clips)
        return dict(features), [self.processor.num_tokens(len(clip)) for clip in clips]

    def _pooled(self, rows: list[dict]) -> tuple[dict, list[int]]:
        clips = [self.cache.get(row["cache_index"], random.randrange(self.cache.variants)) for row in rows]
        lengths = torch.tensor([len(clip) for clip in clips])
        if self.time_mask:
            clips = [mask_time(clip, self.time_mask) for clip in clips]
        pooled = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        mask = torch.arange(pooled.shape[1]) < lengths[:, None]
        return {"pooled_features": pooled, "pooled_features_mask": mask}, lengths.tolist()

    def _tokens(self, prompts: list[str], answers: list[str]) -> dict:
        tokenizer = self.processor.tokenizer
        asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        said = [ids + [tokenizer.eos_token_id] for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]
        length = max(len(a) + len(s) for a, s in zip(asked, said))
        pads = [length - len(a) - len(s) for a, s in zip(asked, said)]
        triples = list(zip(pads, asked, said))
        return {
            "input_ids": torch.tensor([[tokenizer.pad_token_id] * p + a + s for p, a, s in triples]),
            "attention_mask": torch.tensor([[0] * p + [1] * (length - p) for p in pads]),
            "labels": torch.tensor([[-100] * (p + len(a)) + s for p, a, s in triples]),
        }
