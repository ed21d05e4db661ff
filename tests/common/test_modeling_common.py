"""What transformers asks of every model, asked of SenseModel and SenseForConditionalGeneration."""

import copy
import json
import pickle

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSpeechSeq2Seq

from modeling_sense import SenseForConditionalGeneration, SenseModel
from tests.common.conftest import (
    AUDIO_TOKEN_ID,
    AUDIO_TOKENS,
    CLASSIFIER,
    LORA,
    VOCABULARY,
    tiny_config,
    tiny_inputs,
    tiny_model,
)


both_classes = pytest.mark.parametrize("model_class", [SenseModel, SenseForConditionalGeneration])


def first(output) -> torch.Tensor:
    """Hidden states of the base model, logits of the generating one."""
    return output.logits if "logits" in output else output.last_hidden_state


def with_labels(inputs: dict) -> dict:
    labels = inputs["input_ids"].clone()
    labels[:, :-7] = -100
    return {**inputs, "labels": labels}


# ------------------------------------------------------------------ saving and loading


@both_classes
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_what_was_saved_comes_back(model_class, tied, shard, inputs, tmp_path):
    model = tiny_model(tiny_config(tied, lora=LORA), model_class)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "30KB")
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    assert torch.equal(first(loaded(**inputs)), first(model(**inputs)))
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("tied", [False, True])
def test_base_model_of_a_generating_checkpoint_and_back(tied, inputs, tmp_path):
    model = tiny_model(tiny_config(tied, classifier=CLASSIFIER))
    model.save_pretrained(tmp_path / "whole")
    base, info = SenseModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    of_heads = {name for name, _ in model.named_parameters() if not name.startswith("model.")}
    assert ("lm_head.weight" in of_heads) != tied
    assert set(info["unexpected_keys"]) == of_heads
    assert torch.equal(first(base(**inputs)), first(model.model(**inputs)))

    base.save_pretrained(tmp_path / "base")
    again, info = SenseForConditionalGeneration.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert set(info["missing_keys"]) == of_heads
    assert torch.equal(again.model(**inputs).last_hidden_state, base(**inputs).last_hidden_state)


def test_tied_weights_are_one_tensor_saved_once(tmp_path):
    model = tiny_model(tiny_config(tied=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = SenseForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    untied = tiny_model(tiny_config(tied=False))
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


PARAMETERS = list(tiny_model(tiny_config(layers=1, lora=LORA, classifier=CLASSIFIER)).state_dict())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A model with all parts, and its weights."""
    model = tiny_model(tiny_config(layers=1, lora=LORA, classifier=CLASSIFIER))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    return model.config, {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_any_missing_weight_is_initialised(full, name, tmp_path):
    """Loading builds the model on the meta device: what nobody initialises would be uninitialised memory."""
    config, state = full
    config.save_pretrained(tmp_path)
    save_file({k: v for k, v in state.items() if k != name}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        loaded, info = SenseForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == {name}
        weights = loaded.state_dict()
        drawn.append(weights.pop(name))
        assert all(torch.equal(weight, state[other]) for other, weight in weights.items())
    assert torch.equal(*drawn)
    weight = drawn[0]
    assert not weight.is_meta and torch.isfinite(weight).all()
    if name.endswith("bias") or ".lora_B." in name:
        assert not weight.any()
    elif "norm" in name:
        assert (weight == 1).all()
    else:
        assert 0 < weight.abs().max() < 3  # sinusoids and draws, nothing of the 7s


@both_classes
def test_new_models_are_drawn_alike_and_begin_with_lora_that_does_nothing(model_class):
    one, other = (tiny_model(tiny_config(lora=LORA), model_class, seed=5) for _ in range(2))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
        assert weight.any() != (name.endswith("bias") or ".lora_B." in name), name


def test_mismatched_sizes_are_refused_or_drawn_anew(checkpoint):
    config = tiny_config()
    config.text_config.intermediate_size = 41
    with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes"):
        SenseForConditionalGeneration.from_pretrained(checkpoint, config=config)
    loaded, info = SenseForConditionalGeneration.from_pretrained(
        checkpoint, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 6  # three matrices in two layers
    assert all(torch.isfinite(p).all() for p in loaded.parameters())


@both_classes
def test_copies_answer_alike(model_class, inputs):
    model = tiny_model(model_class=model_class)
    expected = first(model(**inputs))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first(again(**inputs)), expected)


def test_architecture_is_written_down(checkpoint):
    saved = json.loads((checkpoint / "config.json").read_text())
    assert saved["architectures"] == ["SenseForConditionalGeneration"] and saved["model_type"] == "sense"
    assert type(AutoModel.from_pretrained(checkpoint)) is SenseModel


def test_parts_are_found_where_transformers_looks(model):
    assert model.base_model is model.model
    assert model.get_encoder("audio") is model.model.audio_tower
    assert model.get_decoder() is model.model.language_model
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    new = torch.nn.Embedding(VOCABULARY, 32)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert {"LlamaDecoderLayer", "WhisperEncoderLayer"} <= set(model._no_split_modules)


# ------------------------------------------------------------------ forward


@both_classes
def test_batch_equals_singles(model_class):
    model = tiny_model(model_class=model_class)
    together = first(model(**tiny_inputs()))
    for clip in range(3):
        alone = first(model(**tiny_inputs(clip)))[0]
        torch.testing.assert_close(together[clip, -alone.shape[0] :], alone, atol=1e-5, rtol=1e-4)


@both_classes
@pytest.mark.parametrize("padding", [1, 5])
def test_padding_on_the_left_changes_nothing(model_class, padding):
    model = tiny_model(model_class=model_class)
    short = tiny_inputs(0)
    long = dict(short)
    for name, value in (("input_ids", 0), ("attention_mask", 0)):
        long[name] = torch.nn.functional.pad(short[name], (padding, 0), value=value)
    torch.testing.assert_close(first(model(**long))[:, padding:], first(model(**short)), atol=1e-5, rtol=1e-4)


@both_classes
def test_speech_may_stand_anywhere_in_the_features(model_class):
    """A mask with silence before and after: as many tokens as windows with speech."""
    model = tiny_model(model_class=model_class)
    inputs = tiny_inputs(1)
    inputs["input_features_mask"] = inputs["input_features_mask"].roll(36, 1)
    assert first(model(**inputs)).shape[1] == inputs["input_ids"].shape[1]


@both_classes
def test_tuples_in_place_of_outputs(model_class, inputs):
    model = tiny_model(model_class=model_class)
    output = model(**inputs, output_hidden_states=True)
    as_tuple = model(**inputs, output_hidden_states=True, return_dict=False)
    assert type(as_tuple) is tuple and len(as_tuple) == len(output)
    assert torch.equal(as_tuple[0], first(output))
    for config in (model.config, model.config.text_config, model.config.audio_config):
        config.return_dict = False
    assert torch.equal(model(**inputs)[0], first(output))
    assert type(model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])) is tuple


@both_classes
def test_hidden_states_and_attentions_are_the_language_models(model_class, inputs):
    config = tiny_config()
    config._attn_implementation = "eager"
    model = tiny_model(config, model_class)
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    batch, length = inputs["input_ids"].shape
    assert [tuple(h.shape) for h in output.hidden_states] == [(batch, length, 32)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(batch, 4, length, length)] * 2
    total = output.attentions[0].sum(-1)[inputs["attention_mask"][:, None].expand(-1, 4, -1).bool()]
    torch.testing.assert_close(total, torch.ones_like(total))
    plain = model(**inputs)
    assert plain.hidden_states is None and plain.attentions is None
    config.text_config.output_hidden_states = config.text_config.output_attentions = True
    asked = model(**inputs)
    assert len(asked.hidden_states) == 3 and len(asked.attentions) == 2


@both_classes
def test_gradients_reach_hidden_states_and_attentions(model_class, inputs):
    config = tiny_config()
    config._attn_implementation = "eager"
    model = tiny_model(config, model_class)
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    kept = (output.hidden_states[0], output.hidden_states[-1], output.attentions[0])
    for tensor in kept:
        tensor.retain_grad()
    first(output).flatten()[5].backward()
    assert all(tensor.grad is not None for tensor in kept)


@both_classes
def test_audio_features(model_class, inputs):
    model = tiny_model(model_class=model_class)
    model.set_attn_implementation("eager")
    audio = {name: inputs[name] for name in ("input_features", "input_features_mask")}
    output = model.get_audio_features(**audio)
    assert output.last_hidden_state.shape == (3, 10, 24) and output.pooler_output.shape == (sum(AUDIO_TOKENS), 32)
    assert output.hidden_states is None
    output = model.get_audio_features(**audio, output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(3, 60, 24)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(3, 2, 60, 60)] * 2
    # Embeddings that the audio was put into already are what forward makes of ids and audio.
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    merged = embeds.masked_scatter((inputs["input_ids"] == AUDIO_TOKEN_ID)[..., None], output.pooler_output)
    by_hand = model(inputs_embeds=merged, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(first(by_hand), first(model(**inputs)))
    found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **audio)  # by the embedding
    torch.testing.assert_close(first(found), first(by_hand))


@both_classes
def test_wrong_numbers_of_clips_and_placeholders(model_class, inputs):
    model = tiny_model(model_class=model_class)
    audio = ("input_features", "input_features_mask")
    fewer = {**inputs, **{name: inputs[name][-1:] for name in audio}}
    more = {**inputs, **{name: torch.cat([inputs[name], inputs[name][:1]]) for name in audio}}
    twice = {name: torch.cat([inputs[name]] * 2, 1) for name in ("input_ids", "attention_mask")}
    for wrong, tokens, features in ((fewer, 21, 7), (more, 21, 31), ({**inputs, **twice}, 42, 21)):
        with pytest.raises(ValueError, match=f"tokens: {tokens}, features: {features}. Let SenseProcessor expand"):
            model(**wrong)
    right = {**twice, **{name: torch.cat([inputs[name]] * 2) for name in audio}}
    assert first(model(**right)).shape[1] == 2 * inputs["input_ids"].shape[1]


# ------------------------------------------------------------------ attention


def implementations(model) -> tuple[str, str, str]:
    base = getattr(model, "model", model)
    parts = (model, base.audio_tower, base.language_model)
    return tuple(part.config._attn_implementation for part in parts)


@both_classes
@pytest.mark.parametrize(
    "asked, expected",
    [
        (None, ("sdpa", "sdpa", "sdpa")),
        ("eager", ("eager", "eager", "eager")),
        ({"audio_config": "eager", "text_config": "sdpa"}, ("sdpa", "eager", "sdpa")),
        ({"text_config": "eager"}, ("sdpa", "sdpa", "eager")),
    ],
)
def test_attention_is_chosen_by_part(model_class, asked, expected, inputs, checkpoint):
    loaded = model_class.from_pretrained(checkpoint, attn_implementation=asked)
    assert implementations(loaded) == expected
    set_later = model_class.from_pretrained(checkpoint)
    reference = first(set_later(**inputs))
    set_later.set_attn_implementation(asked or "sdpa")
    assert implementations(set_later) == expected
    spoken = inputs["attention_mask"].bool()
    for model in (loaded, set_later):
        torch.testing.assert_close(first(model(**inputs))[spoken], reference[spoken], atol=1e-4, rtol=1e-4)


def test_unknown_attention_is_refused(checkpoint):
    with pytest.raises(ValueError, match="nonsense"):
        SenseForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="nonsense")


# ------------------------------------------------------------------ dtypes and devices


@both_classes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model_class, dtype, inputs, checkpoint):
    expected = first(model_class.from_pretrained(checkpoint)(**inputs))
    spoken = inputs["attention_mask"].bool()
    loaded = model_class.from_pretrained(checkpoint, dtype=dtype)
    cast = model_class.from_pretrained(checkpoint).to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    for model in (loaded, cast):
        output = first(model(**{**inputs, "input_features": inputs["input_features"].to(dtype)}))
        assert output.dtype == dtype
        # fp16 carries 11 bits, bf16 8; of a model this deep the last few are noise.
        error = (output.float() - expected)[spoken].norm() / expected[spoken].norm()
        assert error < (0.01 if dtype == torch.float16 else 0.06)


WHOLE = {"": "disk"}
ENCODER = {"model.audio_tower": "disk", "model.multi_modal_projector": "disk", "model.language_model": "cpu",
           "lm_head": "cpu"}  # fmt: skip


@pytest.mark.parametrize("device_map", [WHOLE, ENCODER, "auto"], ids=["whole", "encoder", "auto"])
def test_disk_offload(model, inputs, device_map, checkpoint, tmp_path):
    memory = {"cpu": sum(p.nbytes for p in model.parameters()) // 2} if device_map == "auto" else None
    placed = SenseForConditionalGeneration.from_pretrained(
        checkpoint, device_map=device_map, max_memory=memory, offload_folder=tmp_path
    )
    assert "disk" in placed.hf_device_map.values()
    assert any(p.is_meta for p in placed.parameters())
    torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits)
    for how in ({"max_new_tokens": 3}, {"max_new_tokens": 3, "num_beams": 2}):
        assert torch.equal(placed.generate(**inputs, **how), model.generate(**inputs, **how))
    features = {name: inputs[name][:1] for name in ("input_features", "input_features_mask")}
    prompt = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    (found,), (expected,) = (
        which.generate_branches([[[*prompt, 7], [*prompt, 8]]], **features, max_new_tokens=3)
        for which in (placed, model)
    )
    assert all(map(torch.equal, found, expected))
    pooled, mask = model.model.get_pooled_features(**features)
    scores = [which.score_choices([prompt], [[5, 2], [6, 7, 2]], pooled, mask) for which in (placed, model)]
    torch.testing.assert_close(*scores)


def test_cpu_offload(model, inputs):
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert all(p.is_meta for p in offloaded.parameters())
    torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits)
    expected = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(offloaded.generate(**inputs, max_new_tokens=3), expected)


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_both_kinds(model, inputs, use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointed:
            trained.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert trained.is_gradient_checkpointing == checkpointed
        trained(**with_labels(inputs)).loss.backward()
        gradients.append(trained.model.multi_modal_projector.linear.weight.grad)
        trained.gradient_checkpointing_disable()
        assert not trained.is_gradient_checkpointing
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_one_batch_is_learnt_by_heart():
    """Adapter and LoRA alone, as in training, until generation repeats the text of each clip."""
    lora = {"r": 16, "lora_alpha": 32, "target_modules": r".*_proj"}
    model = tiny_model(tiny_config(lora=lora))
    # The prompts are the same: only the audio can tell which text is asked for.
    inputs = tiny_inputs()
    inputs["input_ids"][:, -8:-6] = torch.tensor([5, 6])
    prompt = {**inputs, **{name: inputs[name][:, :-6] for name in ("input_ids", "attention_mask")}}
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], losses
    answers = model.eval().generate(**prompt, max_new_tokens=6)[:, -6:]
    assert torch.equal(answers, inputs["input_ids"][:, -6:])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size, multiple, rows", [(109, None, 109), (101, 8, 104), (90, None, 90)])
def test_resized_vocabulary(tied, size, multiple, rows, tmp_path):
    model = tiny_model(tiny_config(tied, audio_token_id=85))
    inputs = tiny_inputs(0, 1)
    inputs["input_ids"] = torch.where(inputs["input_ids"] == AUDIO_TOKEN_ID, 85, inputs["input_ids"] % 84)
    before = model(**inputs).logits
    model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
    assert model.config.text_config.vocab_size == rows == model.get_input_embeddings().weight.shape[0]
    after = model(**with_labels(inputs))
    assert after.logits.shape[-1] == rows == model.lm_head.weight.shape[0] and torch.isfinite(after.loss)
    assert torch.equal(after.logits[..., : min(rows, VOCABULARY)], before[..., :rows])
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not model.lm_head.weight.requires_grad and not model.get_input_embeddings().weight.requires_grad
    answer = model.generate(**inputs, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    loaded, info = SenseForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(**inputs).logits, after.logits)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=3), answer)
    new = {**inputs, "input_ids": inputs["input_ids"].clone()}
    new["input_ids"][:, -2] = rows  # one beyond the last
    with pytest.raises(IndexError):
        model(**new)


def test_peft_model_around_sense(model, inputs, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    plain = model(**inputs).logits
    untouched = copy.deepcopy(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q|k|v)_proj"))
    assert torch.equal(wrapped(**inputs).logits, plain)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    logits = wrapped(**inputs).logits
    assert not torch.allclose(logits, plain)
    answer = wrapped.generate(**inputs, max_new_tokens=3)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path)
    assert torch.equal(loaded(**inputs).logits, logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.generate(**inputs, max_new_tokens=3), answer)


def test_a_folder_of_peft_is_loaded_with_its_base(checkpoint, inputs, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = SenseForConditionalGeneration.from_pretrained(checkpoint)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q|k|v)_proj")).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, wrapped(**inputs).logits)
