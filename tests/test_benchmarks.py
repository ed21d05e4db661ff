"""The benchmarks at tiny sizes: every system does what it is said to do, and the numbers are put together right."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from benchmarks import compare, long_audio, measure, report, small_machines, warm_start, word_times
from benchmarks.__main__ import main, make_settings, parse
from benchmarks.setting import TASKS, Setting
from benchmarks.systems import (
    AT_ONCE,
    BARE,
    BEAMS,
    CACHED,
    ENCODING,
    PER_BEAM,
    PIPELINE,
    SYSTEMS,
    THREE_CALLS,
)
from benchmarks.training import BareLLM, bare_inputs, build_sense_to_train, cached_inputs
from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor, load_audio
from tests.conftest import make_corpus, write_corpus


TINY = Setting("tiny", "tiny", batch=2, seconds=1, labels=5, new_tokens=4)
PROJECTORS = ("multi_modal_projector.", "model.projector.", "projector.", "audio_embeds")
# Clips that go through the encoder in one run of the command: batches of 8 and of 4, 5 beams.
ROWS = {
    "train": {name: {CACHED: None, BARE: None}.get(name, 8) for name in SYSTEMS["train"]},
    "beams": {BEAMS: 4, PER_BEAM: 4 * 5, "Voxtral": 4 * 5},
    "understand": {AT_ONCE: 4, THREE_CALLS: 4 * TASKS, PIPELINE: 4},
}


def run(section, name, setting=TINY):
    system = SYSTEMS[section][name]
    return system.run(system.build(setting), system.inputs(setting))


# ------------------------------------------------------------------ systems


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SYSTEMS["train"])
def test_a_step_trains_the_projector_alone(name, dtype):
    system, setting = SYSTEMS["train"][name], replace(TINY, dtype=dtype)
    model = system.build(setting)
    assert torch.isfinite(system.run(model, system.inputs(setting)))
    for parameter_name, parameter in model.named_parameters():
        if any(part in parameter_name for part in PROJECTORS):
            assert parameter.grad.isfinite().all() and (name == BARE or parameter.dtype == torch.float32)
        else:
            assert parameter.grad is None and not parameter.requires_grad, parameter_name
            assert parameter.dtype == getattr(torch, dtype) or "embed_positions" in parameter_name
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_ten_seconds_are_as_many_audio_tokens_as_the_processor_says():
    assert {s.audio_token_id for s in (TINY, Setting())} == {128, 49152}
    inputs = bare_inputs(replace(TINY, seconds=10))
    assert (inputs["input_ids"] == TINY.audio_token_id).sum(1).tolist() == [84, 84]
    assert (inputs["labels"] != -100).sum(1).tolist() == [5, 5]


def test_bare_llm_does_the_same_work_as_sense_from_cache():
    sense, bare = build_sense_to_train(TINY), BareLLM(TINY)
    inputs = cached_inputs(TINY)
    bare.llm.model, bare.llm.lm_head = sense.model.language_model, sense.lm_head
    bare.audio_embeds.data = sense.model.multi_modal_projector(inputs["pooled_features"]).flatten(0, 1).detach()
    torch.testing.assert_close(bare(**bare_inputs(TINY)).loss, sense(**inputs).loss)


def test_one_listen_and_three_calls_give_the_same_answers_of_full_length():
    at_once, one_by_one = run("understand", AT_ONCE), run("understand", THREE_CALLS)
    for task, output in enumerate(one_by_one):
        for clip, row in enumerate(output):
            answer = row[-TINY.new_tokens :]
            assert torch.equal(at_once[clip][task], answer) and len(at_once[clip][task]) == TINY.new_tokens


def test_beams_answer_the_same_however_they_are_encoded():
    setting = replace(TINY, beams=3)
    ours = run("beams", BEAMS, setting)
    assert torch.equal(ours, run("beams", PER_BEAM, setting))
    assert ours.shape == (2, 20 + 9 + TINY.new_tokens)  # prompt, audio, answer


def test_the_pipeline_writes_tags_and_rates():
    written, tags, ratings = run("understand", PIPELINE)
    assert written.shape == (2, TINY.new_tokens)
    assert len(tags) == len(ratings) == 2


# ------------------------------------------------------------------ measuring


def test_systems_take_turns_and_warmups_do_not_count():
    order = []
    seconds = measure.interleave({n: lambda n=n: order.append(n) for n in "ab"}, repeats=2, warmups=1)
    assert "".join(order) == "ababab"
    assert [len(taken) for taken in seconds.values()] == [2, 2]


def test_median_and_quartiles():
    found = measure.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"median_s": 3.0, "iqr_s": [2.0, 4.0], "repeats_s": [5.0, 1.0, 2.0, 4.0, 3.0]}
    assert measure.summary([2.0])["iqr_s"] == [2.0, 2.0]


def test_peak_memory_of_a_process_of_its_own():
    found = measure.peak_memory("train", CACHED, replace(TINY, batch=32, seconds=30), optimizer=True)
    trained = 2 * 32 + 32 * 32 + 32  # norm and linear layer
    assert found["optimizer_bytes"] == 2 * 4 * trained
    assert 2**20 < found["peak_bytes"] < 2**28


def test_real_sizes_are_the_default():
    args = parse(["--device", "cpu"])
    settings = make_settings(args)
    assert args.repeats == 7 and args.dtype == "float32"
    assert (settings["train"].audio, settings["limit"].audio) == ("whisper-small", "whisper-base")
    assert (settings["beams"].beams, settings["beams"].batch, settings["understand"].new_tokens) == (5, 4, 24)


# ------------------------------------------------------------------ the report


def fake_results():
    """Medians 1 and 2 s of SENSE, 4 and 1.5 s of two peers, half a second of the bare LLM."""
    seconds = {CACHED: [9.0, 1.0, 1.0], ENCODING: [2.0] * 3, "Voxtral": [4.0] * 3, "Granite Speech": [1.5] * 3}
    seconds[BARE] = [0.5] * 3
    train = {name: measure.summary(taken) for name, taken in seconds.items()}
    beams = {BEAMS: measure.summary([1.0]), PER_BEAM: measure.summary([3.0]), "Voxtral": measure.summary([0.5])}
    understand = {
        AT_ONCE: measure.summary([2.0]),
        THREE_CALLS: measure.summary([5.0]),
        PIPELINE: measure.summary([3.0]),
    }
    peaks = {CACHED: 330, ENCODING: 400, "Voxtral": 350, BARE: 290}
    peaks = {name: {"peak_bytes": size, "optimizer_bytes": 10} for name, size in peaks.items()}
    sections = {"train": train, "beams": beams, "understand": understand}
    return {**{n: {"systems": systems} for n, systems in sections.items()}, "memory": {"train": peaks, "limit": peaks}}


def test_ratios_are_of_medians():
    assert compare.ratios(fake_results()) == {
        "cached_step_vs_bare_llm": 2.0,
        "train_vs_fastest_peer": 1.5,
        "beam5_vs_encode_per_beam": 1 / 3,
        "understand_vs_three_calls": 0.4,
        "peak_memory_vs_limit": 330 / 300,
    }
    assert compare.time_ratios(fake_results())["cached_step_vs_bare_llm"]["iqr"] == [2.0, 10.0]


def test_sections_that_were_not_run_give_no_ratio():
    assert set(compare.ratios({}).values()) == {None}


def test_peers_that_win_are_named():
    assert compare.peer_wins(fake_results()) == [
        f"train: Granite Speech takes 0.75 of the time of {ENCODING}",
        f"beams: Voxtral takes 0.50 of the time of {BEAMS}",
        f"train: Voxtral takes 0.88 of the memory of {ENCODING}",
    ]


def test_one_command_writes_json_page_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "peak_memory", lambda *a, **k: {"peak_bytes": 2**20, "optimizer_bytes": 0})
    main(["--quick", "--sizes", "tiny", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "latest.json").read_text())
    assert all(results[name] > 0 for name in compare.MEANING)
    assert {"machine", "peer_wins", "time_ratios", "train", "beams", "understand", "memory", "growth"} <= set(results)
    assert all(r["encoder_rows"] == ROWS[s][n] for s in ROWS for n, r in results[s]["systems"].items())
    for section in ROWS:
        for result in results[section]["systems"].values():
            assert {"median_s", "iqr_s", "repeats_s", "clips_per_s"} <= set(result)
    assert list(results["growth"]["beams"]["points"]) == ["1", "10"]
    page = (tmp_path / "latest.md").read_text()
    assert page == report.markdown(results) and page in capsys.readouterr().out
    assert results["machine"]["cpu"] in page and "## Where a peer wins" in page
    assert (tmp_path / "latest.png").stat().st_size > 10_000


# ------------------------------------------------------------------ small machines


def test_weights_in_memory_are_those_of_the_arithmetic(tiny_whisper, tiny_llama, tmp_path, capsys):
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama, dtype=torch.bfloat16)
    model.add_lora(r=4)
    model.save_pretrained(tmp_path / "sense")
    SenseProcessor.from_backbones(tiny_whisper, tiny_llama).save_pretrained(tmp_path / "sense")
    corpus = write_corpus(tmp_path / "corpus", dev=3)
    command = ["--model", str(tmp_path / "sense"), "--dataset", corpus]
    found = {}
    for form in small_machines.FORMS:
        small_machines.main([*command, "--form", form])
        found[form] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found[form]["weights"] == small_machines.expected_bytes(model.config, form), form
        assert found[form]["peak"] > found[form]["imports"] > 0 and found[form]["seconds"] > 0
    sizes = [row["weights"] for row in found.values()]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    table = small_machines.tables(found).splitlines()
    assert [line.split(" | ")[0] for line in table[2:6]] == [f"| {form}" for form in small_machines.FORMS]
    assert table[2].endswith("| 1.00 |") and table[-4].startswith("| float32 | 4,")  # 1.1 and 0.09 billion weights


# ------------------------------------------------------------------ word times and long recordings


def test_errors_of_words_and_entities_are_medians_over_both_edges():
    row = {"text": "anna left moscow", "entities": [["PERSON", 0, 4], ["PLACE", 10, 6]]}
    truth = [(0.0, 0.5), (0.5, 0.8), (1.0, 2.0)]
    mine = [(0.1, 0.5), (0.4, 0.8), (1.0, 2.3)]
    found = word_times.errors([row, row], [mine, None], [truth, truth])
    assert found["words"]["n"] == 3 and found["entities"]["n"] == 2
    assert found["entities"]["median"] == pytest.approx(50)  # of 100, 0, 0, 300
    assert found["entities"]["start"] == pytest.approx(50) and found["entities"]["end"] == pytest.approx(150)
    assert found["words"]["median"] == pytest.approx(50)  # of 100, 0, 100, 0, 0, 300


def test_an_entity_lasts_from_its_first_word_to_its_last():
    row = {"text": "so anna karenina left", "entities": [["PERSON", 3, 13]]}
    assert word_times.entity_spans(row, [(0, 1), (1, 2), (2, 3), (3, 4)]) == [(1, 3)]


def test_a_recording_holds_its_clips_in_order(tmp_path):
    rows = make_corpus(4)
    order = long_audio.write_recording(tmp_path / "recording.wav", rows, minutes=0.25)
    assert order == [i % 4 for i in range(len(order))] and len(order) > 4
    samples, rate = soundfile.read(tmp_path / "recording.wav")
    assert rate == 16000 and 15 <= len(samples) / rate < 18
    first = load_audio(rows[0]["audio"])
    np.testing.assert_allclose(samples[: len(first)], first, atol=1e-4)


def test_the_long_recording_benchmark_runs(tmp_path, tiny_whisper, tiny_llama):
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama)
    model.save_pretrained(tmp_path / "model")
    processor = SenseProcessor.from_backbones(tiny_whisper, tiny_llama)
    processor.chunk_length_s = 5
    processor.save_pretrained(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus", dev=3, test=2)
    command = ["--model", str(tmp_path / "model"), "--dataset", corpus, "--minutes", "0.1", "0.2"]
    found = long_audio.main([*command, "--out", str(tmp_path / "out")])
    assert found["clips"] == 5 and found["chunk_length_s"] == 5
    for recording in found["recordings"]:
        assert recording["peak_mib"] > 100 and recording["duration"] >= 60 * recording["minutes"]
    assert (tmp_path / "out" / "long_audio.md").read_text().count("|") > 20


def test_the_warm_start_is_measured_on_clips_that_it_has_not_seen(tmp_path, tiny_whisper, tiny_llama):
    corpus = write_corpus(tmp_path / "corpus", train=4, dev=2, test=1)
    command = ["--dataset", corpus, "--encoders", tiny_whisper, "--llm", tiny_llama, "--clips", "2", "4"]
    found = warm_start.main([*command, "--ridge", "0.01", "--out", str(tmp_path / "out")])["found"]
    assert [one["clips"] for one in found] == [2, 4] and all(0 <= one["top1"] <= one["top10"] <= 100 for one in found)
    assert "| 4 | 0.01 |" in (tmp_path / "out" / "warm_start.md").read_text()
    tokens, embeddings = torch.tensor([3, 1]), torch.randn(5, 8)
    assert warm_start.ranks(embeddings[tokens], tokens, embeddings).tolist() == [0, 0]
