"""One step of a training: its loss, and the gradients of all that is trained."""

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

import train_sense


class Probe(TrainerCallback):
    def __init__(self, path: str):
        self.path = path

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = ((name.removeprefix("module."), p) for name, p in model.named_parameters())
        self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and state.is_world_process_zero:
            save_file({**self.found, "loss": torch.tensor(float(logs["loss"]))}, self.path)


def write_gradients(path: str, argv: list[str]):
    """Trains one step, in a process of its own; `path` is a safetensors file."""

    class ProbedTrainer(train_sense.SenseTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Probe(path))

    train_sense.SenseTrainer = ProbedTrainer
    train_sense.main(argv)
