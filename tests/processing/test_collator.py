"""Rows -> batches, from audio and from the encoder cache."""

import random

import pytest
import torch

from processing.augmentation import change_speed, mask_time, replace_tokens, stretch_time
from processing.collator import SenseCollator, classifier_label, tag_weights
from processing.encoder_cache import build_cache
from processing.tasks import make_tasks
from tests.conftest import make_corpus, tone


TASKS = make_tasks({"asr": "Transcribe the speech.", "ner": "Tag the entities.", "sa": "Which sentiment?"})


@pytest.fixture
def corpus():
    dataset = make_corpus(6)
    return dataset.add_column("cache_index", list(range(len(dataset)))).add_column("task", ["asr"] * len(dataset))


def test_labels_stand_on_the_answer_and_its_end_alone(sense, corpus):
    _, processor = sense
    batch = SenseCollator(processor, TASKS)(list(corpus))
    for row, ids, labels, mask in zip(corpus, batch["input_ids"], batch["labels"], batch["attention_mask"]):
        answer = labels[labels != -100]
        assert answer[-1] == processor.tokenizer.eos_token_id
        assert processor.decode(answer, skip_special_tokens=True) == row["text"]
        assert torch.equal(ids[-len(answer) :], answer)
        asked = processor.decode(ids[mask.bool()][: -len(answer)])
        assert asked.endswith("Transcribe the speech.<|im_end|>\n<|im_start|>assistant\n")


def test_training_prompt_is_the_one_of_inference(sense, corpus):
    _, processor = sense
    row = corpus[0]
    batch = SenseCollator(processor, TASKS)([row])
    request = processor.apply_transcription_request([row["audio"]])
    length = request["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], request["input_ids"])
    assert torch.equal(batch["input_features"], request["input_features"])


def test_a_batch_may_mix_tasks_each_with_its_prompt_and_answer(sense, corpus):
    _, processor = sense
    labels = {"text": "the user speaks", "entities": [["PERSON", 4, 4]], "sentiment": "Positive"}
    rows = [{**corpus[i], **labels, "task": task} for i, task in enumerate(TASKS)]
    batch = SenseCollator(processor, TASKS)(rows)
    answers = ["the user speaks", "the <PERSON> user </PERSON> speaks", "Positive"]
    for ids, labels, answer, task in zip(batch["input_ids"], batch["labels"], answers, TASKS.values()):
        written = processor.decode(labels[labels != -100], skip_special_tokens=True)
        assert written == processor.decode(processor.tokenizer(answer)["input_ids"], skip_special_tokens=True)
        assert f"{task.prompt}<|im_end|>" in processor.decode(ids)


def test_classifier_labels():
    tags = {"labels": ["PERSON", "PLACE"], "multi_label": True}
    classes = {"labels": ["Negative", "Neutral", "Positive"], "multi_label": False}
    row = {"entities": [["PLACE", 0, 1], ["PLACE", 3, 1], ["LAW", 5, 1]], "sentiment": "Positive"}
    unlabelled = {"entities": None, "sentiment": None}
    assert classifier_label(row, tags) == [0, 1] and classifier_label({**row, "entities": []}, tags) == [0, 0]
    assert classifier_label(unlabelled, tags) == [-100, -100]
    assert classifier_label(row, classes) == 2 and classifier_label(unlabelled, classes) == -100


def test_tag_weights_are_all_tags_over_those_of_the_class():
    entities = [[["A", 0, 1]] * 6 + [["B", 0, 1]], None, [["B", 0, 1], ["D", 0, 1]]]
    assert tag_weights(entities, ["A", "B", "C"], most=20) == [8 / 6, 4, 20]
    assert tag_weights(entities, ["A", "B", "C"], most=3) == [8 / 6, 3, 3]


def test_cache_gives_the_loss_of_the_audio(sense, corpus, tmp_path):
    model, processor = sense
    cache = build_cache(model, processor, corpus, tmp_path)
    rows = list(corpus)
    from_audio = model(**SenseCollator(processor, TASKS)(rows)).loss
    from_cache = model(**SenseCollator(processor, TASKS, cache)(rows)).loss
    torch.testing.assert_close(from_cache, from_audio, rtol=1e-3, atol=1e-3)  # the cache is fp16


def test_faster_is_shorter():
    assert len(change_speed(tone(1.0), 1.25)) == pytest.approx(16000 / 1.25, abs=2)
    assert change_speed(tone(1.0), 1.0).tolist() == tone(1.0).tolist()


def test_mask_hides_about_the_share_asked_for_and_leaves_the_rest():
    torch.manual_seed(0)
    pooled = torch.randn(100, 8)
    hidden = (mask_time(pooled, 0.2, random.Random(0)) != pooled).any(1).sum()
    assert 10 <= hidden <= 24
    assert torch.equal(mask_time(pooled, 0.0, random.Random(0)), pooled)


def test_stretched_clips_keep_their_ends_and_their_limit():
    pooled = torch.linspace(0, 1, 100)[:, None].expand(100, 8).half()
    lengths = set()
    for seed in range(20):
        stretched = stretch_time(pooled, 0.1, random.Random(seed), longest=105)
        assert stretched.dtype == torch.float16 and stretched.shape[1] == 8
        assert stretched[0, 0] < 0.01 and stretched[-1, 0] > 0.99 and (stretched.diff(dim=0) >= 0).all()
        lengths.add(len(stretched))
    assert min(lengths) < 95 and max(lengths) == 105


def test_noise_in_an_answer_is_read_and_not_learnt(sense, corpus, tmp_path):
    _, processor = sense
    rows = [{**row, "seed": f"0/0/{index}"} for index, row in enumerate(corpus)]
    plain = SenseCollator(processor, TASKS)(rows)
    noisy = SenseCollator(processor, TASKS, answer_noise=0.5)(rows)
    assert torch.equal(plain["labels"], noisy["labels"]) and torch.equal(
        plain["attention_mask"], noisy["attention_mask"]
    )
    changed = plain["input_ids"] != noisy["input_ids"]
    assert changed.any() and not changed[plain["labels"] == -100].any()
    assert torch.equal(noisy["input_ids"], SenseCollator(processor, TASKS, answer_noise=0.5)(rows)["input_ids"])
    assert not set(noisy["input_ids"][changed].tolist()) & set(processor.tokenizer.added_tokens_decoder)


def test_about_the_share_asked_for_is_replaced():
    replaced = replace_tokens([1] * 1000, 0.2, random.Random(0), [2, 3])
    assert 150 < replaced.count(2) + replaced.count(3) < 250 and replaced.count(1) > 750
