#!/usr/bin/env python3
"""
Writes the page as the files of a Hugging Face Space: the code, README.md with the Space's settings, requirements.txt.

    python scripts/make_space.py FOLDER --model USER/MODEL

docs/space.md says how to publish it.
"""

import argparse
import shutil
from pathlib import Path

import gradio
import setuptools  # noqa: F401  brings distutils where Python has none
import yaml


ROOT = Path(__file__).resolve().parents[1]
CODE = ("app.py", "modeling_sense", "processing", "LICENSE")


def make_space(folder: Path, model: str):
    """
    Fills `folder`, which must not exist yet.

    Raises:
        ValueError: it does.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; give a new folder")
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, work / name)
    settings = {"title": "SENSE", "emoji": "👂", "colorFrom": "blue", "colorTo": "green"}
    settings |= {"short_description": "Speech to text, named entities and sentiment", "license": "apache-2.0"}
    settings |= {"sdk": "gradio", "sdk_version": gradio.__version__, "python_version": "3.11", "app_file": "app.py"}
    settings |= {"models": [model], "preload_from_hub": [model]}
    head = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    about = (
        f"Speak or upload a recording: [{model}](https://huggingface.co/{model}) writes down what was said, marks the"
    )
    about += " entities that were named, and says how it was meant."
    (work / "README.md").write_text(f"---\n{head}---\n\n# SENSE\n\n{about}\n", encoding="utf-8")
    from distutils.core import run_setup

    package = run_setup(str(ROOT / "setup.py"), stop_after="init")
    needed = [*package.install_requires, *package.extras_require["app"]]
    (work / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    work.rename(folder)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True, help="the model's id on the Hub")
    args = parser.parse_args(argv)
    try:
        make_space(args.folder, args.model)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
