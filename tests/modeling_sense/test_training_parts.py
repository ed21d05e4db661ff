"""What training adds to the network: classifier, its share of the loss, LoRA merged, both kinds of adapter folder."""

import json

import pytest
import torch

from modeling_sense import SenseClassifier, SenseForConditionalGeneration
from modeling_sense.configuration_sense import SenseConfig
from processing import SenseProcessor
from tests.conftest import tone


TAGS = ["PERSON", "PLACE", "WHEN"]


@pytest.fixture
def sense(tiny_whisper, tiny_llama):
    torch.manual_seed(0)
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama)
    model.model.multi_modal_projector.linear.weight.data.normal_()
    return model, SenseProcessor.from_backbones(tiny_whisper, tiny_llama)


def batch(processor, seconds=(0.5, 1.7, 0.9)):
    inputs = processor.apply_request([tone(s, seed=i) for i, s in enumerate(seconds)])
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-3] = -100
    return inputs


def test_logits_do_not_depend_on_the_padding(sense):
    model, _ = sense
    model.add_classifier(TAGS)
    torch.manual_seed(1)
    clip = torch.randn(1, 9, model.config.hidden_size)
    short = model.classifier(clip, torch.tensor([9]))
    for padding in (1, 2, 7, 30):
        padded = torch.cat([clip, torch.randn(1, padding, clip.shape[2])], dim=1)
        torch.testing.assert_close(model.classifier(padded, torch.tensor([9])), short)
    assert not torch.allclose(model.classifier(clip[:, :8], torch.tensor([8])), short)


def test_loss_of_tags_is_the_weighted_cross_entropy_of_the_labelled_clips(sense):
    model, _ = sense
    model.add_classifier(TAGS)
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [3.0, 3.0, 3.0]])
    labels = torch.tensor([[1, 0, 1], [-100, -100, -100], [0, 0, 1]])
    weights = torch.tensor([1.0, 2.0, 5.0])
    p = logits.sigmoid()
    terms = -(labels * weights * p.log() + (1 - labels) * (1 - p).log())
    expected = (terms[0].mean() + terms[2].mean()) / 2
    torch.testing.assert_close(model.classifier.loss(logits, labels, weights), expected)
    torch.testing.assert_close(model.classifier.loss(logits, labels, weights, num_clips=8), expected / 4)


def test_loss_of_classes_skips_clips_without_one(sense):
    model, _ = sense
    model.add_classifier(["Negative", "Neutral", "Positive"], multi_label=False)
    logits = torch.randn(3, 3)
    expected = (-logits.log_softmax(1)[0, 2] - logits.log_softmax(1)[2, 0]) / 2
    torch.testing.assert_close(model.classifier.loss(logits, torch.tensor([2, -100, 0])), expected)
    assert model.classifier.loss(logits, torch.tensor([-100] * 3)) == 0


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_loss_is_the_papers_mixture_in_training_and_plain_in_evaluation(sense, alpha):
    model, processor = sense
    inputs = batch(processor)
    labels = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    plain = model.train()(**inputs).loss
    model.add_classifier(TAGS, alpha=alpha)
    mixed = model.train()(**inputs, classifier_labels=labels).loss
    counts = (inputs["input_ids"] == processor.audio_token_id).sum(1)
    embeds = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
    padded = torch.nn.utils.rnn.pad_sequence(embeds.split(counts.tolist()), batch_first=True)
    extra = model.classifier.loss(model.classifier(padded, counts), labels)
    torch.testing.assert_close(mixed, (1 - alpha) * plain + alpha * extra)
    torch.testing.assert_close(model.eval()(**inputs, classifier_labels=labels).loss, plain)


def test_gradients_reach_adapter_and_classifier_alone(sense):
    model, processor = sense
    model.add_classifier(TAGS)
    model.train()(**batch(processor), classifier_labels=torch.tensor([[1, 0, 0]] * 3)).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == model.trained_state_dict().keys()
    assert any(name.startswith("classifier.") for name in with_gradient)


def test_three_convolutions_and_few_parameters():
    config = SenseConfig()
    config.classifier = {
        "labels": ["a"] * 7,
        "multi_label": True,
        "weights": None,
        "channels": [16, 32, 32],
        "alpha": 0.2,
    }
    with torch.device("meta"):
        classifier = SenseClassifier(config)
    assert len(classifier.convolutions) == 3
    # LayerNorm 2 * 2048; convolutions of 5 x 5; 32 channels of 32 = 2048 / 4^3 columns each to 7 tags.
    expected = 4096 + (25 * 16 + 16) + (25 * 16 * 32 + 32) + (25 * 32 * 32 + 32) + 32 * 32 * 7 + 7
    assert sum(p.numel() for p in classifier.parameters()) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": []}, "labels must be 1 to 256 names"),
        ({"labels": [7]}, "labels must be 1 to 256 names"),
        ({"weights": [1.0]}, "weights must be a number for each of 3 labels"),
        ({"weights": [1.0, "a", 2.0]}, "weights must be a number for each of 3 labels"),
        ({"alpha": 1.5}, "alpha must be within 0 and 1, found 1.5"),
        ({"alpha": "x"}, "alpha must be within 0 and 1, found 'x'"),
        ({"channels": [100_000, 100_000, 1]}, "channels must be 3 numbers up to 256"),  # a terabyte
        ({"channels": "abc"}, "channels must be 3 numbers up to 256"),
        ({"multi_label": "no"}, "multi_label must be true or false"),
    ],
)
def test_bad_classifiers_are_refused(sense, changes, message):
    with pytest.raises(ValueError, match=message):
        sense[0].add_classifier(**({"labels": TAGS} | changes))


def test_dropout_of_a_new_lora_is_off_where_the_model_is_not_in_training(sense):
    model, processor = sense
    model.eval().add_lora(r=4, lora_dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    inputs = processor.apply_request([tone(1.0)])
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(model.train()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("part", ["lora", "classifier"])
def test_parts_are_added_to_a_composed_model(tiny_whisper, tiny_llama, part):
    with pytest.raises(ValueError, match=f"compose the model, then call add_{part}"):
        SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama, **{part: {"r": 4}})


def test_merged_lora_gives_the_same_logits_and_one_matrix_less(sense, tmp_path):
    model, processor = sense
    inputs = processor.apply_request([tone(1.0)])
    before = model(**inputs).logits
    model.add_lora(r=4, lora_alpha=8)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2)
    adapted = model(**inputs).logits
    model.merge_adapter()
    assert not torch.allclose(adapted, before)
    torch.testing.assert_close(model(**inputs).logits, adapted, rtol=1e-4, atol=1e-4)
    assert not any(".lora_" in name or "base_layer" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="no LoRA to merge"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="an adapter can't hold"):
        model.save_adapter(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole")
    loaded = SenseForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.config.backbones["merged_lora"]["r"] == 4


def test_adapter_folder_for_inference_has_no_classifier(sense, tmp_path, tiny_whisper, tiny_llama):
    model, _ = sense
    model.add_classifier(TAGS, weights=[1.0, 2.0, 3.0])
    model.save_adapter(tmp_path / "training")
    model.save_adapter(tmp_path / "inference", inference=True)

    def size(folder):
        return (tmp_path / folder / "adapter_model.safetensors").stat().st_size

    assert size("inference") < size("training")
    for folder, classified in (("training", True), ("inference", False)):
        fresh = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama)
        fresh.load_adapter(tmp_path / folder)
        assert (fresh.classifier is not None) == classified
        for name, weight in fresh.trained_state_dict().items():
            assert torch.equal(weight, model.trained_state_dict()[name])
    with pytest.raises(ValueError, match="classifier is None there"):
        model.load_adapter(tmp_path / "inference")


def test_removed_classifier_leaves_nothing(sense, tmp_path):
    model, _ = sense
    model.add_classifier(TAGS)
    model.remove_classifier()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("classifier") is None
    assert not any("classifier" in name for name in model.state_dict())


def test_classifier_is_kept_by_save_pretrained(sense, tmp_path):
    model, _ = sense
    model.add_classifier(TAGS)
    model.save_pretrained(tmp_path)
    loaded = SenseForConditionalGeneration.from_pretrained(tmp_path)
    for name, weight in model.classifier.state_dict().items():
        assert torch.equal(loaded.classifier.state_dict()[name], weight)
    assert all(p.requires_grad for p in loaded.classifier.parameters())


def test_lora_of_tinyllama_has_the_papers_size():
    """6,127,616 parameters: r = 32 on q, k, v of 22 layers; k and v are 256 wide."""
    with torch.device("meta"):
        model = SenseForConditionalGeneration(SenseConfig())
        model.add_lora()
    assert sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n) == 6_127_616
    assert not any("audio_tower" in n for n, _ in model.named_parameters() if ".lora_" in n)
