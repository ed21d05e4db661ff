"""
The page: speak or upload a recording, see what was said, which entities were named and when, and how it was meant.

    python app.py MODEL [--examples DIR] [--port 7860]     # MODEL: folder or Hub id of a SENSE checkpoint
    SENSE_MODEL=MODEL python app.py                        # the same; as a Space runs it, see docs/space.md
    python app.py                                          # sense-mini, which comes with the package
"""

import argparse
import os
import queue
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
import soundfile
from transformers import TextStreamer

from processing.grammar import sentences
from processing.hub import SHIPPED, load_checkpoint, public_name
from processing.long_audio import RATE, SPEECH, SpeechDetector, read_blocks
from processing.pipeline_sense import SpokenLanguageUnderstandingPipeline
from processing.processing_sense import MAX_SECONDS, open_audio
from processing.synthesis import VOICES, Espeak, speak
from processing.tasks import ALL_TAGS, RAW_TO_COMBINED, SENTIMENTS, check_trained, read_tags


MAX_UPLOAD = "500mb"  # 80 minutes of CD quality
MAX_MINUTES = 180  # of a recording: one at a time is heard
MAX_WAITING = 20  # visitors in the queue
KEEP_SECONDS = 3600  # recordings are deleted after so long
MOST_BARS = 1500  # of the waveform
# Colours of SLUE's tags, dark enough for white letters; OntoNotes' tags have that of the tag they become.
COLOURS = {
    "PERSON": "#0072b2",
    "PLACE": "#007a5a",
    "ORG": "#b84a00",
    "WHEN": "#a8457f",
    "QUANT": "#8a6100",
    "NORP": "#5d6d00",
    "LAW": "#6f51a1",
}
OTHER_COLOUR = "#666666"
COLOUR_OF = {tag: COLOURS.get(RAW_TO_COMBINED.get(tag, tag), OTHER_COLOUR) for tag in sorted(ALL_TAGS)}
HEARING = threading.Lock()
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

CSS = """
.sense-status { min-height: 1.5em; }
.sense-status progress { width: 100%; height: 8px; appearance: none; border: none;
  background: var(--border-color-primary); }
.sense-status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.sense-status progress::-webkit-progress-value { background: var(--color-accent); }
.sense-status progress::-moz-progress-bar { background: var(--color-accent); }
.sense-error { border-left: 4px solid #d33; padding: .5em .8em;
  background: color-mix(in srgb, #d33 12%, transparent); }
#transcript .textfield { word-break: normal; overflow-wrap: anywhere; }
#transcript .token .text { color: var(--body-text-color); }  /* Gradio leaves it black in the dark */
.sense-scroll { overflow-x: auto; padding: .4em 0; }
.sense-wave { position: relative; overflow: hidden; }
.sense-wave svg { position: absolute; left: 0; width: 100%; height: 90px; fill: var(--body-text-color); opacity: .75; }
.sense-span { position: absolute; bottom: 22px; top: 0; border-left: 2px solid var(--tag);
  border-right: 2px solid var(--tag); background: color-mix(in srgb, var(--tag) 28%, transparent); }
.sense-name { position: absolute; height: 20px; line-height: 20px; padding: 0 6px; border-radius: 3px; font-size: 12px;
  max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--body-text-color);
  border-left: 4px solid var(--tag); background: color-mix(in srgb, var(--tag) 30%, var(--block-background-fill)); }
.sense-tick { position: absolute; bottom: 0; height: 20px; font-size: 11px; padding-left: 3px; white-space: nowrap;
  border-left: 1px solid var(--body-text-color-subdued); color: var(--body-text-color); opacity: .75; }
#times table, #times tr { border: none !important; }
#times table { width: 100%; border-collapse: collapse; margin-top: .6em; font-size: 14px; }
#times th, #times td { text-align: left; padding: .3em .6em; border: none !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
#times td.number, #times th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
#times td.tag { border-left: 6px solid var(--tag) !important; font-weight: 600; }
"""


class TokenQueue(TextStreamer):
    """Puts the text of a window into a queue, piece by piece as it is written; once stopped, ends the generation."""

    def __init__(self, tokenizer, events: queue.Queue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.events = events
        self.stopped = threading.Event()
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if self.stopped.is_set():
            raise InterruptedError("stopped")
        self.text += text
        self.events.put(self.text)
        if stream_end:
            self.text = ""


def listen(pipe: SpokenLanguageUnderstandingPipeline, path: str) -> Iterator[dict | str]:
    """
    What a recording says, as it is being heard. Closing the iterator ends the generation.

    Yields:
        the current window's answer so far, as the model writes it (a str), and after each window the result for
        the recording so far (a dict, as of the pipeline's `stream`).
    """
    events = queue.Queue()
    streamer = TokenQueue(pipe.processor.tokenizer, events)

    def work():
        try:
            with HEARING:  # one that was cancelled may still be in its last step
                for result in pipe.stream(path, return_timestamps="word", streamer=streamer):
                    if streamer.stopped.is_set():
                        return
                    events.put(result)
            events.put(None)
        except Exception as error:  # raised again below, in the thread that asked
            events.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, dict) or events.empty():  # unfinished text that is old already is left out
                yield event
    finally:
        streamer.stopped.set()  # without waiting: Gradio closes this in its event loop


def highlights(result: dict, unfinished: str = "") -> dict:
    """For `gr.HighlightedText`: the text and its entities so far, of whole windows and of an unfinished one."""
    answer = read_tags(unfinished.rpartition("<")[0] if unfinished.rfind("<") > unfinished.rfind(">") else unfinished)
    text = " ".join(part for part in (result["text"], answer.text) if part)
    offset = len(text) - len(answer.text)
    entities = [{key: entity[key] for key in ("entity", "start", "end")} for entity in result.get("entities", [])]
    for tag, start, length in answer.entities:
        entities.append({"entity": tag, "start": offset + start, "end": offset + start + length})
    return {"text": text, "entities": entities}


def read_waveform(path: str) -> tuple[np.ndarray, float, bool]:
    """
    One pass over a recording, block by block.

    Returns:
        the loudest sample in each of at most 1500 equal parts, 1 for the loudest of all; its seconds; whether
        someone speaks in its first 30 s (a longer one is searched for speech by the pipeline).

    Raises:
        ValueError: not readable as audio, without samples, with NaN among them, or too long for the page.
    """
    source, rate, name = open_audio(path)
    with source:
        seconds = source.frames / rate
        if seconds > 60 * MAX_MINUTES:
            raise ValueError(f"This recording lasts {seconds / 60:.0f} minutes; the page takes up to {MAX_MINUTES}.")
        detector, probability, peaks = SpeechDetector(), 0.0, []
        step = max(RATE // 200, int(seconds * RATE) // MOST_BARS + 1)
        held = np.zeros(0, np.float32)
        for block in read_blocks(source, rate, name):
            if seconds <= MAX_SECONDS:
                probability = max(probability, detector(block, is_last=True).max())
            held = np.concatenate([held, np.abs(block)])
            whole = len(held) // step * step
            peaks.append(held[:whole].reshape(-1, step).max(1))
            held = held[whole:]
    peaks = np.concatenate([*peaks, held.max(keepdims=True, initial=0.0)])
    return peaks / max(peaks.max(), 1e-9), seconds, seconds > MAX_SECONDS or probability >= SPEECH


def draw_times(peaks: np.ndarray, seconds: float, entities: list[dict]) -> str:
    """HTML: the waveform with the entities' spans and names on it, and the same as a table."""
    entities = sorted(entities, key=lambda entity: entity["timestamp"])
    width = int(min(max(260, 20 * seconds), 16000))  # CSS pixels that are at least there; narrower screens scroll
    marks, rows = [], _rows_of_names(entities, seconds, width)
    for entity, row in zip(entities, rows):
        (start, end), colour = entity["timestamp"], f"--tag:{COLOUR_OF[entity['entity']]}"
        left, size = f"{start / seconds:.3%}", f"{max(end - start, 0.02) / seconds:.3%}"
        marks.append(f'<div class="sense-span" style="left:{left};width:{size};{colour}"></div>')
        left = f"max(0px, min({left}, 100% - {_name_width(entity)}px))"
        name = escape(f"{entity['entity']} {entity['word']}")
        marks.append(f'<div class="sense-name" style="left:{left};top:{22 * row}px;{colour}">{name}</div>')
    top = 22 * (max(rows, default=-1) + 1) + 4
    step = next(step for step in (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800) if step * width >= 50 * seconds)
    for at in np.arange(0, seconds, step):
        marks.append(f'<div class="sense-tick" style="left:{at / seconds:.3%}">{clock(at)}</div>')
    outline = [f"{i} {1 - peak:.2f}" for i, peak in enumerate(peaks)]
    outline += [f"{i} {1 + peak:.2f}" for i, peak in reversed([*enumerate(peaks)])]
    return f"""<div class="sense-scroll" tabindex="0" role="group" aria-label="Waveform, scrolls sideways">
<div class="sense-wave" style="min-width:{width}px;height:{top + 116}px" role="img"
 aria-label="Waveform of {seconds:.1f} seconds with {len(entities)} entities"><svg style="top:{top}px"
 viewBox="0 0 {max(len(peaks) - 1, 1)} 2" preserveAspectRatio="none"><path d="M{" L".join(outline)} Z"/></svg>
{"".join(marks)}</div></div>{times_table(entities)}"""


def _name_width(entity: dict) -> int:
    """About what the name of an entity takes on the waveform, in CSS pixels."""
    return int(7.2 * len(f"{entity['entity']} {entity['word']}") + 18)


def _rows_of_names(entities: list[dict], seconds: float, width: int) -> list[int]:
    """For each entity a row in which its name meets no other, on a waveform that is `width` pixels wide."""
    rows, reached = [], []  # `reached`: where the last name of each row ends
    for entity in entities:
        size = _name_width(entity)
        left = max(0, min(entity["timestamp"][0] / seconds * width, width - size))
        row = next((i for i, end in enumerate(reached) if end <= left), len(reached))
        reached[row : row + 1] = [left + size]
        rows.append(row)
    return rows


def times_table(entities: list[dict]) -> str:
    """HTML: the entities and their times."""
    if not entities:
        return ""
    rows = []
    for entity in entities:
        cells = f'<td class="tag" style="--tag:{COLOUR_OF[entity["entity"]]}">{entity["entity"]}</td>'
        cells += f"<td>{escape(entity['word'])}</td>"
        cells += "".join(f'<td class="number">{clock(at, 2)}</td>' for at in entity["timestamp"])
        rows.append(f"<tr>{cells}</tr>")
    head = '<th scope="col">Entity</th><th scope="col">Words</th>'
    head += '<th scope="col" class="number">From</th><th scope="col" class="number">To</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def clock(seconds: float, digits: int = 0) -> str:
    """Seconds as a reader likes them: 7.25 s, 1:07."""
    if round(seconds, digits) >= 60:
        minutes, rest = divmod(round(seconds, digits), 60)
        return f"{minutes:.0f}:{rest:0{3 + digits if digits else 2}.{digits}f}"
    return f"{seconds:.{digits}f} s" if digits or seconds == int(seconds) else f"{seconds:.1f} s"


def status(text: str, done: float | None = None) -> str:
    """HTML of the line above the results, with a bar if a share that is done is given."""
    bar = "" if done is None else f'<progress max="1" value="{done:.3f}" aria-label="Progress">{done:.0%}</progress>'
    return f"<div>{escape(text)}{bar}</div>"


def failure(text: str) -> str:
    return f'<div class="sense-error" role="alert">{escape(text)}</div>'


def sentiment_scores(result: dict) -> dict[str, float] | None:
    """For `gr.Label`."""
    return result["sentiment"]["scores"] if result.get("sentiment") else None


def understand(pipe: SpokenLanguageUnderstandingPipeline, path: str | None) -> Iterator[tuple]:
    """
    What the page shows while it hears a recording, and at the end.

    Yields:
        status, highlighted transcript, sentiment and times, as their components take them.
    """
    nothing = ({"text": "", "entities": []}, None, "")
    if path is None:
        yield failure("There is no recording yet: record one, upload a file, or choose an example."), *nothing
        return
    begin = time.monotonic()
    yield status("Reading the recording ..."), *nothing
    try:
        peaks, seconds, is_speech = read_waveform(path)
        if not is_speech:
            raise ValueError("No speech was found in this recording; is the microphone on?")
        yield status("Listening ..."), *nothing[:2], draw_times(peaks, seconds, [])
        result = {"text": ""}
        for event in listen(pipe, path):
            if isinstance(event, str):
                yield gr.skip(), highlights(result, event), gr.skip(), gr.skip()
                continue
            result = event
            times = draw_times(peaks, seconds, result.get("entities", []))
            yield progress(result, seconds, begin), highlights(result), sentiment_scores(result), times
        if not result["text"]:
            raise ValueError("No words were heard in this recording.")
        yield (
            status(f"{clock(seconds, 1)} of audio, understood in {clock(time.monotonic() - begin, 1)}"),
            *[gr.skip()] * 3,
        )
    except (ValueError, ImportError) as error:  # the user's file, in words for the user
        yield failure(str(error).replace(str(path), Path(path).name)), *nothing


def progress(result: dict, seconds: float, begin: float) -> str:
    """Status after a window: how much was heard, and how long the rest will take."""
    heard = result["chunks"][-1]["timestamp"][1] if result["chunks"] else 0.0
    share = min(heard / seconds, 1.0)
    if not share:
        return status("Listening ...")
    left = (time.monotonic() - begin) * (1 - share) / share
    return status(f"Heard {clock(heard)} of {clock(seconds)}, about {clock(round(left))} to go", share)


def make_examples(folder: Path) -> list[tuple[str, str]]:
    """Speaks a sentence of each sentiment into `folder`; their paths and texts."""
    espeak, rng, examples = Espeak(), random.Random(0), []
    candidates = sentences("quickstart", "test", 50, 0)
    for label in SENTIMENTS:
        utterance = min((u for u in candidates if u.sentiment == label and u.entities), key=lambda u: len(u.text))
        path = folder / f"{label.lower()}.wav"
        soundfile.write(path, speak(espeak, utterance.text, VOICES["test"][0], rng, False, False), RATE)
        examples.append((str(path), utterance.text))
    return examples


def audio_files(folder: Path) -> list[Path]:
    """Of a folder; none, where there is no such folder."""
    return [path for path in sorted(folder.glob("*")) if path.suffix.lower() in AUDIO_SUFFIXES]


def find_examples(folder: Path) -> list[tuple[str, str]]:
    """Audio files of a folder, and their names."""
    found = [(str(path), path.stem) for path in audio_files(folder)]
    if not found:
        raise ValueError(f"{folder}: no audio to give as examples; put WAV, FLAC, OGG or MP3 files there")
    return found


def build_page(
    pipe: SpokenLanguageUnderstandingPipeline, name: str, examples: list[tuple[str, str]] = ()
) -> gr.Blocks:
    """
    The page of a model.

    Args:
        pipe: what hears the recordings, one at a time.
        name: of the model, to be shown.
        examples: path and label of each recording offered.
    """
    tasks = pipe.processor.prompts
    with gr.Blocks(title="SENSE", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(
            f"# SENSE\nA small LLM that listens: what was said, what was named and when, how it was meant. `{name}`"
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                audio = gr.Audio(
                    label="Recording", sources=["upload", "microphone"], type="filepath", buttons=["download"]
                )
                with gr.Row():
                    start = gr.Button("Understand", variant="primary", min_width=120, elem_id="start")
                    cancel = gr.Button("Cancel", min_width=80)
                line = gr.HTML(
                    html_template='<div class="sense-status" role="status">${value}</div>', value="", elem_id="status"
                )
            with gr.Column(scale=3, min_width=300):
                text = gr.HighlightedText(label="Transcript", color_map=COLOUR_OF, elem_id="transcript")
                sentiment = gr.Label(label="Sentiment", visible="sa" in tasks, elem_id="sentiment")
                times = gr.HTML(label="When", show_label=True, container=True, padding=True, elem_id="times")
        if examples:
            paths, labels = zip(*examples)
            offered = gr.Examples([[path] for path in paths], audio, example_labels=list(labels))

        def run(path: str | None):
            yield from understand(pipe, path)

        how = {"fn": run, "inputs": audio, "outputs": [line, text, sentiment, times]}
        how |= {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        running = [start.click(**how, api_visibility="private")]
        if examples:
            running.append(offered.load_input_event.then(**how, api_visibility="private"))
        cancel.click(lambda: status("Cancelled."), None, line, cancels=running, api_visibility="private")
    return page.queue(max_size=MAX_WAITING)


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    try:
        examples = find_examples(args.examples) if args.examples else None
        model, processor = load_checkpoint(args.model)
        check_trained(args.model, processor.prompts, "serve")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    pipe = SpokenLanguageUnderstandingPipeline(model=model, processor=processor)
    with tempfile.TemporaryDirectory() as made:
        page = build_page(pipe, public_name(args.model), examples or make_examples(Path(made)))
        fonts = ["system-ui", "sans-serif"]  # the page asks no other server for anything
        theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
        page.launch(
            server_port=args.port, max_file_size=MAX_UPLOAD, theme=theme, css=CSS, footer_links=["gradio", "settings"]
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = os.environ.get("SENSE_MODEL") or SHIPPED
    parser.add_argument(
        "model", nargs="?", default=model, help=f"folder or Hub id; default: $SENSE_MODEL, or {SHIPPED}"
    )
    beside = Path(__file__).with_name("examples")  # in a Space nobody gives options
    parser.add_argument(
        "--examples",
        type=Path,
        default=beside if audio_files(beside) else None,
        help="folder of recordings to offer; default: `examples` beside the page; without it, some are spoken",
    )
    parser.add_argument("--port", type=int, help="default: $GRADIO_SERVER_PORT, or the first free one from 7860")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
