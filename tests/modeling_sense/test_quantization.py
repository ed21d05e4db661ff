"""Small machines: 8 and 4 bits in the language model alone, adapters on and for them, and GGUF files."""

import json
import sys

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForSpeechSeq2Seq, BitsAndBytesConfig, TorchAoConfig

import modeling_sense.quantization_sense as quantization
from modeling_sense import QUANTIZATIONS, SenseForConditionalGeneration, quantization_config
from modeling_sense.quantization_sense import name_of
from processing import SenseProcessor
from tests.conftest import tone


def build(whisper, llm, seed=0, lora=True, **how):
    torch.manual_seed(seed)
    model = SenseForConditionalGeneration.from_backbones(whisper, llm, **how)
    model.model.multi_modal_projector.linear.weight.data.normal_(std=0.3)
    if lora:
        model.add_lora(r=4)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def processor(tiny_whisper, tiny_llama):
    return SenseProcessor.from_backbones(tiny_whisper, tiny_llama)


@pytest.fixture(scope="module")
def inputs(processor):
    inputs = processor.apply_request([tone(s, seed=i) for i, s in enumerate((0.5, 1.7))])
    return dict(inputs, labels=inputs["input_ids"].clone())


@pytest.fixture(scope="module")
def full(tiny_whisper, tiny_llama):
    return build(tiny_whisper, tiny_llama)


@pytest.fixture(scope="module")
def folder(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sense")
    full.save_pretrained(folder)
    return folder


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def frozen(model) -> dict[str, torch.Tensor]:
    """The weights that are not trained, as plain tensors."""
    found = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {name: (p.qdata if hasattr(p, "qdata") else p).clone() for name, p in found.items()}


def is_quantized(module) -> bool:
    return type(module) is not nn.Linear or type(module.weight.data) is not torch.Tensor


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_a_saved_model_is_quantised_in_its_language_model_alone(full, folder, inputs, how):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, quantization_config=quantization_config(how))
    assert model.quantization == how and full.quantization is None
    found = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantized(m)}
    layers = [n for n, m in full.model.language_model.named_modules() if isinstance(m, nn.Linear)]
    wanted = {f"model.language_model.{name}" for name in layers if ".lora_" not in name}
    assert found == wanted and len(found) == 2 * 7
    rest = dict(model.named_parameters())
    for name, parameter in full.named_parameters():
        if name.rpartition(".")[0] not in wanted:
            assert torch.equal(rest[name], parameter), name
    assert model.lm_head.weight is not rest.get("model.language_model.embed_tokens.weight")  # not tied here
    error = (logits(model, inputs) - logits(full, inputs)).norm() / logits(full, inputs).norm()
    assert 0 < error < {"int8": 0.02, "int4": 0.3}[how]
    clips = {name: value for name, value in inputs.items() if name != "labels"}
    assert model.generate(**clips, max_new_tokens=3, num_beams=2).shape[0] == 2


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_in_memory_as_from_the_file_and_back(folder, inputs, how, tmp_path):
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(folder, quantization_config=quantization_config(how))
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    fingerprint = model.backbone_fingerprint()
    model.quantize(how)
    assert torch.equal(logits(model, inputs), logits(loaded, inputs))
    model.save_pretrained(tmp_path)
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert again.quantization == how and again.backbone_fingerprint() == fingerprint
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    sizes = [sum(f.stat().st_size for f in where.glob("*.safetensors")) for where in (tmp_path, folder)]
    assert sizes[0] < sizes[1]
    other = {"int8": "int4", "int4": "int8"}[how]
    with pytest.raises(ValueError):
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, quantization_config=quantization_config(other))
    with pytest.raises(ValueError, match=f"this model is {how} already: it can't be made {other}"):
        again.quantize(other)


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_biases_survive(tiny_whisper, tiny_qwen, how):
    full = build(tiny_whisper, tiny_qwen, lora=False)
    model = build(tiny_whisper, tiny_qwen, lora=False, quantize=how)
    parameters = dict(model.named_parameters())
    biases = [name for name, _ in full.named_parameters() if name.endswith("_proj.bias")]
    assert biases and not any(parameter.is_meta for parameter in parameters.values())
    for name, parameter in full.named_parameters():
        if name in biases:
            assert torch.equal(parameters[name], parameter)


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_adapter_and_lora_learn_on_quantised_weights(tiny_whisper, tiny_llama, inputs, how):
    model = build(tiny_whisper, tiny_llama, quantize=how)
    before = frozen(model)
    model.train()
    logits(model, inputs)  # an answer in between must not cut the gradients off
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or "multi_modal_projector" in name), name
        assert not parameter.requires_grad or parameter.grad.any(), name
    assert losses[-1] < losses[0] - 0.1
    after = frozen(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_gradients_are_those_of_the_weights_that_it_holds(tiny_whisper, tiny_llama, inputs, how):
    """Beside a model of floats that has the quantised weights' values: the same gradients reach adapter and LoRA."""
    model, floats = build(tiny_whisper, tiny_llama, quantize=how).train(), build(tiny_whisper, tiny_llama).train()
    for (_, mine), (_, theirs) in zip(model.named_modules(), floats.named_modules()):
        if isinstance(theirs, nn.Linear) and is_quantized(mine):
            eye = torch.eye(mine.in_features)
            with torch.no_grad():
                theirs.weight.copy_(mine(eye).T)
    for each in (model, floats):
        each(**inputs).loss.backward()
    wanted = dict(floats.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-2, atol=1e-4)


def test_adapter_of_full_weights_fits_their_quantised_forms(full, tiny_whisper, tiny_llama, tiny_qwen, tmp_path):
    full.save_adapter(tmp_path)
    for how in QUANTIZATIONS:
        model = build(tiny_whisper, tiny_llama, seed=1, lora=False, quantize=how, dtype=torch.bfloat16)
        model.load_adapter(tmp_path)
        for name, tensor in full.trained_state_dict().items():
            assert torch.equal(model.trained_state_dict()[name], tensor)
        with pytest.raises(ValueError, match="was trained on other backbone weights"):
            build(tiny_whisper, tiny_qwen, lora=False, quantize=how).load_adapter(tmp_path)


def test_adapter_of_quantised_weights_fits_those_alone(tiny_whisper, tiny_llama, tmp_path):
    model = build(tiny_whisper, tiny_llama, quantize="int8")
    model.save_adapter(tmp_path)
    about = json.loads((tmp_path / "sense_adapter.json").read_text())
    assert about["quantization"] == "int8"
    fresh = build(tiny_whisper, tiny_llama, seed=1, lora=False, quantize="int8")
    fresh.load_adapter(tmp_path)
    assert fresh.backbone_fingerprint() == about["fingerprint"]
    for how, found in ((None, "full"), ("int4", "int4")):
        other = build(tiny_whisper, tiny_llama, seed=1, lora=False, quantize=how)
        message = f"was trained on int8 weights, this model's are {found}: compose it with quantize='int8'"
        with pytest.raises(ValueError, match=message):
            other.load_adapter(tmp_path)


def test_backbones_that_nobody_has_seen_have_no_fingerprint(folder, tmp_path):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, quantization_config=quantization_config("int8"))
    with pytest.raises(ValueError, match="made int8 while it was loaded.*without quantization_config, then quantize"):
        model.save_adapter(tmp_path)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes packs weights on CPUs with AVX-512 and bfloat16 only")
def test_weights_that_were_packed_for_answers_are_not_trained_on(tiny_whisper, tiny_llama, inputs):
    model = build(tiny_whisper, tiny_llama, quantize="int4")
    logits(model, inputs)
    with pytest.raises(ValueError, match="q_proj.*packed for fast answers.*call train.. before it answers"):
        model.train()


def test_lora_is_not_merged_into_rounded_weights(tiny_whisper, tiny_llama):
    with pytest.raises(ValueError, match="can't be merged into int8 weights: merge it, then quantize"):
        build(tiny_whisper, tiny_llama, quantize="int8").merge_adapter()


def test_other_quantisations_of_transformers_keep_to_the_language_model_too(folder):
    asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["down_proj"])
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, quantization_config=asked)
    assert model.quantization == "bitsandbytes-8bit" and asked.llm_int8_skip_modules == ["down_proj"]
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantized(m)]
    assert len(found) == 2 * 6 and all("language_model" in name and "lora" not in name for name in found)


def test_wrong_names_and_missing_libraries(full, tiny_whisper, tiny_llama, monkeypatch):
    with pytest.raises(ValueError, match=r"quantize must be one of \('int8', 'int4'\), found 'int3'"):
        build("nowhere", "nowhere", quantize="int3")  # before any weight is looked for
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="int4 weights need bitsandbytes: pip install bitsandbytes"):
        build("nowhere", "nowhere", quantize="int4")
    with pytest.raises(ImportError, match="int8 weights need torchao: pip install torchao"):
        full.quantize("int8")


def test_other_forms_of_a_method_go_by_other_names():
    assert {name_of(quantization_config(how)) for how in QUANTIZATIONS} == set(QUANTIZATIONS)
    double = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    assert name_of(double) == "bitsandbytes-nf4-double"
    assert name_of(TorchAoConfig(Int8WeightOnlyConfig(group_size=32))) == "torchao-Int8WeightOnlyConfig-32"


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_what_is_already_quantised_is_named_in_the_error(folder, how, tmp_path):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, quantization_config=quantization_config(how))
    model.save_pretrained(tmp_path)
    other = quantization_config({"int8": "int4", "int4": "int8"}[how])
    asked = {"pretrained_model_name_or_path": tmp_path, "quantization_config": other}
    with pytest.raises(ValueError):
        SenseForConditionalGeneration.from_pretrained(**asked)


# ------------------------------------------------------------------ GGUF


def test_a_gguf_file_is_the_model_that_it_was_made_of(full, tiny_whisper, tiny_llama, tiny_gguf, processor, inputs):
    model = build(tiny_whisper, tiny_gguf, gguf_file="tiny.gguf")
    mine = SenseProcessor.from_backbones(tiny_whisper, tiny_gguf, gguf_file="tiny.gguf")
    assert mine.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    asked = mine.apply_request([tone(s, seed=i) for i, s in enumerate((0.5, 1.7))])
    assert torch.equal(asked["input_ids"], inputs["input_ids"])
    error = (logits(model, inputs) - logits(full, inputs)).norm() / logits(full, inputs).norm()
    assert 0 < error < 0.02  # what 8 bits lose
    assert model.generation_config.eos_token_id == full.generation_config.eos_token_id


def test_a_gguf_backbone_is_saved_remembered_and_quantised(tiny_whisper, tiny_gguf, inputs, tmp_path):
    model = build(tiny_whisper, tiny_gguf, gguf_file="tiny.gguf")
    assert model.quantization is None and model.config.backbones["text"]["gguf_file"] == "tiny.gguf"
    model.save_pretrained(tmp_path / "whole")
    loaded = SenseForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    model.save_adapter(tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / "sense_adapter.json").read_text())
    assert about["backbones"]["text"] == {"id": tiny_gguf, "revision": None, "gguf_file": "tiny.gguf"}
    small = build(tiny_whisper, tiny_gguf, gguf_file="tiny.gguf", lora=False, quantize="int8", dtype=torch.bfloat16)
    small.load_adapter(tmp_path / "adapter")
    assert small.quantization == "int8"


def test_a_gguf_file_that_is_not_there(tiny_whisper, tiny_gguf):
    with pytest.raises(OSError, match="other.gguf"):
        build(tiny_whisper, tiny_gguf, gguf_file="other.gguf")
