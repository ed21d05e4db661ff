"""What a process finds on the Hub that has transformers, torch and soundfile, and not this package."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
import soundfile
import torch
from packaging.requirements import Requirement
from transformers import pipeline

from processing.hub import export_model, push_model
from tests.conftest import tone
from tests.hub.conftest import compose


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
scores = torch.zeros(2, len(processor.tokenizer))
kept = processor.constrain(["ner", "sa"], [9, 9])(torch.ones(2, 3, dtype=int), scores)
found["kept"] = (kept == 0).sum(1).tolist()
pipe = transformers.pipeline("automatic-speech-recognition", model=repo, revision="v1", trust_remote_code=True)
found["asr"] = pipe("clip.wav", return_timestamps="word", generate_kwargs={"max_new_tokens": 8})
for name, sample in asked["samples"].items():
    exec(sample.replace("num_beams=5", "num_beams=5, max_new_tokens=8"))
    found[name] = [len(model.generate(**processor.apply_request("clip.wav"), max_new_tokens=1)), type(model).__name__]
print(json.dumps(found))
"""


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
    constraint = whole["processor"].constrain(["ner", "sa"], [9, 9])
    kept = constraint(torch.ones(2, 3, dtype=int), torch.zeros(2, len(whole["processor"].tokenizer)))
    assert away["kept"] == (kept == 0).sum(1).tolist() and 0 < away["kept"][1] < away["kept"][0]
    pipe = pipeline("spoken-language-understanding", model=whole["folder"])  # the package's own, which needs no trust
    assert type(pipe).__module__ == "processing.pipeline_sense"
    here = pipe(tone(1.0), return_timestamps="word", generate_kwargs={"max_new_tokens": 8})
    assert away["asr"] == away["pipeline"] == json.loads(json.dumps(here)) and here["text"]


def test_the_samples_of_the_cards_run(away):
    expected = [1, "SenseForConditionalGeneration"]
    assert away["whole sample"] == away["adapter sample"] == expected
