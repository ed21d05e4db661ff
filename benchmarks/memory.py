"""Measures the peak memory of one system; a process of its own for each, started by `measure.peak_memory`."""

import gc
import json
import re
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from .setting import Setting, System
from .systems import SYSTEMS


STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main(argument: str):
    what = json.loads(argument)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(what["threads"])
    system, setting = SYSTEMS[what["section"]][what["name"]], Setting(**what["setting"])
    # Once with a tiny model: the libraries' code and buffers are in memory then, and not counted as the system's.
    run_twice(system, replace(setting, audio="tiny", text="tiny", batch=1), what["optimizer"])
    print(json.dumps(measure(system, setting, what["optimizer"])))


def measure(system: System, setting: Setting, with_optimizer: bool) -> dict:
    """Bytes: see `measure.peak_memory`."""
    gc.collect()
    if setting.device != "cpu":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        state = run_twice(system, setting, with_optimizer)
        return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "optimizer_bytes": state}
    before = resident_bytes("VmRSS")
    state = run_twice(system, setting, with_optimizer)
    return {"peak_bytes": resident_bytes("VmHWM") - before, "optimizer_bytes": state}


def run_twice(system: System, setting: Setting, with_optimizer: bool) -> int:
    """Builds and runs; the second run has the optimiser's state beside it. Returns the size of that, in bytes."""
    model, inputs = system.build(setting), system.inputs(setting)
    forget_peak(setting.device)  # that of building: a model that is loaded from a file is not initialised first
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained) if with_optimizer else None
    for _ in range(2):
        system.run(model, inputs)
        if optimizer:
            optimizer.step()
    if optimizer is None:
        return 0
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())


def forget_peak(device: str):
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif RESET.exists():
        RESET.write_text("5")  # Linux: the highest size so far becomes the present one


def resident_bytes(field: str) -> int:
    """Present (`VmRSS`) or highest (`VmHWM`) resident size of this process."""
    if STATUS.exists():
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", STATUS.read_text())[1])
    # No present size there: the highest so far, on macOS in bytes, elsewhere in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(sys.argv[1])
