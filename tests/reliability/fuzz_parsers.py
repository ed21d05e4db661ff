"""
Coverage-guided fuzzing of everything that reads what others wrote, by atheris: each parser gets its share of the time.

    python -m tests.reliability.fuzz_parsers --seconds 600

Prints executions and findings of each; exits with 1 where there was a finding, whose input is kept under --findings.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import atheris


with atheris.instrument_imports(include=["processing", "modeling_sense", "yaml", "json"]):
    from tests.reliability import hostile


SEEDS = {
    "answers": [b"<PERSON> anna </PERSON> left <PLACE> moscow </PLACE>", b"Positive", b"< / person >"],
    "targets": [b"\x01\x02anna <PERSON> left </PERSON> <PL"],
    "annotations": [b'{"entities": [{"tag": "PERSON", "phrase": "anna"}]}', b'```json\n[["PERSON", "anna"],]\n```'],
    "recipes": [b"tasks: {asr: 1}\nlearning_rate: 1e-3\n", b"a: &b [1]\nc: *b\n"],
    "metadata": [b'{"file_name": "a.wav", "text": "anna", "entities": [["PERSON", 0, 4]], "sentiment": "Neutral"}\n'],
    "librispeech": [b"1-2-0000 ANNA LEFT\n1-2-0001 MOSCOW\n"],
    "adapters": [b'{"backbones": {"audio": {"id": "a", "revision": null}}, "fingerprint": "", "lora": {"r": 2}}'],
    "audio": [hostile.riff(bytes(64)), hostile.flac([0.0, 0.5] * 8)],
}


def make_target(name: str, folder: Path):
    """The function that atheris calls with bytes."""

    def text(data: bytes) -> str:
        return data.decode("utf-8", "surrogateescape" if len(data) % 2 else "replace")

    return {
        "answers": lambda data: hostile.answers_are_read(text(data)),
        "targets": lambda data: hostile.targets_are_read_back(text(data[4:]), list(data[:4])),
        "annotations": lambda data: hostile.annotations_are_read(text(data)),
        "recipes": lambda data: hostile.recipes_are_read(data, folder),
        "metadata": lambda data: hostile.metadata_is_read(data, folder),
        "librispeech": lambda data: hostile.librispeech_is_read(data, folder),
        "adapters": lambda data: hostile.adapter_settings_are_read(data, folder),
        "audio": lambda data: hostile.audio_is_read(data),
    }[name]


def run_child(name: str, seconds: int, findings: Path, work: Path):
    """Fuzzes one parser, all that is printed going to work/log."""
    with open(work / "log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=6000", "-max_len=4096"]
    report = ["-print_final_stats=1", f"-artifact_prefix={findings}/{name}-"]
    atheris.Setup([sys.argv[0], *limits, *report, str(work / "corpus")], make_target(name, work / "files"))
    atheris.Fuzz()


def fuzz(name: str, seconds: int, findings: Path) -> tuple[int, str]:
    """Executions of one parser in a process of its own (libFuzzer never returns), and what it found."""
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "corpus").mkdir()
        (work / "files").mkdir()
        for i, seed in enumerate(SEEDS[name]):
            (work / "corpus" / str(i)).write_bytes(seed)
        child = os.fork()
        if child == 0:
            try:
                run_child(name, seconds, findings, work)
            finally:  # a finding is raised out of atheris: the folder, with its log, is the parent's to delete
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log = (work / "log").read_text(errors="replace")
    runs = re.findall(r"stat::number_of_executed_units:\s*(\d+)|^#(\d+)\s", log, re.MULTILINE)
    found = "" if status == 0 else log[log.find(" === Uncaught") :][:4000] if " === Uncaught" in log else log[-4000:]
    return max((int(a or b) for a, b in runs), default=0), found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="in all, shared out over the parsers")
    parser.add_argument("--only", choices=SEEDS, help="one parser alone")
    parser.add_argument("--findings", type=Path, default=Path("outputs/fuzz"), help="folder for inputs that broke one")
    args = parser.parse_args(argv)
    names = [args.only] if args.only else list(SEEDS)
    args.findings.mkdir(parents=True, exist_ok=True)
    bad = 0
    for name in names:
        runs, found = fuzz(name, max(1, args.seconds // len(names)), args.findings)
        bad += bool(found)
        print(f"{name}: {runs:,} executions, {'a finding' if found else 'no finding'}", flush=True)
        if found:
            print(found, flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
