"""
The language model's linear layers in 8 or 4 bits. Encoder, adapter, LoRA, classifier, embeddings and `lm_head` stay as
they are.
"""

import copy

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils import is_bitsandbytes_available
from transformers.utils.quantization_config import QuantizationConfigMixin


QUANTIZATIONS = ("int8", "int4")
# Not to be quantised: patterns that transformers matches from the beginning of a module's name.
KEPT = [r"(model\.)?audio_tower", r"(model\.)?multi_modal_projector", r".*\.lora_[AB]", "lm_head", "classifier"]
# On CPUs with AVX-512 bitsandbytes packs the weights of 4-bit layers that say so anew as they first answer.
PACKS = "support_avx512bf16_for_cpu"


def quantization_config(how: str) -> QuantizationConfigMixin:
    """
    What `from_pretrained` takes as its `quantization_config`.

    Args:
        how: `"int8"`, torchao's weights in 8 bits with a scale a row, or `"int4"`, bitsandbytes' NF4 with a scale for
            64 weights. Either way it is weights alone: what they are multiplied with stays as it is.

    Raises:
        ValueError: another name.
        ImportError: the library that it takes is not installed.
    """
    if how == "int8":
        try:  # what is imported outside of one, whoever loads the code from the Hub must have
            from torchao.quantization import Int8WeightOnlyConfig
        except ImportError as error:
            raise ImportError("int8 weights need torchao: pip install torchao") from error
        return of_language_model(TorchAoConfig(Int8WeightOnlyConfig()))
    if how == "int4":
        if not is_bitsandbytes_available():
            raise ImportError("int4 weights need bitsandbytes: pip install bitsandbytes")
        return of_language_model(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    raise ValueError(f"quantize must be one of {QUANTIZATIONS}, found {how!r}")


def of_language_model(config: QuantizationConfigMixin | dict) -> QuantizationConfigMixin:
    """
    A copy of any quantisation of transformers that leaves everything but the language model's layers as it is.

    Raises:
        ValueError: a method that can't be told to leave modules out.
    """
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(config, field):
            setattr(config, field, [*dict.fromkeys([*(getattr(config, field) or []), *KEPT])])
            return config
    raise ValueError(
        f"{type(config).__name__} can't leave the encoder as it is: give a TorchAoConfig or BitsAndBytesConfig"
    )


def name_of(config: QuantizationConfigMixin) -> str:
    """`"int8"` or `"int4"` for what `quantization_config` gives; else the method and its settings that matter."""
    if isinstance(config, BitsAndBytesConfig):
        name = "bitsandbytes-8bit" if config.load_in_8bit else f"bitsandbytes-{config.bnb_4bit_quant_type}"
        name += "-double" * (config.load_in_4bit and config.bnb_4bit_use_double_quant)
        return "int4" if name == "bitsandbytes-nf4" else name
    if isinstance(config, TorchAoConfig):
        name = type(config.quant_type).__name__
        if group_size := getattr(config.quant_type, "group_size", None):
            name += f"-{group_size}"
        return "int8" if name == "Int8WeightOnlyConfig" else f"torchao-{name}"
    return str(getattr(config.quant_method, "value", config.quant_method))


def quantize_in_place(model: PreTrainedModel, config: QuantizationConfigMixin):
    """Quantises a model that is in memory, layer by layer: the same that `from_pretrained` makes of a saved one."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment(device_map=None)
    parameters = dict(model.named_parameters())
    quantizer.preprocess_model(model, device_map=None)  # bitsandbytes: new layers, empty, in the linear layers' place
    convert = quantizer.get_quantize_ops().convert
    for name in list(parameters):
        parent, _, leaf = name.rpartition(".")
        module, full = model.get_submodule(parent), parameters.pop(name)  # popped: its memory is free again at once
        if quantizer.param_needs_quantization(model, name):
            # torchao puts the result there itself, bitsandbytes returns it.
            done = convert({name: full.data}, model=model, full_layer_name=name, missing_keys=set())
            module._parameters.update({leaf: parameter for parameter in done.values()})
            module.training = model.training
        elif module._parameters[leaf] is not full:
            module._parameters[leaf] = full  # a bias of one of the new layers
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def settle(model: PreTrainedModel):
    """To be called on every quantised model."""
    model.is_quantized = False  # Trainer refuses what says that it is and is no PEFT model: adapter and LoRA are not
    model._weight_conversions = None  # of a file that held quantised weights; transformers can't undo them to save
    for module in model.modules():
        if hasattr(module, PACKS) and (module.out_features % 32 or module.in_features % 64):
            setattr(module, PACKS, False)  # bitsandbytes would fail on such a width


def keep_unpacked(language_model: nn.Module):
    """
    Prepares for training: no gradient passes 4-bit weights in the order that is faster to answer with, and there is
    no exact way back from it.

    Raises:
        ValueError: the model has answered already, outside of training.
    """
    for name, module in language_model.named_modules():
        if hasattr(module, PACKS):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name}: these 4-bit weights were packed for fast answers on the CPU, and can't be trained on "
                    "any more: load the model again, and call train() before it answers"
                )
            setattr(module, PACKS, False)


__all__ = ["QUANTIZATIONS", "quantization_config"]
