"""Model cards."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from processing.model_card import RECIPE, eval_results, make_card, record_training
from tests.hub.conftest import compose


METRICS = {
    "wer": 12.345,
    "wer_interval": [11.0, 13.5],
    "ner_f1": 40.0,
    "ner_f1_interval": [30.0, 50.0],
    "ner_malformed_rate": 2.5,
    "sa_f1": 50.126,
    "sa_f1_interval": [45.0, 55.0],
    "n_utterances": 1234,
    "audio_seconds": 7200.0,
    "controls": {"always Neutral": {"sa_f1": 20.0, "sa_f1_interval": [18.0, 22.0]}},
    "measured_on": {
        "dataset": "asapp/slue",
        "on_hub": True,
        "config_name": "voxpopuli",
        "split": "test",
        "num_beams": 5,
    },
}
STAGE = {
    "dataset": "my-speech",
    "on_hub": False,
    "languages": ["en"],
    "clips": 1000,
    "hours": 1.5,
    "trained_parameters": {"adapter": 3000, "LoRA": 0, "classifier": 0},
    "steps": 200,
    "epochs": 2.0,
    "recipe": {"tasks": {"asr": 1}, "learning_rate": 0.001, "max_minutes": None},
    "versions": {"torch": "2.14", "transformers": "5.24"},
}


def card_of(whole, tmp_path, **kwargs):
    card = make_card(whole["model"], whole["processor"], repo_id="tester/sense", **kwargs)
    card.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_a_card_tells_what_is_known(whole, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "training.json").write_text(json.dumps([None, STAGE]))
    card = card_of(whole, tmp_path, run=tmp_path, metrics=[tmp_path], datasets=["org/speech"], license="apache-2.0")
    data = card.data.to_dict()
    assert data["base_model"] == ["tester/whisper", "tester/llama"] and data["datasets"] == ["org/speech"]
    assert (data["language"], data["license"], data["library_name"]) == (["en"], "apache-2.0", "transformers")
    assert data["pipeline_tag"] == "automatic-speech-recognition"
    assert "named-entity-recognition" in data["tags"] and "sentiment-analysis" not in data["tags"]
    found = {(r.task_type, r.metric_name, r.metric_value) for r in card.data.eval_results}
    assert found == {
        ("automatic-speech-recognition", "WER", 12.35),
        ("token-classification", "NER F1", 40.0),
        ("audio-classification", "sentiment macro F1", 50.13),
    }
    assert {(r.dataset_type, r.dataset_config, r.dataset_split) for r in card.data.eval_results} == {
        ("asapp/slue", "voxpopuli", "test")
    }
    for told in (
        "| SENSE | 12.3 [11.0, 13.5] | 40.0 [30.0, 50.0] | 50.1 [45.0, 55.0] |",
        "| always Neutral | - | - | 20.0 [18.0, 22.0] |",
        "**asapp/slue voxpopuli**, test split; 1,234 utterances, 2.00 h; 5 beams.",
        "### Stage 1\n\nHow it was trained was not recorded.",
        "my-speech: 1,000 clips, 1.50 h; 200 steps, 2.00 epochs; trained parameters: adapter 3,000;",
        "| learning_rate | 0.001 |",
        "(2.5 % of the answers at worst, in the scores below)",
    ):
        assert told in card.text, told
    assert "max_minutes" not in card.text
    total = sum(parameter.numel() for parameter in whole["model"].parameters())
    assert f"| all | {total:,} |" in card.text


def test_a_card_claims_nothing_that_is_not_known(whole, tmp_path):
    card = card_of(whole, tmp_path)
    assert not {"language", "license", "datasets", "metrics", "model-index"} & card.data.to_dict().keys()
    for told in ("It was not scored on a test set.", "How it was trained was not recorded.", "None was stated"):
        assert told in card.text
    (tmp_path / "metrics.json").write_text(json.dumps({k: v for k, v in METRICS.items() if k != "measured_on"}))
    card = card_of(whole, tmp_path, metrics=[tmp_path])
    assert card.data.eval_results is None and "Data not recorded; 1,234 utterances" in card.text


def test_results_are_of_the_dataset_that_was_scored():
    folder = {**METRICS, "measured_on": {**METRICS["measured_on"], "dataset": "mine", "on_hub": False}}
    assert {result.dataset_name for result in eval_results(folder)} == {"mine"}


@pytest.mark.parametrize(
    "how, told",
    [
        ({"max_samples": 100}, "test split, its first 100 rows at most; 1,234"),
        ({"dtype": "bfloat16", "quantization": "int8", "quantize": "int8"}, "bfloat16; int8 weights, quantised on"),
        ({"dtype": "bfloat16", "quantization": "int8", "quantize": None}, "5 beams; bfloat16; int8 weights."),
    ],
)
def test_scores_of_a_part_or_of_other_weights_are_not_the_models_results(whole, tmp_path, how, told):
    found = {**METRICS, "measured_on": {**METRICS["measured_on"], **how}}
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    card = card_of(whole, tmp_path, metrics=[tmp_path])
    assert told in card.text
    assert bool(card.data.eval_results) == (how.get("max_samples") is None and how.get("quantize") is None)


def test_a_checkpoint_has_the_history_of_its_run_and_its_own_steps(whole, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-50"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "training.json").write_text(json.dumps([None, STAGE]))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 50, "epoch": 0.5}))
    assert "1.50 h; 50 steps, 0.50 epochs;" in card_of(whole, tmp_path, run=checkpoint).text
    recipe = {name: None for name in RECIPE} | {"dataset_dir": str(tmp_path), "init_from": str(checkpoint)}
    recipe |= {"streaming": False, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    recipe["max_steps"] = 7
    state = SimpleNamespace(global_step=7, epoch=1.0)
    record_training(tmp_path, recipe, {"duration": [1.0], "language": ["en"]}, state, {"adapter": 3})
    stages = json.loads((tmp_path / "training.json").read_text())
    assert [stage and (stage["dataset"], stage["steps"]) for stage in stages] == [
        None,
        ("my-speech", 50),
        (tmp_path.name, 7),
    ]
    assert "7 steps of 12 rows, 1.00 epochs" in card_of(whole, tmp_path, run=tmp_path).text


def test_weights_from_packages_are_said_to_be(whole, tmp_path, monkeypatch):
    """Nobody can load such an adapter with transformers alone, nor with the Hub's weights."""
    named = {"audio": {"id": "whisper-base@packages"}, "text": {"id": "SmolLM2-135M-Instruct@packages"}}
    monkeypatch.setattr(whole["model"].config, "backbones", named)
    card = card_of(whole, tmp_path, adapter_only=True, notes="It heard *dev-clean*.\n")
    for told in ("SmolLM2-135M-Instruct@packages is the Q4_1", 'load_checkpoint("tester/sense")', "are refused"):
        assert told in card.text, told
    assert "trust_remote_code" not in card.text and "pip install 'transformers" not in card.text
    assert card.text.index("It heard *dev-clean*.") < card.text.index("## Use")


@pytest.mark.parametrize("how, needs", [("int8", "torchao"), ("int4", "bitsandbytes accelerate")])
def test_the_card_of_a_quantised_model(backbones, whole, how, needs):
    model, processor = compose(backbones)
    total = sum(parameter.numel() for parameter in model.parameters())
    model.quantize(how)
    model.config.backbones["text"]["gguf_file"] = "llama.gguf"
    text = str(make_card(model, processor, repo_id="tester/sense"))
    assert f"| all | {total:,} |" in text and f"soundfile {needs}    #" in text
    adapter = str(make_card(model, processor, repo_id="tester/sense", adapter_only=True))
    assert f"soundfile {needs} gguf    #" in adapter


@pytest.mark.parametrize("content", ["{", "[]", '{"wer": 1.0}'])
def test_metrics_that_are_refused(whole, tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match="metrics.json: .*give a metrics.json of eval_sense.py"):
        card_of(whole, tmp_path, metrics=[tmp_path])
