"""
How much memory a GPU needs to train a recipe, by arithmetic from the backbones' configs: no weight is loaded.

    python -m processing.training_memory recipes/1_asr.yaml --text_tokens 60

Weights, gradients and the optimiser's state are counted parameter by parameter. What a step keeps for the backward
pass is counted too: the language model runs once without memory ("fake" tensors), and the tensors that autograd saves
are added up. What CUDA, its libraries and fragmentation need (1 to 2 GiB) comes on top. What gradient_checkpointing
saves is not counted.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from modeling_sense import SenseConfig, SenseForConditionalGeneration
from modeling_sense.modeling_sense import is_trained

from .backbones import resolve_backbone
from .recipe import parse_recipe
from .report import markdown_table


GIB = 2**30
FROZEN, TRAINED, GRADIENTS, ADAM = "frozen weights", "trained weights", "gradients", "AdamW"
BUCKETS, GATHERED = "DDP's buckets", "gathered weights"
# What is divided over the GPUs.
SHARDED = {
    "ddp": (),
    "zero2": (GRADIENTS, ADAM),
    "fsdp2": (FROZEN, TRAINED, GRADIENTS, ADAM),
}


@dataclass
class Setting:
    """What memory depends on; the names are the recipe's."""

    audio_backbone: str
    text_backbone: str
    backbone_dtype: str = "bfloat16"
    lora_r: int = 0
    num_audio_tokens: int = 250
    per_device_train_batch_size: int = 8
    encoder_cache: str | None = None
    bf16: bool = False
    text_tokens: int = 60  # of prompt and answer


def build_on_meta(setting: Setting) -> SenseForConditionalGeneration:
    """The recipe's model without memory for its weights, trained parts in fp32."""
    sources = (setting.audio_backbone, setting.text_backbone)
    audio, text = (AutoConfig.from_pretrained(resolve_backbone(source)) for source in sources)
    config = SenseConfig(audio_config=audio, text_config=text, num_audio_tokens=setting.num_audio_tokens)
    with torch.device("meta"):
        model = SenseForConditionalGeneration(config)
        if setting.lora_r:
            model.add_lora(r=setting.lora_r)
    if text.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight
    frozen = getattr(torch, setting.backbone_dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if is_trained(name) else frozen)
    if setting.encoder_cache:
        model.model.audio_tower = None
    return model.train()


def count_states(model: SenseForConditionalGeneration, way: str, processes: int) -> dict[str, float]:
    """Bytes on each GPU of what stays from step to step."""
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    found = {FROZEN: frozen, TRAINED: trained, GRADIENTS: trained, ADAM: 2 * trained}
    found = {part: size / processes if part in SHARDED[way] else size for part, size in found.items()}
    found[BUCKETS] = trained if way == "ddp" and processes > 1 else 0
    found[GATHERED] = count_gathered(model) if FROZEN in SHARDED[way] and processes > 1 else 0
    return found


def count_gathered(model: SenseForConditionalGeneration) -> int:
    """Bytes of sharded weights that are whole at a time: all but the decoder layers, and of these the largest two."""
    layers = [
        sum(p.numel() * p.element_size() for p in each.parameters()) for each in model.model.language_model.layers
    ]
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    return everything - sum(layers) + sum(sorted(layers)[-2:])


def count_activations(model: SenseForConditionalGeneration, setting: Setting) -> int:
    """
    Bytes that a step keeps for its backward pass, in adapter, language model and loss. Each row has all audio tokens:
    clips of 30 s, or the longest that the batch is padded to.
    """
    rows, audio = setting.per_device_train_batch_size, setting.num_audio_tokens
    autocast = torch.autocast("cpu", torch.bfloat16) if setting.bf16 else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), autocast, saved_bytes(model) as saved:
        fake = model.to_empty(device="cpu")
        pooled = torch.empty(rows * audio, model.config.audio_config.d_model)
        speech = fake.model.multi_modal_projector(pooled).view(rows, audio, -1)
        text = torch.empty(rows, setting.text_tokens, speech.shape[-1], dtype=fake.lm_head.weight.dtype)
        embeds = torch.cat([speech.to(text.dtype), text], 1)
        hidden = fake.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = fake.lm_head(hidden[:, -setting.text_tokens :]).float()
        labels = torch.zeros(rows * setting.text_tokens, dtype=torch.long)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels)
    return saved()


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator:
    """What autograd saves within; to be called afterwards. The model's own weights are not counted again."""
    seen: dict[int, tuple] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = (storage, storage.nbytes())  # kept, so that no other gets its address
        return tensor

    def total() -> int:
        own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        return sum(size for address, (_, size) in seen.items() if address not in own)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield total


def estimate(setting: Setting, way: str = "ddp", processes: int = 1) -> dict[str, float]:
    """Bytes on each GPU, by what they are for; `total` is their sum."""
    model = build_on_meta(setting)
    found = count_states(model, way, processes)
    found["activations"] = count_activations(model, setting)
    return {**found, "total": sum(found.values())}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="path or name of a recipe")
    parser.add_argument("--audio_backbone", help="in place of the recipe's: a folder with its config.json is enough")
    parser.add_argument("--text_backbone", help="likewise")
    parser.add_argument("--text_tokens", type=int, default=60, help="of prompt and answer, as the batch is padded")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    known = parser.parse_args(argv)
    args, training = parse_recipe([known.recipe, "--dataset_dir", "any", "--use_cpu", "true"])
    for name in ("quantize", "gguf_file"):
        if getattr(args, name):
            raise ValueError(
                f"{name}: {getattr(args, name)!r}; packed weights are not counted: leave it out, and take the frozen "
                "language model's share of what its file takes"
            )
    fields: dict = {name: getattr(args, name) for name in Setting.__dataclass_fields__ if hasattr(args, name)}
    fields |= {"per_device_train_batch_size": training.per_device_train_batch_size, "bf16": training.bf16}
    fields["backbone_dtype"] = str(args.dtype("cuda")).removeprefix("torch.")
    fields |= {name: getattr(known, name) for name in ("audio_backbone", "text_backbone") if getattr(known, name)}
    setting = Setting(**fields, text_tokens=known.text_tokens)
    columns = [("ddp", 1), *((way, n) for n in known.gpus if n > 1 for way in SHARDED)]
    found = [estimate(setting, way, number) for way, number in columns]
    rows = [[part, *(f"{column[part] / GIB:.2f}" for column in found)] for part in found[0]]
    titles = ["one GPU" if number == 1 else f"{number} GPUs, {way}" for way, number in columns]
    print(markdown_table(["GiB on each GPU", *titles], rows))


if __name__ == "__main__":
    main()
