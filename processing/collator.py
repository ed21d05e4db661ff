"""Rows -> batch: the prompt with its audio, the answer and its labels."""

import random
from collections import Counter
from collections.abc import Iterable

import torch
from transformers import BatchFeature

from .augmentation import mask_time, replace_tokens, stretch_time
from .encoder_cache import EncoderCache, pad
from .processing_sense import SenseProcessor, load_audio, text_ids
from .tasks import Task


class SenseCollator:
    """
    Builds training batches, left-padded: `<chat prompt with the audio first><answer><eos>`; labels on the answer only.

    Args:
        processor: the model's processor.
        tasks: by name, as `make_tasks` gives them. A row's `task` column says which one it is for.
        cache: pooled encoder output of the same rows (their `cache_index` column), or None: rows are then decoded
            and their mel features computed here. Of several speeds in it, a row's `seed` column draws one.
        time_mask: share of each clip's audio tokens that training hides, in spans that `seed` draws (needs the cache);
            0 for none.
        time_stretch: the largest share of its audio tokens that a clip gains or loses, drawn likewise.
        answer_noise: share of the answer's tokens in whose place the model reads random ones, drawn likewise. The
            labels stay: what comes next must then be heard, it can't be told from the words before alone.
        classifier: the model's `config.classifier`, or None; adds `classifier_labels`.
    """

    def __init__(
        self,
        processor: SenseProcessor,
        tasks: dict[str, Task],
        cache: EncoderCache | None = None,
        *,
        time_mask: float = 0.0,
        time_stretch: float = 0.0,
        answer_noise: float = 0.0,
        classifier: dict | None = None,
    ):
        self.processor = processor
        self.tasks = tasks
        self.prompts = {name: processor.build_prompt(task.prompt) for name, task in tasks.items()}
        self.cache = cache
        self.time_mask, self.time_stretch, self.answer_noise = time_mask, time_stretch, answer_noise
        self.classifier = classifier
        if answer_noise:  # without tokens for audio and control: in an answer they would be another prompt
            added = processor.tokenizer.added_tokens_decoder
            self.ordinary_tokens = [token for token in range(len(processor.tokenizer)) if token not in added]

    def __call__(self, rows: list[dict]) -> BatchFeature:
        """
        Returns:
            `input_ids`, `attention_mask`, `labels` of shape `(batch, length)`, and either `input_features`
            `(batch, mel_bins, 3000)` with `input_features_mask`, or `pooled_features` `(batch, tokens, d_model)` with
            `pooled_features_mask`.
        """
        audio, num_tokens = self._pooled(rows) if self.cache else self._features(rows)
        prompts = [self.processor.expand_audio(self.prompts[row["task"]], [n]) for row, n in zip(rows, num_tokens)]
        answers = [self.tasks[row["task"]].target(row) for row in rows]
        extra = {}
        if self.classifier is not None:
            extra["classifier_labels"] = torch.tensor([classifier_label(row, self.classifier) for row in rows])
        return BatchFeature({**self._tokens(prompts, answers, rows), **audio, **extra})

    def _features(self, rows: list[dict]) -> tuple[dict, list[int]]:
        clips = [load_audio(row["audio"]) for row in rows]
        features = self.processor.audio_features(clips)
        return dict(features), [self.processor.num_tokens(len(clip)) for clip in clips]

    def _pooled(self, rows: list[dict]) -> tuple[dict, list[int]]:
        clips = [self._augment(row) for row in rows]
        return pad(clips), [len(clip) for clip in clips]

    def _augment(self, row: dict) -> torch.Tensor:
        """The clip, stretched, partly hidden, as the row's seed draws: nothing else decides it."""
        draws = random.Random(row.get("seed"))  # rows of an evaluation have none, and nothing is drawn for them
        clip = self._clip(row, draws)
        if self.time_stretch:
            clip = stretch_time(clip, self.time_stretch, draws, self.processor.num_audio_tokens)
        return mask_time(clip, self.time_mask, draws) if self.time_mask else clip

    def _clip(self, row: dict, draws: random.Random) -> torch.Tensor:
        """One of its speeds."""
        return self.cache.get(row["cache_index"], draws.randrange(self.cache.variants))

    def _tokens(self, prompts: list[str], answers: list, rows: list[dict]) -> dict:
        tokenizer = self.processor.tokenizer
        asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        # A transcript is text, whatever stands in it: only the prompt has control tokens.
        said = [ids + [tokenizer.eos_token_id] for ids in text_ids(answers, tokenizer)]
        read = [self._add_noise(ids, row) for ids, row in zip(said, rows)] if self.answer_noise else said
        length = max(len(a) + len(s) for a, s in zip(asked, said))
        pads = [length - len(a) - len(s) for a, s in zip(asked, said)]
        return {
            "input_ids": torch.tensor([[tokenizer.pad_token_id] * p + a + r for p, a, r in zip(pads, asked, read)]),
            "attention_mask": torch.tensor([[0] * p + [1] * (length - p) for p in pads]),
            "labels": torch.tensor([[-100] * (p + len(a)) + s for p, a, s in zip(pads, asked, said)]),
        }

    def _add_noise(self, ids: list[int], row: dict) -> list[int]:
        return replace_tokens(ids, self.answer_noise, random.Random(f"{row['seed']}/answer"), self.ordinary_tokens)


def classifier_label(row: dict, classifier: dict) -> list[int] | int:
    """
    What `SenseClassifier` learns of a row: for tags 0 or 1 each, for classes the index; -100 where it has no label.
    """
    labels = classifier["labels"]
    if not classifier["multi_label"]:
        return labels.index(row["sentiment"]) if row["sentiment"] in labels else -100
    if row["entities"] is None:
        return [-100] * len(labels)
    present = {tag for tag, _, _ in row["entities"]}
    return [int(label in present) for label in labels]


def tag_weights(entities: Iterable[list | None], tags: list[str], most: float) -> list[float]:
    """
    Weight of each tag: all tags / tags of that class, over the training rows' `entities` (paper: classifier), no more
    than `most`, which a tag that never occurs gets.
    """
    counts = Counter(tag for found in entities for tag, _, _ in found or [])
    total = sum(counts[tag] for tag in tags)
    return [min(most, total / counts[tag]) if counts[tag] else most for tag in tags]
