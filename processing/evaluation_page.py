"""What eval_sense.py found, as a page to look at."""

import base64
import datetime
import io
import json
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path

import jiwer
import soundfile
import torch

from .page import Section, write_page
from .processing_sense import load_audio
from .report import (
    MOST_GROUPS,
    TITLES,
    comparison,
    confusion_table,
    headlines_of,
    left_out_of,
    plot_comparison,
    plot_confusion,
    plot_groups,
    plot_tags,
    plot_training,
    score_cell,
    systems_of,
    tag_table,
)
from .tasks import Answer, Entity


MOST_CLIPS = 20  # to hear: each is some 4 kB a second, a third more as text
GROUPED = {"duration": "duration", "speaking_rate": "speaking rate", "speaker": "speaker"}


def write_evaluation_page(
    path: Path,
    metrics: dict,
    table: list[dict],
    parsed: dict[str, list[Answer]],
    dataset,
    about: dict[str, str],
    history: list[dict] | None = None,
):
    """
    Writes the page.

    Args:
        path: where it goes.
        metrics: as `report.write_evaluation` has them.
        table: of `eval_sense.utterance_table`, the worst first.
        parsed: by task, what each answer says.
        dataset: the rows of the project's schema, in the answers' order.
        about: what was evaluated, by name.
        history: of the training, as trainer_state.json holds it.
    """
    lead = f"{metrics['n_utterances']} utterances, {duration(metrics['audio_seconds'])} of speech."
    lead = " ".join(filter(None, [lead, left_out_of(metrics)]))
    sections = [headline_section(metrics), *group_sections(metrics)]
    if "ner_per_tag" in metrics:
        sections.append(tag_section(metrics["ner_per_tag"]))
    if "sa_confusion" in metrics:
        sections.append(sentiment_section(metrics["sa_confusion"]))
    what = (["", ""], [list(item) for item in about.items()])
    sections.append(Section("What was evaluated", table=what, wide=False))
    worst = [line for line in table if line.get("errors")][:MOST_CLIPS]
    if worst:
        sections.append(worst_section(worst, parsed, dataset))
    sections.append(all_section(table, parsed))
    if history:
        sections.append(training_section(history))
    write_page(path, f"{short(about['model'])} on {short(about['dataset'])}", lead, sections)


def describe_run(args, model, processes: int, rtf: float) -> dict[str, str]:
    """What was evaluated, how, when and on what, by name; `args` are those of eval_sense.py."""
    named = model.config.backbones or {}
    backbones = [named[part]["id"] for part in ("audio", "text") if part in named]
    device = model.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    libraries = ("sense-asr", "torch", "transformers")
    decoding = "greedy" if args.num_beams == 1 else f"{args.num_beams} beams"
    about = {
        "model": args.model,
        "revision": args.revision,
        "backbones": ", ".join(backbones),
        "parameters": f"{model.num_parameters():,}",
        "dataset": args.dataset,
        "configuration": args.config_name,
        "split": args.split + (f", its first {args.max_samples} rows at most" if args.max_samples else ""),
        "audio column": args.audio_column,
        "text column": args.text_column + ", in lower case" * args.lowercase,
        "decoding": decoding + ", constrained" * args.constrained,
        "batch size": str(args.batch_size),
        "number format": str(model.dtype).removeprefix("torch."),
        "language model held in": model.quantization,
        "time / audio": f"{rtf:.3f}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{n} {version(n)}" for n in libraries)]),
        "machine": f"{machine}, {platform.system()}, {processes} process{'es' * (processes > 1)}",
    }
    return {name: value for name, value in about.items() if value}


def cpu_name() -> str:
    """The processor's, as Linux tells it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def read_history(model: str) -> list[dict] | None:
    """The training's log, of a folder that has a trainer_state.json."""
    path = Path(model) / "trainer_state.json"
    return json.loads(path.read_text(encoding="utf-8"))["log_history"] if path.is_file() else None


def short(source: str) -> str:
    """The name of a folder, without where it lies; a Hub id as it is."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def headline_section(metrics: dict) -> Section:
    systems, scores = systems_of(metrics), []
    columns = headlines_of({"SENSE": metrics})
    for key in columns:
        value, _, interval = score_cell(metrics, key).partition(" ")
        scores.append((TITLES[key], value, interval))
    return Section(
        "Scores",
        "Per cent; in brackets and as lines the 95 % interval (bootstrap over utterances). Of WER less is better, of "
        "F1 more. Normalised: after Whisper's English normaliser.",
        scores=scores,
        figure=plot_comparison(systems) if columns else None,  # tasks of one's own have no scores
        alt="Scores of each system with their intervals; the table below has the numbers.",
        table=comparison(systems, TITLES),
    )


def group_sections(metrics: dict) -> list[Section]:
    systems = {name: found["wer_by"] for name, found in systems_of(metrics).items() if "wer_by" in found}
    sections = []
    for key, title in GROUPED.items():
        found = {name: groups[key] for name, groups in systems.items() if key in groups}
        if not found:
            continue
        first = next(iter(found.values()))
        rows = [
            [
                group["group"],
                str(group["n"]),
                str(group["words"]),
                *(score_cell(g[i], "wer_normalized") for g in found.values()),
            ]
            for i, group in enumerate(first)
        ]
        shown = "In parentheses: how many utterances."
        shown += f" The {MOST_GROUPS} worst are drawn." if len(first) > MOST_GROUPS else ""
        sections.append(
            Section(
                f"WER by {title}",
                shown,
                figure=plot_groups(found) if any("wer_normalized" in group for group in first) else None,
                alt=f"Normalised word error rate by {title}; the table below has the numbers.",
                table=([title, "utterances", "words", *found], rows),
                folded=True,
                wide=False,
            )
        )
    return sections


def tag_section(per_tag: dict) -> Section:
    return Section(
        "Entities by tag",
        "Label-F1 does not ask for the right words. Below each tag: how many were said, how many heard.",
        figure=plot_tags(per_tag),
        alt="Precision, recall, F1 and label-F1 of each tag; the table below has the numbers.",
        table=tag_table(per_tag),
        folded=True,
        wide=False,
    )


def sentiment_section(cells: list[list[int]]) -> Section:
    return Section(
        "Sentiment",
        "Utterances, by the sentiment they have (rows) and the one that was heard (columns).",
        figure=plot_confusion(cells),
        alt="Confusion of sentiments; the table below has the numbers.",
        table=confusion_table(cells),
        folded=True,
        wide=False,
    )


def training_section(history: list[dict]) -> Section:
    return Section(
        "Training",
        "Where the loss on shuffled clips parts from that on true ones, the model begins to listen.",
        figure=plot_training({"": history}),
        alt="Losses and word error rate along the steps of the training.",
    )


def worst_section(worst: list[dict], parsed: dict[str, list[Answer]], dataset) -> Section:
    return Section(
        f"Worst {len(worst)} utterances",
        "Words that were heard as others are underlined with dots, words that were missed are struck through, words "
        "that nobody said have a plus; entities are framed, beside their tag.",
        utterances=[show_utterance(line, parsed, dataset[line["index"]]["audio"]) for line in worst],
    )


def show_utterance(line: dict, parsed: dict[str, list[Answer]], audio: dict) -> dict:
    """
    What a page shows of an utterance: `title`, `facts`, `audio` (a data address), `lines` (name and runs of marked
    words, see `mark`) and `answers` (name and text).
    """
    said = line["reference"]
    heard = {name: answers[line["index"]] for name, answers in parsed.items()}
    worded = {name: answer for name, answer in heard.items() if answer.text is not None}
    lines: list[tuple[str, list[dict]]] = []
    for name, answer in worded.items():
        said_marks, heard_marks = compare_words(said, answer.text)
        if not lines:
            lines.append(("said", mark(said, said_marks, line["reference_entities"])))
        lines.append((f"heard ({name})", mark(answer.text, heard_marks, answer.entities)))
    facts = [f"WER {line['wer']:.0f} %", f"{line['duration']:.1f} s"]
    facts += [f"speaker {line['speaker']}"] if line["speaker"] else []
    answers = []
    if "sa" in heard:
        understood = heard["sa"].sentiment or "unreadable"
        answers = [("sentiment", f"said {line['reference_sentiment'] or 'unknown'}, heard {understood}")]
    return {"title": line["id"], "facts": facts, "audio": encode_audio(audio), "lines": lines, "answers": answers}


def compare_words(said: str, heard: str) -> tuple[list[str], list[str]]:
    """How each word of both fared: `equal`, `substitute`, `delete` or `insert`."""
    words = said.split(), heard.split()
    if not words[0]:
        return [], ["insert"] * len(words[1])
    marks: tuple[list[str], list[str]] = [], []
    for chunk in jiwer.process_words(" ".join(words[0]), " ".join(words[1])).alignments[0]:
        marks[0].extend([chunk.type] * (chunk.ref_end_idx - chunk.ref_start_idx))
        marks[1].extend([chunk.type] * (chunk.hyp_end_idx - chunk.hyp_start_idx))
    return marks


def mark(text: str, marks: Sequence[str], entities: Sequence[Entity] | None) -> list[dict]:
    """A text as runs, each within one entity (`tag`) or none (None), of `words`: the word and its mark."""
    runs: list[dict] = []
    last = None
    for found, fared in zip(re.finditer(r"\S+", text), marks, strict=True):
        inside = (e for e in entities or [] if e[1] < found.end() and found.start() < e[1] + e[2])
        entity = next(inside, None)
        if not runs or entity is not last:
            runs.append({"tag": entity and entity[0], "words": []})
        runs[-1]["words"].append((found[0], fared))
        last = entity
    return runs


def encode_audio(audio: dict) -> str:
    """A clip as a data address: MP3, which every browser plays, of 16 kHz, some 30 kbit/s."""
    file = io.BytesIO()
    soundfile.write(file, load_audio(audio), 16000, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.7)
    return f"data:audio/mpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def all_section(table: list[dict], parsed: dict[str, list[Answer]]) -> Section:
    """The utterances, to look for one."""
    columns = {
        "id": lambda line: line["id"],
        "speaker": lambda line: line["speaker"] or "-",
        "seconds": lambda line: f"{line['duration']:.1f}",
        "WER, %": lambda line: f"{line['wer']:.0f}" if "wer" in line else "-",
        "said": lambda line: line["reference"],
    }
    columns |= {f"heard ({name})": itemgetter(name) for name in parsed if name != "sa"}
    if "sa" in parsed:
        columns["sentiment"] = lambda line: line["reference_sentiment"] or "-"
        columns["heard sentiment"] = itemgetter("sa")
    rows = [[cell(line) for cell in columns.values()] for line in table]
    return Section("All utterances", table=(list(columns), rows), searchable=True)
