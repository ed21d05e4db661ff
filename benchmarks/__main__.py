"""`python -m benchmarks [--quick] [--out DIR]`: measures all in one run, writes JSON, a Markdown page and a plot."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from . import compare, measure, report
from .setting import Setting
from .systems import BARE, BEAMS, CACHED, SYSTEMS


SECTIONS = ("train", "beams", "understand", "memory", "growth")
GROWTH = {  # section and system, what it is called, the setting's field that grows, its values
    "batch": ("train", CACHED, "training step from the cache", "batch, clips", (1, 2, 4, 8, 16, 32)),
    "seconds": ("train", CACHED, "training step from the cache", "length of clips, s", (2, 5, 10, 20, 30)),
    "beams": ("beams", BEAMS, "beam search", "beams", (1, 2, 5, 10)),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--quick", action="store_true", help="3 repeats; of growth the ends alone, once")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--repeats", type=int, help="of each system (7; with --quick 3)")
    parser.add_argument("--sizes", choices=["real", "tiny"], default="real", help="tiny: to try the code out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="some sections alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of frozen weights")
    parser.add_argument("--attn", choices=["sdpa", "eager"], default="sdpa", help="attention of all systems")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    args.repeats = args.repeats or (3 if args.quick else 7)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def make_settings(args: argparse.Namespace) -> dict[str, Setting]:
    """The setting of each section; `limit` is that of the memory's limit."""
    if args.sizes == "tiny":
        audio = peers_audio = text = "tiny"
    elif args.device == "cpu":
        audio, peers_audio, text = "whisper-base", "whisper-small", "SmolLM2-135M"
    else:
        audio, peers_audio, text = "whisper-small", "whisper-small", "TinyLlama"
    limit = Setting(audio, text, device=args.device, dtype=args.dtype, attn=args.attn)
    return {
        "limit": limit,
        "train": replace(limit, audio=peers_audio),
        "beams": replace(limit, batch=4, beams=5, new_tokens=32),
        "understand": replace(limit, batch=4, new_tokens=24),
    }


def measure_memory(settings: dict[str, Setting]) -> dict:
    """Of all systems to train at the sizes of the peers' comparison, and of the limit's two at the limit's."""

    def peaks(names, setting):
        return {name: measure.peak_memory("train", name, setting, optimizer=name != BARE) for name in names}

    return {
        "train": peaks(SYSTEMS["train"], settings["train"]),
        "limit": peaks([CACHED, BARE], settings["limit"]),
        "limit_setting": settings["limit"].describe(),
    }


def measure_growth(field: str, settings: dict[str, Setting], quick: bool) -> dict:
    """Time and peak memory of SENSE as one field of the setting grows."""
    section, name, what, axis, values = GROWTH[field]
    setting = settings["limit" if section == "train" else section]
    points = {str(v): replace(setting, **{field: v}) for v in (values[:: len(values) - 1] if quick else values)}
    times = measure.time_growth(SYSTEMS[section][name], points, repeats=1 if quick else 3)
    for value, point in points.items():
        times[value] |= measure.peak_memory(section, name, point, optimizer=section == "train")
    return {"what": what, "axis": axis, "field": field, "setting": setting.describe(), "points": times}


def run(args: argparse.Namespace) -> dict:
    """All results; see `compare.MEANING` for the first five."""
    settings = make_settings(args)
    results = {"machine": measure.machine(args.device), "repeats": args.repeats, "quick": args.quick}
    started = time.perf_counter()
    for section in args.only:
        print(f"{time.perf_counter() - started:6.0f} s  {section}", file=sys.stderr)
        if section == "memory":
            results[section] = measure_memory(settings)
        elif section == "growth":
            results[section] = {field: measure_growth(field, settings, args.quick) for field in GROWTH}
        else:
            systems = measure.time_systems(SYSTEMS[section], settings[section], args.repeats)
            results[section] = {"setting": settings[section].describe(), "systems": systems}
    results["seconds"] = time.perf_counter() - started
    found = {"time_ratios": compare.time_ratios(results), "peer_wins": compare.peer_wins(results)}
    return {**compare.ratios(results), "meaning": compare.MEANING, **found, **results}


def main(arguments: list[str] | None = None) -> dict:
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    results = run(args)
    report.write_results(args.out, "latest", results, report.markdown(results))
    if "growth" in results:
        report.plot(results["growth"], args.out / "latest.png")
    return results


if __name__ == "__main__":
    main()
