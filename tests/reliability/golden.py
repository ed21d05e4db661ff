"""
The losses and the answers of a training of 20 steps on tiny backbones, that the golden test holds to.

    python -m tests.reliability.golden

writes them to golden.json, to be run and committed where a change of the numbers is meant.
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import train_sense
from processing.hub import load_checkpoint
from tests.conftest import save_llm, save_whisper, tone, write_corpus


GOLDEN = Path(__file__).with_name("golden.json")
RECIPE = {
    "backbone_dtype": "float32",
    "tasks": {"asr": 1, "ner": 0.5, "sa": 0.5},
    "prompts": {"asr": "Transcribe.", "ner": "Tag the entities.", "sa": "Which sentiment?"},
    "lora_r": 4,
    "lora_dropout": 0.1,
    "classifier": "ner",
    "speeds": [1.0, 0.9],
    "time_mask": 0.1,
    "train_sampling_strategy": "group_by_length",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 20,
    "logging_steps": 1,
    "learning_rate": "1e-3",
    "eval_strategy": "no",
    "save_strategy": "no",
    "scored_samples": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The order in which floats are added up depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(folder: Path) -> dict:
    """
    Trains in `folder`.

    Returns:
        `loss` and `grad_norm` of each step, the losses of the last evaluation, and for two clips the `tokens` that
        generation chooses with their `logits`, and the smallest `lead`, in logits, of one over the next best.
    """
    backbones = {
        "dataset_dir": write_corpus(folder / "corpus", train=10, dev=4),
        "audio_backbone": save_whisper(folder / "whisper"),
        "text_backbone": save_llm(LlamaConfig, LlamaForCausalLM, folder / "llama"),
        "encoder_cache": str(folder / "cache"),
        "output_dir": str(folder / "out"),
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {**RECIPE, **backbones}.items()))
    with one_thread():
        metrics = train_sense.main([str(recipe)])
        answers = answer(folder / "out")
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    return {
        "loss": [step["loss"] for step in steps],
        "grad_norm": [step["grad_norm"] for step in steps],
        "eval_true_loss": metrics["eval_true_loss"],
        "eval_shuffled_loss": metrics["eval_shuffled_loss"],
        **answers,
    }


def answer(model: Path) -> dict:
    """Of two clips' transcripts 12 greedy tokens, their logits, and the smallest lead."""
    model, processor = load_checkpoint(str(model))
    inputs = processor(
        audio=[tone(2.0, seed=23), tone(2.0, seed=26)], text=[processor.build_prompt("Transcribe.")] * 2
    )
    how = {"min_new_tokens": 12, "max_new_tokens": 12, "do_sample": False}
    found = model.generate(**inputs, **how, return_dict_in_generate=True, output_scores=True)
    best = torch.stack(found.scores, 1).topk(2).values
    lead = (best[..., 0] - best[..., 1]).min().item()
    return {"tokens": found.sequences[:, -12:].tolist(), "logits": best[..., 0].flatten().tolist(), "lead": lead}


def main(argv: list[str] | None = None):
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(run(Path(folder)), indent=2) + "\n")


if __name__ == "__main__":
    main()
