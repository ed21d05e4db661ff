"""Models and adapters from a folder and from the Hub, with this package installed."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor

import eval_sense
from modeling_sense import SenseForConditionalGeneration, SenseModel
from modeling_sense.modeling_sense import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_trained
from processing import SenseProcessor, hub
from processing.hub import export_model, load_checkpoint, push_model
from tests.conftest import tone
from tests.hub.conftest import CODE, answer, compose


@pytest.mark.parametrize("auto", [AutoModelForSpeechSeq2Seq, AutoModelForMultimodalLM])
def test_with_the_package_nobody_is_asked_to_trust(whole, auto):
    for where in (whole["folder"], whole["repo"]):
        assert type(auto.from_pretrained(where)) is SenseForConditionalGeneration
        assert type(AutoProcessor.from_pretrained(where)) is SenseProcessor
    assert type(AutoModel.from_pretrained(whole["folder"])) is SenseModel


def test_saved_folders_name_their_classes(whole):
    config = json.loads((Path(whole["folder"]) / "config.json").read_text())
    generating = "modeling_sense.SenseForConditionalGeneration"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_sense.SenseConfig",
        "AutoModel": "modeling_sense.SenseModel",
        "AutoModelForSpeechSeq2Seq": generating,
        "AutoModelForMultimodalLM": generating,
    }
    processor = json.loads((Path(whole["folder"]) / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_sense.SenseProcessor"
    code = {path.name for path in Path(whole["folder"]).glob("*.py")}
    assert code == CODE


def test_what_is_loaded_from_the_hub_and_saved_names_its_own_code(whole, tmp_path):
    AutoModelForSpeechSeq2Seq.from_pretrained(whole["repo"], revision="v1").save_pretrained(tmp_path)
    assert "--" not in json.dumps(json.loads((tmp_path / "config.json").read_text())["auto_map"])


def test_understand_takes_the_processor_of_the_revision_that_was_loaded(whole):
    other = SenseProcessor.from_backbones("tester/whisper", "tester/llama", prompts={"sa": "How was it meant?"})
    other.push_to_hub(whole["repo"], revision="other")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(whole["repo"], revision="other")
    assert model.understand(tone(1.0), tasks=("sa",), max_new_tokens=2).keys() == {"sa"}
    with pytest.raises(ValueError, match="no prompt for task 'asr'"):
        model.understand(tone(1.0), tasks=("asr",))


def test_load_checkpoint_takes_revisions(whole):
    for revision, expected in whole["answers"].items():
        assert answer(*load_checkpoint(whole["repo"], revision=revision)) == expected
    assert load_checkpoint is eval_sense.load_checkpoint


def test_an_adapter_from_the_hub_at_a_revision(server, adapter, backbones):
    assert answer(*load_checkpoint(adapter["repo"])) == adapter["answers"]
    commit = HfApi().model_info(adapter["repo"]).sha
    assert adapter["address"].endswith(commit)
    other, processor = compose(backbones, seed=2)
    folder = adapter["folder"] / "second"
    other.save_adapter(folder), processor.save_pretrained(folder)
    export_model(folder, adapter["folder"] / "second export", adapter_only=True)
    push_model(adapter["folder"] / "second export", adapter["repo"], revision="other")
    sense = SenseForConditionalGeneration
    assert answer(sense.from_adapter(adapter["repo"], revision="other"), processor) == answer(other, processor)
    assert answer(sense.from_adapter(adapter["repo"], revision=commit), processor) == adapter["answers"]
    fresh = compose(backbones, seed=3)[0]
    fresh.load_adapter(adapter["repo"], revision="other")
    assert answer(fresh, processor) == answer(other, processor)
    with pytest.raises(ValueError, match="no Hub id that can be read at revision 'nowhere'"):
        sense.from_adapter(adapter["repo"], revision="nowhere")
    with pytest.raises(ValueError, match="no adapter folder, and no Hub id"):
        sense.from_adapter("tester/nothing")


def test_backbones_are_taken_at_the_revision_that_the_adapter_names(backbones, adapter):
    HfApi().create_branch("tester/llama", branch="changed")
    api, commit = HfApi(), HfApi().model_info("tester/llama").sha
    about = json.loads((adapter["folder"] / "export" / ADAPTER_CONFIG).read_text())
    assert about["backbones"]["text"] == {"id": "tester/llama", "revision": commit}
    path = Path(api.hf_hub_download("tester/llama", "model.safetensors"))
    state = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(state, adapter["folder"] / "changed.safetensors", metadata={"format": "pt"})
    where = {"path_in_repo": "model.safetensors", "repo_id": "tester/llama"}
    api.upload_file(path_or_fileobj=adapter["folder"] / "changed.safetensors", **where)
    try:
        assert answer(*load_checkpoint(adapter["folder"] / "export")) == adapter["answers"]
        elsewhere = {"text": "tester/llama"}  # the main branch, with other weights
        with pytest.raises(ValueError, match="trained on other backbone weights"):
            SenseForConditionalGeneration.from_adapter(adapter["folder"] / "export", backbones=elsewhere)
    finally:
        api.upload_file(path_or_fileobj=path, **where)


def test_an_adapter_keeps_its_dtype_attention_and_lora(backbones, tmp_path, tiny_whisper, tiny_llama):
    model = SenseForConditionalGeneration.from_backbones(*backbones, dtype="bfloat16", num_audio_tokens=50)
    model.add_lora(r=2)
    model.save_adapter(tmp_path)
    local = {"audio": tiny_whisper, "text": tiny_llama}
    loaded = SenseForConditionalGeneration.from_adapter(tmp_path, backbones=local, attn_implementation="eager")
    assert loaded.lm_head.weight.dtype == torch.bfloat16 and loaded.config.num_audio_tokens == 50
    assert loaded.config.backbones == model.config.backbones and loaded.config.lora == model.config.lora
    assert loaded.config.text_config._attn_implementation == "eager" and not loaded.training
    wide = SenseForConditionalGeneration.from_adapter(tmp_path, dtype=torch.float32)
    assert wide.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_adapter_trained_in_fp32_beside_weights_in_fp16(backbones, tmp_path, quantize):
    model, _ = compose(backbones)
    model.save_adapter(tmp_path / "one")
    sense, fingerprint = SenseForConditionalGeneration, model.backbone_fingerprint()
    assert sense.from_backbones(*backbones, dtype="float16").backbone_fingerprint() != fingerprint  # rounded twice
    for folder, again in (("one", "two"), ("two", "three")):  # what is saved of it can be loaded as well
        half = sense.from_adapter(tmp_path / folder, dtype="float16", quantize=quantize)
        assert half.quantization == quantize and half.backbone_fingerprint() == fingerprint
        for name, parameter in half.named_parameters():
            assert parameter.dtype == (torch.float32 if is_trained(name) else torch.float16), name
            assert parameter.requires_grad == is_trained(name), name
        half.save_adapter(tmp_path / again)


def test_a_model_of_another_kind_is_named(tiny_whisper):
    with pytest.raises(ValueError, match="is no SENSE model: what prepares its input is a Whisper"):
        load_checkpoint(tiny_whisper)


def test_load_adapter_leaves_a_model_as_it_is_that_it_does_not_fit(backbones, tmp_path):
    model, _ = compose(backbones)
    model.add_lora(r=2)
    model.save_adapter(tmp_path)
    other = SenseForConditionalGeneration.from_backbones(*backbones, num_audio_tokens=50)
    with pytest.raises(ValueError, match="num_audio_tokens is 250 there, 50 in this model"):
        other.load_adapter(tmp_path)
    assert other.config.lora is None and not [name for name, _ in other.named_parameters() if ".lora_" in name]


def test_load_checkpoint_finds_backbones_that_go_by_a_name_of_ours(backbones, tmp_path, monkeypatch, tiny_whisper):
    model, processor = compose(backbones)
    model.config.backbones["audio"] = {"id": "whisper-tiny.en", "revision": None}
    model.save_adapter(tmp_path), processor.save_pretrained(tmp_path)
    monkeypatch.setattr(hub, "resolve_backbone", lambda name: tiny_whisper if name == "whisper-tiny.en" else name)
    loaded, _ = load_checkpoint(str(tmp_path))
    assert loaded.config.backbones["audio"]["id"] == "whisper-tiny.en"
    assert answer(loaded, processor) == answer(model, processor)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["../secrets", "/etc/llama", "tester/../llama", "here"])
def test_an_adapter_from_the_hub_names_no_files_of_this_machine(backbones, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    model, _ = compose(backbones)
    model.config.backbones["text"] = {"id": name, "revision": None}
    model.save_adapter(tmp_path / "adapter")
    repo = f"tester/bad-{abs(hash(name))}"
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"{repo}: {ADAPTER_CONFIG}, text backbone: '{re.escape(name)}'"):
        SenseForConditionalGeneration.from_adapter(repo)


def test_adapters_that_are_refused(backbones, tmp_path):
    model, _ = compose(backbones)
    torch.save(model.trained_state_dict(), tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=f"it has no {ADAPTER_CONFIG}"):
        model.load_adapter(tmp_path)
    model.save_adapter(tmp_path)
    weights, settings = tmp_path / ADAPTER_WEIGHTS, tmp_path / ADAPTER_CONFIG
    weights.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=f"it has no {ADAPTER_WEIGHTS}, and no other format is read"):
        model.load_adapter(tmp_path)
    weights.write_bytes((tmp_path / "adapter_model.bin").read_bytes())  # a pickle by another name
    with pytest.raises(ValueError, match=f"{ADAPTER_WEIGHTS}: not readable as safetensors"):
        model.load_adapter(tmp_path)
    about = json.loads(settings.read_text())
    settings.write_text(json.dumps({**about, "backbones": None}))
    with pytest.raises(ValueError, match="it names no (audio|text) backbone"):
        SenseForConditionalGeneration.from_adapter(tmp_path)
    settings.write_text(json.dumps({"lora": None}))
    with pytest.raises(ValueError, match="it lacks audio_tokens, backbones"):
        model.load_adapter(tmp_path)
    settings.write_text("{")
    with pytest.raises(ValueError, match=f"{ADAPTER_CONFIG}: not JSON"):
        model.load_adapter(tmp_path)
