"""The results as a Markdown table and as a plot."""

import json
from pathlib import Path

from processing.report import markdown_table, write_text

from .compare import MEANING


TITLES = {
    "train": "Training step: forward and backward, the projector alone learns",
    "beams": "Beam search",
    "understand": "Three answers about each clip",
}
NOTES = """\
Random weights of the sizes named, the same text for all; systems take turns, one repeat each; medians. `encoder rows`:
clips that went through the speech encoder in one run. `audio tokens`: of a clip, in the LLM's sequence. Peaks are of
training with AdamW, each in its own process, on top of the imported libraries; of the bare LLM without AdamW.
Whisper-like encoders work on a window of 30 s whatever the clip's length, Granite Speech on the clip alone. Granite
Speech has an encoder of its own kind, a conformer of the same number of layers and width; its blocks are larger. All
peers compute logits at every position, as their code does; SENSE and the bare LLM where a label stands. SLAM-ASR's
audio is trimmed to the speech, which its authors' recipe does not do. Peers have their output layer tied where the
LLM has. From the cache SENSE trains without its encoder, as train_sense.py does."""


def markdown(results: dict) -> str:
    """All that was measured, as a page."""
    parts = ["# Benchmarks", ratio_table(results), machine_line(results)]
    for section, title in TITLES.items():
        if section in results:
            parts += [f"## {title}", system_section(results, section)]
    if "memory" in results:
        parts += ["## Peak memory against the limit", limit_section(results["memory"])]
    if "growth" in results:
        parts += ["## Growth of SENSE", "![Growth](latest.png)", *map(growth_section, results["growth"].values())]
    if results.keys() & {*TITLES, "memory"}:
        wins = "\n".join(f"- {win}" for win in results["peer_wins"])
        parts += ["## Where a peer wins", wins or "Nowhere in this run."]
    parts.append(NOTES)
    return "\n\n".join(parts) + "\n"


def write_results(folder: Path, name: str, results: dict, page: str):
    """As JSON and as a page, which is printed too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / f"{name}.md", page)
    print(page)


def table(header: list[str], rows: list[list]) -> str:
    return markdown_table(header, [[str(cell) for cell in row] for row in rows])


def ratio_table(results: dict) -> str:
    rows = []
    for name, meaning in MEANING.items():
        value, spread = results[name], results["time_ratios"].get(name)
        iqr = "" if spread is None else "{:.2f} - {:.2f}".format(*spread["iqr"])
        rows.append([name, "not run" if value is None else f"**{value:.2f}**", iqr, meaning])
    return table(["ratio", "of medians", "quartiles over rounds", "what it is"], rows)


def machine_line(results: dict) -> str:
    m = results["machine"]
    gpu = f"{m['gpu']}; " if m["gpu"] else ""
    return (
        f"Machine: {gpu}{m['cpu']}, {m['cores']} cores ({m['cores_allowed']} allowed), {m['threads']} threads, "
        f"{m['ram_gib']} GiB RAM, load {m['load_before']:.1f} before the run. Python {m['python']}, "
        f"torch {m['torch']}, transformers {m['transformers']}. {results['repeats']} repeats."
    )


def setting_line(s: dict, generates: bool, grows: str | None = None) -> str:
    """What was measured, without the field that grows."""
    phrases = {
        "batch": f"{s['batch']} clips",
        "seconds": f"{s['seconds']} s each",
        "prompt": f"{s['prompt']} prompt tokens",
        "labels": None if generates else f"{s['labels']} label tokens",
        "beams": f"{s['beams']} beams" if generates and s["beams"] > 1 else None,
        "new_tokens": f"{s['new_tokens']} new tokens" if generates else None,
    }
    shapes = ", ".join(phrase for field, phrase in phrases.items() if phrase and field != grows)
    sizes = f"{s['audio']}-sized encoder, {s['text']}-sized LLM"
    return f"{sizes}; {shapes}; {s['dtype']}, {s['attn']} attention, {s['device']}."


def system_section(results: dict, section: str) -> str:
    peaks = results["memory"]["train"] if section == "train" and "memory" in results else {}
    rows = []
    for name, r in results[section]["systems"].items():
        peak = [mib(peaks[name]["peak_bytes"])] if peaks else []
        iqr = " - ".join(map(milliseconds, r["iqr_s"]))
        rows.append([name, milliseconds(r["median_s"]), iqr, f"{r['clips_per_s']:.2f}", shown(r["encoder_rows"])])
        rows[-1] += [shown(r.get("audio_tokens")), *peak]
    header = ["system", "median, ms", "quartiles, ms", "clips a second", "encoder rows", "audio tokens"]
    notes = [f"{name}: {r['note']}." for name, r in results[section]["systems"].items() if "note" in r]
    setting = setting_line(results[section]["setting"], generates=section != "train")
    return "\n\n".join([setting, table(header + ["peak, MiB"] * bool(peaks), rows), *notes])


def limit_section(memory: dict) -> str:
    rows = [[name, mib(r["peak_bytes"]), mib(r["optimizer_bytes"])] for name, r in memory["limit"].items()]
    columns = table(["system", "peak, MiB", "of it AdamW's state, MiB"], rows)
    return f"{setting_line(memory['limit_setting'], generates=False)}\n\n{columns}"


def growth_section(growth: dict) -> str:
    rows = [
        [value, milliseconds(point["median_s"]), mib(point["peak_bytes"])] for value, point in growth["points"].items()
    ]
    setting = setting_line(growth["setting"], growth["field"] == "beams", growth["field"])
    return f"{growth['what']}: {setting}\n\n{table([growth['axis'], 'median, ms', 'peak, MiB'], rows)}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.1f}"


def shown(value) -> str:
    return "" if value is None else str(value)


def plot(growths: dict, path: Path):
    """Above time, below memory, against what grows; a column each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(growths), figsize=(4 * len(growths), 6), sharex="col", squeeze=False)
    for (above, below), growth in zip(axes.T, growths.values()):
        values = [float(value) for value in growth["points"]]
        points = growth["points"].values()
        seconds, gib = [p["median_s"] for p in points], [p["peak_bytes"] / 2**30 for p in points]
        above.set_title(growth["what"], fontsize=10)
        below.set_xlabel(growth["axis"])
        for axis, heights, color in ((above, seconds, "tab:blue"), (below, gib, "tab:orange")):
            axis.plot(values, heights, "o-", color=color)
            axis.set_ylim(0, 1.1 * max(heights))
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("time, s")
    axes[1, 0].set_ylabel("peak memory, GiB")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
