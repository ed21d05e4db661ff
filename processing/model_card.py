"""The model card: what a SENSE model is, how it was trained, how good it is. It says what is known, and no more."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_sense.modeling_sense import is_hub_id, is_trained

from .backbones import BACKBONES, FROM_PACKAGES
from .datasets import dataset_name
from .pipeline_sense import TASK
from .processing_sense import MAX_SECONDS
from .report import comparison, markdown_table, write_text
from .scoring import HEADLINES


TRAINING = "training.json"
TRAINER_STATE = "trainer_state.json"
RECIPE = (  # what a card tells of a run's settings
    "tasks",
    "entity_tags",
    "train_entities",
    "label_noise",
    "filter_labels",
    "balance_classes",
    "max_train_samples",
    "max_eval_samples",
    "backbone_dtype",
    "gguf_file",
    "quantize",
    "num_audio_tokens",
    "audio_tokens",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "classifier",
    "classifier_alpha",
    "warm_start",
    "warm_start_clips",
    "text_as_speech",
    "speeds",
    "time_mask",
    "time_stretch",
    "answer_noise",
    "learning_rate",
    "adapter_learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "max_minutes",
    "seed",
)
HUB_TASKS = {  # by the beginning of a metric's name, the Hub's task
    "wer": "automatic-speech-recognition",
    "ner": "token-classification",
    "sa": "audio-classification",
}
TASK_TAGS = {"ner": "named-entity-recognition", "sa": "sentiment-analysis"}
ANSWERS = {
    "asr": "the transcript",
    "ner": "the transcript with its entities in tags, such as `<PERSON> anna </PERSON>`",
    "sa": "the sentiment: Negative, Neutral or Positive",
}
WHOLE_SAMPLE = """\
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

model_id = "{repo_id}"
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)
model = AutoModelForSpeechSeq2Seq.from_pretrained(model_id, trust_remote_code=True).eval()
"""
ADAPTER_SAMPLE = """\
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

model_id = "{repo_id}"
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)
sense = get_class_from_dynamic_module("modeling_sense.SenseForConditionalGeneration", model_id)
model = sense.from_adapter(model_id)  # fetches the backbones
"""
PACKAGE_SAMPLE = """\
from processing.hub import load_checkpoint

model, processor = load_checkpoint("{repo_id}")
"""
ASK = """\
print(model.understand(["clip.wav"], tasks={tasks}, processor=processor, num_beams=5))
"""


def record_training(folder: Path, recipe: dict, rows, state, sizes: dict[str, int]):
    """
    Writes training.json: how a model came about, stage after stage, for its card.

    Args:
        folder: output folder of this stage.
        recipe: fields of `SenseArguments` and `TrainingArguments`.
        rows: the training split; of a stream the first rows.
        state: of the Trainer.
        sizes: trained parameters, by part.
    """
    durations = [None] if recipe["streaming"] else rows["duration"]
    name, on_hub = dataset_name(recipe["dataset_dir"])
    text = recipe["text_as_speech"]
    stage = {
        "dataset": name,
        "on_hub": on_hub,
        "languages": sorted(set(rows["language"]) - {None}),
        "clips": None if recipe["streaming"] else len(durations),
        "hours": None if None in durations else sum(durations) / 3600,
        "trained_parameters": sizes,
        "steps": state.global_step,
        "epochs": state.epoch,
        "processes": PartialState().num_processes,
        "recipe": {name: _plain(recipe[name]) for name in RECIPE} | {"text_as_speech": text and Path(text).name},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    earlier = []
    if recipe["init_from"]:  # a stage of which nothing is known is one all the same
        earlier = _stages(recipe["init_from"])
    write_text(folder / TRAINING, json.dumps([*earlier, stage], indent=2) + "\n")


def _plain(value):
    return value if isinstance(value, dict | list | str | int | float | None) else str(getattr(value, "value", value))


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_metrics(path: str | os.PathLike) -> dict:
    """
    A metrics.json of eval_sense.py, or the one of its folder.

    Raises:
        ValueError: there is none, or it is another one.
    """
    path = Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a metrics.json of eval_sense.py")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give a metrics.json of eval_sense.py") from error
    if not isinstance(found, dict) or "n_utterances" not in found:
        raise ValueError(f"{path}: it has no n_utterances; give a metrics.json of eval_sense.py")
    return found


def make_card(
    model,
    processor,
    *,
    repo_id: str,
    run: str | os.PathLike | None = None,
    metrics: Sequence[str | os.PathLike] = (),
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
    license: str | None = None,
    notes: str | None = None,
    adapter_only: bool = False,
) -> ModelCard:
    """
    The card of a model.

    Args:
        model, processor: as they are published.
        repo_id: Hub id or folder that the code sample loads.
        run: output folder of train_sense.py, whose training.json, trainer_state.json and metrics.json are told of.
        metrics: metrics.json files of eval_sense.py.
        datasets: Hub ids or names of the training data, beside those in `run`.
        language: ISO codes, beside those in `run`.
        license: the Hub's identifier; none is claimed by default.
        notes: Markdown of whoever publishes it, which comes first: what no file of a run knows.
        adapter_only: the repository holds what was trained alone.

    Raises:
        ValueError: a metrics file that can't be read.
    """
    stages = _stages(run)
    scores = [read_metrics(path) for path in metrics]
    known = [stage for stage in stages if stage]
    trained_on = list(dict.fromkeys([*datasets, *(stage["dataset"] for stage in known)]))
    local = {stage["dataset"] for stage in known if not stage["on_hub"]}
    languages = {*language, *(code for stage in known for code in stage["languages"])}
    results = [result for found in scores for result in eval_results(found)]
    data = ModelCardData(
        base_model=_base_models(model.config.backbones) or None,
        datasets=[name for name in trained_on if name not in local and _has_owner(name)] or None,
        language=sorted(languages) or None,
        license=license,
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=_tags(model, processor, adapter_only),
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    sections = {
        "Use": _use(model, processor, repo_id, adapter_only),
        "Intended use": _intended_use(processor, sorted(languages)),
        "Limits": _limits(processor, scores, adapter_only),
        "Training": _training(stages, trained_on, run),
        "Parameters": _parameters(model),
        "Scores": _scores(scores),
        "Licence": _licence(model, license),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    top = [f"---\n{data.to_yaml()}\n---", f"# {repo_id.rpartition('/')[2]}", _lead(model)]
    return ModelCard("\n\n".join([*top, *([notes.strip()] if notes else []), body]) + "\n")


def _stages(run: str | os.PathLike | None) -> list[dict | None]:
    """Of the runs that made the model, oldest first, what is known; None for one of which nothing is."""
    if run is None:
        return [None]
    found = _read_json(Path(run) / TRAINING)
    if found is None:  # a checkpoint lies in its run's folder, and knows how far the run was
        found, state = _read_json(Path(run).parent / TRAINING), _read_json(Path(run) / TRAINER_STATE)
        if found and found[-1] and state:
            found[-1] |= {"steps": state["global_step"], "epochs": state["epoch"]}
    return found or [None]


def _base_models(backbones: dict | None) -> list[str]:
    """Hub ids; a backbone that is a folder's name has none."""
    known = {name: backbone.hub_id for name, backbone in BACKBONES.items()}
    names = [backbones[part]["id"] for part in ("audio", "text") if part in (backbones or {})]
    found = [known.get(name.removesuffix(FROM_PACKAGES), name) for name in names]
    return [name for name in found if _has_owner(name)]


def _has_owner(name: str) -> bool:
    """Whether it is a Hub id with its owner: alone, our names for backbones would pass as ids."""
    return "/" in name and is_hub_id(name)


def _tags(model, processor, adapter_only: bool) -> list[str]:
    tags = ["sense", "speech", "speech-language-model"]
    tags += [TASK_TAGS[task] for task in processor.prompts if task in TASK_TAGS]
    return tags + ["lora"] * (model.config.lora is not None) + ["adapter"] * adapter_only


def eval_results(metrics: dict) -> list[EvalResult]:
    """
    The headline scores for the card's model-index; none where it is not known what they were measured on, of a part
    of the split (bad rows that were left out make it one), and of a model that was quantised as it was loaded, which
    is not the one that is published.
    """
    on = metrics.get("measured_on")
    if on is None or on.get("max_samples") or on.get("bad_rows") or on.get("quantize"):
        return []
    where = {"dataset_name": on["dataset"], "dataset_type": on["dataset"]}
    where |= {"dataset_config": on["config_name"], "dataset_split": on["split"]}
    return [
        EvalResult(
            task_type=HUB_TASKS[key.partition("_")[0]],
            metric_type="wer" if key.startswith("wer") else "f1",
            metric_name=_metric_name(key),
            metric_value=round(metrics[key], 2),
            **where,
        )
        for key in HEADLINES
        if key in metrics
    ]


def _metric_name(key: str) -> str:
    base = key.removesuffix("_normalized")
    return HEADLINES[base] + (", normalised" if key != base else "")


def _lead(model) -> str:
    names = model.config.backbones or {}
    audio, text = (_name(names.get(part)) for part in ("audio", "text"))
    return (
        f"A SENSE speech-language model ([paper](https://arxiv.org/abs/2509.04473)): the frozen encoder of {audio}, "
        f"an adapter that pools and projects what it hears, and {text}, which answers in text."
    ) + _from_packages(names)


def _from_packages(backbones: dict) -> str:
    """Backbones that nobody gets from the Hub, and what is different in them."""
    names = [backbones[part]["id"] for part in ("audio", "text") if part in backbones]
    found = [name for name in names if name.endswith(FROM_PACKAGES)]
    if not found:
        return ""
    notes = "".join(f" {name} is {BACKBONES[name].note}." for name in found if BACKBONES[name].note)
    return (
        f"\n\n`{FROM_PACKAGES}`: these weights are unpacked from Python packages, pinned by version and checked by "
        f"SHA-256, by processing/backbones.py of the package sense-asr: the same on every machine.{notes} Others, the "
        "Hub's too, are refused: what was trained does not fit them."
    )


def _name(backbone: dict | None) -> str:
    if not backbone:
        return "a backbone that was not recorded"
    name = Path(backbone["id"]).name if Path(backbone["id"]).is_dir() else backbone["id"]
    return name + (f" (revision {backbone['revision']})" if backbone.get("revision") else "")


def _use(model, processor, repo_id: str, adapter_only: bool) -> str:
    sample, backbones = WHOLE_SAMPLE, model.config.backbones
    if adapter_only:
        on_hub = all(_has_owner(backbones[part]["id"]) for part in ("audio", "text"))
        sample = ADAPTER_SAMPLE if on_hub else PACKAGE_SAMPLE
    needs = ["transformers>=5.24", "torch", "soundfile"] + ["peft"] * (model.config.lora is not None)
    needs += _needs_of_weights(model, adapter_only)
    if sample == PACKAGE_SAMPLE:
        install = "With the package sense-asr, which brings the backbones (`pip install .` in its sources):"
        without = ""
    else:
        install = (
            f"```bash\npip install {' '.join(repr(n) if '>' in n else n for n in needs)}"
            "    # torchaudio too, for audio that is not at 16 kHz\n```"
        )
        without = (
            " With the package sense-asr installed, `import modeling_sense, processing` takes the place of "
            "`trust_remote_code=True`."
        )
    code = f"{sample.format(repo_id=repo_id)}{ASK.format(tasks=json.dumps(list(processor.prompts)))}"
    return f"{install}\n\n```python\n{code}```\n\nClips are paths, bytes or arrays.{without}"


def _needs_of_weights(model, adapter_only: bool) -> list[str]:
    """The packages that read what the language model's weights are held in."""
    needs = []
    if model.quantization is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        needs = {"bitsandbytes": ["bitsandbytes", "accelerate"]}.get(method, [str(getattr(method, "value", method))])
    if adapter_only and model.config.backbones["text"].get("gguf_file"):  # a whole model holds it unpacked
        needs.append("gguf")
    return needs


def _intended_use(processor, languages: list[str]) -> str:
    asked = "\n".join(f"- `{task}`: {ANSWERS.get(task, 'see its prompt')}" for task in processor.prompts)
    spoken = f"Language of the training speech: {', '.join(languages)}." if languages else "Languages: not recorded."
    return f"What it answers about a clip of speech:\n\n{asked}\n\n{spoken}"


def _limits(processor, scores: list[dict], adapter_only: bool) -> str:
    longer = "" if adapter_only else f" The pipeline `{TASK}` takes longer recordings (pip install silero-vad)."
    lines = [
        f"A clip lasts {MAX_SECONDS} s at most.{longer}",
        "Answers are generated: words, entities and sentiments can be made up, most of all in noise, in silence and "
        "in speech unlike that of the training data.",
        "It answers the prompts it was trained with; another instruction costs accuracy.",
        "It was not tested for differences between groups of speakers. No decision about people should rest on it.",
    ]
    if "ner" in processor.prompts:
        rates = [found["ner_malformed_rate"] for found in scores if "ner_malformed_rate" in found]
        told = f" ({max(rates):.1f} % of the answers at worst, in the scores below)" if rates else ""
        lines.append(f"Entity tags can be unclosed or unknown{told}; they are left out when the answer is read.")
    return "\n".join(f"- {line}" for line in lines)


def _training(stages: list[dict | None], trained_on: Sequence[str], run) -> str:
    parts = [f"Data: {', '.join(trained_on) if trained_on else 'not recorded'}."]
    for number, stage in enumerate(stages, 1):
        title = f"### Stage {number}\n\n" if len(stages) > 1 else ""
        told = "How it was trained was not recorded." if stage is None else _stage(stage, first=number == 1)
        parts.append(title + told)
    state = _read_json(Path(run) / TRAINER_STATE) if run else None
    if state and stages[-1] is None:
        parts.append(f"The last run took {state['global_step']} steps, {state['epoch']:.2f} epochs.")
    found = _read_json(Path(run) / "metrics.json") if run else None
    held_out = {name: value for name, value in (found or {}).items() if _is_headline(name)}
    if held_out:
        table = markdown_table(["validation, greedy", "%"], [[k, f"{v:.1f}"] for k, v in _named(held_out).items()])
        clips = (found or {}).get("scored_clips")
        of = f"{clips:,} clips of the split" if clips else "the split"
        parts.append(f"At the end of training, on {of} that it was validated on:\n\n{table}")
    return "\n\n".join(parts)


def _is_headline(name: str) -> bool:
    return name.removeprefix("eval_") in HEADLINES and name.startswith("eval_")


def _named(metrics: dict) -> dict[str, float]:
    return {_metric_name(name.removeprefix("eval_")): value for name, value in metrics.items()}


def _stage(stage: dict, first: bool) -> str:
    clips = "a stream" if stage["clips"] is None else f"{stage['clips']:,} clips"
    hours = "" if stage["hours"] is None else f", {stage['hours']:.2f} h"
    trained = ", ".join(f"{part} {size:,}" for part, size in stage["trained_parameters"].items() if size)
    recipe, of = stage["recipe"], ""
    if "processes" in stage:
        rows = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * stage["processes"]
        of = f" of {rows:,} rows"
    lead = (
        f"{stage['dataset']}: {clips}{hours}; {stage['steps']:,} steps{of}, {stage['epochs']:.2f} "
        f"epochs; trained parameters: {trained}; torch {stage['versions']['torch']}, "
        f"transformers {stage['versions']['transformers']}."
    )
    table = markdown_table(["setting", "value"], [[k, json.dumps(v)] for k, v in _in_force(recipe, first).items()])
    return f"{lead}\n\n{table}"


def _in_force(recipe: dict, first: bool) -> dict:
    """The settings that made a difference; only the first stage has a warm start."""
    unused = {name for name, value in recipe.items() if value is None}
    if not (first and recipe.get("warm_start")):
        unused.add("warm_start_clips")
    if not first:
        unused.add("warm_start")
    if not recipe.get("lora_r"):
        unused |= {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
    if not recipe.get("classifier"):
        unused.add("classifier_alpha")
    unused.add("num_train_epochs" if recipe.get("max_steps", -1) > 0 else "max_steps")
    return {name: value for name, value in recipe.items() if name not in unused}


def _parameters(model) -> str:
    sizes = {"Whisper encoder, frozen": 0, "language model, frozen": 0, "adapter": 0, "LoRA": 0}
    for name, parameter in model.named_parameters():
        if not is_trained(name):
            part = "Whisper encoder, frozen" if "audio_tower." in name else "language model, frozen"
        elif name.startswith("classifier."):
            continue  # of training alone
        else:
            part = "LoRA" if ".lora_" in name else "adapter"
        packed = getattr(parameter, "quant_state", None)  # bitsandbytes: two weights a byte
        sizes[part] += parameter.numel() if packed is None else packed.shape.numel()
    rows = [[part, f"{size:,}"] for part, size in sizes.items() if size]
    table = markdown_table(["part", "parameters"], [*rows, ["all", f"{sum(sizes.values()):,}"]])
    merged = (model.config.backbones or {}).get("merged_lora")
    return table + (f"\n\nLoRA of rank {merged['r']} was merged into the language model." if merged else "")


def _scores(scores: list[dict]) -> str:
    if not scores:
        return "It was not scored on a test set."
    parts = []
    for found in scores:
        table = markdown_table(*comparison({"SENSE": found, **found.get("controls", {})}))
        parts.append(f"{_measured(found)} Per cent, with 95 % intervals (bootstrap over utterances).\n\n{table}")
    return "\n\n".join(parts)


def _measured(metrics: dict) -> str:
    on = metrics.get("measured_on")
    size = f"{metrics['n_utterances']:,} utterances, {metrics['audio_seconds'] / 3600:.2f} h"
    if on is None:
        return f"Data not recorded; {size}."
    name = " ".join(filter(None, [on["dataset"], on["config_name"]]))
    beams = "greedy" if on["num_beams"] == 1 else f"{on['num_beams']} beams"
    where = "" if on["on_hub"] else " (a folder, not on the Hub)"
    part = f", its first {on['max_samples']:,} rows at most" if on.get("max_samples") else ""
    part += f", {on['bad_rows']:,} rows left out that can't be used" if on.get("bad_rows") else ""
    how = [size, beams, *(["constrained to the tasks' grammars"] if on.get("constrained") else [])]
    how += filter(None, [on.get("dtype")])
    if on.get("quantization"):
        how.append(f"{on['quantization']} weights" + (", quantised on loading" if on.get("quantize") else ""))
    return f"**{name}**{where}, {on['split']} split{part}; {'; '.join(how)}."


def _licence(model, license: str | None) -> str:
    own = f"{license}." if license else "None was stated for these weights."
    return f"{own} The backbones and the training data have their own."
