"""
Kills trainings with SIGKILL at random moments, starts each again with the same command, and compares all that comes
out, bit by bit, with a run that nobody disturbed.

    python -m tests.reliability.kill_and_resume --kills 20

The moments are of several kinds: while the encoder cache is built, within steps, within evaluations, while checkpoints
are written, and while the finished model is. Backbones and speech are tiny and made here; one training takes seconds.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import safe_globals

import train_sense
from tests.conftest import save_llm, save_whisper, write_corpus


ROOT = Path(__file__).resolve().parents[2]
# What runs while a moment of this kind lasts: the object that holds the function, and its name.
MOMENTS = {
    "cache": (train_sense, "build_cache"),
    "step": (train_sense.SenseTrainer, "training_step"),
    "evaluation": (train_sense.SenseTrainer, "evaluate"),
    "checkpoint": (train_sense.SenseTrainer, "_save_checkpoint"),
    "output": (train_sense, "write_output"),
}
TASKS = {
    "tasks": {"asr": 0.5, "ner": 1, "sa": 0.5},
    "prompts": {"asr": "Transcribe.", "ner": "Tag the entities.", "sa": "Which sentiment?"},
}
# Steps of logging, evaluation, checkpoints and epochs (6, 8) that do not fall together.
RECIPES = {
    "cached": {
        **TASKS,
        "lora_r": 4,
        "lora_dropout": 0.2,
        "classifier": "ner",
        "speeds": [1.0, 0.9],
        "time_mask": 0.2,
        "train_sampling_strategy": "group_by_length",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 16,
        "logging_steps": 3,
        "eval_steps": 4,
        "save_steps": 4,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_true_loss",
        "greater_is_better": False,
    },
    "workers": {
        **TASKS,
        "lora_r": 4,
        "lora_dropout": 0.2,
        "lr_scheduler_type": "cosine",
        "dataloader_num_workers": 2,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
        "logging_steps": 2,
        "eval_steps": 6,
        "save_steps": 3,
    },
}


@dataclass
class Place:
    """Where trainings take place: a folder with the corpus and the backbones."""

    folder: Path
    recipe: dict = field(default_factory=dict)

    def __post_init__(self):
        self.recipe = {
            "dataset_dir": write_corpus(self.folder / "corpus", train=12, dev=3),
            "audio_backbone": save_whisper(self.folder / "whisper"),
            "text_backbone": save_llm(LlamaConfig, LlamaForCausalLM, self.folder / "llama"),
            "backbone_dtype": "float32",
            "learning_rate": "1e-3",
            "scored_samples": 1,
            "eval_strategy": "steps",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }

    def write_recipe(self, name: str, kind: str) -> str:
        """Path of the recipe of a run `name`, with an output folder and a cache of its own."""
        run = self.folder / name
        run.mkdir()
        fields = {**self.recipe, **RECIPES[kind], "output_dir": str(run / "out")}
        if "speeds" in fields:
            fields["encoder_cache"] = str(run / "cache")
        path = run / "recipe.yaml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()))
        return str(path)


def train(recipe: str, moment: str | None, at: int, told):
    """
    In a process of its own: trains, and says through the connection `told` when the moment's `at`-th time begins;
    without a moment, how long those of each kind took, in seconds.
    """
    log = os.open(Path(recipe).with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    multiprocessing.set_start_method("fork", force=True)  # of data loaders, Linux's usual one
    torch.set_num_threads(1)
    took = {kind: [] for kind in MOMENTS}
    for kind, (holder, name) in MOMENTS.items():
        setattr(holder, name, timed(getattr(holder, name), took[kind], at if kind == moment else None, told))
    train_sense.main([recipe])
    told.send(took)


def timed(function, took: list[float], at: int | None, told):
    """`function`, which also adds its seconds to `took`, and tells when it is called for the `at`-th time."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        number, start = len(took), time.perf_counter()
        took.append(0.0)
        if number == at:
            told.send("now")
        try:
            return function(*args, **kwargs)
        finally:
            took[number] = time.perf_counter() - start

    return call


def fork_server():
    """A context whose processes are forked from one that has imported everything, and done nothing else."""
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.reliability.kill_and_resume", "tests.reliability.golden"])
    return context


class Runner:
    """Starts trainings, each in a process of its own."""

    def __init__(self):
        self.context = fork_server()

    def start(self, recipe: str, moment: str | None = None, at: int = 0):
        told, tell = self.context.Pipe(duplex=False)
        process = self.context.Process(target=train, args=(recipe, moment, at, tell))
        process.start()
        tell.close()
        return process, told

    def finish(self, recipe: str) -> dict[str, list[float]]:
        """Trains to the end; how long the moments took."""
        process, told = self.start(recipe)
        try:
            took = told.recv()
        except EOFError:
            raise AssertionError(f"training failed:\n{Path(recipe).with_name('log').read_text()[-3000:]}") from None
        process.join()
        return took

    def kill(self, recipe: str, moment: str, at: int, delay: float) -> bool:
        """Trains until `delay` seconds into the `at`-th moment of a kind; whether it was killed before its end."""
        process, told = self.start(recipe, moment, at)
        assert told.recv() == "now"
        process.join(delay)
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), process.exitcode
        return process.exitcode != 0


def kill_once(runner: Runner, place: Place, name: str, kind: str, moment: str, took, draws: random.Random) -> str:
    """One training that is killed and started again; says where it was killed, and what it went on from."""
    at = draws.randrange(len(took[moment]))
    delay = draws.uniform(0, took[moment][at])
    recipe = place.write_recipe(name, kind)
    out = Path(recipe).with_name("out")
    while not runner.kill(recipe, moment, at, delay):  # this time it was faster
        delay /= 2
        shutil.rmtree(out.parent)
        recipe = place.write_recipe(name, kind)
    left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*checkpoint-*") if path.is_dir())
    runner.finish(recipe)
    (source,) = re.findall(r"resuming from: (?:.*/)?(\S+)", Path(recipe).with_name("log").read_text())[-1:]
    return (
        f"{kind}: killed {1000 * delay:.0f} ms into {moment} {at + 1} of {len(took[moment])}; "
        f"left: {', '.join(left) or 'nothing'}; went on from: {source}"
    )


def differences(one: Path, other: Path) -> list[str]:
    """In what two output folders differ: weights, optimiser, schedule, random state, history, scores; times aside."""
    folders = [sorted(path.name for path in out.glob("*checkpoint-*")) for out in (one, other)]
    if folders[0] != folders[1]:
        return [f"checkpoints: {folders[0]} != {folders[1]}"]
    found = []
    for name in ["model.safetensors", *(f"{folder}/adapter_model.safetensors" for folder in folders[0])]:
        found += compare(load_file(one / name), load_file(other / name), name)
    for folder in folders[0]:
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            with safe_globals():
                states = [torch.load(out / folder / file, weights_only=True) for out in (one, other)]
            found += compare(*states, f"{folder}/{file}")
    for name in ["trainer_state.json", "metrics.json", *(f"{folder}/trainer_state.json" for folder in folders[0])]:
        texts = [(out / name).read_text().replace(str(out), "") for out in (one, other)]
        found += compare(*map(json.loads, texts), name)
    return found


def compare(one, other, name: str) -> list[str]:
    """In what two nested states differ, bit by bit. Not compared: times, and the mean loss of one process's steps."""
    if re.search(r"runtime|_per_second|/train_loss$", name):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = {key: (one.get(key), other.get(key)) for key in one.keys() | other.keys()}
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = dict(enumerate(zip(one, other)))
    elif isinstance(one, np.ndarray | torch.Tensor):
        return [] if np.array_equal(np.asarray(one), np.asarray(other)) else [f"{name}: other values"]
    else:
        return [] if one == other else [f"{name}: {str(one)[:80]} != {str(other)[:80]}"]
    return [line for key in sorted(pairs, key=str) for line in compare(*pairs[key], f"{name}/{key}")]


def kill_and_resume(folder: Path, moments: list[tuple[str, str]], seed: int) -> list[str]:
    """
    A training for each of `moments` (recipe, kind of moment), killed there and started again.

    Returns:
        what differs from the undisturbed runs.
    """
    runner, place, draws = Runner(), Place(folder), random.Random(seed)
    undisturbed, found = {}, []
    for number, (kind, moment) in enumerate(moments, 1):
        if kind not in undisturbed:
            undisturbed[kind] = runner.finish(place.write_recipe(kind, kind))
        story = kill_once(runner, place, f"run-{number}", kind, moment, undisturbed[kind], draws)
        different = differences(folder / kind / "out", folder / f"run-{number}" / "out")
        print(f"{number:2} {story}: {'bit-equal' if not different else f'{len(different)} differences'}", flush=True)
        found += [f"{number}: {line}" for line in different]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    cycle = [("cached", kind) for kind in ("checkpoint", "step", "cache", "evaluation", "step", "output")]
    cycle += [("workers", kind) for kind in ("step", "checkpoint", "step", "evaluation")]
    moments = [cycle[number % len(cycle)] for number in range(args.kills)]
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(Path(folder), moments, args.seed)
    print("\n".join(found[:40]) or f"{args.kills} of {args.kills} killed trainings end bit-equal to undisturbed ones")
    return int(bool(found))


if __name__ == "__main__":
    # Under its real name, so that the processes it starts find its functions.
    from tests.reliability.kill_and_resume import main as run

    sys.exit(run())
