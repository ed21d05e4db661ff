"""Trains one step; writes its loss and the gradients of all that is trained: gradient_probe.py FILE RECIPE [...]."""

import sys

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

import train_sense


class Probe(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = ((name.removeprefix("module."), p) for name, p in model.named_parameters())
        self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and state.is_world_process_zero:
            save_file({**self.found, "loss": torch.tensor(float(logs["loss"]))}, sys.argv[1])


class ProbedTrainer(train_sense.SenseTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Probe())


if __name__ == "__main__":
    train_sense.SenseTrainer = ProbedTrainer
    train_sense.main(sys.argv[2:])
