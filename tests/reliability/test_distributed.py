"""One model, however many processes train and score it: curves, checkpoints, metrics. Gloo on the CPU."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, WhisperConfig
from transformers.integrations.deepspeed import (
    HfTrainerDeepSpeedConfig,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

import eval_sense
import train_sense
from benchmarks.memory import forget_peak, resident_bytes
from modeling_sense.modeling_sense import is_trained
from processing import bad_rows, questions
from processing.bad_rows import BadRows, problem
from processing.datasets import SCHEMA, load_corpus
from processing.questions import Stream
from processing.sharding import whole_weights
from processing.tasks import make_tasks
from processing.training_memory import Setting, build_on_meta, count_states, estimate
from processing.training_memory import main as training_memory
from tests.conftest import write_corpus
from tests.processes import launch, launcher_environment
from tests.reliability import stream_memory


CONFIGS = Path(train_sense.__file__).parent / "recipes" / "accelerate"
# How many processes, and whose checkpoint each of them goes on from.
WAYS = {"one": 1, "ddp2": 2, "fsdp2": 2, "ddp4": 4}
GOES_ON_FROM = {"one": "ddp4", "ddp2": "one", "fsdp2": "ddp2", "ddp4": "fsdp2"}
STEPS, SAVED_AT, ROWS = 20, 10, 8  # of a step, over all processes


def work(jobs: list[tuple[str, list[str]]]):
    for program, argv in jobs:
        {"train": train_sense.main, "score": eval_sense.main}[program](argv)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_whisper, tiny_llama) -> Path:
    """
    Folder of all runs: `one`, `ddp2`, ... from the start, `one-from-ddp4`, ... from another's checkpoint in the middle
    of an epoch, `evaluated-1` to `-3` and `scored-1` to `-3` of one model by so many processes; `stream-1` and `-2`
    by so many processes, `stream-again` from the former's checkpoint.
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
        batch = ["--per_device_train_batch_size", str(ROWS // WAYS[way])]
        return "train", [str(recipe), "--output_dir", str(folder / out), *batch]

    def streaming(number: int, out: str, *more: str) -> tuple[str, list[str]]:
        batch = ["--per_device_train_batch_size", str(4 // number), "--train_sampling_strategy", "random"]
        asked = ["--streaming", "true", "--warm_start_clips", "8", "--tasks", '{"asr": 1}', "--max_steps", "4"]
        asked += ["--save_steps", "2", "--shuffle_buffer", "8", "--max_eval_samples", "4", *batch]
        return "train", [str(plain), "--output_dir", str(folder / out), *asked, *more]

    plain = folder / "plain.yaml"
    plain.write_text("".join(line for line in recipe.open() if not line.startswith("encoder_cache")))

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

    launch(1, work, [training("one", "one"), streaming(1, "stream-1")])
    copy_checkpoint(folder / "stream-1", folder / "stream-again", 2)
    talk_on(folder / "one")
    launch(2, work, [training("ddp2", "ddp2"), going_on("ddp2"), *judging(2), streaming(2, "stream-2")])
    launch(2, work, [training("fsdp2", "fsdp2"), going_on("fsdp2")], config=CONFIGS / "fsdp2.yaml")
    launch(4, work, [training("ddp4", "ddp4"), going_on("ddp4")])
    launch(3, work, judging(3))
    launch(1, work, [going_on("one"), *judging(1), streaming(1, "stream-again")])
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
    assert (shared.pop("bad_rows"), alone.pop("bad_rows")) == ({}, {})
    assert shared == pytest.approx(alone, abs=1e-5)
    assert metrics(runs / f"scored-{number}") == metrics(runs / "scored-1")
    tables = [(runs / f"scored-{n}" / "utterances.jsonl").read_text() for n in (1, number)]
    assert tables[0] == tables[1]
    rows = [json.loads(line) for line in tables[1].splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(11))
    assert len({row["asr"] for row in rows}) > 1  # it does answer, and not always the same


# ---------------------------------------------------------------- streams


def test_a_stream_teaches_the_same_on_two_processes_and_from_a_checkpoint(runs):
    assert curve(runs / "stream-2") == pytest.approx(curve(runs / "stream-1"), abs=1e-4)
    assert curve(runs / "stream-again") == pytest.approx(curve(runs / "stream-1"), abs=1e-4)
    assert len(curve(runs / "stream-1")) == 4
    assert "corpus: a stream; 4 steps" in (runs / "stream-1" / "README.md").read_text()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> str:
    """A folder of 120 rows of 0.1 s in 4 files."""
    folder = tmp_path_factory.mktemp("parquet")
    stream_memory.write_stream(folder, 120, 0.1)
    return str(folder)


def open_stream(folder: str, weights: dict, prompts: dict, batches: int = 0, out: Path | None = None) -> Stream:
    noted = BadRows("skip", out, training=True)
    rows = load_corpus(folder, "train", streaming=True, bad_rows=noted)
    args = SimpleNamespace(tasks=weights, shuffle_buffer=10)
    return Stream(args, rows, make_tasks(prompts), 0, 2, noted, batches)


def be_process(monkeypatch, index: int, number: int):
    state = SimpleNamespace(process_index=index, num_processes=number)
    monkeypatch.setattr(questions, "PartialState", lambda: state)


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (2, 2), (3, 0)])
def test_processes_and_workers_share_a_stream_out(parquet, monkeypatch, processes, workers):
    """4 files: two processes take two each; three take every third row of all."""
    seen = []
    for process in range(processes):
        be_process(monkeypatch, process, processes)

        def read(number: int, known: int) -> list[list[str]]:
            stream = open_stream(parquet, {"asr": 1}, {"asr": "Write."}, known)
            loader = torch.utils.data.DataLoader(stream, 2, collate_fn=list, num_workers=workers)
            return [[row["text"] for row in batch] for batch in itertools.islice(loader, number)]

        batches = read(60 // processes, 0)
        assert sorted(read(2, 7)) == sorted(batches[7:9])  # neighbours may change places, with workers
        seen += [text for batch in batches for text in batch]
    assert len(set(seen)) == len(seen) == 120


@pytest.mark.parametrize("processes", [1, 3])
def test_a_stream_listens_to_the_rows_alone_that_are_learnt_from(parquet, monkeypatch, tmp_path, processes):
    """Not to others' rows, nor to an earlier run's, though that left some out: every fifth is said to be silent."""
    heard, silent = [], problem("silent", "audio", "silence")

    def listen(audio: dict):
        heard.append(audio["path"])
        return silent if int(Path(audio["path"]).stem) % 5 == 0 else None

    monkeypatch.setattr(bad_rows, "find_problem", listen)
    taken = []
    for process in range(processes):
        be_process(monkeypatch, process, processes)

        def read(number: int, known: int) -> list[str]:
            heard.clear()
            stream = open_stream(parquet, {"asr": 1.5}, {"asr": "Write."}, known, tmp_path / str(process))
            return [row["text"] for row in itertools.islice(stream, number)]

        first = read(36, 0)
        assert len(heard) == len(set(heard)) < 60
        taken += heard
        assert read(6, 15) == first[30:] and 0 < len(heard) <= 10
    assert len(set(taken)) == len(taken)  # each by one process


def test_a_stream_mixes_tasks_as_often_as_the_recipe_says(parquet):
    stream = open_stream(parquet, {"asr": 0.25, "sa": 2}, {"asr": "Write.", "sa": "Which?"})
    asked_for = list(itertools.islice(stream, 540))  # of two epochs
    assert sum(row["task"] == "asr" for row in asked_for) == pytest.approx(60, abs=20)
    assert all(row.keys() == {*SCHEMA, "task"} for row in asked_for)
    with pytest.raises(ValueError, match="not one row of this process's share of the stream has a label for ner"):
        next(iter(open_stream(parquet, {"ner": 1}, {"ner": "Tag."})))  # there are no entities


def test_a_stream_is_read_in_flat_memory(tmp_path):
    """The same with 50,000 rows: docs/distributed.md."""
    (tmp_path / "data").mkdir()
    stream_memory.write_stream(tmp_path / "data", 2000, 1.0, files=20)
    launch(1, stream_memory.read, str(tmp_path / "data"), 2000, str(tmp_path / "memory.json"))
    memory = json.loads((tmp_path / "memory.json").read_text())
    settled = [size for rows, size in memory if rows >= 800]
    assert len(memory) == 10 and max(settled) - settled[0] < 15, memory  # those rows are 37 MiB


@pytest.mark.parametrize(
    "content, message",
    [
        ("encoder_cache: x", "encoder_cache needs all rows before the first step"),
        ("balance_classes: true", "balance_classes needs all rows"),
        ("max_train_samples: 5", "max_train_samples needs all rows"),
        ("train_entities: spacy", "spacy reads all rows before the first step"),
        ("warm_start: true", "streaming: give warm_start_clips"),
        ("warm_start_clips: 5", "a stream has no end; give max_steps, found -1"),
        (
            "warm_start_clips: 5\nmax_steps: 5\ntrain_sampling_strategy: group_by_length",
            "leave train_sampling_strategy out, found 'group_by_length'",
        ),
    ],
)
def test_what_a_stream_can_not_do_is_said_first(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"dataset_dir: x\nstreaming: true\noutput_dir: {tmp_path}\nuse_cpu: true\n{content}\n")
    with pytest.raises(ValueError, match=message):
        train_sense.main([str(path)])


# ---------------------------------------------------------------- recipes for accelerate, and their memory


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_what_accelerate_launch_takes(config, monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: True, raising=False)
    found = launcher_environment(config)
    assert found["ACCELERATE_MIXED_PRECISION"] == "no"  # the recipe decides
    assert (found.get("FSDP_VERSION") == "2") == (config.stem == "fsdp2")


class Filled(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
    """Trainer's, which wants deepspeed to be installed, over accelerate's, which does not."""

    def __init__(self, config: str | dict):
        HfDeepSpeedConfig.__init__(self, config)
        self._dtype, self.mismatches = None, []


def test_deepspeed_takes_its_settings_from_the_recipe(tmp_path):
    found = Filled(str(CONFIGS / "zero2.json"))
    out = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    args, training = train_sense.parse_recipe(["1_asr", *out])
    found.trainer_config_process(training)
    text = LlamaConfig(hidden_size=2048)
    found.trainer_config_finalize(training, SimpleNamespace(config=SimpleNamespace(text_config=text)), 1000)
    assert '"auto"' not in json.dumps(found.config)
    assert found.is_zero2() and not found.is_offload()
    assert found.config["train_batch_size"] == 16 * 2 and found.config["gradient_clipping"] == 1.0
    assert "optimizer" not in found.config  # SenseTrainer's, with its groups


def test_zero3_is_refused(tmp_path):
    config = json.loads((CONFIGS / "zero2.json").read_text())
    asked = ["1_asr", "--dataset_dir", str(tmp_path / "none"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    asked += ["--bf16", "false", "--resume_from_checkpoint", str(tmp_path / "none")]
    messages = {2: "there is no folder", 3: r"shard them with FSDP2 .*recipes/accelerate/fsdp2.yaml.*found stage 3"}
    try:
        for stage, message in messages.items():
            config["zero_optimization"]["stage"] = stage
            found = Filled(config)
            set_hf_deepspeed_config(found)
            with pytest.raises(ValueError, match=message):
                train_sense.main(asked)
    finally:
        unset_hf_deepspeed_config()


def shard_and_look(report: str):
    """Writes how a model of two layers reshards before, within and after `whole_weights`."""
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    settings = (True, False, True)  # the root's, too
    for module, setting in zip((*model, model), settings):
        fully_shard(module, mesh=mesh, reshard_after_forward=setting)

    def look() -> list[bool]:
        model(torch.ones(1, 2))
        return [isinstance(layer.weight, DTensor) for layer in model]

    found = [look()]
    with contextlib.suppress(KeyError), whole_weights(model):
        found.append(look())
        raise KeyError
    found.append(look())
    Path(report).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_scoring_leaves_sharding_as_it_was(tmp_path):
    """Also where it fails."""
    launch(1, shard_and_look, str(tmp_path / "found"))
    assert json.loads((tmp_path / "found").read_text()) == [[True, False], [False, False], [True, False]]


SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Setting:
    """Backbones that are configs alone, large enough to be seen in a process's memory."""
    folder = tmp_path_factory.mktemp("configs")
    WhisperConfig(d_model=128, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=256).save_pretrained(
        folder / "whisper"
    )
    LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=8000, pad_token_id=0).save_pretrained(folder / "llama")
    names = {"audio_backbone": str(folder / "whisper"), "text_backbone": str(folder / "llama")}
    how = {"backbone_dtype": "float32", "per_device_train_batch_size": 8, "encoder_cache": "cache", "lora_r": 8}
    return Setting(**names, **how)


def train_two_steps(setting: Setting, report: str):
    """Writes how much more memory the process needed at most."""

    def run(rows: int):
        model = build_on_meta(setting).to_empty(device="cpu")
        model.config.audio_token_id = 7
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        ids = torch.full((rows, setting.num_audio_tokens + setting.text_tokens), 5)
        ids[:, : setting.num_audio_tokens] = model.config.audio_token_id
        labels = ids.masked_fill(ids == model.config.audio_token_id, -100)
        pooled = torch.randn(rows, setting.num_audio_tokens, model.config.audio_config.d_model)
        for _ in range(2):
            model(input_ids=ids, pooled_features=pooled, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    run(1)
    forget_peak("cpu")
    before = resident_bytes("VmRSS")
    run(setting.per_device_train_batch_size)
    Path(report).write_text(str(resident_bytes("VmHWM") - before))


def test_estimated_memory_is_what_a_training_step_takes(small, tmp_path):
    launch(1, train_two_steps, small, str(tmp_path / "bytes"))
    found = estimate(small)
    # What the backward pass needs for a moment, and what the allocator wastes, is not counted.
    assert found["total"] < int((tmp_path / "bytes").read_text()) < 1.6 * found["total"]
    assert found["activations"] > 0.7 * found["total"] > 100e6


@pytest.mark.parametrize("field, value", [("quantize", "int4"), ("gguf_file", "small.gguf")])
def test_memory_of_packed_weights_is_not_guessed(tmp_path, field, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{field}: {value}\n")
    with pytest.raises(ValueError, match=f"{field}: '{value}'; packed weights are not counted"):
        training_memory([str(path)])


def test_estimated_memory_counts_what_is_sharded(small):
    model = build_on_meta(small)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    alone, ddp, zero2, fsdp2 = (
        count_states(model, *how) for how in (("ddp", 1), ("ddp", 4), ("zero2", 4), ("fsdp2", 4))
    )
    assert sum(alone.values()) == 4 * frozen + 16 * trained
    assert sum(ddp.values()) == 4 * frozen + 20 * trained
    assert sum(zero2.values()) == 4 * frozen + 4 * trained + 12 * trained / 4
    assert fsdp2["frozen weights"] == frozen and fsdp2["gathered weights"] < 4 * (frozen + trained)
