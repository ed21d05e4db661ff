"""The documentation: it builds, its links hold, its commands parse, its recipes are valid and its Python runs."""

import argparse
import dataclasses
import html.parser
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mkdocs.config
import numpy as np
import pytest
import soundfile
import torch
import typer
from mkdocs.commands.build import build
from transformers import TrainingArguments

import eval_sense
import sense_cli
import train_sense
from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor, scoring
from processing.tasks import TASKS
from tests.conftest import tone, write_corpus


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^(<!-- not run: .*-->\n)?```(\w+).*\n((?s:.*?))^```$", re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks in a language, but those that are said not to run."""
    return [code for not_run, name, code in FENCE.findall(page.read_text()) if name == language and not not_run]


def pages_with(language: str) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_nothing_is_left_to_be_filled_in(page):
    """A line of capitals alone, such as MEMORY, stood for text to come."""
    assert re.findall(r"^[A-Z][A-Z_ ]+$", FENCE.sub("", page.read_text()), re.MULTILINE) == []


# ---------------------------------------------------------------- the site


class Resources(html.parser.HTMLParser):
    """Of a page: `links` (href of a), `loaded` (what the browser fetches by itself) and `ids`."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a":
            self.links.append(found.get("href"))
        elif tag == "link" and found.get("rel") in ("canonical", "prev", "next"):
            pass  # says where something is; nothing is fetched
        else:
            self.loaded += [found[name] for name in ("src", "href", "srcset", "data", "poster") if found.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = mkdocs.config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    assert config.strict
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_internal_links_hold(site):
    pages = {path: Resources(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            address = urlsplit(link or "")
            if address.scheme or address.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            anchor = unquote(address.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].ids):
                broken.append((str(path.relative_to(site)), link))
    assert len(pages) > 10 and not broken


def test_pages_load_nothing_from_elsewhere(site):
    loaded = {link for path in site.rglob("*.html") for link in Resources(path).loaded}
    for path in site.rglob("*.css"):
        loaded |= set(re.findall(r"url\(\s*[\"']?([^)\"']+)", path.read_text()))
    elsewhere = {link for link in loaded if urlsplit(link).netloc}
    assert any(link.endswith(".css") for link in loaded) and not elsewhere


def test_the_classes_are_documented(site):
    ids = Resources(site / "api" / "modeling_sense.html").ids
    assert "modeling_sense.SenseForConditionalGeneration.understand" in ids
    text = (site / "api" / "modeling_sense.html").read_text()
    assert "[<code>" not in text  # references became links


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()))
def test_links_of_the_readme_hold(link):
    address = urlsplit(link)
    assert address.scheme or (ROOT / address.path).exists()


# ---------------------------------------------------------------- commands, in code blocks for the shell


class Parsed(Exception):
    """A program's arguments were read without an error."""


PROGRAMS = (
    "eval_sense.py",
    "annotate_sense.py",
    "app.py",
    "train_sense.py",
    "scripts/ablation.py",
    "processing/backbones.py",
    "scripts/make_space.py",
    "processing.report",
    "processing.synthesis",
    "processing.transcription",
    "processing.training_memory",
    "tests.reliability.stream_memory",
    "benchmarks",
    "benchmarks.long_audio",
    "benchmarks.slam_asr",
    "benchmarks.small_machines",
    "benchmarks.warm_start",
    "benchmarks.word_times",
    "tests.reliability.fuzz_parsers",
    "tests.reliability.golden",
    "tests.reliability.kill_and_resume",
    "tests.reliability.load_test",
    "tests.reliability.ten_hours",
)
OF_SENSE = {"train": "train_sense.py", "eval": "eval_sense.py", "annotate": "annotate_sense.py", "app": "app.py"}
# Programs that are others' own: not looked at, but for the targets of make.
FOREIGN = ("cat", "curl", "hf", "make", "pip")
LAUNCHERS = (
    "num_processes",
    "nproc_per_node",
    "module",
    "config_file",
    "machine_rank",
    "main_process_ip",
)  # their options that we speak of
RUNNERS = ("python", "accelerate", "torchrun", "sense")
SPY = "\n".join(
    f'{name}() {{ printf "%s\\0" {name} "$@" >&3; printf "\\1\\0" >&3; }}' for name in (*FOREIGN, *RUNNERS)
)


def commands(script: str, folder: Path) -> list[list[str]]:
    """What a shell script would run: bash reads it, with functions that note their arguments for programs."""
    script = f"exec 3>noted\n{SPY}\n{script}"
    how = {"cwd": folder, "env": {"PATH": ""}, "capture_output": True, "text": True}
    bash = subprocess.run(["/bin/bash", "-eu", "-c", script], **how)
    assert bash.returncode == 0, bash.stderr
    return [words.split("\0")[:-1] for words in (folder / "noted").read_text().split("\1\0")[:-1]]


def without_launcher(words: list[str]) -> list[str]:
    """`accelerate launch --num_processes 2 train_sense.py X` -> `train_sense.py X`."""
    runner, *rest = words
    if runner == "sense":
        return words
    if runner == "accelerate":
        assert rest.pop(0) == "launch"
    while rest[0].startswith("--"):
        assert rest[0].removeprefix("--") in LAUNCHERS, rest[0]
        rest = rest[1 if rest[0] == "--module" else 2 :]
    return rest[1:] if rest[0] == "-m" else rest


def call(program: str, argv: list[str]):
    """Runs one of `PROGRAMS`, or a command of `sense`, which `parse_only` ends."""
    if program != "sense":
        name = "benchmarks.__main__" if program == "benchmarks" else program.removesuffix(".py").replace("/", ".")
        importlib.import_module(name).main(argv)
    elif argv[0] in OF_SENSE:
        call(OF_SENSE[argv[0]], argv[1:])
    else:
        commands_of_sense = typer.main.get_command(sense_cli.cli).commands
        if argv[-1] != "--help":
            commands_of_sense[argv[0]].make_context(argv[0], argv[1:])
        assert argv[0] in (*commands_of_sense, "--help")
        raise Parsed


@pytest.fixture
def parse_only(monkeypatch, tmp_path):
    """Programs stop once they have read their arguments."""
    parse_args, parse_recipe = argparse.ArgumentParser.parse_args, train_sense.parse_recipe

    def parse(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    def parse_here(argv):
        parse_recipe([*argv, "--use_cpu", "true", "--bf16", "false"])  # whatever this machine can do
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(train_sense, "parse_recipe", parse_here)
    monkeypatch.setenv("SENSE_MODEL", "outputs/quickstart")  # as docs/cli.md says
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_name_what_there_is(page, tmp_path, parse_only, capsys):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in (words for script in blocks(page, "bash") for words in commands(script, tmp_path)):
        assert all((ROOT / word).is_file() for word in words if word.startswith("recipes/")), words
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), words
        if words[0] in FOREIGN:
            continue
        program, *argv = without_launcher(words)
        if program == "places.py":  # test_a_task_is_added_as_the_page_says runs it
            continue
        try:
            # processing.report has no parser: it opens the runs that are named.
            with pytest.raises(FileNotFoundError if program == "processing.report" else Parsed):
                call(program, argv)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}\n{capsys.readouterr().err}")


def test_commands_that_are_wrong_are_found(tmp_path, parse_only):
    (words,) = commands(
        "FILES='--splits dev'\nfor x in a; do python annotate_sense.py --input $x $FILES; done", tmp_path
    )
    assert words == ["python", "annotate_sense.py", "--input", "a", "--splits", "dev"]
    with pytest.raises(SystemExit):
        eval_sense.main(["--model", "x", "--dataset", "y", "--output_dir", "z", "--beams", "5"])
    with pytest.raises(AssertionError, match="command not found|No such file"):
        commands("tset x", tmp_path)


# ---------------------------------------------------------------- recipes, and names within the text


FIELDS = {f.name: f for kind in (train_sense.SenseArguments, TrainingArguments) for f in dataclasses.fields(kind)}


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_recipes_are_valid(page, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "places", TASKS["asr"])  # of docs/add_a_task.md
    for recipe in blocks(page, "yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe)
        asked = ["--dataset_dir", "x", "--output_dir", str(tmp_path), "--use_cpu", "true"]
        args, _ = train_sense.parse_recipe([str(path), *asked])
        assert args.tasks.keys() <= args.prompts.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_fields_and_options_in_the_text_exist(page, known_options):
    """`field: value` and `--option` between backticks."""
    text = FENCE.sub("", page.read_text())
    for code in re.findall(r"`([^`\n]+)`", text):
        named = re.match(r"([a-z_]+): ", code)
        if named and not code.endswith("..."):  # `empty: ...`: a reason of annotation
            assert named[1] in FIELDS, code
        for option in re.findall(r"(?<!\S)--([\w-]+)", code):
            assert option in known_options, code


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """The options of all programs."""
    found = {*FIELDS, *LAUNCHERS}
    with pytest.MonkeyPatch.context() as patch:

        def parse_args(self, *args, **kwargs):
            found.update(name.removeprefix("--") for action in self._actions for name in action.option_strings)
            raise Parsed

        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        for program in PROGRAMS:
            if program not in ("train_sense.py", "processing.report", "benchmarks.slam_asr"):  # they have no parser
                with pytest.raises(Parsed):
                    call(program, [])
        with pytest.raises(Parsed):
            call("annotate_sense.py", ["compare"])
    for command in typer.main.get_command(sense_cli.cli).commands.values():
        found.update(name.removeprefix("--") for option in command.params for name in option.opts)
    return found


def test_the_table_of_fields_is_whole_and_its_defaults_are_true():
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]+)`)? *\|", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    stated = {name: default.replace("\\|", "|") for name, default in rows}
    assert len(stated) == len(rows)
    defaults = {}
    for field in dataclasses.fields(train_sense.SenseArguments):
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        defaults[field.name] = "" if made is None else str(made)
    assert stated == defaults


# ---------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_whisper, tiny_llama) -> Path:
    """A folder with what the pages' code names: models, recordings, backbones under the names of real ones."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama)
    model.generation_config.exponential_decay_length_penalty = (2, 4.0)  # answers end soon, whatever the code asks for
    prompts = {"asr": "Transcribe the speech.", "ner": "Tag the entities.", "sa": "What is the sentiment?"}
    processor = SenseProcessor.from_backbones(tiny_whisper, tiny_llama, prompts=prompts)
    links = {"openai/whisper-small": tiny_whisper, "TinyLlama/TinyLlama-1.1B-Chat-v1.0": tiny_llama}
    links |= {"processing": ROOT / "processing"}
    for name in ("outputs/quickstart", "outputs/mini/3b_slue_sa", "sense-mini"):
        for part in (model, processor):
            part.save_pretrained(folder / name)
    for name, target in links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    soundfile.write(folder / "one.flac", tone(1.5), 16000)
    soundfile.write(folder / "two.wav", np.stack([tone(1.0, 44100)] * 2, 1), 44100)
    soundfile.write(folder / "talk.wav", tone(11.0), 16000)
    return folder


RUNNING = [case for case in pages_with("python") if case.values[0].name != "add_a_task.md"]  # it trains first, below


@pytest.mark.parametrize("page", RUNNING)
def test_python_runs(page, workplace, monkeypatch):
    """All blocks of a page, one after the other, as a reader would run them."""
    monkeypatch.chdir(workplace)
    code = "\n".join(blocks(page, "python"))
    exec(compile(code, str(page), "exec"), {"__name__": "example"})


def test_comments_say_what_is_printed(workplace, monkeypatch, capsys):
    """`print(...)  # this` of the pages on tasks and scores."""
    monkeypatch.chdir(workplace)
    for name in ("tasks.md", "evaluation.md"):
        code = "\n".join(blocks(ROOT / "docs" / name, "python"))
        exec(compile(code, name, "exec"), {"__name__": "example"})
        promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
        assert promised and capsys.readouterr().out.splitlines() == promised


def test_a_task_is_added_as_the_page_says(workplace, tiny_whisper, tiny_llama, monkeypatch, capsys):
    page = ROOT / "docs" / "add_a_task.md"
    (workplace / "places.yaml").write_text(blocks(page, "yaml")[0])
    module, asking = blocks(page, "python")
    (workplace / "places.py").write_text(module)
    write_corpus(workplace / "data" / "quickstart", train=8, dev=4, test=4)
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    for registry in (TASKS, scoring.SCORERS):  # what the page adds is gone after the test
        monkeypatch.setitem(registry, "places", None)
    monkeypatch.delitem(sys.modules, "places", raising=False)

    tiny = ["--audio_backbone", tiny_whisper, "--text_backbone", tiny_llama, "--lora_r", "4", "--max_steps", "2"]
    tiny += ["--eval_steps", "1", "--save_steps", "1", "--use_cpu", "true", "--backbone_dtype", "float32"]
    training, scored = map(without_launcher, commands(blocks(page, "bash")[0], workplace))
    for words in ([*training, *tiny], scored):
        monkeypatch.setattr(sys, "argv", words)
        named = runpy.run_path("places.py", run_name="__main__")
    metrics = json.loads((workplace / "outputs/places/metrics.json").read_text())
    assert 0 <= metrics["eval_places_f1"] <= 100
    assert "places_f1" in json.loads((workplace / "outputs/places/test/metrics.json").read_text())

    task = named["PlaceTask"]("Which places are named?")
    row = {"text": "anna left paris for london", "entities": [["GPE", 10, 5], ["PERSON", 0, 4], ["PLACE", 20, 6]]}
    assert task.target(row) == "paris; london" and task.parse(task.target(row)).places == ["paris", "london"]
    assert task.target({"text": "anna left", "entities": []}) == "none" and task.parse("none").places == []
    assert named["score_places"]([row], [task.parse("paris; rome")]) == {"places_f1": 50.0}
    capsys.readouterr()
    exec(compile(asking, "asking", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip().endswith("]")
