"""sense-mini on its real backbones and on synthesised speech, which it never heard in training."""

import pytest
import torch

from eval_sense import shuffle_audio, understand
from processing.collator import SenseCollator
from processing.datasets import load_corpus
from processing.hub import load_checkpoint
from processing.synthesis import main as synthesize
from processing.tasks import SENTIMENTS, make_tasks


pytestmark = pytest.mark.real


def test_sense_mini_hears_and_answers_three_ways(tmp_path):
    synthesize([str(tmp_path / "speech"), "--grammar", "quickstart", "--train", "8", "--dev", "1", "--test", "1"])
    rows = load_corpus(str(tmp_path / "speech"), "train")
    model, processor = load_checkpoint("sense-mini")
    collator = SenseCollator(processor, make_tasks(processor.prompts, {"asr": 1}))

    @torch.inference_mode()
    def loss(dataset) -> float:
        return float(model(**collator([{**row, "task": "asr"} for row in dataset])).loss)

    assert loss(rows) < loss(shuffle_audio(rows)) - 0.5
    answers = understand(model, processor, rows.select(range(2)), ("asr", "ner", "sa"))
    assert all(answers["asr"]) and all(answers["ner"]) and set(answers["sa"]) <= set(SENTIMENTS)
