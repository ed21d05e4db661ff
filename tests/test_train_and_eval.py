"""train_sense.py and eval_sense.py as their users call them, on tiny backbones."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import spacy
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import WhisperModel

import eval_sense
import modeling_sense.modeling_sense
import train_sense
from benchmarks import slam_asr
from modeling_sense import QUANTIZATIONS, SenseModel
from processing import SenseProcessor, report
from processing.collator import SenseCollator
from processing.datasets import from_rows, load_corpus
from processing.hub import export_model, load_checkpoint
from processing.processing_sense import text_ids
from processing.questions import Mixture, spread, usual_length, usual_rate
from processing.tasks import COMBINED_TAGS, ENGLISH_RATE, TASKS, Answer, Task, make_tasks, read_tags
from scripts import ablation
from tests.conftest import make_corpus, make_tokenizer, tone, wav, write_corpus
from tests.gradient_probe import write_gradients
from tests.processes import launch


ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=12, dev=4, test=5)


@pytest.fixture
def recipe(tmp_path, corpus, tiny_whisper, tiny_llama):
    """Writes a recipe; keyword arguments change it."""

    def write(**changes):
        fields = {
            "dataset_dir": corpus,
            "audio_backbone": tiny_whisper,
            "text_backbone": tiny_llama,
            "backbone_dtype": "float32",
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": "1e-3",
            "use_cpu": True,
            "report_to": "tensorboard",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in fields.items()))
        return str(path)

    return write


@pytest.fixture
def text_tools(monkeypatch):
    """A tagger of this corpus's words in the place of spaCy's model."""
    nlp = spacy.blank("en")
    nlp.add_pipe("entity_ruler").add_patterns([{"label": "GPE", "pattern": "user"}])
    tagger = eval_sense.SpacyTagger
    monkeypatch.setattr(tagger, "from_pretrained", lambda combined=False: tagger(nlp, combined))


@pytest.mark.parametrize("audio_tokens", ["trim", "fixed"])
def test_trains_saves_and_is_scored(recipe, corpus, tmp_path, audio_tokens):
    cache = {"encoder_cache": str(tmp_path / "cache"), "speeds": [1.0, 0.9], "time_mask": 0.2}
    metrics = train_sense.main([recipe(audio_tokens=audio_tokens, lora_r=4, **cache)])
    out = tmp_path / "out"
    assert {"eval_true_loss", "eval_shuffled_loss", "eval_wer"} <= metrics.keys()
    assert json.loads((out / "metrics.json").read_text())["eval_wer"] == metrics["eval_wer"]
    assert (out / "training.png").stat().st_size > 5000 and list(out.glob("runs/*/events*"))
    scored = eval_sense.main(
        ["--model", str(out), "--dataset", corpus, "--output_dir", str(tmp_path / "scored"), "--num_beams", "2"]
        + ["--shuffled_control"]
    )
    assert {"wer", "wer_normalized", "n_utterances", "audio_seconds", "rtf", "wer_shuffled"} <= scored.keys()
    assert scored["n_utterances"] == 5 and scored["audio_seconds"] == pytest.approx(5.0, abs=0.01)
    table = [json.loads(line) for line in (tmp_path / "scored" / "utterances.jsonl").read_text().splitlines()]
    assert {row["id"] for row in table} == {f"clip-{i}" for i in range(5)}
    errors, words = sum(row["errors"] for row in table), sum(row["words"] for row in table)
    assert scored["wer"] == pytest.approx(100 * errors / words)
    model, processor = load_checkpoint(str(out))
    assert model.config.audio_tokens == processor.audio_tokens == audio_tokens

    report.main([str(tmp_path / "both.png"), f"one={out}", f"two={out}"])
    assert (tmp_path / "both.png").stat().st_size > (out / "training.png").stat().st_size


def test_a_text_takes_the_place_of_the_clips(recipe, tmp_path):
    """The same measures, other words; an adapter at rest; and a run that goes on ends with the same bits."""
    how = {"lora_r": 2, "adapter_learning_rate": 0, "encoder_cache": str(tmp_path / "cache"), "eval_strategy": "no"}
    found = {}
    for name, text in (("one", "the user speaks " * 30), ("two", "and transcribe, Transcribe AND " * 30)):
        (tmp_path / f"{name}.txt").write_text(text)
        out = tmp_path / name
        made = recipe(output_dir=str(out), text_as_speech=str(tmp_path / f"{name}.txt"), **how)
        train_sense.main([made])
        found[name] = load_file(out / "model.safetensors")
    same = {key: torch.equal(found["one"][key], found["two"][key]) for key in found["one"]}
    assert all(same[key] for key in same if "multi_modal_projector" in key)
    assert not any(same[key] for key in same if ".lora_B" in key)
    assert '| text_as_speech | "two.txt" |' in (out / "README.md").read_text()
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    train_sense.main([made, "--output_dir", str(again)])
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_regularised_training_is_scored_on_data_as_it_is(recipe, corpus, tmp_path):
    """Stretched clips, noise in the answers and LoRA on other modules, in training alone."""
    settings = {"time_stretch": 0.3, "answer_noise": 0.5, "lora_r": 2, "lora_target_modules": r".*\.down_proj"}
    made = recipe(output_dir=str(tmp_path / "one"), encoder_cache=str(tmp_path / "cache"), **settings)
    metrics = train_sense.main([made, "--max_steps", "2"])
    model, processor = load_checkpoint(str(tmp_path / "one"))
    assert model.config.lora["target_modules"] == r".*\.down_proj"
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in model.trained_state_dict() if ".lora_" in name} == {
        "down_proj"
    }
    # Were the dev split stretched or noisy too, its loss would be another.
    rows = [{**row, "task": "asr"} for row in load_corpus(corpus, "dev")]
    loss = float(model(**SenseCollator(processor, make_tasks(processor.prompts, {"asr": 1}))(rows)).loss)
    assert metrics["eval_true_loss"] == pytest.approx(loss, rel=1e-3)


def test_the_card_tells_how_a_model_was_trained_and_scored(recipe, corpus, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train_sense.main([recipe(output_dir=str(one)), "--max_steps", "1"])
    (one / "training.json").rename(tmp_path / "kept")  # as of a stage before there were any
    train_sense.main([recipe(output_dir=str(two), init_from=str(one)), "--max_steps", "2"])
    assert [stage and stage["steps"] for stage in json.loads((two / "training.json").read_text())] == [None, 2]
    (tmp_path / "kept").rename(one / "training.json")
    train_sense.main([recipe(output_dir=str(two), init_from=str(one)), "--max_steps", "3"])
    card = ModelCard.load(two / "README.md")
    assert not {"language", "datasets", "model-index"} & card.data.to_dict().keys()  # a folder is no Hub id
    assert str(tmp_path) not in card.content and 'model_id = "two"' in card.content
    name = Path(corpus).name
    for told in (
        f"### Stage 1\n\n{name}: 12 clips, 0.00 h; 1 steps",
        f"### Stage 2\n\n{name}: 12 clips, 0.00 h; 3 steps",
        "| learning_rate | 0.001 |",
        "| validation, greedy | % |",
        "It was not scored on a test set.",
        "Languages: not recorded.",
    ):
        assert told in card.text, told
    assert corpus not in card.content and "lora_alpha" not in card.text  # it had no LoRA
    asked = ["--dataset", corpus, "--tasks", "asr"]
    whole = eval_sense.main(["--model", str(two), "--output_dir", str(two / "test"), *asked])
    exported = export_model(two, tmp_path / "export", metrics=[two / "test"])
    (result,) = [r for r in ModelCard.load(exported / "README.md").data.eval_results if r.metric_name == "WER"]
    assert (result.metric_value, result.dataset_name) == (round(whole["wer"], 2), name)
    checkpoint = eval_sense.main(  # of the same weights, without the backbones
        ["--model", str(two / "checkpoint-3"), "--output_dir", str(tmp_path / "scored"), *asked]
    )
    assert checkpoint["wer"] == whole["wer"]


def test_it_goes_on_from_the_checkpoint_that_comes_with_the_package(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("processing.hub.CHECKPOINTS", tmp_path / "checkpoints")
    lora = {"lora_r": 2}
    train_sense.main([recipe(output_dir="one", **lora), "--max_steps", "2"])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "one" / "checkpoint-2").rename(tmp_path / "checkpoints" / "sense-mini")
    still = ["--max_steps", "1", "--learning_rate", "0", "--init_from", "sense-mini"]
    train_sense.main([recipe(output_dir="two", **lora), *still])
    one, two = (load_checkpoint(name)[0].trained_state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_training_without_a_cache_and_without_warm_start(recipe, tmp_path, strategy):
    train_sense.main([recipe(warm_start=False, train_sampling_strategy=strategy), "--max_steps", "2"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["train_clips"] == 12


def test_from_a_cache_no_epoch_and_no_later_stage_runs_the_encoder(recipe, tmp_path, monkeypatch):
    encoded = []
    encode = SenseModel.encode

    def counted(self, input_features, *args, **kwargs):
        encoded.append(len(input_features))
        return encode(self, input_features, *args, **kwargs)

    monkeypatch.setattr(SenseModel, "encode", counted)
    cache = {"encoder_cache": str(tmp_path / "cache"), "speeds": [1.0, 0.9], "max_steps": -1, "num_train_epochs": 2}
    cache |= {"encoder_cache_storage": "int8"}
    assert train_sense.main([recipe(cache_only=True, **cache)]) == {} and not (tmp_path / "out").exists()
    assert sum(encoded) == 2 * 12  # dev's clips are among train's in this corpus
    train_sense.main([recipe(output_dir=str(tmp_path / "one"), **cache)])
    assert sum(encoded) == 2 * 12 + 12  # the warm start, once: it looks at single frames, which no cache holds
    ner = {"tasks": {"asr": 1, "ner": 1}, "prompts": {"asr": "Write.", "ner": "Tag."}, "classifier": "ner"}
    train_sense.main([recipe(init_from=str(tmp_path / "one"), output_dir=str(tmp_path / "two"), **cache, **ner)])
    assert sum(encoded) == 2 * 12 + 12
    model, processor = load_checkpoint(str(tmp_path / "two"))  # whole, with the encoder
    assert len(eval_sense.understand(model, processor, make_corpus(2), ["asr", "ner"])["ner"]) == 2


@pytest.mark.parametrize("cached", [True, False])
def test_a_compiled_step_learns_as_another(recipe, tmp_path, cached):
    losses = []
    for compiled in (False, True):
        how = {"output_dir": str(tmp_path / str(compiled))}
        how |= {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        how |= {"encoder_cache": str(tmp_path / "cache")} if cached else {}
        losses.append(train_sense.main([recipe(max_steps=2, **how)])["eval_true_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_attention_of_the_language_model_alone_can_be_chosen(recipe, tmp_path):
    eager = {"text_attn_implementation": "eager", "max_steps": 1}
    train_sense.main([recipe(**eager)])
    for source in ({}, {"init_from": str(tmp_path / "out")}):
        model, _ = train_sense.build_model(train_sense.parse_recipe([recipe(**eager, **source)])[0])
        assert model.model.language_model.config._attn_implementation == "eager"
        assert model.model.audio_tower.config._attn_implementation == "sdpa"


def test_checkpoints_hold_what_was_trained_only(recipe, tmp_path):
    train_sense.main([recipe(max_steps=2)])
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 20_000
    assert not (checkpoint / "model.safetensors").exists()


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_training_beside_a_quantised_language_model(recipe, corpus, tmp_path, quantize):
    out, fields = tmp_path / "out", {"lora_r": 4, "quantize": quantize, "encoder_cache": str(tmp_path / "cache")}
    train_sense.main([recipe(**fields)])
    model, _ = load_checkpoint(str(out))
    trained, whole = model.trained_state_dict(), (out / "model.safetensors").stat().st_size
    assert model.quantization == quantize and len(trained) == 4 + 2 * 3 * 2
    (out / "checkpoint-4").rename(tmp_path / "later")
    train_sense.main([recipe(**fields)])  # goes on from checkpoint-2
    for name, weight in load_checkpoint(str(out))[0].trained_state_dict().items():
        torch.testing.assert_close(weight, trained[name])
    train_sense.main([recipe(lora_r=4, output_dir=str(tmp_path / "full"))])
    assert (tmp_path / "full" / "model.safetensors").stat().st_size > whole
    # Stages: from a checkpoint of full weights, from a folder of them, from a quantised folder; not back.
    for source in (tmp_path / "full" / "checkpoint-4", tmp_path / "full", out):
        stage = {"init_from": str(source), "max_steps": 1, "output_dir": str(tmp_path / "next"), "save_steps": 1}
        train_sense.main([recipe(**fields, **stage)])
        about = json.loads((tmp_path / "next" / "checkpoint-1" / "sense_adapter.json").read_text())
        assert about["quantization"] == quantize
        shutil.rmtree(tmp_path / "next")
    with pytest.raises(ValueError, match=f"holds {quantize} weights, the recipe says None"):
        train_sense.main([recipe(init_from=str(out), lora_r=4)])
    with pytest.raises(ValueError, match=f"trained on {quantize} weights, this model's are full"):
        train_sense.main([recipe(init_from=str(out / "checkpoint-4"), lora_r=4)])


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_scoring_a_quantised_language_model(recipe, corpus, tmp_path, quantize):
    train_sense.main([recipe(max_steps=1, save_strategy="no")])
    what = ["--model", str(tmp_path / "out"), "--dataset", corpus, "--output_dir", str(tmp_path / "scored")]
    metrics = eval_sense.main([*what, "--quantize", quantize, "--max_samples", "3"])
    told = {"quantize": quantize, "quantization": quantize, "dtype": "float32", "max_samples": 3}
    assert "wer" in metrics and told.items() <= metrics["measured_on"].items()
    assert load_checkpoint(str(tmp_path / "out"), quantize=quantize)[0].quantization == quantize


def test_training_on_a_gguf_file(recipe, tiny_gguf, tmp_path):
    fields = {"text_backbone": tiny_gguf, "gguf_file": "tiny.gguf"}
    train_sense.main([recipe(**fields)])
    about = json.loads((tmp_path / "out" / "checkpoint-4" / "sense_adapter.json").read_text())
    assert about["backbones"]["text"] == {"id": tiny_gguf, "revision": None, "gguf_file": "tiny.gguf"}
    train_sense.main([recipe(**fields, init_from=str(tmp_path / "out"), output_dir=str(tmp_path / "next"))])
    shutil.copy(Path(tiny_gguf) / "tiny.gguf", Path(tiny_gguf) / "copy.gguf")
    with pytest.raises(ValueError, match="gguf_file is 'tiny.gguf' there, 'copy.gguf' in the recipe"):
        train_sense.main([recipe(**fields | {"gguf_file": "copy.gguf"}, init_from=str(tmp_path / "out"))])


@pytest.mark.parametrize(
    "content, message",
    [
        ("learning_rte: 1", "unknown field 'learning_rte'; did you mean 'learning_rate'"),
        ("- 1", "must hold `field: value` lines, found list"),
        ("time_mask: 0.1\ndataset_dir: x", "set encoder_cache to a folder"),
        ("speeds: [1.0, 0.0]\nencoder_cache: x\ndataset_dir: x", "speeds must begin with 1.0"),
        ("max_minutes: 0\ndataset_dir: x", "max_minutes: give minutes above 0, or none, found 0"),
        ("time_stretch: 0.1\ndataset_dir: x", "set encoder_cache to a folder"),
        (
            "time_stretch: 0.1\ndataset_dir: x\nencoder_cache: x\naudio_tokens: fixed",
            "changes how many audio tokens a clip has",
        ),
        ("adapter_learning_rate: 0\ndataset_dir: x", "adapter_learning_rate: 0 without LoRA trains nothing"),
        ("entity_tags: any\ndataset_dir: x", "entity_tags: give .*, found 'any'"),
        ("answer_noise: 1\ndataset_dir: x", "answer_noise: give a share from 0 to below 1, found 1"),
        ("answer_noise: 0.1\nstreaming: true\ndataset_dir: x", "answer_noise is drawn by a row's place"),
        ("cache_only: true\ndataset_dir: x", "cache_only fills a cache: set encoder_cache to a folder"),
        ("audio_tokens: trim", "dataset_dir is missing"),
        ("dataset_dir: x\ntasks: {ner: 1}", "task 'ner' has no prompt"),
        ("dataset_dir: x\ntasks: {asr: -1}", "tasks: the weight of asr is -1; give a number above 0"),
        ("dataset_dir: x\ntasks: asr", "not JSON"),
        ("dataset_dir: x\ntext_as_speech: book.txt", "set encoder_cache to a folder"),
        (
            "dataset_dir: x\ntext_as_speech: book.txt\nencoder_cache: x\naudio_tokens: fixed",
            "knows no silence after a clip",
        ),
        ("dataset_dir: x\ntext_as_speech: book.txt\nclassifier: sa", "train the task asr, without a classifier"),
        ("dataset_dir: x\ntext_as_speech: book.txt\nwarm_start: false", "begins from the warm start: leave it on"),
        ("dataset_dir: none", "dataset_dir is missing"),
        ("dataset_dir: x\nencoder_cache: none\ntime_mask: 0.1", "set encoder_cache to a folder"),
        ("dataset_dir: x\nquantize: int3", "quantize: give int8 or int4, found 'int3'"),
        ("dataset_dir: x\nclassifier: words", "classifier: give ner or sa, found 'words'"),
        (
            "dataset_dir: x\nfilter_labels: true",
            "filters what label_noise put there: give label_noise",
        ),
        ("dataset_dir: x\nlabel_noise: {typos: 0.1}", "there is no 'typos'; there are false_positives, drops, swaps"),
        ("dataset_dir: x\nfilter_labels: true\nlabel_noise: {drops: 2}", "drops: 2 is no share"),
        ("dataset_dir: x\nlabel_noise: {drops: 0.1}", "train the task ner alone, found tasks asr"),
        (
            "dataset_dir: x\nentity_tags: raw\nlabel_noise: {drops: 0.1}",
            "knows the combined tags only, found .* 'raw'",
        ),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        train_sense.parse_recipe([str(path)])


def test_an_answer_is_no_wer(recipe):
    fields = {"metric_for_best_model": "eval_answer_f1", "max_minutes": 1, "warmup_steps": 0.5}
    with pytest.raises(ValueError, match="warmup_steps: 0.5 is a share"):  # what is looked at next
        train_sense.main([recipe(**fields)])


@pytest.mark.parametrize("metric", ["eval_wer", "eval_ner_malformed_rate"])
def test_the_highest_wer_is_not_kept_as_the_best(recipe, metric):
    fields = {"metric_for_best_model": metric, "load_best_model_at_end": True}
    with pytest.raises(ValueError, match=f"of {metric} the lowest is the best; set greater_is_better: false"):
        train_sense.main([recipe(**fields)])


def test_missing_recipe_is_named():
    with pytest.raises(ValueError, match="there is no recipe nowhere.yaml"):
        train_sense.parse_recipe(["nowhere.yaml"])


def test_command_line_wins_over_the_recipe(recipe):
    args, training = train_sense.parse_recipe([recipe(), "--learning_rate", "5e-4", "--prompts", '{"asr": "Write."}'])
    assert training.learning_rate == 5e-4 and args.prompts == {"asr": "Write."}


ABLATIONS = [ROOT / "recipes" / f"{name}.yaml" for name in ("ablation", "limits", "noise")]


@pytest.mark.parametrize(
    "path",
    sorted(set((ROOT / "recipes").glob("**/*.yaml")) - set(ABLATIONS) - set((ROOT / "recipes/accelerate").iterdir())),
    ids=lambda path: path.stem,
)
def test_shipped_recipes_are_valid(path, tmp_path):
    args, training = parse(path, tmp_path)
    rank = 8 if path.parent.name == "sense_mini" else 32
    assert args.tasks.keys() <= args.prompts.keys() and args.lora_r == rank
    if training.metric_for_best_model:
        _, metric = training.metric_for_best_model.split("_", 1)
        assert metric.split("_")[0] in {"wer", *args.tasks}


@pytest.mark.parametrize("recipe", ABLATIONS, ids=lambda path: path.stem)
def test_the_cells_of_the_ablations_are_valid(recipe, tmp_path):
    parts = ablation.read_recipe(recipe, None)
    for changes in (parts["first"], *parts["cells"].values()):
        fields = {**parts["shared"], **changes}
        path = tmp_path / "cell.yaml"
        path.write_text(yaml.safe_dump(fields))
        args, _ = parse(path, tmp_path)
        assert args.tasks.keys() <= args.prompts.keys()


def parse(path, tmp_path):
    asked = ["--dataset_dir", "x", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    return train_sense.parse_recipe([str(path), *asked])


def test_lowercase_and_spacy_labels_change_what_is_trained_on(recipe, corpus, monkeypatch, text_tools):
    """Entities come from the text tools: with them, the classifier's weights are of their tags."""
    seen = {}
    monkeypatch.setattr(train_sense, "add_classifier", lambda args, model, train: seen.update(rows=list(train)))
    train_sense.main([recipe(max_steps=1, lowercase=True, train_entities="spacy", save_strategy="no")])
    for row in seen["rows"]:
        at = row["text"].find("user")
        assert row["entities"] == ([["PLACE", at, 4]] if at >= 0 else [])


@pytest.mark.parametrize("filtered", [False, True])
def test_noise_comes_among_the_training_labels_alone(recipe, corpus, monkeypatch, filtered):
    """Unfiltered, rows are asked to write what nobody said; filtered, tags of the set on words of the text stay."""
    seen = {}
    monkeypatch.setattr(train_sense, "add_classifier", lambda args, model, train: seen.update(rows=list(train)))
    tasks = {"tasks": {"ner": 1}, "prompts": {"ner": "Tag."}}
    train_sense.main(
        [
            recipe(
                max_steps=1, label_noise={"false_positives": 0.6}, filter_labels=filtered, save_strategy="no", **tasks
            )
        ]
    )
    own = list(load_corpus(corpus, "train"))
    added = [row["text"] != before["text"] for row, before in zip(seen["rows"], own)]
    tags = {tag for row in seen["rows"] for tag, _, _ in row["entities"]}
    assert any(added) != filtered and (tags <= set(COMBINED_TAGS)) == filtered
    assert sum(len(row["entities"]) for row in seen["rows"]) > sum(len(row["entities"]) for row in own)


def test_wrong_column_names_those_present(recipe):
    with pytest.raises(
        ValueError, match="no text column 'words'; it has 'file_name', 'text', 'duration', 'entities', 'sentiment'"
    ):
        train_sense.main([recipe(text_column="words")])


def test_shuffling_pairs_every_clip_with_another_text():
    dataset = make_corpus(5)
    shuffled = eval_sense.shuffle_audio(dataset)
    assert list(shuffled["id"]) == list(dataset["id"])
    assert all(a != b for a, b in zip(dataset["text"], shuffled["text"]))
    labels = [sorted(zip(rows["text"], map(str, rows["entities"]), rows["sentiment"])) for rows in (dataset, shuffled)]
    assert labels[0] == labels[1]  # of a row, together


def test_shuffling_parts_clips_from_their_class_in_a_corpus_sorted_by_class():
    dataset = make_corpus(90)
    classes = ["Negative"] * 30 + ["Neutral"] * 30 + ["Positive"] * 30
    dataset = dataset.remove_columns("sentiment").add_column("sentiment", classes)
    same = [a == b for a, b in zip(classes, eval_sense.shuffle_audio(dataset)["sentiment"])]
    assert 15 < sum(same) < 45  # a third by chance


ALL_TASKS = {
    "tasks": {"asr": 1, "ner": 2, "sa": 1},
    "prompts": {"asr": "Transcribe.", "ner": "Tag the entities.", "sa": "Which sentiment?"},
}


def test_three_tasks_in_one_run_and_their_comparison(recipe, corpus, tmp_path, capsys, text_tools):
    metrics = train_sense.main([recipe(**ALL_TASKS, classifier="ner", balance_classes=True)])
    assert {"eval_wer", "eval_ner_f1", "eval_ner_label_f1", "eval_ner_malformed_rate", "eval_sa_f1"} <= metrics.keys()
    model, processor = load_checkpoint(str(tmp_path / "out"))
    assert model.classifier is None and processor.prompts == ALL_TASKS["prompts"]
    checkpoint = json.loads((tmp_path / "out" / "checkpoint-4" / "sense_adapter.json").read_text())
    assert checkpoint["classifier"]["labels"][0] == "WHEN" and len(checkpoint["classifier"]["weights"]) == 7
    assert "classifier's tag weights (at most 20): WHEN 20.0" in capsys.readouterr().out

    out = tmp_path / "scored"
    scored = eval_sense.main(
        ["--model", str(tmp_path / "out"), "--dataset", corpus, "--output_dir", str(out)]
        + ["--controls", "gold", "majority", "--shuffled_control", "--report"]
    )
    for name in ("wer", "ner_f1", "ner_label_f1", "sa_f1"):
        low, high = scored[f"{name}_interval"]
        assert low <= scored[name] <= high
    controls = scored["controls"]
    assert list(controls) == ["true text, then spaCy / VADER", "true text, then the same LLM", "always Neutral"]
    assert controls["true text, then spaCy / VADER"]["ner_wer"] == 0
    assert controls["always Neutral"]["sa_accuracy"] == 60  # of five rows three
    sections = [section.splitlines() for section in (out / "results.md").read_text().split("## ")[1:]]
    assert [section[0].split(":")[0] for section in sections] == [
        "per cent [95 % interval, bootstrap over utterances]",
        "sentiment",
        "entities, by tag",
    ]
    table = [line for line in sections[0] if line.startswith("|")]
    assert table[0].startswith("|  | WER | normalised | NER F1") and len(table) == 2 + 1 + 3
    assert table[-1].startswith("| always Neutral | - | - | - ") and "[" in table[-1]
    assert (out / "sentiment.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (out / "utterances.jsonl").read_text().splitlines()]
    assert {"asr", "ner", "sa", "entities", "reference_entities", "reference_sentiment"} <= rows[0].keys()
    assert [(row["id"], row["speaker"]) for row in sorted(rows, key=lambda row: row["index"])] == [
        (f"clip-{i}", f"speaker-{i % 2}") for i in range(5)
    ]
    assert [group["n"] for group in scored["wer_by"]["speaker"]] == [3, 2]
    assert not any("wer_by" in found for found in controls.values())  # they were given the words
    page = (out / "report.html").read_text()
    assert "<h1>out on " in page and "greedy" in page and "training" in page and page.count("<audio") == 5
    assert all(f"{scored[name]:.1f} [" in page for name in ("wer", "ner_f1", "sa_f1"))


def test_what_keeps_a_control_from_running_is_said_first(recipe, tmp_path, tiny_whisper, monkeypatch):
    """Before any clip is listened to."""
    unlabelled = write_corpus(tmp_path / "unlabelled", train=2, test=2)
    for path in Path(unlabelled).glob("*/metadata.jsonl"):
        path.write_text(path.read_text().replace('"sentiment"', '"mood"'))
    train_sense.main([recipe(**ALL_TASKS, max_steps=1)])
    asked = ["--model", str(tmp_path / "out"), "--dataset", unlabelled, "--output_dir", str(tmp_path / "scored")]
    monkeypatch.setattr(eval_sense, "understand", lambda *_, **__: pytest.fail("listened first"))
    with pytest.raises(ValueError, match="none of the training rows has a sentiment"):
        eval_sense.main([*asked, "--controls", "majority"])
    missing = ImportError("spacy can't be imported")
    monkeypatch.setattr(eval_sense.SpacyTagger, "from_pretrained", lambda **_: (_ for _ in ()).throw(missing))
    with pytest.raises(ImportError, match="spacy can't be imported"):
        eval_sense.main([*asked, "--controls", "gold"])
    encoder = WhisperModel.from_pretrained(tiny_whisper).encoder
    encoder.save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr(eval_sense, "whisper_of", lambda model: str(tmp_path / "encoder"))
    with pytest.raises(ValueError, match="is an encoder alone: leave cascade out of --controls"):
        eval_sense.main([*asked, "--controls", "cascade"])


def test_answers_in_one_batch_encode_each_clip_once(recipe, corpus, tmp_path):
    train_sense.main([recipe(**ALL_TASKS, max_steps=1)])
    model, processor = load_checkpoint(str(tmp_path / "out"))
    encoded = []
    model.model.audio_tower.register_forward_hook(lambda _, __, output: encoded.append(len(output[0])))
    rows = eval_sense.load_corpus(corpus, "test")
    answers = eval_sense.understand(model, processor, rows, ["asr", "ner", "sa"], num_beams=3, batch_size=2)
    assert sum(encoded) == len(rows) == 5
    assert answers["ner"] == eval_sense.understand(model, processor, rows, ["ner"], num_beams=3)["ner"]


def test_epochs_draw_other_rows_as_often():
    args, rows = SimpleNamespace(tasks={"asr": 0.5, "sa": 1.5}, balance_classes=False), make_corpus(20)
    tokenizer = make_tokenizer()
    tasks = make_tasks({"asr": "Write.", "sa": "Which?"})
    mixture = Mixture(args, rows, list(range(100, 120)), tasks, tokenizer, seed=0)
    epochs = []
    for epoch in (0, 1, 2, 1):
        mixture.set_epoch(epoch)
        epochs.append([mixture[i] for i in range(len(mixture))])
        for length, row in zip(mixture.lengths, epochs[-1], strict=True):
            answer = tokenizer(tasks[row["task"]].target(row))["input_ids"]
            assert length == 100 + int(row["id"].split("-")[1]) + len(answer)
    shown = [sorted(row["id"] for row in epoch if row["task"] == "asr") for epoch in epochs]
    assert [len(ids) for ids in shown] == [10] * 4
    assert shown[0] != shown[1] != shown[2] and epochs[1] == epochs[3]


def test_processes_that_do_not_save_write_nothing(tmp_path):
    idle = SimpleNamespace(args=SimpleNamespace(should_save=False))
    train_sense.SenseTrainer._save(idle, str(tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_rows_that_are_scored_are_spread_over_the_split():
    rows = make_corpus(11)
    assert spread(rows, 4)["id"] == ["clip-0", "clip-2", "clip-5", "clip-8"]
    assert len(spread(rows, None)) == len(spread(rows, 99)) == 11


def test_a_task_of_ones_own_is_one_class(recipe, corpus, tmp_path, monkeypatch):
    class Echo(Task):
        name, label, tokens_per_second = "echo", "text", 7

        def target(self, row):
            return f"{row['text']} {row['text']}"

        def parse(self, answer):
            return Answer(text=answer)

    monkeypatch.setitem(TASKS, Echo.name, Echo)
    mixed = {"tasks": {"asr": 1, "echo": 0.5}, "prompts": {"asr": "Transcribe.", "echo": "Say it twice."}}
    train_sense.main([recipe(**mixed)])
    asked = ["--model", str(tmp_path / "out"), "--dataset", corpus, "--output_dir", str(tmp_path / "scored")]
    assert "wer" not in eval_sense.main([*asked, "--tasks", "echo", "--report"])
    assert "heard (echo)" in (tmp_path / "scored" / "report.html").read_text()
    assert "wer" in eval_sense.main([*asked, "--tasks", "echo", "asr"])
    rows = [json.loads(line) for line in (tmp_path / "scored" / "utterances.jsonl").read_text().splitlines()]
    assert all("echo" in row and "asr" in row for row in rows)


def test_rows_are_scored_by_the_columns_that_are_named(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.wav").write_bytes(wav(tone(0.5)))
    line = {"sound": "a.wav", "said": "ANNA LEFT"}
    (tmp_path / "test" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    asked = ["--model", "m", "--output_dir", "out", "--dataset", str(tmp_path)]
    asked += ["--audio_column", "sound", "--text_column", "said", "--lowercase"]
    rows = eval_sense.load_rows(eval_sense.parse_args(asked), "test")
    assert rows["text"] == ["anna left"] and rows["audio"][0]["path"] == str(tmp_path / "test" / "a.wav")


def test_trained_for_entities_alone_still_answers_what_can_be_read(recipe, corpus, tmp_path):
    train_sense.main([recipe(tasks={"ner": 1}, prompts={"ner": "Tag."}, max_steps=1)])
    asked = ["--model", str(tmp_path / "out"), "--dataset", corpus, "--output_dir", str(tmp_path / "scored")]
    scored = eval_sense.main(asked)
    rows = [json.loads(line) for line in (tmp_path / "scored" / "utterances.jsonl").read_text().splitlines()]
    malformed = [read_tags(row["ner"]).malformed for row in rows]
    assert [row["malformed"] for row in rows] == malformed
    assert scored["ner_malformed_rate"] == pytest.approx(100 * sum(n > 0 for n in malformed) / len(rows))
    assert "wer" not in scored and "ner_wer" in scored
    with pytest.raises(ValueError, match="task 'sa' has no prompt; the prompts are for ner"):
        eval_sense.main([*asked, "--tasks", "ner", "sa"])


def test_stages_go_on_from_an_output_folder_or_a_checkpoint(recipe, tmp_path):
    """A learning rate of 0 shows what a stage began with."""

    def trained(folder):
        return train_sense.SenseForConditionalGeneration.from_pretrained(folder).trained_state_dict()

    first, second = tmp_path / "out", tmp_path / "second"
    train_sense.main([recipe(lora_r=4, **ALL_TASKS, classifier="ner")])
    for source in (first, first / "checkpoint-4"):
        stage = {"init_from": str(source), "lora_r": 4, "learning_rate": "0.0", "output_dir": str(second)}
        train_sense.main([recipe(**stage, **ALL_TASKS, classifier="sa", max_steps=1, save_strategy="no")])
        for name, weight in trained(second).items():
            assert torch.equal(weight, trained(first)[name]), name
    for other in ({}, {"lora_r": 4, "lora_alpha": 64}, {"lora_r": 4, "lora_dropout": 0.5}):
        with pytest.raises(ValueError, match=r"has LoRA .* the recipe says \{"):
            train_sense.main([recipe(init_from=str(first), **other)])
    with pytest.raises(ValueError, match="num_audio_tokens is 250 there, 125 in the recipe"):
        train_sense.main([recipe(init_from=str(first), lora_r=4, num_audio_tokens=125)])


def test_slam_projector_in_the_place_of_the_adapter(recipe, corpus, tmp_path):
    heard = {"encoder_cache": str(tmp_path / "cache"), "warm_start": False, "max_steps": 2}
    metrics = slam_asr.main(["train", recipe(**heard)])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    heard, hidden = 5 * config["audio_config"]["d_model"], config["text_config"]["hidden_size"]
    assert metrics["trained_parameters"] == (heard + 1) * 2048 + (2048 + 1) * hidden
    scored = ["eval", "--model", str(tmp_path / "out"), "--dataset", corpus, "--output_dir", str(tmp_path / "scored")]
    slam_asr.main(scored)
    assert json.loads((tmp_path / "scored" / "metrics.json").read_text())["wer"] >= 0
    with pytest.raises(SystemExit, match="Trains and scores"):
        slam_asr.main(["play"])
    assert modeling_sense.modeling_sense.SenseAdapter is not slam_asr.SlamProjector  # as before


def test_a_budget_of_minutes_ends_training_and_takes_the_rate_to_zero(recipe, tmp_path, monkeypatch):
    ticks = itertools.count()  # by this clock a step takes 0.1 s: a real one may take as long as it likes
    monkeypatch.setattr(train_sense, "time", SimpleNamespace(perf_counter=lambda: 0.1 * next(ticks)))
    endless = {"max_steps": 100_000, "save_steps": 1, "save_total_limit": 1, "eval_strategy": "no"}
    train_sense.main([recipe(**endless), "--max_minutes", "0.02"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert state["global_step"] in (12, 13) and rates[-1] < 0.2e-3
    assert state["stateful_callbacks"]["TimeBudget"]["attributes"]["seconds"] > 1.19
    # Started again, it finds its budget spent.
    train_sense.main([recipe(**endless), "--max_minutes", "0.02"])
    again = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert again["global_step"] == state["global_step"]
    # With more minutes it goes on, and the rate falls from where the clock stands.
    train_sense.main([recipe(**endless), "--max_minutes", "0.04"])
    later = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    rates = [e["learning_rate"] for e in later["log_history"] if e["step"] > again["global_step"] and "loss" in e]
    assert later["global_step"] in (24, 25) and len(rates) >= 10 and max(rates) < 0.6e-3


def test_where_the_steps_end_before_the_minutes_the_rate_falls_too(recipe, tmp_path):
    train_sense.main([recipe(max_steps=10, eval_strategy="no"), "--max_minutes", "60"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert state["global_step"] == 10 and rates[-1] < 0.3 * max(rates)


def test_a_split_without_labels_for_a_task_is_told_before_the_encoder_hears_it(recipe, tmp_path, monkeypatch):
    fields = yaml.safe_load(Path(recipe()).read_text())
    data = tmp_path / "data"
    shutil.copytree(fields["dataset_dir"], data)
    lines = [json.loads(line) for line in (data / "dev" / "metadata.jsonl").read_text().splitlines()]
    unlabelled = [{name: value for name, value in line.items() if name != "sentiment"} for line in lines]
    (data / "dev" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unlabelled))
    monkeypatch.setattr(train_sense, "build_caches", None)
    with pytest.raises(ValueError, match=f"task 'sa': not one of the {len(lines)} rows of 'dev' has a label for it"):
        train_sense.main([recipe(dataset_dir=str(data), tasks={"sa": 1}, prompts={"sa": "How is it meant?"})])


def test_the_dtype_of_frozen_weights_is_one_that_the_device_knows(recipe, monkeypatch):
    found = []
    for known in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=known: known)
        args, _ = train_sense.parse_recipe([recipe(backbone_dtype="auto")])
        found += [args.dtype("cpu"), args.dtype("cuda"), train_sense.build_model(args)[0].lm_head.weight.dtype]
    assert found == [torch.bfloat16] * 3 + [torch.float32, torch.bfloat16, torch.float32]
    with pytest.raises(ValueError, match="backbone_dtype: give one of auto, float32, bfloat16, float16, found 'fp32'"):
        train_sense.parse_recipe([recipe(backbone_dtype="fp32")])


@pytest.mark.parametrize("classifier", [None, "ner", "sa"])
def test_accumulated_and_shared_out_steps_have_the_gradients_of_the_full_batch(recipe, tmp_path, classifier):
    """Eight rows in one step: at once, in two parts, on two processes, on two processes in two parts."""
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "warm_start": False, "lora_r": 4, "save_strategy": "no"}
    settings |= {"classifier": classifier, "eval_strategy": "no"}
    path, found = recipe(**settings, **ALL_TASKS), []
    for processes, batch, parts in ((1, 8, 1), (1, 4, 2), (2, 4, 1), (2, 2, 2)):
        out = tmp_path / f"{processes}-{parts}.safetensors"
        sizes = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(parts)]
        launch(processes, write_gradients, str(out), [path, *sizes])
        found.append(load_file(out))
    assert any(name.startswith("classifier.") for name in found[0]) == (classifier is not None)
    assert all(value.abs().sum() > 0 for name, value in found[0].items() if "lora_A" not in name)  # B starts at 0
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=1e-5, atol=1e-5, msg=name)


def test_torchrun_starts_the_script(recipe, tmp_path):
    """As docs/distributed.md says for CPUs: `accelerate launch` starts no more than one process there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "train_sense.py"), recipe(max_steps=1, eval_strategy="no", save_strategy="no")]
    done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("trained parameters:") == 1  # the first process alone says so
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_a_run_tells_those_who_ask_its_model(recipe, corpus, tmp_path):
    assert usual_length([2.0, 4.0, 6.0, 8.0, None]) == 7  # 6.5 s is the third quartile
    assert usual_length([0.3]) == 1 and usual_length([200.0]) == 30
    assert usual_length([None]) == 30
    tokenizer = make_tokenizer()
    said, *_ = rows = list(make_corpus(2))
    tokens = len(text_ids([said["text"]], tokenizer)[0])
    assert usual_rate(from_rows([said, said | {"text": ""}]), tokenizer) == tokens / 0.5
    assert usual_rate(from_rows([row | {"text": ""} for row in rows]), tokenizer) == ENGLISH_RATE
    train_sense.main([recipe(entity_tags="raw"), "--max_steps", "1"])
    saved = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert saved["chunk_length_s"] == 2 and saved["entity_tags"] == "raw"
    processor = SenseProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokens_per_second == usual_rate(load_corpus(corpus, "train"), processor.tokenizer)
