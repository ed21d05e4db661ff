"""The encoder's output on disk: what is found, what is not, and builds that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor, encoder_cache, load_audio
from processing.augmentation import change_speed
from processing.datasets import from_rows
from processing.encoder_cache import EncoderCache, build_cache, write_shard
from tests.conftest import make_corpus, tone, wav, write_corpus


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus():
    return make_corpus(6)


def count_clips(model) -> list[int]:
    """Clips in each call of the encoder, as a list that fills itself."""
    rows = []
    model.model.audio_tower.register_forward_hook(lambda _, __, output: rows.append(len(output.last_hidden_state)))
    return rows


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))}


def test_features_are_the_encoders(sense, corpus, tmp_path):
    model, processor = sense
    cache = build_cache(model, processor, corpus, tmp_path)
    clips = [load_audio(row["audio"]) for row in corpus]
    pooled, mask = model.model.get_pooled_features(**processor.audio_features(clips))
    for i in range(len(corpus)):
        torch.testing.assert_close(cache.get(i).float(), pooled[i][mask[i]], rtol=2e-3, atol=2e-3)
    assert cache.lengths == mask.sum(1).tolist()
    batch = cache.batch([2, 0])
    assert torch.equal(batch["pooled_features_mask"].sum(1), mask.sum(1)[[2, 0]])
    assert torch.equal(batch["pooled_features"][1][batch["pooled_features_mask"][1]], cache.get(0))


def test_int8_is_half_as_large_and_within_its_step(sense, corpus, tmp_path):
    model, processor = sense
    exact, small = (build_cache(model, processor, corpus, tmp_path, storage=name) for name in ("float16", "int8"))
    for i in range(len(corpus)):
        true, stored = exact.get(i).float(), small.get(i).float()
        assert stored.dtype == torch.float32 and small.get(i).dtype == torch.float16
        step = true.abs().amax(1, keepdim=True) / 127
        assert ((true - stored).abs() <= step * 0.51 + 2e-3).all()
    small_size, exact_size = sorted(sum(path.stat().st_size for path in one.iterdir()) for one in tmp_path.iterdir())
    # By token: d_model 32 in 2 bytes, or in 1 and a scale of 4.
    assert exact_size - small_size == pytest.approx(sum(exact.lengths) * (2 * 32 - 32 - 4), rel=0.1)


def test_what_is_there_is_found_whatever_the_stage_asks_for(sense, corpus, tmp_path):
    model, processor = sense
    encoded = count_clips(model)
    build_cache(model, processor, corpus, tmp_path)
    assert sum(encoded) == 6
    for rows in (range(6), range(5), [3, 1], [0, 0, 2]):  # the same, a subset, another order, a clip twice
        cache = build_cache(model, processor, corpus.select(rows), tmp_path)
        assert len(cache) == len(rows) and sum(encoded) == 6
    assert len(build_cache(model, processor, make_corpus(8), tmp_path)) == sum(encoded) == 8


@pytest.mark.parametrize("change", ["weight", "byte", "pooling", "trim", "mel", "dtype", "storage"])
def test_a_stale_or_foreign_entry_is_never_read(sense, corpus, tmp_path, tiny_whisper, tiny_llama, change):
    model, processor = sense
    build_cache(model, processor, corpus, tmp_path)
    how = {}
    if change == "weight":
        model.model.audio_tower.conv1.bias.data[0] += 1e-3
    elif change == "byte":
        clips = [row["audio"] for row in corpus]
        clips[0]["bytes"] = clips[0]["bytes"][:-1] + bytes([clips[0]["bytes"][-1] ^ 1])
        corpus = corpus.map(lambda _, i: {"audio": clips[i]}, with_indices=True)
    elif change in ("pooling", "trim"):
        how = {"num_audio_tokens": 125} if change == "pooling" else {"audio_tokens": "fixed"}
        model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama, **how)
        processor = SenseProcessor.from_backbones(tiny_whisper, tiny_llama, **how)
        how = {}
    elif change == "mel":
        processor.feature_extractor.dither = 1e-4
    elif change == "dtype":
        model.model.audio_tower.to(torch.bfloat16)
    else:
        how = {"storage": "int8"}
    encoded = count_clips(model)
    build_cache(model, processor, corpus, tmp_path, **how)
    assert sum(encoded) == (1 if change == "byte" else 6)


def test_a_version_of_each_clip_per_speed(sense, corpus, tmp_path):
    model, processor = sense
    cache = build_cache(model, processor, corpus, tmp_path, speeds=(1.0, 0.8))
    assert isinstance(cache, EncoderCache) and len(cache) == len(corpus) and cache.variants == 2
    for i, row in enumerate(corpus):
        clip = load_audio(row["audio"])
        slower = change_speed(clip, 0.8)
        assert len(slower) == pytest.approx(1.25 * len(clip), abs=2)
        assert [len(cache.get(i, v)) for v in (0, 1)] == [processor.num_tokens(len(c)) for c in (clip, slower)]
    encoded = count_clips(model)
    build_cache(model, processor, corpus, tmp_path)  # one speed of those that are there
    assert not encoded
    for wrong in ({"speeds": (0.9, 1.0)}, {"speeds": ()}, {"speeds": (1.0, 0.0)}, {"storage": "int4"}):
        with pytest.raises(ValueError, match="speeds must begin with 1.0|give float16 or int8, found 'int4'"):
            build_cache(model, processor, corpus, tmp_path, **wrong)


def test_a_long_clip_is_not_slowed_beyond_what_whisper_hears(sense, tmp_path):
    model, processor = sense
    rows = list(make_corpus(2))
    rows[0]["audio"] = {"bytes": wav(tone(29.0)), "path": None}
    cache = build_cache(model, processor, from_rows(rows), tmp_path, speeds=(1.0, 0.9))
    assert [torch.equal(cache.get(row, 0), cache.get(row, 1)) for row in (0, 1)] == [True, False]


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_a_build_that_broke_off_is_finished_with_the_same_bytes(sense, corpus, tmp_path, monkeypatch, storage):
    model, processor = sense
    how = {"storage": storage, "batch_size": 1, "shard_clips": 2}
    build_cache(model, processor, corpus, tmp_path / "whole", **how)
    written = []

    def write_one(*args):
        if written:
            raise KeyboardInterrupt
        written.append(write_shard(*args))

    with monkeypatch.context() as patch:
        patch.setattr(encoder_cache, "write_shard", write_one)
        with pytest.raises(KeyboardInterrupt):
            build_cache(model, processor, corpus, tmp_path / "broken", **how)
    assert len(files(tmp_path / "broken")) == 1
    encoded = count_clips(model)
    build_cache(model, processor, corpus, tmp_path / "broken", **how)
    assert sum(encoded) == 4 and files(tmp_path / "broken") == files(tmp_path / "whole")


BUILD = """
import json, sys, time
from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor, encoder_cache
from processing.datasets import load_corpus
from accelerate import PartialState
PartialState(cpu=True)
whisper, llama, corpus, folder, seconds = sys.argv[1:]
model = SenseForConditionalGeneration.from_backbones(whisper, llama)
processor = SenseProcessor.from_backbones(whisper, llama)
audio_features = processor.audio_features
processor.audio_features = lambda waves: time.sleep(float(seconds)) or audio_features(waves)
cache = encoder_cache.build_cache(
    model, processor, load_corpus(corpus, "train"), folder, (1.0, 0.9), batch_size=2, shard_clips=4
)
print(json.dumps(cache.lengths))
"""


def build_elsewhere(tiny_whisper, tiny_llama, corpus, folder, seconds, processes=1):
    script = folder.with_suffix(".py")
    script.write_text(BUILD)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script)]
    command += [tiny_whisper, tiny_llama, corpus, str(folder), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_killed_and_started_again(tiny_whisper, tiny_llama, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", train=9)
    assert build_elsewhere(tiny_whisper, tiny_llama, corpus, tmp_path / "whole", 0).wait(120) == 0
    killed = build_elsewhere(tiny_whisper, tiny_llama, corpus, tmp_path / "broken", 0.5)
    end = time.monotonic() + 120
    while not files(tmp_path / "broken"):
        assert killed.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 1 <= len(files(tmp_path / "broken")) < 5
    again = build_elsewhere(tiny_whisper, tiny_llama, corpus, tmp_path / "broken", 0)
    lengths = json.loads(again.communicate(timeout=120)[0].splitlines()[-1])
    assert len(lengths) == 9 and files(tmp_path / "broken") == files(tmp_path / "whole")


def test_two_processes_build_the_same(tiny_whisper, tiny_llama, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", train=9)
    one, two = (build_elsewhere(tiny_whisper, tiny_llama, corpus, tmp_path / str(n), 0, processes=n) for n in (1, 2))
    assert one.wait(120) == two.wait(120) == 0
    assert len(files(tmp_path / "1")) == 5 and files(tmp_path / "1") == files(tmp_path / "2")


def test_the_encoder_may_be_taken_away(sense, corpus, tmp_path):
    model, processor = sense
    cache = build_cache(model, processor, corpus, tmp_path)
    request = processor.apply_requests([row["audio"] for row in corpus], ["asr"])

    def answers(**inputs):
        return [of_clip[0].tolist() for of_clip in model.generate_branches(**inputs, max_new_tokens=4)]

    heard = answers(**request)
    encoder = model.detach_encoder()
    assert not any("audio_tower" in name for name, _ in model.named_parameters())
    model.train().eval()
    assert answers(prompts=[processor.prompt_ids(n, ["asr"]) for n in cache.lengths], **cache.batch(range(6))) == heard
    with pytest.raises(ValueError, match="encoder was detached: give pooled_features"):
        answers(**request)
    with pytest.raises(ValueError, match="the encoder was detached: attach_encoder"):
        model.save_pretrained(tmp_path / "whole")
    model.save_adapter(tmp_path / "adapter")
    model.attach_encoder(encoder)
    model.load_adapter(tmp_path / "adapter")
    assert answers(**request) == heard


def test_a_shard_that_cannot_be_read_is_made_anew(sense, corpus, tmp_path, capsys):
    """And what a build that was killed left unfinished is removed, once it is old."""
    model, processor = sense
    cache = build_cache(model, processor, corpus, tmp_path, shard_clips=2)
    whole = [cache.get(row).clone() for row in range(len(corpus))]
    first, second, _ = sorted(tmp_path.rglob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-8])
    old, new = second.with_suffix(".1.tmp"), second.with_suffix(".2.tmp")
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    encoded = count_clips(model)
    again = build_cache(model, processor, corpus, tmp_path, shard_clips=2)
    assert f"encoder cache: {first} can't be read (" in capsys.readouterr().out
    assert sum(encoded) == 2 and first.read_bytes() == content and new.exists() and not old.exists()
    assert all(torch.equal(again.get(row), clip) for row, clip in enumerate(whole))


def test_processes_share_out_the_main_ones_list(sense, corpus, tmp_path, monkeypatch):
    """Another run fills the folder before the second process looks: it encodes its part of the list all the same."""
    model, processor = sense
    kept, listed = build_cache(model, processor, corpus, tmp_path), []
    find = encoder_cache._find_missing
    monkeypatch.setattr(encoder_cache, "_find_missing", lambda *given: listed.append(given) or find(*given))
    build_cache(model, processor, corpus, tmp_path)
    (_, keys, speeds), encoded = listed[0], count_clips(model)
    everything = find(tmp_path / "empty", keys, speeds)
    second = SimpleNamespace(is_main_process=False, process_index=1, num_processes=2, device=torch.device("cpu"))
    second.wait_for_everyone = lambda: None
    monkeypatch.setattr(encoder_cache, "PartialState", lambda: second)
    monkeypatch.setattr(encoder_cache, "hash_clips", lambda _: [key for (key,) in keys])
    monkeypatch.setattr(encoder_cache, "broadcast_object_list", lambda _: [everything])
    build_cache(model, processor, corpus, tmp_path, shard_clips=2)
    assert sum(encoded) == 2 and len(everything) == len(kept) == 6  # the second of three groups


def test_a_file_that_goes_meanwhile_is_no_fault(tmp_path):
    (tmp_path / "a.tmp").symlink_to(tmp_path / "gone")  # listed, and not there
    encoder_cache.clean_up(tmp_path)
