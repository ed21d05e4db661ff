"""Rows -> batch: the prompt with its audio, the answer and its labels."""

import random
from collections import Counter
from collections.abc import Iterable

import torch
from transformers import BatchFeature

from .augmentation import mask_time
from .encoder_cache import EncoderCache, pad
from .processing_sense import SenseProcessor, load_audio, text_ids
from .spoken_words import SpokenWords, delayed
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
        classifier: the model's `config.classifier`, or None; adds `classifier_labels`.
        spoken: the words said in the cache's clips, or None: `labels` then stand on the audio tokens as well.
    """

    def __init__(
        self,
        processor: SenseProcessor,
        tasks: dict[str, Task],
        cache: EncoderCache | None = None,
        time_mask: float = 0.0,
        classifier: dict | None = None,
        spoken: SpokenWords | None = None,
    ):
        self.processor = processor
        self.tasks = tasks
        self.prompts = {name: processor.build_prompt(task.prompt) for name, task in tasks.items()}
        self.cache = cache
        self.time_mask = time_mask
        self.classifier = classifier
        self.spoken = spoken

    def __call__(self, rows: list[dict]) -> BatchFeature:
        """
        Returns:
            `input_ids`, `attention_mask`, `labels` of shape `(batch, length)`, and either `input_features`
            `(batch, mel_bins, 3000)` with `input_features_mask`, or `pooled_features` `(batch, tokens, d_model)` with
            `pooled_features_mask`.
        """
        audio, said = self._pooled(rows) if self.cache else self._features(rows)
        num_tokens = [len(labels) for labels in said]
        prompts = [self.processor.expand_audio(self.prompts[row["task"]], [n]) for row, n in zip(rows, num_tokens)]
        answers = [self.tasks[row["task"]].target(row) for row in rows]
        extra = {}
        if self.classifier is not None:
            extra["classifier_labels"] = torch.tensor([classifier_label(row, self.classifier) for row in rows])
        return BatchFeature({**self._tokens(prompts, answers, said), **audio, **extra})

    def _features(self, rows: list[dict]) -> tuple[dict, list[list[int]]]:
        """Of the clips, and for each of their audio tokens what is to be learnt there: -100, nothing."""
        clips = [load_audio(row["audio"]) for row in rows]
        features = self.processor.audio_features(clips)
        return dict(features), [[-100] * self.processor.num_tokens(len(clip)) for clip in clips]

    def _pooled(self, rows: list[dict]) -> tuple[dict, list[list[int]]]:
        """As `_features`, from the cache; with `spoken`, words are to be learnt."""
        clips, said = zip(*map(self._augment, rows))
        return pad(clips), list(said)

    def _augment(self, row: dict) -> tuple[torch.Tensor, list[int]]:
        """One of the clip's speeds, partly hidden, as the row's seed draws: nothing else decides it."""
        index, draws = row["cache_index"], random.Random(row.get("seed"))
        variant = draws.randrange(self.cache.variants)
        clip = self.cache.get(index, variant)
        said = [-100] * len(clip)
        if self.spoken is not None:
            said = delayed(self.spoken.get(index, variant), self.processor.num_audio_tokens)
        return mask_time(clip, self.time_mask, draws) if self.time_mask else clip, said

    def _tokens(self, prompts: list[str], answers: list, heard: list[list[int]]) -> dict:
        tokenizer = self.processor.tokenizer
        asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        # A transcript is text, whatever stands in it: only the prompt has control tokens.
        said = [ids + [tokenizer.eos_token_id] for ids in text_ids(answers, tokenizer)]
        length = max(len(a) + len(s) for a, s in zip(asked, said))
        pads = [length - len(a) - len(s) for a, s in zip(asked, said)]
        labels = [self._prompt_labels(a, words) + s for a, s, words in zip(asked, said, heard)]
        return {
            "input_ids": torch.tensor([[tokenizer.pad_token_id] * p + a + s for p, a, s in zip(pads, asked, said)]),
            "attention_mask": torch.tensor([[0] * p + [1] * (length - p) for p in pads]),
            "labels": torch.tensor([[-100] * p + row for p, row in zip(pads, labels)]),
        }

    def _prompt_labels(self, asked: list[int], heard: list[int]) -> list[int]:
        """-100, and what is to be said at each audio token: as all labels, one step on from where it is said."""
        labels, first = [-100] * len(asked), asked.index(self.processor.audio_token_id) + 1
        labels[first : first + len(heard)] = heard
        return labels


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
