"""Several processes of one training on the CPU, as torchrun starts them, without its seconds of imports for each."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


PRELOADED = ["train_sense", "tests.processes", "tests.conftest"]


def launch(number: int, task: Callable, *args, sharded: bool = False):
    """
    Calls `task(*args)` in `number` processes that find each other over gloo. Raises what one of them raises.

    Args:
        task: of a module, so that it can be sent; what it finds out it writes to files.
        sharded: let accelerate shard (FSDP2), which it does not on CPUs; torch does.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    how = {"nprocs": number, "start_method": "forkserver"}
    torch.multiprocessing.start_processes(_begin, (number, port, sharded, task, args), **how)


def _begin(rank: int, number: int, port: int, sharded: bool, task: Callable, args: tuple):
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(number)}
    if sharded:
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    task(*args)
