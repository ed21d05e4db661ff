"""Trainings that are killed, run into a full disk, or find their checkpoint broken, and go on."""

import json
import os
import re
import resource
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import train_sense
from modeling_sense import SenseForConditionalGeneration
from processing.bad_rows import BadRows
from processing.checkpoints import (
    CHECKSUMS,
    UNFINISHED,
    find_fault,
    last_checkpoint,
    publish,
    require_whole,
    seal,
    unfinished,
)
from processing.hub import load_checkpoint
from processing.questions import EpochSampler, Mixture
from processing.tasks import make_tasks
from tests.reliability.kill_and_resume import Place, differences, kill_and_resume


WRITTEN = [  # files of a checkpoint, by the name that they are opened by
    "adapter_model.safetensors",
    ".sense_adapter.json.tmp",
    "tokenizer.json",
    "processor_config.json",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def recipe(place, tmp_path):
    """Path of a short recipe whose output folder is `tmp_path / "out"`."""
    fields = {**place.recipe, "output_dir": str(tmp_path / "out"), "warm_start": False, "lora_r": 4}
    fields |= {"max_steps": 6, "save_steps": 2, "eval_strategy": "no", "logging_steps": 4}
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()))
    return str(path)


def test_killed_trainings_end_as_undisturbed_ones(tmp_path):
    """Three of the twenty moments of kill_and_resume.py."""
    moments = [("cached", "checkpoint"), ("cached", "step"), ("workers", "step")]
    assert kill_and_resume(tmp_path, moments, seed=1) == []


@pytest.fixture
def little_space(monkeypatch):
    """10 MB are free, for who asks: disks are not really filled here."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))


@contextmanager
def full_disk(path: Path):
    """A write to `path` meets the kernel's own "no space left", one of weights its "file too large"."""
    if path.suffix == ".safetensors":  # are written under another name
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    else:
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("/dev/full")
        yield


def test_what_is_called_a_checkpoint_is_whole(recipe, tmp_path, monkeypatch, little_space):
    """Whichever file of the next one fills the disk."""
    out, name = tmp_path / "out", None
    write, write_all = transformers.Trainer._save_checkpoint, train_sense.SenseTrainer._save_checkpoint

    def save(self, model, trial):
        with full_disk(self.writing / f"checkpoint-{self.state.global_step}" / name) if name else nullcontext():
            write(self, model, trial)

    def save_all(self, model, trial):
        nonlocal name
        for name in WRITTEN if self.state.global_step == 4 else ():
            with pytest.raises(OSError) as error:
                write_all(self, model, trial)
            assert str(error.value).startswith(f"{out / 'checkpoint-4'} could not be written ("), name
            assert re.search(r"needs up to 20 MB, [0-9,]+ MB are free there", str(error.value)), name
            assert [path.name for path in out.iterdir()] == ["checkpoint-2"], name
            assert find_fault(out / "checkpoint-2") is None
        name = None
        write_all(self, model, trial)

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", save)
    monkeypatch.setattr(train_sense.SenseTrainer, "_save_checkpoint", save_all)
    train_sense.main([recipe])
    assert {path.name: find_fault(path) for path in out.glob("checkpoint-*")} == {
        f"checkpoint-{step}": None for step in (2, 4, 6)
    }
    assert not (out / UNFINISHED).exists()


def test_a_full_disk_ends_training_and_the_same_command_goes_on(recipe, tmp_path, monkeypatch, capsys, little_space):
    """With checkpoints, and with the finished model."""
    out, write = tmp_path / "out", transformers.Trainer._save_checkpoint

    def save(self, model, trial):
        with full_disk(self.writing / "checkpoint-2" / "optimizer.pt"):
            write(self, model, trial)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="checkpoint-2 could not be written"):
        patch.setattr(transformers.Trainer, "_save_checkpoint", save)
        train_sense.main([recipe])
    assert list(out.iterdir()) == []

    save_pretrained = train_sense.SenseForConditionalGeneration.save_pretrained

    def fill(self, folder):
        with full_disk(folder / "model.safetensors"):
            save_pretrained(self, folder)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"{out}/model.safetensors could not be written"):
        patch.setattr(train_sense.SenseForConditionalGeneration, "save_pretrained", fill)
        train_sense.main([recipe])
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    train_sense.main([recipe])
    assert f"resuming from: {out / 'checkpoint-6'}" in capsys.readouterr().out
    assert load_checkpoint(str(out)) and json.loads((out / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize(
    "error, free, told",
    [
        (ValueError("a bug"), 21_000_000, "a bug"),
        (
            RuntimeError("file write failed"),
            19_000_000,
            r"model could not be written \(RuntimeError: file write failed",
        ),
        (OSError("quota exceeded"), 21_000_000, r"model could not be written \(OSError: quota exceeded"),
    ],
)
def test_room_is_asked_for_where_it_is_short(tmp_path, monkeypatch, error, free, told):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(type(error) if told == "a bug" else OSError, match=told):
        with unfinished(tmp_path, "model", lambda: 0) as folder:
            (folder / "part").touch()
            raise error
    assert list(tmp_path.iterdir()) == []


def test_what_gets_its_name_is_on_the_disk(tmp_path, monkeypatch):
    """Files before their list, that before the folder's name, and the name at last."""
    synced, fsync = [], os.fsync

    def note(opened: int):
        synced.append(Path(os.readlink(f"/proc/self/fd/{opened}")).relative_to(tmp_path).as_posix())
        fsync(opened)

    monkeypatch.setattr(os, "fsync", note)
    made = tmp_path / "_unfinished" / "checkpoint-2"
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "weights").write_text("1")
    seal(made)
    publish(made, tmp_path / "checkpoint-2")
    inside = [f"_unfinished/checkpoint-2{name}" for name in ("/deep/weights", f"/{CHECKSUMS}", "/deep", "")]
    assert synced == [*inside, "."]


def forget_callbacks(checkpoint: Path, *names: str):
    """Makes it one of an older version, or of another recipe."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    for name in names:
        del state["stateful_callbacks"][name]
    path.write_text(json.dumps(state))
    (checkpoint / CHECKSUMS).unlink()


def test_a_checkpoint_without_the_states_of_new_callbacks_is_gone_on_from(recipe, tmp_path):
    train_sense.main([recipe, "--max_steps", "2"])
    old = tmp_path / "out" / "checkpoint-2"
    forget_callbacks(old, "LossSinceLog")
    again = ["--resume_from_checkpoint", str(old), "--max_steps", "4", "--max_minutes", "5"]
    train_sense.main([recipe, *again])
    newest = tmp_path / "out" / "checkpoint-4"
    state = json.loads((newest / "trainer_state.json").read_text())
    assert {"LossSinceLog", "TimeBudget"} <= state["stateful_callbacks"].keys() and find_fault(newest) is None
    losses = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    assert losses[4] > 5  # the mean of steps 3 and 4, not over the two whose losses are not known


def test_the_best_checkpoint_is_kept_in_a_folder_of_another_name(recipe, tmp_path):
    fields = ["--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1", "--save_total_limit", "2"]
    fields += ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_true_loss"]
    fields += ["--greater_is_better", "false", "--learning_rate", "0"]  # so that the first one stays the best
    train_sense.main([recipe, *fields, "--max_steps", "2"])
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "moved" / "metrics.json").unlink()
    train_sense.main([recipe, *fields, "--max_steps", "4", "--output_dir", str(tmp_path / "moved")])
    left = {path.name for path in (tmp_path / "moved").glob("checkpoint-*")}
    assert left == {"checkpoint-1", "checkpoint-4"}
    state = json.loads((tmp_path / "moved" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "moved" / "checkpoint-1")


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def test_a_broken_checkpoint_is_passed_over_and_named(recipe, tmp_path, capsys):
    once, out = tmp_path / "once", tmp_path / "out"
    train_sense.main([recipe])
    shutil.copytree(out, once)
    capsys.readouterr()
    files = sorted(path.name for path in (out / "checkpoint-6").iterdir())
    assert {"sense_adapter.json", CHECKSUMS, *WRITTEN} - {".sense_adapter.json.tmp"} <= set(files)
    newest = out / "checkpoint-6"
    for name in files:
        truncate(newest / name)
        assert last_checkpoint(out) == str(out / "checkpoint-4")
        told = capsys.readouterr().out
        assert told.startswith(f"not going on from {newest}: {name} ") and "trying the one before it" in told
        shutil.rmtree(newest)
        shutil.copytree(once / "checkpoint-6", newest)
    assert last_checkpoint(out) == str(newest)
    for name in ("optimizer.pt", CHECKSUMS):
        (newest / name).unlink()
        assert f"{name}" in find_fault(newest) and "is missing" in find_fault(newest)
        shutil.copy(once / "checkpoint-6" / name, newest)
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert find_fault(newest) == f"{weights.name} is not what was written, its SHA-256 is another"

    for checkpoint in (out / "checkpoint-4", out / "checkpoint-6"):  # now and, as the run was over, once more
        train_sense.main([recipe])
        assert f"resuming from: {checkpoint}\n" in capsys.readouterr().out
        assert find_fault(newest) is None and differences(once, out) == []

    for checkpoint in out.glob("checkpoint-*"):
        truncate(checkpoint / "scheduler.pt")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* is whole \(.*scheduler.pt has .* afresh"):
        train_sense.main([recipe])


def test_a_checkpoint_that_is_named_must_be_whole(tmp_path):
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: there is no folder {tmp_path}/none"):
        require_whole(str(tmp_path / "none"))
    require_whole(str(tmp_path))  # of an older version
    (tmp_path / CHECKSUMS).write_text(json.dumps({"optimizer.pt": {"bytes": 1, "sha256": ""}}))
    with pytest.raises(ValueError, match="optimizer.pt is missing; name one before it"):
        require_whole(str(tmp_path))
    for broken in ("[1]", '{"optimizer.pt": 3}', '{"optimizer'):
        (tmp_path / "optimizer.pt").touch()
        (tmp_path / CHECKSUMS).write_text(broken)
        assert find_fault(tmp_path).startswith(f"{CHECKSUMS} can't be read (")


def test_what_is_drawn_depends_on_seed_epoch_and_row_alone(place, tmp_path):
    """Not on the workers that build batches, nor on what was drawn before."""
    recipe = place.write_recipe("draws", "cached")
    args, training = train_sense.parse_recipe([recipe])
    model, processor = train_sense.build_model(args)
    bad_rows = BadRows(training=True)
    train = train_sense.usable_rows(args, train_sense.load_split(args, "train", None, bad_rows), bad_rows)
    cache, _ = train_sense.build_caches(args, model, processor, train, train)
    tasks = make_tasks(args.prompts, args.tasks)
    mixture = Mixture(args, train, cache.lengths, tasks, processor.tokenizer, seed=3)
    collate = train_sense.SenseCollator(processor, tasks, cache, time_mask=args.time_mask)

    def epoch(number: int, workers: int):
        mixture.set_epoch(number)
        sampler = EpochSampler(mixture, 3, None)
        loader = torch.utils.data.DataLoader(mixture, 4, sampler=sampler, collate_fn=collate, num_workers=workers)
        return [batch["pooled_features"] for batch in loader]

    first, second, again, other = epoch(0, 0), epoch(1, 0), epoch(0, 0), epoch(0, 2)
    assert all(map(torch.equal, first, again)) and all(map(torch.equal, first, other))
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ["--label_smoothing_factor", "0.1"],
            "label_smoothing_factor: Trainer would smooth labels that nobody shifted",
        ),
        (
            ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"],
            "dataloader_persistent_workers: such workers go on with the first epoch's",
        ),
        (["--push_to_hub", "true"], "push_to_hub: .* run sense export .*out FOLDER --push OWNER/NAME"),
        (
            ["--max_minutes", "1", "--warmup_steps", "0.1"],
            "warmup_steps: 0.1 is a share, and under max_minutes nobody",
        ),
    ],
)
def test_what_trainer_would_do_wrong_is_refused(recipe, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train_sense.main([recipe, *more])
    assert not (tmp_path / "out").exists()


def test_no_stage_begins_with_a_merged_model(recipe, tmp_path, place):
    """Its first checkpoint could not be written."""
    audio, text = (place.recipe[f"{part}_backbone"] for part in ("audio", "text"))
    model = SenseForConditionalGeneration.from_backbones(audio, text)
    model.add_lora(r=2)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match="init_from: LoRA of .*merged was merged"):
        train_sense.main([recipe, "--init_from", str(tmp_path / "merged")])
