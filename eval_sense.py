"""
Scores a SENSE checkpoint on a dataset: transcript, named entities, sentiment, beside what simpler systems score.

    python eval_sense.py --model DIR --dataset DIR --split test --output_dir OUT --tasks asr ner sa \\
        --controls cascade gold majority --num_beams 5
    accelerate launch --num_processes 2 eval_sense.py ...     # same result, in less time; on CPUs torchrun

Writes OUT/metrics.json, OUT/utterances.jsonl and pictures, prints the tables and the worst utterances; with --report
also OUT/report.html, a page to look at and listen to.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import concatenate_datasets
from tqdm.auto import tqdm
from transformers import AutoConfig, BatchFeature

from modeling_sense import QUANTIZATIONS
from processing import report
from processing.arguments import positive
from processing.backbones import resolve_backbone
from processing.bad_rows import ON_BAD_ROW, BadRows
from processing.controls import SpacyTagger, VaderSentiment, majority_sentiment
from processing.datasets import dataset_name, first_rows, load_corpus
from processing.evaluation_page import describe_run, read_history, write_evaluation_page
from processing.hub import load_checkpoint, start_processes
from processing.pipeline_sense import answer_settings
from processing.processing_sense import AUDIO_TOKEN, MAX_SECONDS, load_audio
from processing.scoring import score, wer_by, word_errors
from processing.tasks import TASKS, Answer, make_tasks
from processing.transcription import WhisperDecoder


CONTROLS = ("cascade", "gold", "majority")


def understand(
    model,
    processor,
    dataset,
    tasks=("asr",),
    *,
    num_beams: int = 1,
    batch_size: int = 8,
    constrained: bool = False,
    cache=None,
) -> dict[str, list[str]]:
    """
    The model's answer to each task for each row of `dataset`, in order, from one listen to each clip; from an
    `EncoderCache`, if there is one, of which each row has its `cache_index`. With `constrained` answers keep to their
    tasks' grammars. Under several processes each does its share of the rows and all get the whole lists.

    Returns:
        by task, the answers as the model writes them.
    """

    def answer(rows: list[dict]) -> list[tuple[str, ...]]:
        if cache is None:
            inputs = processor.apply_requests([row["audio"] for row in rows], tasks)
            seconds = (inputs["input_features_mask"].sum(1) / 100).tolist()  # a mel step is 10 ms
        else:
            inputs = BatchFeature(cache.batch([row["cache_index"] for row in rows]))
            lengths = inputs["pooled_features_mask"].sum(1).tolist()
            inputs["prompts"] = [processor.prompt_ids(n, tasks) for n in lengths]
            seconds = [n * MAX_SECONDS / processor.num_audio_tokens for n in lengths]
        limits = [processor.most_tokens(name, s) for s in seconds for name in tasks]
        constraint = processor.constrain(list(tasks) * len(rows), limits) if constrained else None
        how = answer_settings(limits, constraint)
        answers = model.generate_branches(**inputs, num_beams=num_beams, **how)
        return [tuple(_decode(processor, of_clip)) for of_clip in answers]

    answers = _over_processes(dataset, answer, batch_size, "listening")
    return dict(zip(tasks, map(list, zip(*answers))))


def understand_text(
    model, processor, dataset, tasks=("asr",), *, num_beams: int = 1, batch_size: int = 8, constrained: bool = False
) -> dict[str, list[str]]:
    """The same with the true transcript in the audio's place: what the language model makes of perfect hearing."""

    def answer(rows: list[dict]) -> list[tuple[str, ...]]:
        found = []
        for name in tasks:
            prompt = processor.build_prompt(processor.prompts[name])
            texts = [prompt.replace(AUDIO_TOKEN, processor.plain_text(row["text"])) for row in rows]
            inputs = processor(text=texts)
            limits = [processor.most_tokens(name, row["duration"] or MAX_SECONDS) for row in rows]
            constraint = processor.constrain([name] * len(rows), limits) if constrained else None
            output = model.generate(**inputs, num_beams=num_beams, **answer_settings(limits, constraint))
            found.append(_decode(processor, output[:, inputs["input_ids"].shape[1] :]))
        return list(zip(*found))

    answers = _over_processes(dataset, answer, batch_size, "reading")
    return dict(zip(tasks, map(list, zip(*answers))))


def _decode(processor, answers) -> list[str]:
    return [answer.strip() for answer in processor.batch_decode(answers, skip_special_tokens=True)]


def transcribe_whisper(source, dataset, *, num_beams: int = 1, batch_size: int = 8, device="cpu") -> list[str]:
    """What Whisper's own decoder hears. `source` is a Hub id or folder of a Whisper checkpoint."""
    decoder = WhisperDecoder(source, device)

    def answer(rows: list[dict]) -> list[str]:
        clips = [load_audio(row["audio"]) for row in rows]
        return decoder(clips, [row["language"] for row in rows], num_beams=num_beams)

    return _over_processes(dataset, answer, batch_size, "whisper's decoder")


def _over_processes(dataset, answer: Callable[[list[dict]], list], batch_size: int, label: str) -> list:
    """Calls `answer` on batches of rows, longest first, shared out over the processes; results in row order."""
    state = PartialState()
    durations = dataset["duration"]
    order = sorted(range(len(durations)), key=lambda i: (-(durations[i] or 0), i))
    mine = order[state.process_index :: state.num_processes]
    found = []
    batches = range(0, len(mine), batch_size)
    for start in tqdm(batches, desc=label, unit="batch", disable=not state.is_main_process):
        rows = mine[start : start + batch_size]
        found += zip(rows, answer([dataset[i] for i in rows]))
    everyone = gather_object(found) if state.num_processes > 1 else found
    return [given for _, given in sorted(everyone)]


def shuffle_audio(dataset):
    """The same labels, each beside the clip of another row: what a model scores that does not listen."""
    names = [name for name in ("text", "entities", "sentiment") if name in dataset.column_names]
    rows = np.random.default_rng(0).permutation(len(dataset))
    others = np.empty_like(rows)
    others[rows] = np.roll(rows, -1)  # one cycle through all rows, so that none keeps its own
    labels = dataset.select_columns(names).select(others)
    return concatenate_datasets([dataset.remove_columns(names), labels], axis=1)


def parse_answers(prompts: dict[str, str], answers: dict[str, list[str]]) -> dict[str, list[Answer]]:
    """By task, what the answers say."""
    return {name: [task.parse(a) for a in answers[name]] for name, task in make_tasks(prompts, answers).items()}


def run_controls(
    args, model, processor, dataset, tasks: list[str], most: str | None, how: dict
) -> dict[str, dict[str, list[Answer]]]:
    """By system, the answers of each control that was asked for."""
    systems = {}
    if "cascade" in args.controls:
        heard = transcribe_whisper(whisper_of(model), dataset, device=model.device, **how)
        systems["cascade: Whisper's own decoder, then spaCy / VADER"] = from_text(heard, tasks)
    if "gold" in args.controls:
        reading = [name for name in tasks if name != "asr"]
        systems["true text, then spaCy / VADER"] = from_text(list(dataset["text"]), reading)
        read = understand_text(model, processor, dataset, reading, constrained=args.constrained, **how)
        systems["true text, then the same LLM"] = parse_answers(processor.prompts, read)
    if most is not None:
        systems[f"always {most}"] = {"sa": [Answer(sentiment=most)] * len(dataset)}
    return systems


def check_controls(args, model, tasks: list[str]) -> str | None:
    """
    What would keep a control from running comes to light before hours of decoding, not after. Returns the class for
    `majority`, if that is asked for.
    """
    if "cascade" in args.controls and AutoConfig.from_pretrained(whisper_of(model)).architectures == [
        "WhisperEncoder"
    ]:
        raise ValueError(f"{whisper_of(model)} is an encoder alone: leave cascade out of --controls")
    if {"cascade", "gold"} & set(args.controls):
        from_text([], tasks)
    return majority_class(args) if "majority" in args.controls and "sa" in tasks else None


def whisper_of(model) -> str:
    """The checkpoint that the model's encoder came from."""
    return resolve_backbone(model.config.backbones["audio"]["id"])


def majority_class(args) -> str:
    """The most frequent sentiment of the training split."""
    bad_rows = BadRows(args.on_bad_row)
    rows = load_rows(args, args.train_split, bad_rows)
    bad_rows.settle()
    return majority_sentiment(rows["sentiment"])


def from_text(texts: list[str], tasks: list[str]) -> dict[str, list[Answer]]:
    """What well-known text tools make of transcripts."""
    answers = {}
    if "asr" in tasks:
        answers["asr"] = [Answer(text=text) for text in texts]
    if "ner" in tasks:
        tagged = SpacyTagger.from_pretrained().tag(texts)
        answers["ner"] = [Answer(text=text, entities=entities) for text, entities in zip(texts, tagged)]
    if "sa" in tasks:
        answers["sa"] = [Answer(sentiment=found) for found in VaderSentiment().classify(texts)]
    return answers


def worded_task(parsed: dict[str, list[Answer]]) -> str | None:
    """The first task whose answers have words."""
    return next((name for name, given in parsed.items() if given and given[0].text is not None), None)


def utterance_table(
    rows: list[dict], seconds: list[float], answers: dict[str, list[str]], parsed: dict[str, list[Answer]]
) -> list[dict]:
    """
    One dict an utterance, the worst transcript first: `id`, `index` in the rows, `speaker`, `duration` in seconds, the
    references, by task the answer as it was written and what was read in it, and of the first task with words
    `heard` (the words), `errors`, `words`, `wer`.
    """
    worded = worded_task(parsed)
    table = []
    for i, row in enumerate(rows):
        line = {"id": row["id"], "index": i, "speaker": row["speaker"], "duration": seconds[i]}
        line["reference"] = row["text"]
        line |= {"reference_entities": row["entities"], "reference_sentiment": row["sentiment"]}
        for name in answers:
            line[name] = answers[name][i]
        if "ner" in parsed:
            line |= {"entities": parsed["ner"][i].entities, "malformed": parsed["ner"][i].malformed}
        if worded:
            heard = parsed[worded][i].text
            errors, words = word_errors(row["text"], heard)
            line |= {"heard": heard, "errors": errors, "words": words, "wer": 100 * errors / max(words, 1)}
        table.append(line)
    return sorted(table, key=lambda line: -line.get("wer", 0))


def wer_of_groups(rows: list[dict], answers: dict[str, list[Answer]], seconds: list[float], task: str | None) -> dict:
    """`wer_by` of a task's answers, if it was asked: controls that were given the true words have no `asr`."""
    return {"wer_by": wer_by(rows, answers[task], seconds)} if task in answers else {}


def load_rows(args, split: str, bad_rows: BadRows | None = None):
    """One split of the dataset that the command line names."""
    with PartialState().main_process_first():  # one process prepares a Hub dataset, the others find it prepared
        return load_corpus(
            args.dataset,
            split,
            audio_column=args.audio_column,
            text_column=args.text_column,
            lowercase=args.lowercase,
            config_name=args.config_name,
            entity_tags="combined",
            bad_rows=bad_rows,
        )


def require_writable(folder: Path):
    """Makes the folder. Raises ValueError where nothing can be written to it: better now than after the decoding."""
    if not report.make_folder(folder):
        raise ValueError(f"--output_dir {folder} is no folder that can be written to: name another")


def measured_on(args, model) -> dict:
    """What the scores are of, for the card: the data (a folder by its own name), the weights and the decoding."""
    name, on_hub = dataset_name(args.dataset)
    return {
        "dataset": name,
        "on_hub": on_hub,
        "config_name": args.config_name,
        "split": args.split,
        "max_samples": args.max_samples,
        "num_beams": args.num_beams,
        "constrained": args.constrained,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "quantize": args.quantize,  # on loading: not as it was saved
    }


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    start_processes()
    model, processor = load_checkpoint(args.model, args.dtype, revision=args.revision, quantize=args.quantize)
    tasks = args.tasks or list(processor.prompts)
    make_tasks(processor.prompts, tasks)  # an unknown one should not wait for the others
    bad_rows = BadRows(args.on_bad_row, args.output_dir)
    dataset = bad_rows.check(first_rows(load_rows(args, args.split, bad_rows), args.max_samples))
    bad_rows.settle()
    most = check_controls(args, model, tasks)
    folder = Path(args.output_dir)
    require_writable(folder)
    how = {"num_beams": args.num_beams, "batch_size": args.batch_size}

    begin = time.perf_counter()
    answers = understand(model, processor, dataset, tasks, constrained=args.constrained, **how)
    seconds = time.perf_counter() - begin
    parsed = parse_answers(processor.prompts, answers)
    rows = list(dataset.remove_columns("audio"))
    durations = [len(load_audio(row["audio"])) / 16000 for row in dataset]
    metrics = score(rows, parsed) | wer_of_groups(rows, parsed, durations, worded_task(parsed))
    audio_seconds = sum(durations)
    metrics |= {"n_utterances": len(rows), "audio_seconds": audio_seconds, "rtf": seconds / audio_seconds}
    if args.shuffled_control:
        # The answers do not depend on the labels: pairing them otherwise is the same as shuffling the clips.
        shuffled = score(list(shuffle_audio(dataset).remove_columns("audio")), parsed)
        metrics |= {f"{name}_shuffled": value for name, value in shuffled.items()}
    systems = run_controls(args, model, processor, dataset, tasks, most, how)
    metrics["controls"] = {
        name: score(rows, given) | wer_of_groups(rows, given, durations, "asr") for name, given in systems.items()
    }
    metrics["bad_rows"] = bad_rows.counts
    metrics["measured_on"] = measured_on(args, model) | {"bad_rows": len(bad_rows)}
    if PartialState().is_main_process:
        table = utterance_table(rows, durations, answers, parsed)
        report.write_evaluation(folder, metrics, table, args.show)
        if args.report:
            about = describe_run(args, model, PartialState().num_processes, metrics["rtf"])
            history = read_history(args.model)
            write_evaluation_page(folder / "report.html", metrics, table, parsed, dataset, about, history)
    return metrics


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SENSE model or adapter: folder or Hub id")
    parser.add_argument("--revision", help="of a model on the Hub: branch, tag or commit")
    parser.add_argument("--dataset", required=True, help="audiofolder, LibriSpeech tree or Hub dataset")
    parser.add_argument("--config_name", help="configuration of a Hub dataset")
    parser.add_argument("--split", default="test")
    parser.add_argument("--train_split", default="train", help="where the majority control finds its class")
    parser.add_argument("--audio_column", default="audio")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--lowercase", action="store_true", help="transcripts in lower case, as LibriSpeech needs")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="default: all that the model has a prompt for")
    parser.add_argument("--num_beams", type=positive, default=1)
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument(
        "--constrained", action="store_true", help="keep answers to their grammar: whole tags, one of the sentiments"
    )
    parser.add_argument("--max_samples", type=positive)
    parser.add_argument("--on_bad_row", default="stop", choices=ON_BAD_ROW, help="skip: score the others, and say so")
    parser.add_argument("--dtype", default="auto", help="auto (as saved), float32, bfloat16, float16")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="hold the language model in 8 or 4 bits")
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=[], help="what to compare with")
    parser.add_argument("--shuffled_control", action="store_true", help="also score with the clips shuffled")
    parser.add_argument("--show", type=int, default=10, help="how many of the worst utterances to print")
    parser.add_argument("--report", action="store_true", help="also write report.html, with the worst clips to hear")
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
