"""The network: sizes, pooling, loss, generation, saving. Tiny random backbones, made in conftest.py."""

import json
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
)

from modeling_sense import SenseConfig, SenseForConditionalGeneration, SenseModel
from processing import SenseProcessor
from tests.conftest import save_llm, tone


SECONDS = [0.5, 1.7, 0.9, 2.4, 1.1, 0.3, 3.0, 1.3]


@pytest.fixture(params=["trim", "fixed"])
def audio_tokens(request):
    return request.param


@pytest.fixture(params=["llama", "qwen"])
def text_backbone(request, tiny_llama, tiny_qwen):
    return {"llama": tiny_llama, "qwen": tiny_qwen}[request.param]


def build(audio, text, audio_tokens="trim", num_audio_tokens=250, **kwargs):
    tokens = {"audio_tokens": audio_tokens, "num_audio_tokens": num_audio_tokens}
    torch.manual_seed(0)
    model = SenseForConditionalGeneration.from_backbones(audio, text, **tokens, **kwargs)
    return model, SenseProcessor.from_backbones(audio, text, **tokens)


@pytest.fixture
def sense(tiny_whisper, tiny_llama):
    return build(tiny_whisper, tiny_llama)


def request(processor, number=len(SECONDS)):
    return processor.apply_transcription_request([tone(s, seed=i) for i, s in enumerate(SECONDS[:number])])


def with_labels(inputs, number=3):
    labels = inputs["input_ids"].clone()
    labels[:, :-number] = -100
    return {**inputs, "labels": labels}


def count_rows(module):
    """Batch sizes of the calls of a module, as a list that fills itself."""
    rows = []

    def note(module, args, kwargs, output):
        rows.append(tuple(output.last_hidden_state.shape[:2]))

    module.register_forward_hook(note, with_kwargs=True)
    return rows


# ------------------------------------------------------------------ sizes and composition


def test_adapter_of_whisper_small_and_tinyllama_has_the_papers_size():
    with torch.device("meta"):
        model = SenseForConditionalGeneration(SenseConfig())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 1_576_448
    assert not any("decoder" in name for name, _ in model.named_parameters())


def test_lora_on_tinyllama_has_the_papers_size():
    with torch.device("meta"):
        model = SenseForConditionalGeneration(SenseConfig(lora={"r": 32, "target_modules": r".*\.(q|k|v)_proj"}))
    lora = [(n, p) for n, p in model.named_parameters() if ".lora_" in n]
    assert sum(p.numel() for _, p in lora) == 6_127_616
    assert all(n.startswith("model.language_model.") and p.requires_grad for n, p in lora)


def test_backbones_keep_their_weights_and_stay_frozen(tiny_whisper, text_backbone):
    model, processor = build(tiny_whisper, text_backbone)
    source = AutoModel.from_pretrained(text_backbone)
    mine = model.model.language_model.state_dict()
    rows = source.get_input_embeddings().weight.shape[0]
    for name, weight in source.state_dict().items():
        assert torch.equal(mine[name][:rows] if "embed_tokens" in name else mine[name], weight), name
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("multi_modal_projector" in name for name in trained)
    assert model.config.audio_token_id == processor.audio_token_id


def test_text_model_as_audio_encoder_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="audio encoder must be a Whisper model, found 'llama'"):
        SenseForConditionalGeneration.from_backbones(tiny_llama, tiny_llama)


def test_audio_model_as_language_model_is_refused(tiny_whisper):
    with pytest.raises(ValueError, match="must be a decoder-only text model, found 'whisper'"):
        SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_whisper)


def test_language_models_with_heads_of_another_kind_are_refused(tiny_whisper, tmp_path):
    llm = save_llm(partial(GraniteConfig, logits_scaling=8.0), GraniteForCausalLM, tmp_path)
    with pytest.raises(ValueError, match="a linear head without bias, and 'granite' makes its logits otherwise"):
        SenseForConditionalGeneration.from_backbones(tiny_whisper, llm)


@pytest.mark.parametrize("name", ["token", "device_map", "quantization_config", "torch_dtype", "num_audio_token"])
def test_arguments_that_backbones_do_not_take_are_refused(tiny_whisper, tiny_llama, name):
    """A configuration would keep, and publish, whatever it is given."""
    with pytest.raises(TypeError, match=f"from_backbones\\(\\) has no argument {name}"):
        SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama, **{name: "value"})


@pytest.mark.parametrize("field, value", [("audio_tokens", "some"), ("num_audio_tokens", 0)])
def test_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        SenseConfig(**{field: value})


# ------------------------------------------------------------------ pooling


def test_trim_averages_over_the_frames_that_hold_speech(sense):
    model, _ = sense
    frames, mask = torch.randn(1, 1500, 32), torch.zeros(1, 1500)
    mask[:, :15] = 1  # two and a half windows of six frames
    pooled, valid = model.model.multi_modal_projector.pool(frames, mask)
    assert valid.sum() == 3
    expected = [frames[0, :6].mean(0), frames[0, 6:12].mean(0), frames[0, 12:15].mean(0)]
    torch.testing.assert_close(pooled[0, :3], torch.stack(expected))


def test_fixed_is_plain_adaptive_average_pooling(tiny_whisper, tiny_llama):
    model, _ = build(tiny_whisper, tiny_llama, "fixed")
    frames = torch.randn(1, 1500, 32)
    pooled, valid = model.model.multi_modal_projector.pool(frames, torch.zeros(1, 1500))
    torch.testing.assert_close(pooled, frames.view(1, 250, 6, 32).mean(2))
    assert valid.all()


@pytest.mark.parametrize("num_audio_tokens", [125, 250, 400, 1500])
def test_processor_and_model_agree_on_the_number_of_tokens(tiny_whisper, tiny_llama, num_audio_tokens):
    model, processor = build(tiny_whisper, tiny_llama, num_audio_tokens=num_audio_tokens)
    for samples in [1, 160, 161, 320, 321, 1919, 1920, 1921, 16000, 479_840, 480_000]:
        mask = torch.zeros(1, 3000)
        mask[:, : -(-samples // 160)] = 1
        _, valid = model.model.multi_modal_projector.pool(torch.randn(1, 1500, 32), mask[:, ::2])
        assert valid.sum() == processor.num_tokens(samples), samples


# ------------------------------------------------------------------ forward and loss


def test_placeholder_mismatch_names_both_counts(sense):
    model, processor = sense
    inputs = request(processor, 1)
    inputs["input_ids"][inputs["input_ids"] == processor.audio_token_id] = 1
    with pytest.raises(ValueError, match=r"tokens: 0, features: \d+"):
        model(**inputs)


def test_pooled_features_give_what_input_features_give(sense, audio_tokens, tiny_whisper, tiny_llama):
    model, processor = build(tiny_whisper, tiny_llama, audio_tokens)
    inputs = request(processor, 3)
    expected = model(**inputs).logits
    pooled, mask = model.model.get_pooled_features(inputs.pop("input_features"), inputs.pop("input_features_mask"))
    rows = count_rows(model.model.audio_tower)
    torch.testing.assert_close(model(**inputs, pooled_features=pooled, pooled_features_mask=mask).logits, expected)
    assert rows == []


def test_loss_is_the_one_of_full_logits_and_honours_num_items_in_batch(sense):
    model, processor = sense
    inputs = with_labels(request(processor, 3))
    full = model(**inputs)
    shifted = torch.nn.functional.cross_entropy(
        full.logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(full.loss, shifted / 9)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=18).loss, shifted / 18)
    model.train()
    skipped = model(**inputs)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, full.loss)


def test_accumulated_gradients_equal_those_of_the_full_batch(sense):
    model, processor = sense
    weight = model.model.multi_modal_projector.linear.weight
    clips = [tone(s, seed=i) for i, s in enumerate(SECONDS[:4])]

    def gradient(groups):
        model.zero_grad()
        for group in groups:
            inputs = with_labels(processor.apply_transcription_request(group))
            model(**inputs, num_items_in_batch=12).loss.backward()
        return weight.grad.clone()

    torch.testing.assert_close(gradient([clips]), gradient([clips[:1], clips[1:]]), rtol=1e-3, atol=1e-6)


def test_gradient_reaches_the_adapter_and_lora_alone(sense):
    model, processor = sense
    model.add_lora(r=4)
    model.train()
    model(**with_labels(request(processor, 2))).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(model.trained_state_dict())
    assert not model.model.audio_tower.training


def test_gradient_checkpointing_changes_nothing(sense):
    model, processor = sense
    inputs = with_labels(request(processor, 2))
    model.train()
    model(**inputs).loss.backward()
    expected = model.model.multi_modal_projector.linear.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    torch.testing.assert_close(model.model.multi_modal_projector.linear.weight.grad, expected)


def test_eager_and_sdpa_attention_agree(tiny_whisper, tiny_llama):
    logits = {}
    for attention in ("eager", "sdpa"):
        model, processor = build(tiny_whisper, tiny_llama, attn_implementation=attention)
        assert model.model.language_model.config._attn_implementation == attention
        inputs = request(processor, 3)
        logits[attention] = model(**inputs).logits[inputs["attention_mask"].bool()]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-4, rtol=1e-4)


def test_logits_to_keep(sense):
    model, processor = sense
    inputs = request(processor, 2)
    full = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([0, 3])).logits, full[:, [0, 3]])


def test_bf16_backbones_with_an_fp32_adapter(tiny_whisper, tiny_llama, tmp_path):
    model, processor = build(tiny_whisper, tiny_llama, dtype=torch.bfloat16)
    model.add_lora(r=4)
    assert model.model.language_model.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    inputs = request(processor, 2)
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = SenseForConditionalGeneration.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(loaded(**inputs).logits, logits)


# ------------------------------------------------------------------ generation


def test_batch_of_eight_equals_eight_singles(tiny_whisper, text_backbone, audio_tokens):
    model, processor = build(tiny_whisper, text_backbone, audio_tokens)
    clips = [tone(s, seed=i) for i, s in enumerate(SECONDS)]
    for how in ({}, {"num_beams": 3}):
        how = {**how, "max_new_tokens": 8, "min_new_tokens": 8}
        batch = processor.apply_transcription_request(clips)
        together = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
        for clip, expected in zip(clips, together):
            single = processor.apply_transcription_request(clip)
            alone = model.generate(**single, **how)[0, single["input_ids"].shape[1] :]
            assert torch.equal(alone, expected)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 5}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 2, "do_sample": True}]
)
def test_each_clip_is_encoded_once_and_prefilled_once(sense, how):
    model, processor = sense
    inputs = request(processor, 4)
    encoded, read = count_rows(model.model.audio_tower), count_rows(model.model.language_model)
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **how)
    assert [rows for rows, _ in encoded] == [4]
    copies = max(how.get("num_beams", 1), how.get("num_return_sequences", 1))
    assert read[0] == (4, inputs["input_ids"].shape[1] - 1)
    assert all(call == (4 * copies, 1) for call in read[1:]) and len(read) > 3


@pytest.mark.parametrize("how", [{"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_other_caches_encode_once_and_answer_the_same(sense, how, num_beams):
    model, processor = sense
    inputs = request(processor, 3)
    length = {"max_new_tokens": 5, "num_beams": num_beams}
    expected = model.generate(**inputs, **length)
    encoded = count_rows(model.model.audio_tower)
    assert torch.equal(model.generate(**inputs, **length, **how), expected)
    assert [rows for rows, _ in encoded] == [3]


def test_assisted_generation_equals_greedy(sense):
    model, processor = sense
    inputs = request(processor, 1)
    expected = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=2), expected)


PROMPTS = {"asr": "Transcribe the speech.", "ner": "Transcribe the speech and tag it.", "sa": "Which sentiment?"}


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_branches_answer_as_separate_calls_token_for_token(tiny_whisper, text_backbone, audio_tokens, how):
    model, processor = build(tiny_whisper, text_backbone, audio_tokens)
    processor.prompts = PROMPTS
    clips = [tone(s, seed=i) for i, s in enumerate(SECONDS[:4])]
    how = {**how, "max_new_tokens": 9, "min_new_tokens": 9}
    encoded, read = count_rows(model.model.audio_tower), count_rows(model.model.language_model)
    branches = model.generate_branches(**processor.apply_requests(clips, PROMPTS), **how)
    beams = how.get("num_beams", 1)
    assert [rows for rows, _ in encoded] == [4]
    # The audio's prefix once, the questions for each task, then a token at a time.
    assert read[0][0] == 4 and read[1][0] == 12 and all(call == (12 * beams, 1) for call in read[2:])
    answers = model.understand(clips, PROMPTS, processor=processor, **how)
    for t, task in enumerate(PROMPTS):
        inputs = processor.apply_request(clips, task)
        expected = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(torch.stack([of_clip[t] for of_clip in branches]), expected)
        assert answers[task] == [text.strip() for text in processor.batch_decode(expected, skip_special_tokens=True)]


def test_answers_end_by_themselves_in_branches_too(sense):
    model, processor = sense
    processor.prompts = PROMPTS
    clips = [tone(s, seed=i) for i, s in enumerate(SECONDS[:3])]
    for t, task in enumerate(PROMPTS):
        first = model.generate_branches(**processor.apply_requests(clips, PROMPTS), max_new_tokens=1)[1][t]
        model.generation_config.eos_token_id = int(first[0])  # that clip's answer to that task is empty
        answers = model.understand(clips, PROMPTS, processor=processor, max_new_tokens=6)
        for name in PROMPTS:
            inputs = processor.apply_request(clips, name)
            output = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(output, skip_special_tokens=True)
            assert answers[name] == [text.strip() for text in texts]


def test_understand_finds_the_processor_beside_the_model(sense, tmp_path):
    model, processor = sense
    processor.prompts = PROMPTS
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval()
    clip = tone(0.5)
    answers = loaded.understand(clip, max_new_tokens=5)
    assert answers == model.understand([clip], processor=processor, max_new_tokens=5) and list(answers) == list(
        PROMPTS
    )
    with pytest.raises(ValueError, match="no prompt for task 'poem'; this model was trained for"):
        loaded.understand(clip, ["poem"])
    of_many = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path.parent, subfolder=tmp_path.name).eval()
    assert of_many.understand(clip, max_new_tokens=5) == answers


@pytest.mark.parametrize(
    "prompts, how, message",
    [
        ([[[1, 2]], [[1, 2], [1, 3]]], {}, "as many prompts for each clip, found \\[1, 2\\]"),
        ([[[1, 2], [2, 2]]], {}, "put the audio first"),
        ([[[1, 2]]], {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences is 2"),
        ([[[1, 2]]], {"prompt_lookup_num_tokens": 2}, "leave drafts, cache_implementation and custom_generate out"),
        ([[[1, 2]]], {"cache_implementation": "static"}, "call generate\\(\\) for each task"),
    ],
)
def test_branches_that_cannot_be(sense, prompts, how, message):
    with pytest.raises(ValueError, match=message):
        sense[0].generate_branches(prompts, pooled_features=torch.zeros(1, 1, 32), **how)


def test_answers_do_not_depend_on_a_cache_that_somebody_switched_off(sense, tiny_whisper, tiny_llama, tmp_path):
    """As Trainer does in the configuration of each model that it saves."""
    model, processor = sense
    how = {"processor": processor, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.understand([tone(0.5)], ["asr"], **how)
    assert model.understand([tone(0.5)], ["asr"], **how, use_cache=False) == expected
    shutil.copytree(tiny_llama, tmp_path / "llm")
    settings = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(settings | {"use_cache": False}))
    other, _ = build(tiny_whisper, str(tmp_path / "llm"))
    assert other.generation_config.use_cache and other.understand([tone(0.5)], ["asr"], **how) == expected


def test_answers_in_a_dictionary_are_answers(sense):
    model, processor = sense
    how = {"processor": processor, "max_new_tokens": 4}
    found = model.understand([tone(0.5)], ["asr"], **how, return_dict_in_generate=True, output_scores=True)
    assert found == model.understand([tone(0.5)], ["asr"], **how)


def test_two_clips_in_one_prompt_with_beams(sense):
    model, processor = sense
    clips = [tone(0.5, seed=1), tone(1.0, seed=2)]
    inputs = processor(audio=clips, text="<|audio|> and <|audio|> said")
    output = model.generate(**inputs, num_beams=3, max_new_tokens=4)
    assert output.shape[0] == 1
    with pytest.raises(ValueError, match="2 clips for 1 prompts"):
        model.generate(**inputs, max_new_tokens=4, num_beams=3, use_cache=False)


def test_text_alone_is_answered_by_the_language_model(sense):
    model, processor = sense
    inputs = processor(text=["hello there"])
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_generation_never_answers_with_a_placeholder(sense):
    model, processor = sense
    model.lm_head.weight.data[processor.audio_token_id] += 100 * model.lm_head.weight.data[5]
    output = model.generate(**request(processor, 4), max_new_tokens=6)
    assert not (output[:, -6:] == processor.audio_token_id).any()


# ------------------------------------------------------------------ saving and loading


FRESH_PROCESS = """
import json, sys, torch
import modeling_sense, processing
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor
folder = sys.argv[1]
expected = load_file(folder + "/expected.safetensors")
inputs = AutoProcessor.from_pretrained(folder).apply_transcription_request(expected.pop("clip").numpy())
same = {}
for auto in (AutoModelForSpeechSeq2Seq, AutoModelForMultimodalLM):
    same[auto.__name__] = torch.equal(auto.from_pretrained(folder)(**inputs).logits, expected["logits"])
base = AutoModel.from_pretrained(folder)
same[type(base).__name__] = torch.equal(base(**inputs).last_hidden_state, expected["hidden"])
print(json.dumps(same))
"""


def test_loaded_in_a_fresh_process_logits_are_bit_equal(tiny_whisper, text_backbone, audio_tokens, tmp_path):
    from safetensors.torch import save_file

    model, processor = build(tiny_whisper, text_backbone, audio_tokens)
    model.add_lora(r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    clip = tone(1.5, seed=3)
    inputs = processor.apply_transcription_request(clip)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = {"logits": model(**inputs).logits, "hidden": model.model(**inputs).last_hidden_state}
    save_file({**expected, "clip": torch.from_numpy(clip)}, tmp_path / "expected.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)], capture_output=True, text=True, check=True
    )
    same = json.loads(done.stdout.splitlines()[-1])
    assert same == {"AutoModelForSpeechSeq2Seq": True, "AutoModelForMultimodalLM": True, "SenseModel": True}


def test_loaded_model_is_frozen_and_complete(sense, tmp_path):
    model, _ = sense
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(model.trained_state_dict())
    assert isinstance(AutoModel.from_pretrained(tmp_path), SenseModel)
    assert isinstance(AutoModelForMultimodalLM.from_pretrained(tmp_path), SenseForConditionalGeneration)
    theirs, mine = AutoConfig.from_pretrained(tmp_path).to_dict(), model.config.to_dict()
    for config in (theirs, mine):
        for part in (config, config["audio_config"], config["text_config"]):
            part.pop("_name_or_path")  # where it lies: other folders
    assert "auto_map" in mine and "auto_map" not in theirs  # for those who have not installed the package
    del mine["auto_map"]
    assert theirs == mine


def test_missing_weights_are_initialised(sense, tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = sense
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {k: v for k, v in state.items() if "multi_modal_projector" not in k}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = SenseForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == 4
    adapter = loaded.model.multi_modal_projector
    assert torch.equal(adapter.norm.weight, torch.ones(32)) and torch.equal(adapter.linear.bias, torch.zeros(64))
    assert 0 < adapter.linear.weight.std() < 0.1


def test_adapter_files_round_trip_into_another_dtype(sense, tiny_whisper, tiny_llama, tmp_path):
    model, processor = sense
    model.add_lora(r=4)
    model.save_adapter(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 200_000
    fresh, _ = build(tiny_whisper, tiny_llama, dtype=torch.bfloat16)
    fresh.load_adapter(tmp_path)
    for name, weight in model.trained_state_dict().items():
        assert torch.equal(fresh.trained_state_dict()[name], weight)


def test_adapter_of_other_backbones_is_refused(sense, tiny_whisper, tiny_llama, tmp_path):
    model, _ = sense
    model.save_adapter(tmp_path)
    other, _ = build(tiny_whisper, tiny_llama)
    other.model.language_model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(ValueError, match="other backbone weights"):
        other.load_adapter(tmp_path)


def test_adapter_files_are_read_strictly(sense, tiny_whisper, tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = sense
    model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="audio_tokens is 'trim' there, 'fixed' in this model"):
        build(tiny_whisper, tiny_llama, "fixed")[0].load_adapter(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    state["extra"] = state.pop("model.multi_modal_projector.linear.bias")
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"missing \['model.multi_modal_projector.linear.bias'\], unexpected \['extra'\]"
    ):
        model.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="is no adapter folder"):
        model.load_adapter(tmp_path / "nowhere")


def test_device_map_places_and_offloads(sense, tmp_path):
    model, processor = sense
    inputs = request(processor, 2)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "model")
    placed = SenseForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map={"model.audio_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model": "disk",
                    "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )  # fmt: skip
    torch.testing.assert_close(placed(**inputs).logits, expected)


def test_any_llama_like_size_can_be_the_default_text_config():
    config = SenseConfig(text_config=LlamaConfig(hidden_size=64, num_hidden_layers=1, tie_word_embeddings=True))
    assert config.tie_word_embeddings and config.get_text_config().hidden_size == 64
