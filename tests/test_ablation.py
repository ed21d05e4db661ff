"""scripts/ablation.py on tiny backbones: cells, their comparison, and going on where it stopped."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import yaml

import eval_sense
import train_sense
from scripts import ablation
from tests import processes
from tests.conftest import write_corpus


MAINS = {"train_sense.py": train_sense.main, "eval_sense.py": eval_sense.main}


@pytest.fixture
def recipe(tmp_path, tiny_whisper, tiny_llama):
    shared = {"audio_backbone": tiny_whisper, "text_backbone": tiny_llama, "backbone_dtype": "float32"}
    shared |= {"tasks": {"ner": 1, "sa": 1}, "prompts": {"asr": "Write.", "ner": "Tag.", "sa": "Which?"}}
    shared |= {"use_cpu": True}
    shared |= {"max_steps": 2, "eval_strategy": "no", "save_steps": 1, "learning_rate": "1e-3", "scored_samples": 2}
    first = {"tasks": {"asr": 1}, "max_steps": 1}
    cells = {"adapter": None, "+ LoRA": {"lora_r": 2}, "never run": {"lora_r": "bad"}}
    path = tmp_path / "ablation.yaml"
    curves = {"xlabel": "rank", "lines": {"LoRA": {0: "adapter", 2: "+ LoRA", 9: "never run"}}}
    whole = {"first": first, "shared": shared, "cells": cells, "curves": curves}
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def test_cells_are_compared_and_not_run_twice(recipe, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", train=6, dev=4)
    launched = []

    def launch(args, script, *options):
        launched.append(script)
        processes.launch(args.num_processes, MAINS[script], list(options))

    monkeypatch.setattr(ablation, "launch", launch)
    out = tmp_path / "out"
    asked = [str(recipe), "--dataset_dir", corpus, "--minutes", "1", "--output_dir", str(out)]
    found = ablation.main([*asked, "--cells", "adapter", "+ LoRA"])
    assert found["adapter"]["trained_parameters"] < found["+ LoRA"]["trained_parameters"]
    assert found["adapter"]["steps"] == 2
    assert json.loads((out / "first_250_audio_tokens" / "trainer_state.json").read_text())["global_step"] == 1
    for cell in ("adapter", "lora"):
        fields = yaml.safe_load((out / cell / "recipe.yaml").read_text())
        assert fields["init_from"] == str(out / "first_250_audio_tokens") and fields["tasks"] == {"ner": 1, "sa": 1}
    table = (out / "ablation.md").read_text().splitlines()
    assert table[0].startswith("|  | trained | steps | loss | clips shuffled | WER |")
    assert [row.split(" | ")[0] for row in table[2:]] == ["| adapter", "| + LoRA"]
    with open(out / "ablation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == ["adapter", "+ LoRA"]
    trained = json.loads((out / "lora" / "metrics.json").read_text())
    assert float(rows[1]["true_loss"]) == trained["eval_true_loss"] != trained["eval_shuffled_loss"]
    for row, cell in zip(rows, found.values()):
        for name in ("wer", "ner_f1", "ner_label_f1", "sa_f1"):
            assert float(row[name]) == cell[name] and float(row[f"{name}_low"]) <= cell[name] <= float(
                row[f"{name}_high"]
            )
    assert (out / "ablation.png").stat().st_size > 10_000 and (out / "curves.png").stat().st_size > 10_000

    assert launched == ["train_sense.py", "train_sense.py", "eval_sense.py", "train_sense.py", "eval_sense.py"]
    launched.clear()
    assert ablation.main([*asked, "--cells", "adapter", "+ LoRA"]) == found and not launched
    with pytest.raises(ValueError, match="was made with other settings"):
        ablation.main([*asked[:4], "2", *asked[5:], "--cells", "adapter"])
    with pytest.raises(ValueError, match="was made with other settings"):  # its batches would be of other rows
        ablation.main([*asked, "--num_processes", "2", "--cells", "adapter"])
    # A cell that was trained and not scored is scored alone.
    (out / "adapter" / "scored_dev" / "metrics.json").unlink()
    assert ablation.main([*asked, "--cells", "adapter"])["adapter"]["wer"] == found["adapter"]["wer"]
    assert launched == ["eval_sense.py"]


def test_scripts_are_started_by_torchrun(monkeypatch):
    ran = []
    run = SimpleNamespace(run=lambda command, check: ran.append((command, check)))
    monkeypatch.setattr(ablation, "subprocess", run)
    ablation.launch(SimpleNamespace(num_processes=2), "train_sense.py", "a.yaml")
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert ran == [([*starter, str(ablation.ROOT / "train_sense.py"), "a.yaml"], True)]


def test_cells_are_scored_on_the_columns_that_they_learnt(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablation, "launch", lambda args, script, *options: asked.extend(options))
    args = SimpleNamespace(dataset_dir="DIR", split="dev")
    fields = {"audio_column": "sound", "lowercase": True, "config_name": "voxpopuli", "on_bad_row": "skip"}
    ablation.evaluate(tmp_path, fields, args)  # of no task: the recipe's default
    assert "--lowercase" in asked and asked[asked.index("--audio_column") + 1] == "sound"
    assert asked[asked.index("--config_name") + 1] == "voxpopuli" and asked[asked.index("--on_bad_row") + 1] == "skip"
    assert "--text_column" not in asked and asked[-2:] == ["--tasks", "asr"]


def test_a_cell_that_was_not_written_to_its_end_is_trained_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablation, "launch", lambda args, script, *options: asked.append(script))
    args = SimpleNamespace(dataset_dir="DIR", num_processes=1)
    (tmp_path / "metrics.json").touch()
    ablation.train(tmp_path, {}, args)
    (tmp_path / "config.json").touch()
    ablation.train(tmp_path, {}, args)
    assert asked == ["train_sense.py"]


def test_another_split_is_scored_anew(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablation, "launch", lambda args, script, *options: asked.append(options))
    (tmp_path / "scored_dev").mkdir()
    (tmp_path / "scored_dev" / "metrics.json").touch()
    for split in ("dev", "test"):
        ablation.evaluate(tmp_path, {}, SimpleNamespace(dataset_dir="DIR", split=split))
    assert [options[options.index("--split") + 1] for options in asked] == ["test"]


def test_words_of_entity_answers_stand_for_the_transcript(tmp_path):
    (tmp_path / "scored_dev").mkdir()
    scores = {"ner_wer": 50.0, "ner_wer_interval": [40.0, 60.0], "ner_f1": 10.0}
    (tmp_path / "scored_dev" / "metrics.json").write_text(json.dumps(scores))
    trained = {"trained_parameters": 7, "eval_true_loss": 1.5, "eval_shuffled_loss": 4.5}
    (tmp_path / "metrics.json").write_text(json.dumps(trained))
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    training = {"trained_parameters": 7, "steps": 3, "true_loss": 1.5, "shuffled_loss": 4.5}
    assert ablation.collect(tmp_path, "dev") == scores | {"wer": 50.0, "wer_interval": [40.0, 60.0]} | training
    asked = scores | {"wer": 60.0, "wer_interval": [50.0, 70.0]}
    (tmp_path / "scored_dev" / "metrics.json").write_text(json.dumps(asked))
    assert ablation.collect(tmp_path, "dev") == asked | training


def test_without_minutes_the_steps_are_the_recipes(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=lambda command, check: None))
    with pytest.raises(FileNotFoundError):  # there is nothing to collect
        ablation.main([str(recipe), "--dataset_dir", "x", "--output_dir", str(tmp_path), "--cells", "adapter"])
    fields = yaml.safe_load((tmp_path / "adapter" / "recipe.yaml").read_text())
    assert fields["max_steps"] == 2 and "max_minutes" not in fields


def test_bad_recipes_and_cells_are_named(recipe, tmp_path):
    with pytest.raises(ValueError, match="there is no cell '\\+ LORA'; there are adapter, \\+ LoRA, never run"):
        ablation.read_recipe(recipe, ["+ LORA"])
    with pytest.raises(ValueError, match="there is no recipe"):
        ablation.read_recipe(tmp_path / "none.yaml", None)
    (tmp_path / "bad.yaml").write_text("cells: {}")
    with pytest.raises(ValueError, match="must hold `shared` and `cells`, may hold `first` and `curves`"):
        ablation.read_recipe(tmp_path / "bad.yaml", None)
    (tmp_path / "bad.yaml").write_text("shared: {}\ncells: {a: }\ncurves: {xlabel: x, lines: {one: {0: a, 1: b}}}")
    with pytest.raises(ValueError, match="there is no cell 'b'; there are a"):
        ablation.read_recipe(tmp_path / "bad.yaml", None)
    (tmp_path / "bad.yaml").write_text("shared: {}\ncells: {a: }\ncurves: {lines: {}}")
    with pytest.raises(ValueError, match="`curves` must hold `xlabel` and `lines`, found lines"):
        ablation.read_recipe(tmp_path / "bad.yaml", None)
    for cells in ("{+ LoRA: , LoRA: }", "{'+': }"):
        (tmp_path / "bad.yaml").write_text(f"shared: {{}}\ncells: {cells}")
        with pytest.raises(ValueError, match="would be in the folder"):
            ablation.read_recipe(tmp_path / "bad.yaml", None)
    (tmp_path / "bad.yaml").write_text("shared: {}\ncells: {a: }\ncurves:")
    assert ablation.read_recipe(tmp_path / "bad.yaml", None)["curves"] == {}


def test_shipped_recipe_has_the_cells_of_the_question():
    recipe = ablation.read_recipe(ablation.ROOT / "recipes" / "ablation.yaml", None)
    first, cells = recipe["first"], recipe["cells"]
    assert first["tasks"] == {"asr": 1} and "classifier" not in first and "lora_r" not in first
    assert list(cells)[:4] == ["adapter", "+ classifier", "+ LoRA", "+ both"]
    assert {fields.get("num_audio_tokens", 250) for fields in cells.values()} == {125, 250, 500}
    assert {fields.get("classifier_alpha", 0.2) for fields in cells.values()} == {0.0, 0.1, 0.2, 0.5}
    assert any(fields.get("train_entities") == "spacy" for fields in cells.values())


def test_noise_recipe_has_the_rates_of_the_question():
    recipe = ablation.read_recipe(ablation.ROOT / "recipes" / "noise.yaml", None)
    for name, line in recipe["curves"]["lines"].items():
        assert list(line) == [0, 10, 30, 50]
        for x, cell in line.items():
            fields = recipe["cells"][cell]
            assert fields.get("label_noise", {"false_positives": 0}) == {"false_positives": x / 100}
            assert x == 0 or fields.get("filter_labels", False) == (name == "both filters")


def test_what_limits_sense_mini_is_asked_one_at_a_time():
    recipe = ablation.read_recipe(ablation.ROOT / "recipes" / "limits.yaml", None)
    shared, cells = recipe["shared"], list(recipe["cells"].values())
    assert cells[0] == {} and all(shared.get(name) != value for changes in cells for name, value in changes.items())
    together = {"time_mask", "time_stretch", "answer_noise"}  # what is done to clips and answers
    assert all(len(changes) == 1 or changes.keys() == together for changes in cells[1:])
    stage = yaml.safe_load((ablation.ROOT / "recipes" / "sense_mini" / "1_asr_ner.yaml").read_text())
    shortened = {"tasks", "prompts", "max_steps", "eval_strategy", "scored_samples", "save_steps", "save_total_limit"}
    assert {name for name in shared if shared[name] != stage.get(name)} == shortened
    assert stage.keys() - shared == {"output_dir", "num_train_epochs", "eval_steps", "report_to"}
