"""
Trains SENSE: the adapter, and LoRA where the recipe asks for it, on any speech with transcripts.

    accelerate launch train_sense.py recipes/quickstart.yaml [--field value ...]

A recipe is a YAML file with the fields of `SenseArguments` and of transformers' `TrainingArguments`; fields on the
command line win. A run that was interrupted goes on from its last checkpoint when started again.
"""

import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from eval_sense import score, shuffle_audio, transcribe, write_text
from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor
from processing.collator import SenseCollator
from processing.datasets import load_corpus
from processing.encoder_cache import build_cache
from processing.report import plot_training
from processing.warm_start import warm_start
from scripts.get_backbones import resolve_backbone


@dataclass
class SenseArguments:
    """What a recipe says beside `TrainingArguments`."""

    dataset_dir: str = field(default=None, metadata={"help": "audiofolder, LibriSpeech tree or Hub dataset"})
    audio_backbone: str = field(default="openai/whisper-small", metadata={"help": "Whisper: Hub id or folder"})
    text_backbone: str = field(
        default="TinyLlama/TinyLlama-1.1B-Chat-v1.0", metadata={"help": "language model: Hub id or folder"}
    )
    backbone_dtype: str = field(default="bfloat16", metadata={"help": "dtype of the frozen weights"})
    num_audio_tokens: int = field(default=250, metadata={"help": "steps that 30 s of speech are pooled to"})
    audio_tokens: str = field(default="trim", metadata={"help": "trim (those that hold speech) or fixed (all)"})
    lora_r: int = field(default=0, metadata={"help": "rank of LoRA on q, k, v; 0 trains the adapter alone"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of LoRA"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before LoRA"})
    adapter_learning_rate: float = field(default=None, metadata={"help": "of the adapter; default: learning_rate"})
    prompt: str = field(default="Transcribe the speech.", metadata={"help": "the instruction after the audio"})

    config_name: str = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str = field(default="dev", metadata={"help": "split to choose the best checkpoint by"})
    audio_column: str = field(default="audio", metadata={"help": "column of the audio"})
    text_column: str = field(default="text", metadata={"help": "column of the transcript"})
    max_train_samples: int = field(default=None, metadata={"help": "use the first rows only"})
    max_eval_samples: int = field(default=None, metadata={"help": "use the first rows only"})
    wer_samples: int = field(default=None, metadata={"help": "rows, evenly spaced, for the WER; default: all"})

    encoder_cache: str = field(default=None, metadata={"help": "folder for the encoder's output; none: no cache"})
    speeds: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "versions of each training clip kept in the cache"}
    )
    time_mask: float = field(default=0.0, metadata={"help": "share of audio tokens hidden in training"})

    warm_start: bool = field(default=True, metadata={"help": "closed-form start of the adapter"})
    warm_start_gain: float = field(default=1.5, metadata={"help": "factor on the regression's output"})
    warm_start_ridge: float = field(default=1e-3, metadata={"help": "ridge penalty, per row"})
    warm_start_clips: int = field(default=None, metadata={"help": "clips to use; default: all"})

    def __post_init__(self):
        if not self.dataset_dir:
            raise ValueError("dataset_dir is missing: name the data in the recipe or with --dataset_dir")
        if self.encoder_cache is None and (self.speeds != [1.0] or self.time_mask):
            raise ValueError("speeds and time_mask work on cached features: set encoder_cache to a folder")


class SenseTrainer(Trainer):
    """
    Trainer whose checkpoints hold the trained weights only, and whose evaluation adds the loss on shuffled clips
    (`eval_shuffled_loss`: the gap to `eval_true_loss` is what the model hears) and the WER (`eval_wer`).
    """

    def __init__(
        self, *args, eval_collator: SenseCollator, wer_rows, adapter_learning_rate: float | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.wer_rows = wer_rows
        self.eval_collator = eval_collator
        self.adapter_learning_rate = adapter_learning_rate or self.args.learning_rate

    def create_optimizer(self, model=None):
        """AdamW in two groups: the adapter has its own rate. Weight decay as Trainer decides, per parameter."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    key = ("multi_modal_projector" in name, name in decayed)
                    groups.setdefault(key, []).append(parameter)
            rates = {True: self.adapter_learning_rate, False: self.args.learning_rate}
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(
                [
                    {"params": parameters, "lr": rates[adapter], "weight_decay": self.args.weight_decay * decay}
                    for (adapter, decay), parameters in sorted(groups.items())
                ],
                **options,
            )
        return self.optimizer

    def get_eval_dataloader(self, eval_dataset=None):
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None or isinstance(eval_dataset, dict):  # the outermost call, not one of its parts
            rows = self.wer_rows
            model = self.accelerator.unwrap_model(self.model).eval()
            answers = transcribe(model, self.processing_class, rows, batch_size=self.args.per_device_eval_batch_size)
            scores = {f"{metric_key_prefix}_{k}": v for k, v in score(list(rows["text"]), answers).items()}
            if self.is_world_process_zero():
                for said, heard in list(zip(rows["text"], answers))[:3]:
                    print(f"  said:  {said}\n  heard: {heard}", flush=True)
            self.log(scores)
            metrics |= scores
        return metrics

    # A checkpoint is what was trained: megabytes, not the backbones again. Optimiser, schedule and random state are
    # written beside it by Trainer itself.

    def _save(self, output_dir=None, state_dict=None):
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_adapter(folder)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, Path(folder) / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.accelerator.unwrap_model(model or self.model).load_adapter(resume_from_checkpoint)

    def _load_best_model(self):
        self.accelerator.unwrap_model(self.model).load_adapter(self.state.best_model_checkpoint)


def parse_recipe(argv: list[str]) -> tuple[SenseArguments, TrainingArguments]:
    """
    A recipe's path, then overrides.

    Raises:
        ValueError: the recipe is missing, no mapping, or has a field that nobody knows.
    """
    parser = HfArgumentParser((SenseArguments, TrainingArguments))
    if not argv or argv[0].startswith("-"):
        return parser.parse_args_into_dataclasses(argv)
    recipe = Path(argv[0])
    if not recipe.is_file():
        raise ValueError(f"there is no recipe {recipe}")
    fields = yaml.safe_load(recipe.read_text())
    if not isinstance(fields, dict):
        raise ValueError(f"{recipe} must hold `field: value` lines, found {type(fields).__name__}")
    known = {f.name for kind in (SenseArguments, TrainingArguments) for f in dataclasses.fields(kind) if f.init}
    for name in fields.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{recipe}: unknown field {name!r}{hint}")
    # YAML reads 1e-3 as text: argparse converts text defaults as it would command-line values.
    parser.set_defaults(**fields)
    return parser.parse_args_into_dataclasses(argv[1:])


def build_model(args: SenseArguments) -> tuple[SenseForConditionalGeneration, SenseProcessor]:
    """Backbones with a new adapter (and LoRA), and their processor."""
    with PartialState().main_process_first():  # one process downloads
        audio, text = resolve_backbone(args.audio_backbone), resolve_backbone(args.text_backbone)
    tokens = {"num_audio_tokens": args.num_audio_tokens, "audio_tokens": args.audio_tokens}
    processor = SenseProcessor.from_backbones(audio, text, prompt=args.prompt, **tokens)
    model = SenseForConditionalGeneration.from_backbones(
        audio, text, dtype=getattr(torch, args.backbone_dtype), **tokens
    )
    # By the name in the recipe: a path of this machine would mean nothing on another.
    model.config.backbones["audio"]["id"] = args.audio_backbone
    model.config.backbones["text"]["id"] = args.text_backbone
    if args.lora_r:
        model.add_lora(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    return model, processor


def load_split(args: SenseArguments, split: str, most: int | None):
    columns = {"audio_column": args.audio_column, "text_column": args.text_column}
    dataset = load_corpus(args.dataset_dir, split, config_name=args.config_name, **columns)
    if most:
        dataset = dataset.select(range(min(most, len(dataset))))
    return dataset.add_column("cache_index", list(range(len(dataset))))


def build_caches(args: SenseArguments, model, processor, train, dev):
    """The encoder's output of both splits, computed by one process; `(None, None)` where no cache is asked for."""
    if args.encoder_cache is None:
        return None, None
    with PartialState().main_process_first():
        return (
            build_cache(model, processor, train, args.encoder_cache, args.speeds),
            build_cache(model, processor, dev, args.encoder_cache),
        )


def add_lengths(dataset, cache, column: str):
    """Adds what `train_sampling_strategy: group_by_length` sorts by: audio tokens, or hundredths of a second."""
    lengths = cache.lengths if cache else [math.ceil(100 * (seconds or 0)) for seconds in dataset["duration"]]
    return dataset.add_column(column, lengths)


def start_adapter(args: SenseArguments, model, processor, train):
    """The warm start, computed by one process and sent to the others."""
    if not args.warm_start:
        return
    if PartialState().is_main_process:
        found = warm_start(
            model,
            processor,
            train,
            resolve_backbone(args.audio_backbone),
            gain=args.warm_start_gain,
            ridge=args.warm_start_ridge,
            max_clips=args.warm_start_clips,
        )
        print(f"warm start: {found}", flush=True)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data = broadcast(parameter.data)


def main(argv: list[str] | None = None) -> dict:
    args, training = parse_recipe(sys.argv[1:] if argv is None else argv)
    set_seed(training.seed)
    # The rows bring their own columns to the collator, and the model's labels are its own business.
    training.remove_unused_columns = False
    training.label_names = ["labels"]
    model, processor = build_model(args)
    train = load_split(args, args.train_split, args.max_train_samples)
    dev = load_split(args, args.eval_split, args.max_eval_samples)
    train_cache, dev_cache = build_caches(args, model, processor, train, dev)
    train, dev = (add_lengths(*pair, training.length_column_name) for pair in ((train, train_cache), (dev, dev_cache)))

    checkpoint = training.resume_from_checkpoint
    if checkpoint is None and Path(training.output_dir).is_dir():
        checkpoint = get_last_checkpoint(training.output_dir)
    if checkpoint is None:
        start_adapter(args, model, processor, train)
    trainer = SenseTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset={"true": dev, "shuffled": shuffle_audio(dev)},
        data_collator=SenseCollator(processor, args.prompt, train_cache, args.time_mask),
        eval_collator=SenseCollator(processor, args.prompt, dev_cache),
        processing_class=processor,
        wer_rows=dev.select(range(0, len(dev), max(1, len(dev) // (args.wer_samples or len(dev))))),
        adapter_learning_rate=args.adapter_learning_rate,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if PartialState().is_main_process:
        print(f"trained parameters: {trained:,}; clips: {len(train)}; resuming from: {checkpoint}", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() | {"trained_parameters": trained, "train_clips": len(train)}
    trainer.save_state()
    if trainer.is_world_process_zero():
        model.save_pretrained(training.output_dir)
        processor.save_pretrained(training.output_dir)
        plot_training({"": trainer.state.log_history}, Path(training.output_dir) / "training.png")
        write_text(Path(training.output_dir) / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    main()
