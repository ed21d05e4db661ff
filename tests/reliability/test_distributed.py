"""Distributed is the same model."""
import json
from pathlib import Path
import pytest, torch, time
import train_sense
from tests.conftest import write_corpus
from tests.processes import launch

FSDP = ["--fsdp", "--fsdp_config", json.dumps({"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True})]

def train(argv):
    train_sense.main(argv)


def test_x(tmp_path, tiny_whisper, tiny_llama):
    corpus = write_corpus(tmp_path / "corpus", train=44, dev=11)
    fields = {
            "dataset_dir": corpus, "audio_backbone": tiny_whisper, "text_backbone": tiny_llama, "backbone_dtype": "float32",
            "tasks": {"asr": 1, "ner": 0.5, "sa": 0.4},
            "prompts": {"asr": "Transcribe.", "ner": "Tag the entities.", "sa": "Which sentiment?"},
            "lora_r": 4, "classifier": "ner", "max_steps": 20, "dataloader_drop_last": True, "save_steps": 10, "eval_strategy": "steps", "eval_steps":10,
            "logging_steps": 1, "learning_rate": "1e-3", "use_cpu": True, "report_to": "none", "warm_start": True, "scored_samples": 5,
            "train_sampling_strategy": "group_by_length", "disable_tqdm": True}
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in fields.items()))
    found = {}
    for name, number, extra in (("one", 1, []), ("fsdp2", 2, FSDP)):
        t = time.time()
        out = tmp_path / name
        launch(number, train, [str(path), "--output_dir", str(out), "--per_device_train_batch_size", str(8 // number), *extra], sharded=name.startswith("fsdp"))
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        found[name] = [e["loss"] for e in log if "loss" in e]
        print(name, time.time() - t, found[name][::4], [e for e in log if "eval_true_loss" in e][-1], [e for e in log if "eval_wer" in e][-1], flush=True)
    for name in found:
        print(name, max(abs(a-b) for a,b in zip(found[name], found["one"])))
