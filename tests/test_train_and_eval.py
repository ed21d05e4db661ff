"""train_sense.py and eval_sense.py as their users call them, on tiny backbones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import eval_sense
import train_sense
from processing import report
from scripts import transcribe
from tests.conftest import make_corpus, write_corpus


ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=12, dev=4, test=5)


@pytest.fixture
def recipe(tmp_path, corpus, tiny_whisper, tiny_llama):
    """Writes a recipe; keyword arguments change it."""

    def write(**changes):
        fields = {
            "dataset_dir": corpus,
            "audio_backbone": tiny_whisper,
            "text_backbone": tiny_llama,
            "backbone_dtype": "float32",
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": "1e-3",
            "use_cpu": True,
            "report_to": "tensorboard",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in fields.items()))
        return str(path)

    return write


@pytest.mark.parametrize("audio_tokens", ["trim", "fixed"])
def test_trains_saves_and_is_scored(recipe, corpus, tmp_path, audio_tokens):
    cache = {"encoder_cache": str(tmp_path / "cache"), "speeds": [1.0, 0.9], "time_mask": 0.2}
    metrics = train_sense.main([recipe(audio_tokens=audio_tokens, lora_r=4, **cache)])
    out = tmp_path / "out"
    assert {"eval_true_loss", "eval_shuffled_loss", "eval_wer"} <= metrics.keys()
    assert json.loads((out / "metrics.json").read_text())["eval_wer"] == metrics["eval_wer"]
    assert (out / "training.png").stat().st_size > 5000 and list(out.glob("runs/*/events*"))
    scored = eval_sense.main(
        ["--model", str(out), "--dataset", corpus, "--output_dir", str(tmp_path / "scored"), "--num_beams", "2"]
        + ["--shuffled_control"]
    )
    assert {"wer", "wer_normalized", "n_utterances", "audio_seconds", "rtf", "wer_shuffled"} <= scored.keys()
    assert scored["n_utterances"] == 5 and scored["audio_seconds"] == pytest.approx(5.0, abs=0.01)
    table = [json.loads(line) for line in (tmp_path / "scored" / "utterances.jsonl").read_text().splitlines()]
    assert {row["id"] for row in table} == {f"clip-{i}" for i in range(5)}
    errors, words = sum(row["errors"] for row in table), sum(row["words"] for row in table)
    assert scored["wer"] == pytest.approx(100 * errors / words)
    model, processor = eval_sense.load_checkpoint(str(out))
    assert model.config.audio_tokens == processor.audio_tokens == audio_tokens

    report.main([str(tmp_path / "both.png"), f"one={out}", f"two={out}"])
    assert (tmp_path / "both.png").stat().st_size > (out / "training.png").stat().st_size


def test_transcribe_prints_what_was_said_beside_what_was_heard(recipe, corpus, tmp_path, capsys):
    train_sense.main([recipe(), "--max_steps", "1"])
    alone = tmp_path / "alone.wav"
    soundfile.write(alone, np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    line = json.loads((Path(corpus) / "test" / "metadata.jsonl").read_text().splitlines()[0])
    clip = Path(corpus) / "test" / line["file_name"]
    answers = transcribe.main([str(tmp_path / "out"), str(clip), str(alone), "--num_beams", "2"])
    printed = capsys.readouterr().out
    assert f"{clip}\n  said:  {line['text']}\n  heard: {answers[0].strip()}" in printed
    assert f"{alone}\n  heard: {answers[1].strip()}" in printed


def test_training_without_a_cache_and_without_warm_start(recipe, tmp_path):
    train_sense.main([recipe(warm_start=False), "--max_steps", "2"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["train_clips"] == 12


def test_checkpoints_hold_what_was_trained_only_and_resume(recipe, tmp_path):
    def weights():
        return train_sense.SenseForConditionalGeneration.from_pretrained(tmp_path / "out").trained_state_dict()

    train_sense.main([recipe()])
    straight = weights()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 20_000
    assert not (checkpoint / "model.safetensors").exists()
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "later")
    train_sense.main([recipe()])  # finds checkpoint-2 by itself
    for name, weight in weights().items():
        torch.testing.assert_close(weight, straight[name])


@pytest.mark.parametrize(
    "content, message",
    [
        ("learning_rte: 1", "unknown field 'learning_rte'; did you mean 'learning_rate'"),
        ("- 1", "must hold `field: value` lines, found list"),
        ("time_mask: 0.1\ndataset_dir: x", "set encoder_cache to a folder"),
        ("audio_tokens: trim", "dataset_dir is missing"),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        train_sense.parse_recipe([str(path)])


def test_missing_recipe_is_named():
    with pytest.raises(ValueError, match="there is no recipe nowhere.yaml"):
        train_sense.parse_recipe(["nowhere.yaml"])


def test_command_line_wins_over_the_recipe(recipe):
    args, training = train_sense.parse_recipe([recipe(), "--learning_rate", "5e-4", "--prompt", "Write it down."])
    assert training.learning_rate == 5e-4 and args.prompt == "Write it down."


def test_wrong_column_names_those_present(recipe):
    with pytest.raises(ValueError, match="no text column 'words'; it has 'file_name', 'text', 'duration'"):
        train_sense.main([recipe(text_column="words")])


def test_score_counts_words():
    scores = eval_sense.score(["the colour of the sea", "it is ten"], ["The color of the sea.", "it is 10"])
    assert scores["wer"] == pytest.approx(100 * 4 / 8) and scores["wer_normalized"] == 0


def test_shuffling_pairs_every_clip_with_another_text():
    dataset = make_corpus(5)
    shuffled = eval_sense.shuffle_audio(dataset)
    assert list(shuffled["id"]) == list(dataset["id"])
    assert all(a != b for a, b in zip(dataset["text"], shuffled["text"]))
    assert sorted(dataset["text"]) == sorted(shuffled["text"])


def launch(number, script, *args):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(number)]
    subprocess.run([*command, str(ROOT / script), *args], env=ENVIRONMENT, check=True, timeout=300)


def test_two_processes_train_and_score_as_one(recipe, corpus, tmp_path):
    launch(2, "train_sense.py", recipe(per_device_train_batch_size=2, max_steps=2))
    found = []
    for number in (1, 2):
        out = tmp_path / f"scored{number}"
        launch(
            number, "eval_sense.py", "--model", str(tmp_path / "out"), "--dataset", corpus, "--output_dir", str(out)
        )
        metrics = json.loads((out / "metrics.json").read_text())
        del metrics["rtf"]
        found.append((metrics, (out / "utterances.jsonl").read_text()))
    assert found[0] == found[1]
