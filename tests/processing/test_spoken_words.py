"""The word loss: words laid along clips, and the labels that they become."""

import re

import pytest
import torch

from processing.collator import SenseCollator
from processing.encoder_cache import build_cache
from processing.spoken_words import SpokenWords, delayed, find_spoken_words
from processing.tasks import make_tasks
from tests.conftest import make_corpus


TASKS = make_tasks({"asr": "Transcribe the speech."})


class Clips:
    """A cache of two versions of each clip."""

    variants = 2

    def __init__(self, clips):
        self.clips = clips

    def get(self, index, variant=0):
        return self.clips[index][variant]


def test_words_are_found_where_they_are_said(sense):
    """Audio whose features the adapter maps to embeddings of words: slowly, and once more at twice the speed."""
    model, processor = sense
    adapter, embeddings = model.model.multi_modal_projector, model.get_input_embeddings().weight.detach()
    ids = processor.tokenizer("the user speaks", add_special_tokens=False)["input_ids"]
    slow = torch.tensor(ids).repeat_interleave(4)
    wanted = embeddings[torch.stack([slow[::2].repeat_interleave(2), slow])].float()
    map_back = torch.linalg.lstsq  # the adapter is linear behind its norm: features that it maps to what is wanted
    with torch.no_grad():
        adapter.norm = torch.nn.Identity()
        width = adapter.linear.in_features
        adapter.linear.weight.copy_(torch.randn_like(adapter.linear.weight))
        adapter.linear.bias.zero_()
        clip = [map_back(adapter.linear.weight, vectors.T).solution.T for vectors in wanted]
    assert clip[1].shape == (len(slow), width)
    found = find_spoken_words(model, processor.tokenizer, ["the user speaks", ""], Clips([clip, clip]))
    assert found.get(0, 1).tolist() == slow.tolist()
    assert set(found.get(1, 0).tolist()) == {-100} and len(found.get(1, 0)) == len(slow)


def test_what_was_found_is_kept(tmp_path):
    words = SpokenWords(torch.arange(6).int(), torch.tensor([0, 1, 3, 5, 6]), 2)
    words.save(tmp_path / "words.safetensors")
    found = SpokenWords.load(tmp_path / "words.safetensors")
    assert [found.get(clip, variant).tolist() for clip in (0, 1) for variant in (0, 1)] == [[0], [1, 2], [3, 4], [5]]
    assert [path.name for path in tmp_path.iterdir()] == ["words.safetensors"]
    (tmp_path / "words.safetensors").write_bytes(b"")
    for path in (tmp_path / "words.safetensors", tmp_path / "none"):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: can't be read .*train into a new folder"):
            SpokenWords.load(path)


def test_words_are_asked_for_a_quarter_of_a_second_later():
    said = torch.tensor([5, 6, 7, 8])
    assert delayed(said, 250) == [-100, -100, 5, 6]
    assert delayed(said, 125) == [-100, 5, 6, 7]
    assert delayed(said[:1], 500) == [-100]


def test_labels_stand_on_the_audio_one_step_on(sense, tmp_path):
    model, processor = sense
    corpus = make_corpus(3)
    rows = [{**row, "cache_index": index, "task": "asr"} for index, row in enumerate(corpus)]
    cache = build_cache(model, processor, corpus, tmp_path)
    words = find_spoken_words(model, processor.tokenizer, corpus["text"], cache)
    plain = SenseCollator(processor, TASKS, cache)(rows)
    batch = SenseCollator(processor, TASKS, cache, spoken=words)(rows)
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    for index, (ids, labels, without) in enumerate(zip(batch["input_ids"], batch["labels"], plain["labels"])):
        audio = (ids == processor.audio_token_id).nonzero().flatten() + 1
        assert labels[audio].tolist() == delayed(words.get(index), processor.num_audio_tokens)
        labels[audio] = -100
        assert torch.equal(labels, without)
    assert model(**SenseCollator(processor, TASKS, cache, spoken=words)(rows)).loss.isfinite()
