"""The `sense` command as it is typed, on a tiny model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import annotate_sense
import eval_sense
import sense_cli
import train_sense
from processing import SenseProcessor, SpokenLanguageUnderstandingPipeline
from processing.recipe import find_recipe
from tests.conftest import tone, wav, write_corpus
from tests.processing.test_subtitles import read_srt, read_vtt


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("SENSE_MODEL", raising=False)


@pytest.fixture
def clips(tmp_path) -> list[str]:
    paths = [tmp_path / f"{name}.wav" for name in ("one", "two", "three")]
    for i, path in enumerate(paths):
        path.write_bytes(wav(tone(0.5 + 0.2 * i, seed=i)))
    return list(map(str, paths))


def sense(*arguments, **kwargs):
    """Runs the command here; nothing but the answer is on its stdout."""
    return CliRunner().invoke(sense_cli.cli, list(map(str, arguments)), **kwargs)


def start_sense(*arguments, **kwargs) -> subprocess.Popen:
    """Runs the command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-m", "sense_cli", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **pipes, **kwargs)


def test_help_and_version_need_no_torch():
    code = """if True:
        import sys
        from typer.testing import CliRunner
        import sense_cli
        for arguments in (["--help"], ["transcribe", "--help"], ["export", "--help"], ["--version"]):
            found = CliRunner().invoke(sense_cli.cli, arguments)
            assert found.exit_code == 0 and "sense" in found.stdout.lower(), found.output
        print({"torch", "transformers", "numpy"} & sys.modules.keys())
    """
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr


def test_json_is_what_the_pipeline_hears(parts, saved, clips):
    found = sense("transcribe", "--model", saved, "--json", "--batch-size", 2, "--num-beams", 2, *clips)
    assert found.exit_code == 0, found.stderr
    pipe = SpokenLanguageUnderstandingPipeline(*parts, device="cpu")
    asked = {"return_entities": False, "return_sentiment": False, "return_timestamps": "word"}
    true = pipe(clips, batch_size=2, generate_kwargs={"num_beams": 2}, **asked)
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert lines == json.loads(json.dumps([{"file": clip, **heard} for clip, heard in zip(clips, true)]))


def test_understand_writes_entities_and_sentiment(saved, clips):
    found = sense("understand", "--json", clips[0], env={"SENSE_MODEL": saved})
    assert found.exit_code == 0, found.stderr
    heard = json.loads(found.stdout)
    assert heard.keys() == {"file", "text", "duration", "entities", "sentiment", "chunks"}
    shown = sense("understand", clips[0], env={"SENSE_MODEL": saved}).stdout
    assert shown.splitlines()[-1] == f"  {heard['sentiment']['label']}  {100 * heard['sentiment']['score']:.0f} %"


def test_constrained_answers(saved, clips, monkeypatch):
    made, make = [], SenseProcessor.constrain
    monkeypatch.setattr(SenseProcessor, "constrain", lambda *args: made.append(args[1]) or make(*args))
    for options in ([], ["--constrained", "--num-beams", 2]):
        found = sense("understand", "--json", *clips[:2], "--model", saved, *options)
        assert found.exit_code == 0, found.stderr
    assert made == [["ner", "ner"]]  # of the second call


def test_recordings_that_fail_are_named_and_the_others_go_on(saved, clips, tmp_path):
    noise, text = tmp_path / "nan.wav", tmp_path / "text.wav"
    soundfile.write(noise, np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    text.write_text("no audio")
    names = [clips[0], "missing.wav", "a" * 300, "~nobody-of-that-name.wav", noise, clips[1], tmp_path, text, clips[2]]
    found = sense("transcribe", "--model", saved, "--json", *names)
    assert found.exit_code == 1
    assert [json.loads(line)["file"] for line in found.stdout.splitlines()] == clips
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6
    assert "error: missing.wav: no such file" in errors and sum("no such file" in line for line in errors) == 3
    assert any(str(noise) in line and "NaN" in line for line in errors)
    assert any(str(text) in line and "not readable as audio" in line for line in errors)
    assert any(line.startswith(f"error: {tmp_path}: a folder") for line in errors)
    assert all(line.count(str(noise)) <= 1 for line in errors)


def test_a_name_that_is_no_utf8(saved, clips, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    shutil.copy(clips[0], path)
    process = start_sense("transcribe", "--model", saved, "--json", path)
    out, err = process.communicate()
    assert process.returncode == 0 and json.loads(out)["file"] == path, err.decode()


def test_a_recording_that_breaks_off(saved, clips, tmp_path):
    whole, broken = tmp_path / "whole.flac", tmp_path / "broken.flac"
    soundfile.write(whole, tone(3.0), 16000)
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    found = sense("transcribe", "--model", saved, "--json", clips[0], broken, clips[1])
    assert found.exit_code == 1 and f"error: {broken}: " in found.stderr, found.exception
    assert [json.loads(line)["file"] for line in found.stdout.splitlines()] == clips[:2]


def test_text_names_recordings_where_there_are_several(saved, clips):
    several = sense("transcribe", "--model", saved, *clips).stdout
    assert [several.count(f"{clip}: ") for clip in clips] == [1, 1, 1]
    assert clips[0] not in sense("transcribe", "--model", saved, clips[0]).stdout


def test_subtitles_and_output_folder(saved, clips, tmp_path):
    out = tmp_path / "deep" / "out"
    for form in ("srt", "vtt", "json"):
        found = sense("understand", "--model", saved, f"--{form}", "--output", out, *clips)
        assert found.exit_code == 0 and found.stdout == "", found.stderr
    assert sense("understand", "--model", saved, "--output", out, *clips).exit_code == 0
    names = [f"{name}.{form}" for name in ("one", "two", "three") for form in ("json", "srt", "txt", "vtt")]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in ("one", "two", "three"):
        words = json.loads((out / f"{name}.json").read_text())["text"].split()
        heard = "".join("".join(lines) for _, _, lines in read_srt((out / f"{name}.srt").read_text()))
        assert heard.replace(" ", "") == "".join(words).replace("-->", "->") and words
        assert len(read_vtt((out / f"{name}.vtt").read_text())) == len(read_srt((out / f"{name}.srt").read_text()))
        assert not (out / f"{name}.txt").read_text().startswith(clips[0])
    assert read_srt(sense("transcribe", "--model", saved, "--srt", clips[0]).stdout)


def test_nobodys_file_is_lost(saved, clips, tmp_path):
    (tmp_path / "one.tmp").write_text("mine")
    (tmp_path / "two.srt").mkdir()  # can't be written over
    found = sense("transcribe", "--model", saved, "--srt", "--output", tmp_path, *clips)
    assert found.exit_code == 1 and f"error: {clips[1]}: {tmp_path / 'two.srt'} can't be written" in found.stderr
    assert (tmp_path / "one.tmp").read_text() == "mine"
    assert read_srt((tmp_path / "one.srt").read_text()) and read_srt((tmp_path / "three.srt").read_text())


def test_a_pipe_is_heard_to_its_end(saved, clips, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(Path(clips[0]).read_bytes()), daemon=True).start()
    found = sense("transcribe", "--model", saved, "--json", pipe)
    true = json.loads(sense("transcribe", "--model", saved, "--json", clips[0]).stdout)
    assert json.loads(found.stdout) == true | {"file": str(pipe)}


def test_reference_of_a_recording_is_that_of_its_parts(clips):
    folder = Path(clips[0]).parent
    lines = [{"file_name": "one.wav", "text": text, "start_second": start} for text, start in (("b", 9), ("a", 0.5))]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sense_cli._texts_of.cache_clear()
    assert sense_cli.what_was_said(Path(clips[0])) == "a b"
    (folder / "metadata.jsonl").write_text('{"file_name": "one.wav", "normalized_text": "a b"}\n')
    sense_cli._texts_of.cache_clear()
    with pytest.raises(typer.BadParameter, match="with a column text"):
        sense_cli.what_was_said(Path(clips[0]))


def test_reference_is_what_was_said(saved, clips, tmp_path):
    corpus = Path(write_corpus(tmp_path / "corpus", test=1)) / "test"
    line = json.loads((corpus / "metadata.jsonl").read_text())
    clip = corpus / line["file_name"]
    shown = sense("transcribe", "--model", saved, "--reference", clip, clips[0]).stdout
    assert f"{clip}\n  said:  {line['text']}\n  heard: " in shown and f"{clips[0]}\n  heard: " in shown
    found = sense("transcribe", "--model", saved, "--reference", "--json", clip, clips[0]).stdout
    assert [json.loads(one)["reference"] for one in found.splitlines()] == [line["text"], None]
    # Blank lines, and characters that end a line elsewhere, as load_corpus reads them.
    (corpus / "metadata.jsonl").write_text(f'\n{{"file_name": "{clip.name}", "text": "one\u2028two"}}\n')
    sense_cli._texts_of.cache_clear()
    assert sense_cli.what_was_said(clip) == "one\u2028two"
    for wrong in ('{"text": "whose?"}\n', "7\n"):  # said before a model is looked for
        (corpus / "metadata.jsonl").write_text(wrong)
        sense_cli._texts_of.cache_clear()
        assert sense("transcribe", "--model", tmp_path / "nowhere", "--reference", clip).exit_code == 2


def test_stdin_in_a_process_of_its_own(saved):
    process = start_sense("transcribe", "-", "--json", "--model", saved)
    out, err = process.communicate(wav(tone(0.7)))
    assert process.returncode == 0, err.decode()
    assert json.loads(out)["file"] == "stdin" and json.loads(out)["duration"] == pytest.approx(0.7)
    process = start_sense("understand", "-", "--vtt", "--model", saved)
    process.stdin.write(wav(tone(0.7)))
    process.stdin.close()
    process.stdout.close()  # nobody reads
    assert process.wait() == 1
    assert "Traceback" not in process.stderr.read().decode()


def test_interrupted_it_says_no_more_than_that():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    process = start_sense("transcribe", "-", "--model", "anything")
    process.stdin.write(bytes(1 << 20))  # more than a pipe holds: it is reading
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and out == b"" and "Traceback" not in err.decode() and len(err) < 80


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["transcribe", "--model", "m"], "FILE"),
        (["transcribe", "--model", "m", "--srt", "--vtt", "a.wav"], "choose one"),
        (["understand", "--model", "m", "--srt", "a.wav", "b.wav"], "--output"),
        (["transcribe", "--model", "m", "--output", "out", "a/x.wav", "b/x.flac"], "x.txt"),
        (["transcribe", "--model", "m", "--srt", "--reference", "a.wav"], "--reference"),
        (["transcribe", "--model", "m", "--output", "/dev/null/out", "a.wav"], "--output"),
        (["transcribe", "--model", "m", "--device", "abacus", "a.wav"], "--device"),
        (["transcribe", "--model", "m", "--dtype", "int3", "a.wav"], "float32"),
        (["transcribe", "--model", "m", "--num-beams", "0", "a.wav"], "--num-beams"),
        (["export", "model"], "--push"),
        (["listen"], "listen"),
    ],
)
def test_usage_errors(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = sense(*arguments)
    assert found.exit_code == 2 and named in found.stderr and found.stdout == ""
    assert not list(tmp_path.iterdir())


def test_models_that_cant_answer(parts, tiny_whisper, clips, tmp_path):
    missing = sense("transcribe", "--model", tmp_path / "nowhere", clips[0])
    assert missing.exit_code == 1 and f"error: {tmp_path / 'nowhere'}" in missing.stderr
    model, processor = parts
    model.save_pretrained(tmp_path / "asr")
    SenseProcessor.from_backbones(tiny_whisper, processor.tokenizer.name_or_path).save_pretrained(tmp_path / "asr")
    found = sense("understand", "--model", tmp_path / "asr", clips[0])
    assert found.exit_code == 1 and "was trained for asr; this needs ner, or asr and sa" in found.stderr


@pytest.mark.parametrize(
    "command, module", [("train", train_sense), ("eval", eval_sense), ("annotate", annotate_sense)]
)
def test_arguments_reach_the_scripts_as_they_are(command, module, monkeypatch):
    given = []
    monkeypatch.setattr(module, "main", lambda argv: given.extend(argv) or {"stopped": "early"})
    monkeypatch.setattr(sys, "argv", sys.argv)
    arguments = [
        "recipes/x.yaml",
        "--a",
        "1",
        "--b=2",
        "-c",
        "--tasks",
        "asr",
        "ner",
        "--no_d",
        "-1",
        "--model",
        "x y",
    ]
    assert sense(command, *arguments).exit_code == (1 if command == "annotate" else 0)
    assert given == arguments


@pytest.mark.parametrize(
    "command, option", [("train", "--warm_start"), ("eval", "--controls"), ("annotate", "--task")]
)
def test_help_of_the_scripts(command, option, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    found = sense(command, "--help")
    assert found.exit_code == 0 and found.stdout.startswith(f"usage: sense {command} ") and option in found.stdout


def test_recipes_go_by_path_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("quickstart") == ROOT / "recipes" / "quickstart.yaml"
    assert find_recipe("mini/1_asr") == find_recipe("recipes/mini/1_asr.yaml")
    (tmp_path / "quickstart").write_text("one's own")
    assert find_recipe("quickstart") == Path("quickstart")
    with pytest.raises(ValueError, match="there is no recipe fast; .*, mini/1_asr, .*, quickstart"):
        find_recipe("fast")


def test_entities_are_coloured_where_they_stand():
    entities = [{"entity": "PERSON", "word": "anna", "start": 0, "end": 4, "timestamp": (0.0, 0.5)}]
    entities += [{"entity": "GPE", "word": "moscow", "start": 10, "end": 16, "timestamp": (0.9, 1.456)}]
    sentiment = {"label": "Positive", "score": 0.876, "scores": {}}
    found = sense_cli.coloured({"text": "anna left moscow", "entities": entities, "sentiment": sentiment})
    assert found.plain == (
        "anna left moscow\n  PERSON  anna  0.00 to 0.50 s\n  GPE  moscow  0.90 to 1.46 s\n  Positive  88 %"
    )
    colours = {found.plain[span.start : span.end]: span.style for span in found.spans}
    assert colours["anna"] == "bold green" and colours["moscow"] == "bold cyan" and colours["GPE"] == "cyan"
    assert sense_cli.coloured({"text": "", "sentiment": None}).plain == ""


def test_export(saved, clips, tmp_path):
    pytest.importorskip("processing.hub")
    told = [
        "--license",
        "apache-2.0",
        "--dataset",
        "org/a",
        "--dataset",
        "org/b",
        "--language",
        "en",
        "--language",
        "de",
        "--notes",
        tmp_path / "about.md",
    ]
    (tmp_path / "about.md").write_text("Made for a test.")
    found = sense("export", saved, tmp_path / "out", *told)
    assert found.exit_code == 0, found.stderr
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.datasets, data.language) == (["org/a", "org/b"], ["de", "en"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search("^license: apache-2.0$", card, re.MULTILINE) and "Made for a test." in card
    assert sense("transcribe", "--model", tmp_path / "out", clips[0]).exit_code == 0
    again = sense("export", saved, tmp_path / "out")
    assert again.exit_code == 1 and "exists" in again.stderr
