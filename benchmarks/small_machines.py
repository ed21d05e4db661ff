"""
What a SENSE checkpoint needs and loses where its language model is held in fewer bits; prints Markdown tables.

    python -m benchmarks.small_machines --model DIR --dataset DIR --split dev --max_samples 40

Each form in a process of its own, on the CPU; time is the processor's, so that it means something beside other work.
Then, by arithmetic, the weights of whisper-small with TinyLlama.
"""

import argparse
import json
import sys
import time

import torch
import transformers
from accelerate import PartialState
from torch import nn

from eval_sense import parse_answers, understand
from modeling_sense import SenseConfig, SenseForConditionalGeneration
from processing.datasets import first_rows, load_corpus
from processing.hub import load_checkpoint
from processing.report import markdown_table
from processing.scoring import score_asr

from .measure import in_own_process, machine
from .memory import resident_bytes


# What load_checkpoint takes: dtype of what is not quantised, and how the language model is.
FORMS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
BYTES = {"float32": 4, "bfloat16": 2}
MB = 1e6


def held_bytes(model: nn.Module) -> int:
    """Of all weights as they are held, those that are shared once, with the scales of quantised ones."""
    total = 0
    for parameter in model.parameters():
        if hasattr(parameter, "qdata"):  # torchao
            total += parameter.qdata.nbytes + parameter.scale.nbytes
        else:
            state = getattr(parameter, "quant_state", None)  # bitsandbytes, 4 bits
            total += parameter.nbytes + (0 if state is None else state.absmax.nbytes)
    return total


def expected_bytes(config: SenseConfig, form: str) -> int:
    """The same by arithmetic, without a model: for backbones that need not be there."""
    dtype, quantize = FORMS[form]
    with torch.device("meta"):
        model = SenseForConditionalGeneration(config)
    model.tie_weights()
    inner = model.model.language_model
    layers = [m for n, m in inner.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n]
    quantised = {id(layer.weight) for layer in layers} if quantize else set()
    total = 0
    for name, parameter in model.named_parameters():
        number = parameter.numel()
        if id(parameter) in quantised:  # scales are fp32: int8 has one a row, int4 one for 64 weights
            scales = parameter.shape[0] if quantize == "int8" else -(-number // 64)
            total += (number if quantize == "int8" else -(-number // 2)) + 4 * scales
        elif "multi_modal_projector" in name or ".lora_" in name:
            total += 4 * number  # what is trained stays in fp32
        else:
            total += BYTES[dtype] * number
    return total


def paper_config() -> SenseConfig:
    """whisper-small and TinyLlama, with LoRA as in the paper; no weights are needed."""
    target_modules = r".*\.(q_proj|k_proj|v_proj)"
    return SenseConfig(lora={"r": 32, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": target_modules})


def measure_form(args: argparse.Namespace, form: str) -> dict:
    """To be called in a new process: `weights` and `peak`, bytes; `imports`, those before; `seconds`; the WER."""
    PartialState(cpu=True)  # what is measured is a CPU, on machines with a GPU too
    before = resident_bytes("VmRSS")
    dtype, quantize = FORMS[form]
    model, processor = load_checkpoint(args.model, dtype, quantize=quantize)
    weights = held_bytes(model)
    names = {"text_column": args.text_column, "config_name": args.config_name}
    rows = first_rows(load_corpus(args.dataset, args.split, **names), args.max_samples)
    begin = time.process_time()
    heard = understand(model, processor, rows, ["asr"], batch_size=args.batch_size)
    seconds, peak = time.process_time() - begin, resident_bytes("VmHWM")
    scores = score_asr(list(rows.remove_columns("audio")), parse_answers(processor.prompts, heard)["asr"])
    return {"weights": weights, "imports": before, "peak": peak, "seconds": seconds, **scores}


def tables(found: dict[str, dict]) -> str:
    """Two Markdown tables: what was measured, and the arithmetic."""
    rows = []
    for form, row in found.items():
        low, high = row["wer_interval"]
        rows.append([form, f"{row['weights'] / MB:.0f}", f"{row['peak'] / MB:.0f}"])
        rows[-1] += [
            f"{row['wer']:.1f} [{low:.1f}, {high:.1f}]",
            f"{row['seconds'] / found['float32']['seconds']:.2f}",
        ]
    measured = markdown_table(["", "weights, MB", "peak of the process, MB", "WER", "CPU time / float32's"], rows)
    sums = [[form, f"{expected_bytes(paper_config(), form) / MB:,.0f}"] for form in FORMS]
    return measured + "\n\n" + markdown_table(["whisper-small + TinyLlama", "weights, MB"], sums)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    if args.form:
        print(json.dumps(measure_form(args, args.form)))
        return
    print(json.dumps(machine("cpu")), flush=True)
    found = {}
    for form in FORMS:
        found[form] = in_own_process("benchmarks.small_machines", [*argv, "--form", form])
        print(form, found[form], flush=True)
    print(tables(found))


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a SENSE checkpoint, not quantised")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--config_name")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_samples", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--form", choices=list(FORMS), help="this one alone, its memory and WER, as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
