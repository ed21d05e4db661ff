"""
`python -m benchmarks.word_times --dataset DIR --models 125=DIR 250=DIR 500=DIR`: how far off the times of words and
entities are.

The true text of clips with entities is laid along their audio by each model and by Whisper's own decoder, and
compared with a forced alignment by PocketSphinx, a recogniser of another kind (hidden Markov models and a dictionary;
its package brings the English model). Words of the models' own answers are compared too, where they are right.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jiwer
import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from processing import SpokenLanguageUnderstandingPipeline
from processing.alignment import monotonic_path, standardize, word_pieces, word_times
from processing.backbones import resolve_backbone
from processing.datasets import load_corpus
from processing.hub import load_checkpoint
from processing.pipeline_sense import SECONDS_PER_FRAME
from processing.processing_sense import MAX_SECONDS, load_audio
from processing.report import markdown_table
from processing.warm_start import WordAligner

from .report import write_results


HEADS = 8  # of the language model, whose attention is averaged
Spans = list[tuple[float, float]]


class Sphinx:
    """Word times in seconds by PocketSphinx, 10 ms a frame."""

    def __init__(self):
        from pocketsphinx import Decoder

        self.decoder = Decoder(samprate=16000, loglevel="FATAL")

    def knows(self, text: str) -> bool:
        return all(self.decoder.lookup_word(word) is not None for word in text.split())

    def align(self, wave: np.ndarray, text: str) -> Spans | None:
        """None where the alignment fails."""
        self.decoder.set_align_text(text)
        self.decoder.start_utt()
        self.decoder.process_raw((wave.clip(-1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self.decoder.end_utt()
        segments = [s for s in self.decoder.seg() or [] if s.word[0] not in "<[("]
        if [s.word.partition("(")[0] for s in segments] != text.split():
            return None
        return [(s.start_frame / 100, (s.end_frame + 1) / 100) for s in segments]


def choose_clips(rows, number: int) -> list[dict]:
    """The first clips with entities that PocketSphinx can align, each with its word times as `sphinx`."""
    sphinx, chosen = Sphinx(), []
    for row in rows:
        if row["entities"] and sphinx.knows(row["text"]) and len(chosen) < number:
            spans = sphinx.align(load_audio(row["audio"]), row["text"])
            if spans is not None:
                chosen.append({**row, "sphinx": spans})
    return chosen


class Hearing:
    """A model's view of a clip: its frames, and what the language model makes of its audio tokens."""

    def __init__(self, model, processor, row: dict):
        self.model, self.processor, self.words = model, processor, row["text"].split()
        features = processor.audio_features([load_audio(row["audio"])])
        encoded, self.mask = model.model.encode(**features)
        self.frames = encoded.last_hidden_state
        self.num_frames = int(self.mask.sum())
        self.pooled, self.valid = model.model.multi_modal_projector.pool(self.frames, self.mask)

    def by_frames(self) -> Spans:
        return self._by_embeddings(self.frames[0, : self.num_frames], SECONDS_PER_FRAME)

    def by_audio_tokens(self) -> Spans:
        return self._by_embeddings(self.pooled[self.valid], MAX_SECONDS / self.processor.num_audio_tokens)

    def _by_embeddings(self, speech: torch.Tensor, seconds: float) -> Spans:
        weights = self.model.get_input_embeddings().weight
        return word_times(
            self.model.model.multi_modal_projector(speech), self.words, self.processor.tokenizer, weights, seconds
        )

    def attention(self) -> tuple[torch.Tensor, list[int]]:
        """`(layers * heads, tokens, audio tokens)`, of the token to be said next, and each word's last token."""
        prompt = self.processor.prompt_ids(int(self.valid.sum()), ["asr"])[0]
        pieces = word_pieces(self.words, self.processor.tokenizer)
        answer = [token for piece in pieces for token in piece]
        ids = torch.tensor([prompt + answer])
        audio = {"pooled_features": self.pooled, "pooled_features_mask": self.valid}
        found = self.model(input_ids=ids, **audio, output_attentions=True).attentions
        heads = torch.cat([layer[0] for layer in found]).float()
        says = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        lasts = np.cumsum([len(piece) for piece in pieces]) - 1
        return heads[:, says][:, :, ids[0] == self.model.config.audio_token_id], lasts.tolist()


def choose_heads(model, processor, rows: list[dict]) -> torch.Tensor:
    """The heads that look where the word is, by Whisper's recipe: on other clips, the share of attention within it."""
    seconds, totals = MAX_SECONDS / processor.num_audio_tokens, 0
    for row in rows:
        attention, lasts = Hearing(model, processor, row).attention()
        centres = (torch.arange(attention.shape[-1]) + 0.5) * seconds
        for last, (start, end) in zip(lasts, row["sphinx"]):
            inside = (centres >= start - seconds / 2) & (centres <= end + seconds / 2)
            totals = totals + attention[:, last, inside].sum(-1) / attention[:, last].sum(-1)
    return totals.topk(HEADS).indices


def by_attention(hearing: Hearing, heads: torch.Tensor) -> Spans | None:
    """Whisper's way, dynamic time warping over these heads' attention; None where there are too few audio tokens."""
    attention, lasts = hearing.attention()
    scores = standardize(attention[heads], 1).mean(0)
    if scores.shape[1] < scores.shape[0]:
        return None
    path = monotonic_path(scores.numpy())
    ends = [path[last][1] * MAX_SECONDS / hearing.processor.num_audio_tokens for last in lasts]
    return list(zip([0.0, *ends[:-1]], ends))


def by_whisper(hearing: Hearing, aligner: WordAligner, text: str) -> Spans:
    ends = [frame * SECONDS_PER_FRAME for frame in aligner.word_times(hearing.frames, text, hearing.num_frames)]
    return list(zip([0.0, *ends[:-1]], ends))


def entity_spans(row: dict, spans: Spans) -> Spans:
    """Of each entity, from its first word's start to its last word's end."""
    found = []
    for _, start, length in row["entities"]:
        first = row["text"][:start].count(" ")
        last = first + row["text"][start : start + length].count(" ")
        found.append((spans[first][0], spans[last][1]))
    return found


def errors(rows: list[dict], spans: list[Spans | None], truth: list[Spans]) -> dict:
    """Absolute errors of starts and ends in ms: the median over words and over entities, and how many."""
    words, entities = [], []
    for row, mine, true in zip(rows, spans, truth):
        if mine is not None:
            words += _edges(mine, true)
            entities += _edges(entity_spans(row, mine), entity_spans(row, true))
    return {"words": _summary(words), "entities": _summary(entities)}


def _edges(mine: Spans, true: Spans) -> list[tuple[float, float]]:
    return [(abs(a - c), abs(b - d)) for (a, b), (c, d) in zip(mine, true, strict=True)]


def _summary(found: list[tuple[float, float]]) -> dict:
    if not found:
        raise ValueError("not one word to measure: the model had none right, or the clips have none with known times")
    milliseconds = 1000 * np.array(found)
    names = ("start", "end")
    return {
        "n": len(found),
        "median": float(np.median(milliseconds)),
        "p90": float(np.percentile(milliseconds, 90)),
    } | {name: float(np.median(milliseconds[:, i])) for i, name in enumerate(names)}


def heard_errors(model, processor, rows: list[dict]) -> dict:
    """Of the words that a model's own answer has right: what a user of the pipeline sees."""
    pipe = SpokenLanguageUnderstandingPipeline(model=model, processor=processor)
    how = {"return_timestamps": "word", "return_entities": False, "return_sentiment": False, "batch_size": 8}
    found, words = [], 0
    for row, heard in zip(rows, pipe([load_audio(row["audio"]) for row in rows], progress=False, **how)):
        words += len(row["sphinx"])
        if heard["text"]:
            for part in jiwer.process_words(row["text"], heard["text"]).alignments[0]:
                if part.type == "equal":
                    mine = [chunk["timestamp"] for chunk in heard["chunks"][part.hyp_start_idx : part.hyp_end_idx]]
                    found += _edges(mine, row["sphinx"][part.ref_start_idx : part.ref_end_idx])
    return _summary(found) | {"of": words}


@torch.inference_mode()
def measure_model(folder: str, rows: list[dict], tuning: list[dict], aligner: WordAligner) -> dict:
    PartialState(cpu=True)  # what is measured is a CPU, on machines with a GPU too
    model, processor = load_checkpoint(folder, "float32")
    model.set_attn_implementation("eager")  # the one that returns its weights
    heads = choose_heads(model, processor, tuning)
    methods: dict[str, Callable[[Hearing, dict], Spans | None]] = {
        "encoder frames": lambda hearing, row: hearing.by_frames(),
        "audio tokens": lambda hearing, row: hearing.by_audio_tokens(),
        "attention": lambda hearing, row: by_attention(hearing, heads),
        "whisper": lambda hearing, row: by_whisper(hearing, aligner, row["text"]),
    }
    spans = {name: [] for name in methods}
    for row in tqdm(rows, desc=folder):
        hearing = Hearing(model, processor, row)
        for name, method in methods.items():
            spans[name].append(method(hearing, row))
    sphinx = [row["sphinx"] for row in rows]
    found = {name: errors(rows, mine, sphinx) for name, mine in spans.items()}
    found["against whisper"] = errors(rows, spans["encoder frames"], spans["whisper"])
    found["heard"] = heard_errors(model, processor, rows)
    return found | {"audio_tokens": processor.num_audio_tokens}


def page(results: dict) -> str:
    """The results in Markdown."""
    rows = []
    for name, found in results["models"].items():
        step = f"{30000 / found['audio_tokens']:.0f} ms"
        for method in ("encoder frames", "audio tokens", "attention"):
            rows.append([name, step, f"SENSE, {method}", *_cells(found[method])])
    whisper = next(iter(results["models"].values()))["whisper"]
    rows.append(["-", "20 ms", "Whisper's own word times", *_cells(whisper)])
    header = ["audio tokens", "of", "method", "entities", "90 % below", "start", "end", "words", "90 % below"]
    other = []
    for name, found in results["models"].items():
        against, heard = found["against whisper"], found["heard"]
        medians = [against["entities"]["median"], against["words"]["median"], heard["median"]]
        other.append([name, *(f"{median:.0f}" for median in medians), f"{heard['n']} of {heard['of']}"])
    titles = ["audio tokens", "entities against Whisper", "words against Whisper", "words heard right", "how many"]
    return "\n\n".join([markdown_table(header, rows), markdown_table(titles, other), results["about"]]) + "\n"


def _cells(found: dict) -> list[str]:
    entities, words = found["entities"], found["words"]
    numbers = [entities["median"], entities["p90"], entities["start"], entities["end"], words["median"], words["p90"]]
    return [f"{number:.0f}" for number in numbers]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--models", nargs="+", required=True, help="NAME=FOLDER of each")
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    args = parser.parse_args(argv)
    rows, tuning = (
        choose_clips(load_corpus(args.dataset, split, text_column=args.text_column), clips)
        for split, clips in (("test", args.clips), ("dev", 20))
    )
    results = {"models": {}}
    for pair in args.models:
        name, _, folder = pair.partition("=")
        whisper = json.loads((Path(folder) / "config.json").read_text())["backbones"]["audio"]["id"]
        aligner = WordAligner.from_pretrained(resolve_backbone(whisper), "cpu")
        results["models"][name] = measure_model(folder, rows, tuning, aligner)
    number = sum(len(row["entities"]) for row in rows)
    words = sum(len(row["sphinx"]) for row in rows)
    results["about"] = (
        f"Absolute errors in ms, medians over starts and ends, of {number} entities and {words} words in {len(rows)} "
        f"test clips of {args.dataset.rstrip('/').rpartition('/')[2]}."
    )
    write_results(args.out, "word_times", results, page(results))
    return results


if __name__ == "__main__":
    main()
