"""The archives of `make dist`: the same bytes from any copy of the files, and whole."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGED = ("modeling_sense/", "processing/", "recipes/", "checkpoints/")
UNTRACKED = (
    ".git",
    ".*cache",
    ".coverage*",
    ".hypothesis",
    ".venv",
    "*.egg-info",
    "__pycache__",
    "build",
    "data",
    "dist",
    "outputs",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[Path]:
    """The `dist` folders of two builds of copies of the project, whose files are of other times."""
    folders = []
    for number in (1, 2):
        copy = tmp_path_factory.mktemp("copies") / f"copy {number}"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*UNTRACKED))
        for path in copy.rglob("*"):
            os.utime(path, (1e9 * number, 1e9 * number))
        home = Path(sys.prefix)
        made = ["make", "dist", f"VENV={home}", f"--assume-old={home}/installed"]  # not to install it once more
        subprocess.run(made, cwd=copy, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"})
        folders.append(copy / "dist")
    return folders


def test_builds_are_reproducible(built):
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in built)
    assert sorted(first) == ["sense_asr-0.1.0-py3-none-any.whl", "sense_asr-0.1.0.tar.gz"]
    assert first == second


def test_archives_hold_all_files(built):
    """The wheel has every module and data file, the source archive the tests and what they read as well."""
    with zipfile.ZipFile(next(built[0].glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    with tarfile.open(next(built[0].glob("*.tar.gz"))) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    files = [path for path in ROOT.rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    packaged = {name for name in names if name.startswith(PACKAGED)}
    assert packaged and packaged <= held
    assert {"app.py", "eval_sense.py", "sense_cli.py", "serve.py", "train_sense.py", "annotate_sense.py"} <= held
    beside = ("tests/", "docs/", "benchmarks/", "scripts/")
    assert packaged | {name for name in names if name.startswith(beside)} | {"Makefile", "mkdocs.yml"} <= sources


def test_an_installed_wheel_is_whole(built, tmp_path):
    """In an empty environment that borrows the dependencies alone: imports, the command, a recipe by its name."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    wheel = next(built[0].glob("*.whl"))
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--no-index", wheel], check=True, env=alone)
    borrowed = {**alone, "PYTHONPATH": sysconfig.get_path("purelib")}
    script = (
        "import modeling_sense, processing, train_sense\nfrom processing import recipe\n"
        "assert all('venv' in module.__file__ for module in (modeling_sense, processing, train_sense))\n"
        "print(recipe.find_recipe('mini/1_asr'))"
    )
    how = {"cwd": tmp_path, "env": borrowed, "check": True, "capture_output": True, "text": True}
    assert subprocess.run([python, "-c", script], **how).stdout.strip().endswith("recipes/mini/1_asr.yaml")
    sense = tmp_path / "venv" / "bin" / "sense"
    assert subprocess.run([sense, "--version"], **how).stdout == "sense 0.1.0\n"
