"""Several processes of one training on the CPU, as torchrun starts them, without its seconds of imports for each."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env


PRELOADED = ["train_sense", "tests.processes", "tests.conftest"]


def launch(number: int, task: Callable, *args, config: Path | None = None):
    """
    Calls `task(*args)` in `number` processes that find each other over gloo. Raises what one of them raises.

    Args:
        task: of a module, so that it can be sent; what it finds out it writes to files.
        config: of `accelerate launch`, for FSDP2.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    how = {"nprocs": number, "start_method": "forkserver"}
    torch.multiprocessing.start_processes(_begin, (number, port, config, task, args), **how)


def launcher_environment(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` tells its processes."""
    args = launch_command_parser().parse_args(["--config_file", str(config), "train_sense.py"])
    args, _, _ = _validate_launch_command(args)
    found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def _begin(rank: int, number: int, port: int, config: Path | None, task: Callable, args: tuple):
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(number)}
    if config is not None:
        os.environ |= launcher_environment(config)
        # On CPUs accelerate would not shard, though torch can: it takes them for accelerators.
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    task(*args)
