"""One model, however many processes train and score it: curves, checkpoints, metrics. Gloo on the CPU."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval_sense
import train_sense
from modeling_sense.modeling_sense import is_trained
from tests.conftest import write_corpus
from tests.processes import launch


SHARDED = ["--fsdp", "--fsdp_config", json.dumps({"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]})]
# How many processes, their options, and whose checkpoint each of them goes on from.
WAYS = {"one": (1, []), "ddp2": (2, []), "fsdp2": (2, SHARDED), "ddp4": (4, [])}
GOES_ON_FROM = {"one": "ddp4", "ddp2": "one", "fsdp2": "ddp2", "ddp4": "fsdp2"}
STEPS, SAVED_AT, ROWS = 20, 10, 8  # of a step, over all processes


def work(jobs: list[tuple[str, list[str]]]):
    for program, argv in jobs:
        {"train": train_sense.main, "score": eval_sense.main}[program](argv)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_whisper, tiny_llama) -> Path:
    """
    Folder of all runs: `one`, `ddp2`, ... from the start, `one-from-ddp4`, ... from another's checkpoint in the middle
    of an epoch, `evaluated-1` to `-3` and `scored-1` to `-3` of one model by so many processes.
    """
    folder = tmp_path_factory.mktemp("distributed")
    fields = {
        "dataset_dir": write_corpus(folder / "corpus", train=20, dev=11),
        "audio_backbone": tiny_whisper,
        "text_backbone": tiny_llama,
        "backbone_dtype": "float32",
        "tasks": {"asr": 1, "ner": 0.5, "sa": 0.4},  # each epoch of 37 rows draws others
        "prompts": {"asr": "Transcribe.", "ner": "Tag the entities.", "sa": "Which sentiment?"},
        "classifier": "ner",
        "lora_r": 4,
        "encoder_cache": str(folder / "cache"),
        "train_sampling_strategy": "group_by_length",
        "dataloader_drop_last": True,
        "max_steps": STEPS,
        "save_steps": SAVED_AT,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "adapter_learning_rate": 5e-3,
        "per_device_eval_batch_size": 5,
        "use_cpu": True,
        "report_to": "none",
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))

    def training(way: str, out: str) -> tuple[str, list[str]]:
        number, options = WAYS[way]
        batch = ["--per_device_train_batch_size", str(ROWS // number)]
        return "train", [str(recipe), "--output_dir", str(folder / out), *batch, *options]

    def going_on(way: str) -> tuple[str, list[str]]:
        out = f"{way}-from-{GOES_ON_FROM[way]}"
        copy_checkpoint(folder / GOES_ON_FROM[way], folder / out, SAVED_AT)
        return training(way, out)

    def judging(number: int) -> list[tuple[str, list[str]]]:
        copy_checkpoint(folder / "one", folder / f"evaluated-{number}", STEPS)  # nothing is left to be trained
        evaluate = [str(recipe), "--output_dir", str(folder / f"evaluated-{number}")]
        score = ["--model", str(folder / "one"), "--dataset", str(folder / "corpus"), "--split", "dev"]
        score += ["--output_dir", str(folder / f"scored-{number}"), "--batch_size", "3", "--shuffled_control"]
        return [("train", evaluate), ("score", score)]

    launch(1, work, [training("one", "one")])
    talk_on(folder / "one")
    launch(2, work, [training("ddp2", "ddp2"), going_on("ddp2"), *judging(2)])
    launch(2, work, [training("fsdp2", "fsdp2"), going_on("fsdp2")], sharded=True)
    launch(4, work, [training("ddp4", "ddp4"), going_on("ddp4")])
    launch(3, work, judging(3))
    launch(1, work, [going_on("one"), *judging(1)])
    return folder


def copy_checkpoint(source: Path, target: Path, step: int):
    shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")


def talk_on(folder: Path):
    """Lets a random model write something: it would rather say nothing."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    settings["suppress_tokens"].append(settings["eos_token_id"])
    path.write_text(json.dumps(settings))


def curve(folder: Path) -> dict[int, float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def metrics(folder: Path) -> dict:
    """But for the times."""
    times = ("rtf", "_runtime", "_second")
    found = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in found.items() if not name.endswith(times)}


@pytest.mark.parametrize("way", ["ddp2", "fsdp2", "ddp4"])
def test_the_loss_falls_as_in_one_process(runs, way):
    alone, shared = curve(runs / "one"), curve(runs / way)
    assert list(shared) == list(alone) == list(range(1, STEPS + 1))
    assert shared == pytest.approx(alone, abs=1e-4)
    assert len({round(loss, 3) for loss in alone.values()}) > 10 and alone[STEPS] < alone[1]
    assert metrics(runs / way)["trained_parameters"] == metrics(runs / "one")["trained_parameters"] > 0
    assert metrics(runs / way)["eval_true_loss"] == pytest.approx(metrics(runs / "one")["eval_true_loss"], abs=1e-4)


@pytest.mark.parametrize("way", GOES_ON_FROM)
def test_a_run_goes_on_from_a_checkpoint_of_any_other_kind(runs, way):
    """Data, optimiser and rate: the curve is that of the run that was never interrupted."""
    assert curve(runs / f"{way}-from-{GOES_ON_FROM[way]}") == pytest.approx(curve(runs / "one"), abs=1e-4)


@pytest.mark.parametrize("way", ["ddp2", "fsdp2", "ddp4"])
def test_checkpoints_and_models_are_the_same_files(runs, way):
    for step in (SAVED_AT, STEPS):
        one, other = (runs / name / f"checkpoint-{step}" for name in ("one", way))
        random_states = {f"rng_state{suffix}.pth" for suffix in ("", "_0", "_1", "_2", "_3")}
        names = [{path.name for path in folder.iterdir()} - random_states for folder in (one, other)]
        assert names[0] == names[1]
        expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        expected, found = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, other))
        assert found["param_groups"] == expected["param_groups"] and len(found["param_groups"]) == 4
        torch.testing.assert_close(found["state"], expected["state"], rtol=1e-3, atol=1e-4)
    expected, found = (load_file(runs / name / "model.safetensors") for name in ("one", way))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        if is_trained(name):
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert torch.equal(weight, expected[name]), name
    configs = [json.loads((runs / name / "config.json").read_text()) for name in ("one", way)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("number", [2, 3])
def test_every_row_is_judged_once(runs, number):
    """11 clips and 32 questions do not divide by 2 or 3 processes, nor by their batches of 3 and 5."""
    alone, shared = (metrics(runs / f"evaluated-{n}") for n in (1, number))
    assert {"eval_true_loss", "eval_shuffled_loss", "eval_wer", "eval_ner_f1", "eval_sa_f1"} <= alone.keys()
    assert shared == pytest.approx(alone, abs=1e-5)
    assert metrics(runs / f"scored-{number}") == metrics(runs / "scored-1")
    tables = [(runs / f"scored-{n}" / "utterances.jsonl").read_text() for n in (1, number)]
    assert tables[0] == tables[1]
    rows = [json.loads(line) for line in tables[1].splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(11))
    assert len({row["asr"] for row in rows}) > 1  # it does answer, and not always the same
