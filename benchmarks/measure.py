"""Time, taken in turns; encoder rows, counted; peak memory, each system in a process of its own."""

import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import transformers
from torch import nn

from processing.bad_rows import count_cores
from processing.evaluation_page import cpu_name

from .setting import Setting, System
from .systems import encoder_of


def interleave(
    steps: dict[str, Callable], repeats: int, warmups: int = 0, synchronize: Callable = lambda: None
) -> dict[str, list[float]]:
    """
    Seconds of each repeat of each step. One of each in turn: what slows the machine for a while slows all of them.

    Args:
        steps: functions without arguments, by name.
        warmups: rounds that do not count.
        synchronize: waits until the device is done.
    """
    seconds = {name: [] for name in steps}
    for turn in range(warmups + repeats):
        for name, step in steps.items():
            gc.collect()  # or a system would pay for another one's garbage
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if turn >= warmups:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict:
    """`median_s`, `iqr_s` (first and third quartile, in s) and all repeats as they came, `repeats_s`."""
    return {"median_s": statistics.median(seconds), "iqr_s": quartiles(seconds), "repeats_s": seconds}


def quartiles(values: list[float]) -> list[float]:
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def count_encoder_rows(model: nn.Module, step: Callable) -> int | None:
    """Runs `step` once; how many clips (rows of a batch) went through the encoder. None without an encoder."""
    encoder = encoder_of(model)
    rows = []
    hook = encoder and encoder.register_forward_hook(lambda _, args, output: rows.append(len(output[0])))
    step()
    if hook is None:
        return None
    hook.remove()
    return sum(rows)


def time_systems(systems: dict[str, System], setting: Setting, repeats: int) -> dict[str, dict]:
    """
    For each system `summary`'s fields, `encoder_rows` of one run, `audio_tokens` of a clip and `clips_per_s`.
    Systems that are built alike share one model.
    """
    models, steps, results = {}, {}, {}
    for name, system in systems.items():
        if system.build not in models:
            models[system.build] = system.build(setting)
        model, inputs = models[system.build], system.inputs(setting)
        steps[name] = functools.partial(system.run, model, inputs)
        results[name] = {"encoder_rows": count_encoder_rows(model, steps[name])}  # and warms it up
        if "input_ids" in inputs:
            results[name]["audio_tokens"] = int((inputs["input_ids"][0] == setting.audio_token_id).sum())
        if note := getattr(model, "note", None):
            results[name]["note"] = note
    seconds = interleave(steps, repeats, **on_device(setting.device))
    for name, result in results.items():
        result |= summary(seconds[name])
        result["clips_per_s"] = setting.batch / result["median_s"]
    return results


def time_growth(system: System, settings: dict[str, Setting], repeats: int) -> dict[str, dict]:
    """`summary` of one system at several settings, which must not differ in what is built: the model is the same."""
    model = system.build(next(iter(settings.values())))
    steps = {name: functools.partial(system.run, model, system.inputs(s)) for name, s in settings.items()}
    seconds = interleave(steps, repeats, warmups=1, synchronize=on_device(model.device.type)["synchronize"])
    return {name: summary(taken) for name, taken in seconds.items()}


def on_device(device: str) -> dict:
    """A GPU works behind the caller's back, and picks its kernels in the first runs."""
    if device == "cpu":
        return {"synchronize": lambda: None}
    return {"synchronize": torch.cuda.synchronize, "warmups": 2}


# ---------------------------------------------------------------- memory


def peak_memory(section: str, name: str, setting: Setting, optimizer: bool = False) -> dict:
    """
    Measured in a new process: `peak_bytes`, the most that the system and two runs of it have in use at a time, beyond
    what a process needs that has imported everything (on a GPU: have allocated); and `optimizer_bytes`, AdamW's state.

    Args:
        optimizer: a step of AdamW follows each run.
    """
    what = {"section": section, "name": name, "setting": asdict(setting), "optimizer": optimizer}
    what["threads"] = torch.get_num_threads()
    # glibc keeps freed blocks below a threshold that grows by itself; with a fixed one they go back at once, and the
    # resident size is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return in_own_process("benchmarks.memory", [json.dumps(what)], environment)


def in_own_process(module: str, arguments: list[str], environment: dict[str, str] | None = None) -> dict:
    """What a module prints as its last line, in JSON, when it runs alone in a new process."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the machine


def machine(device: str) -> dict:
    """What the numbers were measured on and with."""
    gpu = torch.cuda.get_device_name() if device != "cpu" else None
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "cores_allowed": count_cores(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],  # processes that ran in the last minute: is anybody else at work?
        "ram_gib": round(int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _field(path: str, name: str) -> str | None:
    """The first value of a field in one of Linux's tables of `name : value`."""
    try:
        with open(path) as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)
    except OSError:
        return None
