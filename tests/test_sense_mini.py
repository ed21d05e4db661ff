"""The checkpoint that comes with the package, as its files; tests/real hears with it."""

import re
import subprocess
from pathlib import Path

from safetensors import safe_open

from modeling_sense.modeling_sense import ADAPTER_WEIGHTS, is_trained, read_adapter_config
from processing import SenseProcessor
from processing.hub import SHIPPED, shipped
from processing.recipe import find_recipe


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "checkpoints" / "sense-mini"


def test_what_was_trained_alone_is_shipped():
    names = {path.name for path in FOLDER.iterdir()}
    assert {ADAPTER_WEIGHTS, "sense_adapter.json", "README.md", "processor_config.json", "tokenizer.json"} <= names
    assert not {path.suffix for path in FOLDER.iterdir()} & {".py", ".bin", ".pt", ".pkl"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 25e6
    with safe_open(FOLDER / ADAPTER_WEIGHTS, "pt") as weights:
        sizes = {name: weights.get_tensor(name).numel() for name in weights.keys()}
    assert all(map(is_trained, sizes)) and not any(name.startswith("classifier.") for name in sizes)
    lora = sum(size for name, size in sizes.items() if ".lora_" in name)
    adapter = sum(sizes.values()) - lora
    assert f"adapter {adapter:,}, LoRA {lora:,}" in (FOLDER / "README.md").read_text()
    assert f"{adapter + lora:,}" in (ROOT / "docs" / "sense_mini.md").read_text()


def test_it_names_backbones_that_are_the_same_everywhere():
    backbones = read_adapter_config(FOLDER)["backbones"]
    found = [backbones[part]["id"] for part in ("audio", "text")]
    assert found == ["whisper-base@packages", "SmolLM2-135M-Instruct@packages"]


def test_it_answers_as_its_recipe_asked():
    recipe = Path(find_recipe("sense_mini/3_asr_ner_sa")).read_text()
    prompts = SenseProcessor.from_pretrained(FOLDER).prompts
    assert set(prompts) == {"asr", "ner", "sa"} and all(f"{name}: {text}" in recipe for name, text in prompts.items())


def test_another_seed_has_a_folder_of_its_own():
    """Else it would go on from the checkpoints of the first."""
    for seed, folder in (("0", "outputs/sense_mini"), ("1", "outputs/sense_mini_seed1")):
        asked = ["make", "--dry-run", "reproduce", "DATASET=DIR", f"SEED={seed}"]
        said = subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert said.count(f"--seed {seed} --output_dir {folder}/") == 3
        assert f"--init_from {folder}/1_asr_ner" in said and f"--init_from {folder}/2_asr_ner_sa" in said
        assert set(re.findall(r"outputs/\w+", said)) == {folder}


def test_it_goes_by_its_name_unless_a_folder_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped(SHIPPED) == FOLDER and shipped("other") == "other"
    (tmp_path / SHIPPED).mkdir()
    assert shipped(SHIPPED) == SHIPPED
