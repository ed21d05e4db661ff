"""What a training is told: `SenseArguments`, and recipes, YAML files with its fields and transformers' own."""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from modeling_sense import QUANTIZATIONS
from modeling_sense.modeling_sense import LORA_TARGETS

from .annotation.noise import RATES, add_noise
from .augmentation import check_speeds
from .bad_rows import BadRows
from .tasks import TAG_SETS, make_tasks


MAX_RECIPE = 100_000  # characters
BACKBONE_DTYPES = ("auto", "float32", "bfloat16", "float16")
MAPPINGS = ("tasks", "prompts", "label_noise")


@dataclass
class SenseArguments:
    """What a recipe says beside `TrainingArguments`."""

    dataset_dir: str | None = field(default=None, metadata={"help": "audiofolder, LibriSpeech tree or Hub dataset"})
    audio_backbone: str = field(default="openai/whisper-small", metadata={"help": "Whisper: Hub id or folder"})
    text_backbone: str = field(
        default="TinyLlama/TinyLlama-1.1B-Chat-v1.0", metadata={"help": "language model: Hub id or folder"}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "a GGUF file in text_backbone, in place of its weights"}
    )
    quantize: str | None = field(
        default=None, metadata={"help": "hold the language model in int8 or int4; none: as floats"}
    )
    backbone_dtype: str = field(
        default="auto", metadata={"help": "of the frozen weights; auto: bfloat16, float32 on CPUs that emulate it"}
    )
    text_attn_implementation: str | None = field(
        default=None, metadata={"help": "the language model's attention: on CPUs eager trains faster than sdpa"}
    )
    num_audio_tokens: int = field(default=250, metadata={"help": "steps that 30 s of speech are pooled to"})
    audio_tokens: str = field(default="trim", metadata={"help": "trim (those that hold speech) or fixed (all)"})
    lora_r: int = field(default=0, metadata={"help": "rank of LoRA; 0 trains the adapter alone"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of LoRA"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before LoRA"})
    lora_target_modules: str = field(
        default=LORA_TARGETS, metadata={"help": "regular expression on the names of the modules with LoRA"}
    )
    adapter_learning_rate: float | None = field(
        default=None, metadata={"help": "of the adapter; default: learning_rate"}
    )
    init_from: str | None = field(
        default=None, metadata={"help": "go on from this stage: output folder or checkpoint; or sense-mini"}
    )

    # Mappings in a recipe, JSON on the command line: to HfArgumentParser they are strings.
    tasks: str = field(
        default='{"asr": 1}',
        metadata={"help": "how often an epoch shows each task's rows, such as {asr: 1, ner: 2, sa: 0.5}"},
    )
    prompts: str = field(
        default='{"asr": "Transcribe the speech."}', metadata={"help": "each task's instruction after the audio"}
    )
    entity_tags: str = field(default="combined", metadata={"help": "combined (SLUE's 7) or raw (OntoNotes' 18)"})
    train_entities: str = field(
        default="given", metadata={"help": "given, or spacy: in their place what spaCy finds in the transcripts"}
    )
    label_noise: str | None = field(
        default=None,
        metadata={"help": "wrong entities among the training rows' own, such as {false_positives: 0.3, drops: 0.1}"},
    )
    filter_labels: bool = field(default=False, metadata={"help": "and annotate_sense.py's two filters after them"})
    balance_classes: bool = field(default=False, metadata={"help": "show each sentiment equally often"})
    classifier: str | None = field(
        default=None, metadata={"help": "regulariser: ner (tags) or sa (sentiment); none: without"}
    )
    classifier_alpha: float = field(default=0.2, metadata={"help": "the classifier's share of the loss"})
    classifier_max_weight: float = field(default=20.0, metadata={"help": "cap on the weight of a rare tag"})

    config_name: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str = field(default="dev", metadata={"help": "split to choose the best checkpoint by"})
    audio_column: str = field(default="audio", metadata={"help": "column of the audio"})
    text_column: str = field(default="text", metadata={"help": "column of the transcript"})
    lowercase: bool = field(
        default=False, metadata={"help": "transcripts in lower case (LibriSpeech's are upper case)"}
    )
    on_bad_row: str = field(
        default="stop", metadata={"help": "stop, or skip: leave rows out that can't be used, and list them"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the training split as it comes, in flat memory, until max_steps"}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "rows that a stream is shuffled among"})
    max_train_samples: int | None = field(default=None, metadata={"help": "use the first rows only"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "use the first rows only"})
    scored_samples: int | None = field(
        default=None, metadata={"help": "rows, evenly spaced, that evaluation generates answers for; default: all"}
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "train so long; the learning rate falls to 0 by then, after warmup_steps"}
    )

    encoder_cache: str | None = field(
        default=None, metadata={"help": "folder for the encoder's output; none: no cache"}
    )
    encoder_cache_storage: str = field(default="float16", metadata={"help": "float16, or int8: half as large"})
    cache_only: bool = field(default=False, metadata={"help": "fill the cache, ahead of training, and stop"})
    speeds: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "versions of each training clip kept in the cache"}
    )
    time_mask: float = field(default=0.0, metadata={"help": "share of audio tokens hidden in training"})
    time_stretch: float = field(
        default=0.0, metadata={"help": "largest share of audio tokens that a clip gains or loses in training"}
    )
    answer_noise: float = field(
        default=0.0, metadata={"help": "share of the answer's tokens that training reads as random ones"}
    )

    warm_start: bool = field(default=True, metadata={"help": "closed-form start of the adapter"})
    warm_start_gain: float = field(default=1.5, metadata={"help": "factor on the regression's output"})
    warm_start_ridge: float = field(default=1e-3, metadata={"help": "ridge penalty, per row"})
    warm_start_clips: int | None = field(default=None, metadata={"help": "clips to use; default: all"})
    text_as_speech: str | None = field(
        default=None, metadata={"help": "a text to learn from in the clips' place, said as the warm start hears words"}
    )

    def __post_init__(self):
        for known in dataclasses.fields(self):
            if known.default is None and getattr(self, known.name) in ("none", "None", ""):  # YAML's is null
                setattr(self, known.name, None)
        if not self.dataset_dir:
            raise ValueError("dataset_dir is missing: name the data in the recipe or with --dataset_dir")
        if self.encoder_cache is None and (self.speeds != [1.0] or self.time_mask or self.time_stretch):
            raise ValueError(
                "speeds, time_mask and time_stretch work on cached features: set encoder_cache to a folder"
            )
        if self.entity_tags not in TAG_SETS:
            raise ValueError(f"entity_tags: give {' or '.join(TAG_SETS)}, found {self.entity_tags!r}")
        if not self.lora_r and self.adapter_learning_rate == 0:
            raise ValueError("adapter_learning_rate: 0 without LoRA trains nothing; set lora_r, or a rate above 0")
        check_speeds(self.speeds)
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise ValueError(f"max_minutes: give minutes above 0, or none, found {self.max_minutes}")
        if self.time_stretch and self.audio_tokens == "fixed":
            raise ValueError(
                "time_stretch changes how many audio tokens a clip has: leave it or audio_tokens: fixed out"
            )
        for name in ("time_mask", "time_stretch", "answer_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: give a share from 0 to below 1, found {getattr(self, name)}")
        if self.encoder_cache is None and self.cache_only:
            raise ValueError("cache_only fills a cache: set encoder_cache to a folder")
        self.tasks, self.prompts = _mapping("tasks", self.tasks), _mapping("prompts", self.prompts)
        make_tasks(self.prompts, self.tasks)
        for name, weight in self.tasks.items():
            if not isinstance(weight, int | float) or not weight > 0:
                raise ValueError(f"tasks: the weight of {name} is {weight!r}; give a number above 0")
        if self.train_entities not in ("given", "spacy"):
            raise ValueError(f"train_entities: give given or spacy, found {self.train_entities!r}")
        if self.filter_labels and self.label_noise is None:
            raise ValueError("filter_labels filters what label_noise put there: give label_noise, or leave it out")
        if self.label_noise is not None:
            self.label_noise = _mapping("label_noise", self.label_noise)
            if unknown := sorted(self.label_noise.keys() - set(RATES)):
                raise ValueError(f"label_noise: there is no {unknown[0]!r}; there are {', '.join(RATES)}")
            add_noise([], **self.label_noise)  # a wrong rate should not wait for the data
            if self.entity_tags != "combined":
                raise ValueError(f"label_noise knows the combined tags only, found entity_tags {self.entity_tags!r}")
            if not self.filter_labels and set(self.tasks) != {"ner"}:
                raise ValueError(
                    "label_noise without filter_labels puts words into the transcripts: train the task ner alone, "
                    f"found tasks {', '.join(self.tasks)}"
                )
        if self.backbone_dtype not in BACKBONE_DTYPES:
            names = ", ".join(BACKBONE_DTYPES)
            raise ValueError(f"backbone_dtype: give one of {names}, found {self.backbone_dtype!r}")
        BadRows(self.on_bad_row)  # another word should not wait for the data
        if self.quantize not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantize: give {' or '.join(QUANTIZATIONS)}, found {self.quantize!r}")
        if self.classifier not in (None, "ner", "sa"):
            raise ValueError(f"classifier: give ner or sa, found {self.classifier!r}")
        if self.streaming:
            self._check_stream()
        if self.text_as_speech is not None:
            self._check_text()

    def dtype(self, device: str) -> torch.dtype:
        """Of the frozen weights on a device, such as "cpu". CPUs without bfloat16 are 20 times slower in it."""
        if self.backbone_dtype != "auto":
            return getattr(torch, self.backbone_dtype)
        emulated = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.float32 if emulated else torch.bfloat16

    def _check_text(self):
        """A text has no labels, and is said as the warm start hears."""
        if set(self.tasks) != {"asr"} or self.classifier is not None:
            raise ValueError("text_as_speech has words alone: train the task asr, without a classifier")
        if self.init_from or not self.warm_start:
            raise ValueError("text_as_speech begins from the warm start: leave it on, and init_from out")
        if self.encoder_cache is None:
            raise ValueError("text_as_speech takes the lengths of cached clips: set encoder_cache to a folder")
        if self.audio_tokens == "fixed":
            raise ValueError("text_as_speech knows no silence after a clip: leave it or audio_tokens: fixed out")

    def _check_stream(self):
        """Of a stream nobody has all rows."""
        for name in ("encoder_cache", "balance_classes", "label_noise", "max_train_samples"):
            if getattr(self, name):
                raise ValueError(f"{name} needs all rows before the first step: leave it or streaming out")
        if self.answer_noise:
            raise ValueError("answer_noise is drawn by a row's place in its epoch: leave it or streaming out")
        if self.train_entities != "given":
            raise ValueError("train_entities: spacy reads all rows before the first step: leave it or streaming out")
        if not self.warm_start_clips:
            raise ValueError(
                "streaming: give warm_start_clips, how many rows of the stream are looked at before the first step "
                "(warm start, weights of rare tags, usual length)"
            )


def _mapping(name: str, value: dict | str) -> dict:
    """A mapping from a recipe, or from the command line as JSON."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} {value}: not JSON ({error}); write it like '{{\"asr\": 1}}'") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{name} must map names to values, found {value!r}")
    return found


def parse_recipe(argv: list[str]) -> tuple[SenseArguments, TrainingArguments]:
    """
    A recipe's path or name, then overrides.

    Raises:
        ValueError: the recipe is missing, no mapping, or has a field that nobody knows.
    """
    parser = HfArgumentParser((SenseArguments, TrainingArguments))
    if not argv or argv[0].startswith("-"):
        return parser.parse_args_into_dataclasses(argv)
    recipe = find_recipe(argv[0])
    fields = read_recipe(recipe)
    # YAML reads 1e-3 as text: argparse converts text defaults as it would command-line values.
    parser.set_defaults(**fields)
    try:
        return parser.parse_args_into_dataclasses(argv[1:])
    except (TypeError, AttributeError, KeyError, OverflowError) as error:  # of checks in transformers and here
        raise ValueError(f"{recipe}: a field has a value of another kind than it takes ({error})") from error


def read_recipe(recipe: Path) -> dict:
    """
    The fields of a recipe, as YAML reads them.

    Raises:
        ValueError: it is no YAML, has aliases, is no mapping, or has a field that nobody knows or whose value is a
            list or mapping where it takes none.
    """
    try:
        text = recipe.read_text(encoding="utf-8")
        _check_growth(text)
        fields = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{recipe}: not readable as a recipe ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{recipe} must hold `field: value` lines, found {type(fields).__name__}")
    known = {f.name: f for kind in (SenseArguments, TrainingArguments) for f in dataclasses.fields(kind) if f.init}
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{recipe}: unknown field {name!r}{hint}")
        kinds = str(known[name].type)
        if isinstance(value, dict | list) and name not in MAPPINGS and "dict" not in kinds and "list" not in kinds:
            raise ValueError(f"{recipe}: {name} takes one value, found {value!r}")
    return fields


def _check_growth(text: str):
    """Raises ValueError for YAML that takes more time or memory than its letters."""
    if len(text) > MAX_RECIPE:
        raise ValueError(f"{len(text):,} characters, the limit is {MAX_RECIPE:,}")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):  # a few lines of them, each of several others, stand for gigabytes
            raise ValueError("it has an alias, such as *name: write its value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 20:  # with each bracket that is open, PyYAML gets slower
            raise ValueError("lists or mappings more than 20 deep")


def find_recipe(name: str) -> Path:
    """A recipe that is named by its path, or one of `recipes/` by its name there, such as quickstart or mini/1_asr."""
    home = Path(__file__).resolve().parents[1] / "recipes"
    for recipe in (Path(name), home.parent / name, home / f"{name}.yaml"):
        if recipe.is_file():
            return recipe
    paths = (path.relative_to(home) for path in home.rglob("*.yaml") if path.parent.name != "accelerate")
    names = sorted(path.with_suffix("").as_posix() for path in paths)
    raise ValueError(f"there is no recipe {name}; name a YAML file, or one of {', '.join(names)}")


__all__ = ["SenseArguments", "find_recipe", "parse_recipe", "read_recipe"]
