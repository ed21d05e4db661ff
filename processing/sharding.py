"""What FSDP2 shards over the processes, put together again: weights, and the optimiser's state."""

import contextlib

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


@contextlib.contextmanager
def whole_weights(model: nn.Module):
    """
    Each process holds all weights within, in the dtype that they are computed in. Generating needs it: the processes
    answer for other rows each, in as many steps as these take, and weights can only be gathered by all at once.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in sharded for group in _parameter_groups(module)]
    before = [group.post_forward_mesh_info for group in groups]
    try:
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()
        for group, setting in zip(groups, before):
            group.post_forward_mesh_info = setting


def _parameter_groups(module: FSDPModule) -> list:
    """torch can set whether they are sharded again after the forward pass, but has no name to ask for it by."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [group for group in [state._fsdp_param_group] if group is not None]  # torch 2.11 knows one at most


def gather_weights(model: nn.Module, keep: bool):
    """
    Ends sharding, in place: plain tensors on the CPU in the process that asks to `keep` them, to be saved as any
    model's; shards in the others, which must call it too.
    """
    gathered: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in gathered:
                whole = parameter.full_tensor()
                gathered[parameter] = nn.Parameter(whole.cpu(), parameter.requires_grad) if keep else parameter
            setattr(module, name, gathered[parameter])


def gather_state(state: dict) -> dict:
    """An optimiser's `state_dict` with whole tensors, as one process has it; all must ask for it together."""
    found = {
        index: {
            name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in of_one.items()
        }
        for index, of_one in state["state"].items()
    }
    return {**state, "state": found}


def shard_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """What `gather_state` returned, sharded as the optimiser's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {}
    for index, of_one in state["state"].items():
        like = parameters[index]
        found[index] = {
            name: distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
            if isinstance(like, DTensor) and value.shape == like.shape
            else value
            for name, value in of_one.items()
        }
    return {**state, "state": found}


__all__ = ["gather_state", "gather_weights", "shard_state", "whole_weights"]
