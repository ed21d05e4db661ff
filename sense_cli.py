"""
The `sense` command: asks models, trains, scores and publishes them.

What a command needs is imported when it runs: `sense --help` answers without torch.
"""

import importlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text


TAG_COLOURS = {
    "PERSON": "green",
    "PLACE": "cyan",
    "ORG": "magenta",
    "NORP": "bright_magenta",
    "WHEN": "yellow",
    "QUANT": "bright_blue",
    "LAW": "bright_red",
}
SENTIMENT_COLOURS = {"Negative": "red", "Neutral": "bright_black", "Positive": "green"}
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

cli = typer.Typer(
    name="sense", help="SENSE: a small LLM that listens.", no_args_is_help=True, pretty_exceptions_enable=False
)


Files = Annotated[
    list[str],
    typer.Argument(metavar="FILE", help="Recordings of any length, paths or addresses; - is stdin."),
]
Model = Annotated[
    str, typer.Option(envvar="SENSE_MODEL", help="Folder or Hub id of a SENSE model; sense-mini is here already.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a recording, each on a line.")]
AsSrt = Annotated[bool, typer.Option("--srt", help="SubRip subtitles.")]
AsVtt = Annotated[bool, typer.Option("--vtt", help="WebVTT subtitles.")]
Output = Annotated[
    Path | None,
    typer.Option(file_okay=False, metavar="DIR", help="Not to stdout: to a file for each recording in this folder."),
]
NumBeams = Annotated[int, typer.Option(min=1, help="Of beam search; 1 is greedy.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows, of at most 30 s, heard at a time.")]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda:1. By default the GPU where there is one.")]
Quantize = Annotated[Literal["int8", "int4"] | None, typer.Option(help="Hold the language model in fewer bits.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of weights; auto: as saved.")]


def _show_version(wanted: bool):
    if wanted:
        typer.echo(f"sense {version('sense-asr')}")
        raise typer.Exit


@cli.callback()
def sense(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
):
    pass


@cli.command()
def transcribe(
    files: Files,
    model: Model = "sense-mini",
    as_json: AsJson = False,
    as_srt: AsSrt = False,
    as_vtt: AsVtt = False,
    reference: Annotated[
        bool,
        typer.Option("--reference", help="What was said beside what was heard, from the folder's metadata.jsonl."),
    ] = False,
    output: Output = None,
    num_beams: NumBeams = 1,
    batch_size: BatchSize = 8,
    device: Device = "",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
):
    """
    Write what recordings say: text, JSON with the time of each word, or subtitles.

    Recordings are heard in batches. One that can't be read is named, the others go on; the exit code is 1 then.
    """
    form = _form(json=as_json, srt=as_srt, vtt=as_vtt)
    if reference and form in ("srt", "vtt"):
        raise typer.BadParameter("goes with text and --json", param_hint="--reference")
    sources = _sources(files, form, output)
    if reference:  # what is wrong with a metadata.jsonl is said before anything is heard
        for name in sources:
            what_was_said(Path(name))
    pipe = _load(model, device, dtype, quantize, "transcribe")
    how = {"return_entities": False, "return_sentiment": False, "return_timestamps": form != "txt" and "word"}
    results = _hear(pipe, sources, batch_size=batch_size, generate_kwargs={"num_beams": num_beams}, **how)
    _write(results, form, output, many=len(sources) > 1, reference=reference)


@cli.command()
def understand(
    files: Files,
    model: Model = "sense-mini",
    as_json: AsJson = False,
    as_srt: AsSrt = False,
    as_vtt: AsVtt = False,
    output: Output = None,
    num_beams: NumBeams = 1,
    batch_size: BatchSize = 8,
    device: Device = "",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    constrained: Annotated[
        bool, typer.Option("--constrained", help="Keep answers to the grammar of tags: known, closed, not empty.")
    ] = False,
):
    """
    Write what recordings say, what they name and when, and how it was meant.

    As `sense transcribe`. In WebVTT, entities stand in class spans: <c.PERSON>anna karenina</c>.
    """
    form = _form(json=as_json, srt=as_srt, vtt=as_vtt)
    sources = _sources(files, form, output)
    pipe = _load(model, device, dtype, quantize, "understand")
    how = {"return_timestamps": "word", "constrained": constrained, "generate_kwargs": {"num_beams": num_beams}}
    _write(_hear(pipe, sources, batch_size=batch_size, **how), form, output, many=len(sources) > 1)


@cli.command(context_settings=PASS_ON, add_help_option=False)
def train(context: typer.Context):
    """
    Train by a recipe: `sense train quickstart --dataset_dir DIR`; options as of train_sense.py.

    On several GPUs: `accelerate launch --module train_sense quickstart ...`.
    """
    _run_script("train_sense", context)


@cli.command("eval", context_settings=PASS_ON, add_help_option=False)
def evaluate(context: typer.Context):
    """Score a model on a dataset; options as of eval_sense.py."""
    _run_script("eval_sense", context)


@cli.command(context_settings=PASS_ON, add_help_option=False)
def annotate(context: typer.Context):
    """Label transcripts with entities or sentiment; options as of annotate_sense.py."""
    if _run_script("annotate_sense", context).get("stopped"):
        raise typer.Exit(1)


@cli.command(context_settings=PASS_ON, add_help_option=False)
def app(context: typer.Context):
    """Open a page in the browser to speak to a model; options as of app.py."""
    try:
        _run_script("app", context)
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        _fail("the page needs Gradio: pip install 'sense-asr[app]'")


@cli.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            envvar="SENSE_MODEL",
            help="Folder or Hub id of a SENSE model; sense-mini is here already.",
        ),
    ] = "sense-mini",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets others on the network in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str, typer.Option(help="Of the model, as clients name it. By default the end of its path.")] = "",
    language: Annotated[
        str | None, typer.Option(metavar="CODE", help="What it was trained to hear: the one that requests may name.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Windows, of at most 30 s, heard at a time.")] = 8,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="That the first of a batch waits for others.")] = 10,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests taken and not yet answered; others get 429.")] = 64,
    max_upload_mb: Annotated[float, typer.Option(min=0.001, help="Of a request; larger ones get 413.")] = 500,
    max_minutes: Annotated[float, typer.Option(min=0.01, help="Of a recording; longer ones get 413.")] = 180,
    upload_seconds: Annotated[float, typer.Option(min=1, help="Within which an upload must have come.")] = 120,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable with the key that requests must give.")
    ] = "",
    device: Device = "",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
):
    """
    Answer many clients at once over HTTP, in the manner of OpenAI's API for speech.

    SIGTERM and Ctrl-C end it once those who were accepted are answered.
    """
    api_key = os.environ.get(api_key_env) if api_key_env else None
    if api_key_env and not api_key:
        raise typer.BadParameter(f"the environment variable {api_key_env} is not set", param_hint="--api-key-env")
    try:
        from serve import Server, Service
    except ModuleNotFoundError as error:
        _fail(f"the server needs {error.name}: pip install 'sense-asr[serve]'")
    from processing.hub import public_name

    pipe = _load(model, device, dtype, quantize, "serve")
    limits = {"max_batch": max_batch, "max_wait": max_wait_ms / 1000, "max_queue": max_queue}
    limits |= {"max_upload": int(max_upload_mb * 1e6), "max_seconds": 60 * max_minutes}
    service = Service(
        pipe, name or public_name(model), **limits, upload_seconds=upload_seconds, language=language, api_key=api_key
    )
    Server(service, host=host, port=port).run()


@cli.command()
def export(
    model: Annotated[str, typer.Argument(help="Output folder of a training, or a checkpoint in it.")],
    output_dir: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="New folder to write to.")] = None,
    push: Annotated[str | None, typer.Option(metavar="REPO_ID", help="Upload it to the Hugging Face Hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="What was trained alone, without the backbones.")
    ] = False,
    metrics: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="metrics.json of eval_sense.py, for the card; repeatable."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What it was trained on beside what the run recorded; repeatable."),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="ISO code, beside those that the run recorded; repeatable."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="The Hub's name of it, such as apache-2.0, for the card.")
    ] = None,
    notes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Markdown that the card begins with, in your own words.")
    ] = None,
):
    """Write a folder with weights, processor, code and model card that others can load, or upload it to the Hub."""
    if output_dir is None and push is None:
        raise typer.BadParameter("name a folder to write to, or --push REPO_ID", param_hint="DIR")
    from processing.hub import export_model, push_model

    how = {"adapter_only": adapter_only, "metrics": metrics or (), "repo_id": push, "license": license}
    how |= {"datasets": dataset or (), "language": language or (), "notes": notes}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = export_model(model, output_dir or Path(scratch) / Path(push).name, **how)
            typer.echo(push_model(folder, push, private=private) if push else folder)
        except (ValueError, OSError, ImportError) as error:
            _fail(error)


def _run_script(module: str, context: typer.Context) -> dict:
    """Calls a script's `main` with the arguments as they were given."""
    sys.argv = [context.command_path, *context.args]  # where argparse finds the program's name
    return importlib.import_module(module).main(context.args)


def _form(**asked: bool) -> str:
    """The suffix of the one form that was asked for."""
    forms = [name for name, is_asked in asked.items() if is_asked]
    if len(forms) > 1:
        raise typer.BadParameter("choose one", param_hint=[f"--{name}" for name in forms])
    return forms[0] if forms else "txt"


def _sources(files: list[str], form: str, output: Path | None) -> dict:
    """
    By name, what the pipeline hears; of `-` the bytes on stdin, of a pipe those in it.

    Raises:
        BadParameter: recordings that would share one place.
    """
    names = list(dict.fromkeys("stdin" if file == "-" else file for file in files))
    if output is None and form in ("srt", "vtt") and len(names) > 1:
        raise typer.BadParameter("several recordings need --output DIR", param_hint=f"--{form}")
    if output is not None:
        stem, number = Counter(Path(name).stem for name in names).most_common(1)[0]
        if number > 1:
            raise typer.BadParameter(f"{number} recordings would be written to {stem}.{form}", param_hint="--output")
        from processing.report import make_folder

        if not make_folder(output):  # better now than when all is heard
            raise typer.BadParameter(f"{output} is no folder that can be written to", param_hint="--output")
    sources = {name: name for name in names}
    for name in names:
        if os.path.exists(name) and Path(name).is_fifo():  # no seeking in it
            sources[name] = {"bytes": Path(name).read_bytes(), "path": name}
    if "-" in files:
        sources["stdin"] = {"bytes": typer.get_binary_stream("stdin").read(), "path": "stdin"}
    return sources


def _load(model: str, device: str, dtype: str, quantize: str | None, command: str):
    """The pipeline of a model that was trained for what the command needs."""
    import torch
    from transformers.utils import logging

    from processing import SpokenLanguageUnderstandingPipeline
    from processing.hub import load_checkpoint, start_processes
    from processing.tasks import check_trained

    if device:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from error
        os.environ["ACCELERATE_TORCH_DEVICE"] = device  # where load_checkpoint puts the model
    start_processes()
    logging.disable_progress_bar()
    try:
        loaded, processor = load_checkpoint(model, dtype, quantize=quantize)
    except (OSError, ValueError, ImportError) as error:
        _fail(f"{model} is no model that can be loaded: {error}")
    try:
        check_trained(model, processor.prompts, command)
    except ValueError as error:
        _fail(error)
    return SpokenLanguageUnderstandingPipeline(loaded, processor=processor, device=loaded.device)


def _hear(pipe, sources: dict, **how) -> Iterator[tuple[str, dict | Exception]]:
    """What is heard in each recording, or what is wrong with it."""
    waiting = list(sources)
    for name in sources:
        path = os.path.expanduser(name)
        if sources[name] == name and "://" not in name and not os.path.isfile(path):
            is_folder = os.path.isdir(path)
            yield name, ValueError(f"a folder; name its files, such as {name}/*.flac" if is_folder else "no such file")
            waiting.remove(name)
    while waiting:
        opened = []
        results = pipe(_opened(waiting, sources, opened), **how)
        try:
            for result in results:
                yield waiting.pop(0), result
        except (ValueError, OSError) as error:
            # The last one opened breaks off the batch: it goes, and those that were waiting in the batch start again.
            yield opened[-1], error
            waiting.remove(opened[-1])
        except ImportError as error:
            _fail(error)


def _opened(names: list[str], sources: dict, opened: list[str]) -> Iterator:
    """The sources of these recordings; the names of those that were asked for go to `opened`."""
    for name in tuple(names):
        opened.append(name)
        yield sources[name]


def _write(results: Iterator, form: str, output: Path | None, many: bool, reference: bool = False):
    """Results as they come, to stdout or files; those that failed to stderr."""
    from processing.report import write_text

    console, failed = Console(highlight=False, soft_wrap=True), False
    for name, result in results:
        if isinstance(result, Exception):
            failed = True
            typer.echo(f"error: {name}: {str(result).removeprefix(f'{name}: ')}", err=True)
            continue
        if reference:
            result["reference"] = what_was_said(Path(name))
        shown = _render(name, result, form, many and output is None)
        if output is not None:
            path = output / f"{Path(name).stem}.{form}"
            try:
                write_text(path, shown.plain + "\n" if form == "txt" else shown)
            except OSError as error:  # the others may fit
                failed = True
                typer.echo(f"error: {name}: {path} can't be written ({error})", err=True)
        elif form == "txt":
            console.print(shown)
        else:
            typer.echo(shown, nl=False)
    if failed:
        raise typer.Exit(1)


def _render(name: str, result: dict, form: str, many: bool) -> Text | str:
    """A result as text, with its recording's name where there are many; or as the content of a file."""
    from processing import subtitles

    def printable(text: str) -> str:  # a file's name may be no UTF-8
        return text.encode("utf-8", "backslashreplace").decode()

    if form == "json":
        return printable(json.dumps({"file": name, **result}, ensure_ascii=False)) + "\n"
    name = printable(name)
    if form in ("srt", "vtt"):
        return subtitles.to_srt(result) if form == "srt" else subtitles.to_vtt(result)
    heard = coloured(result)
    if "reference" in result:
        said = f"\n  said:  {result['reference']}" if result["reference"] else ""
        return Text.assemble(name, said, "\n  heard: ", heard)
    return Text.assemble(f"{name}: ", heard) if many else heard


def coloured(result: dict) -> Text:
    """The words, entities in colours; below them each entity with its times, and the sentiment."""
    from processing.tasks import RAW_TO_COMBINED

    text, lines = Text(result["text"]), []
    for entity in result.get("entities", []):
        tag, (start, end) = entity["entity"], entity["timestamp"]
        colour = TAG_COLOURS.get(RAW_TO_COMBINED.get(tag, tag), "bright_yellow")
        text.stylize(f"bold {colour}", entity["start"], entity["end"])
        lines.append(Text.assemble("  ", (tag, colour), f"  {entity['word']}  {start:.2f} to {end:.2f} s"))
    if sentiment := result.get("sentiment"):
        label = sentiment["label"]
        lines.append(Text.assemble("  ", (label, SENTIMENT_COLOURS[label]), f"  {100 * sentiment['score']:.0f} %"))
    return Text("\n").join([text, *lines])


def what_was_said(clip: Path) -> str | None:
    """The clip's text in the metadata.jsonl beside it, if there is one."""
    return _texts_of(clip.parent).get(clip.name)


@cache
def _texts_of(folder: Path) -> dict[str, str]:
    from processing.datasets import read_json_lines

    metadata = folder / "metadata.jsonl"
    if not os.path.isfile(metadata):
        return {}
    try:
        lines = sorted(read_json_lines(metadata), key=lambda line: line.get("start_second") or 0)
        texts: dict[str, list[str]] = {}
        for line in lines:  # a recording's parts, in order
            texts.setdefault(line["file_name"], []).append(line["text"])
        return {name: " ".join(parts) for name, parts in texts.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(
            f"{metadata} is not that of an audiofolder with a column text: {error!r}", param_hint="--reference"
        ) from error


def _fail(message):
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    cli(prog_name="sense")
