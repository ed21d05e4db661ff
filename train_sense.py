"""
Trains SENSE: the adapter, and LoRA where the recipe asks for it, on any speech with transcripts, entities, sentiment.

    accelerate launch train_sense.py recipes/quickstart.yaml [--field value ...]

A recipe is a YAML file with the fields of `SenseArguments` and of transformers' `TrainingArguments`; one of `recipes/`
may go by its name, such as quickstart. Fields on the command line win. A run that was interrupted goes on from its
last checkpoint when started again.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy, rotate_checkpoints
from transformers.utils import CONFIG_NAME

from eval_sense import parse_answers, shuffle_audio, understand
from modeling_sense import SenseForConditionalGeneration
from modeling_sense.modeling_sense import ADAPTER_CONFIG
from processing import SenseProcessor
from processing.annotation.noise import add_noise, with_annotation
from processing.backbones import resolve_backbone
from processing.bad_rows import BadRows, count_kinds
from processing.checkpoints import last_checkpoint, publish, require_whole, seal, sync, unfinished
from processing.collator import SenseCollator, tag_weights
from processing.controls import SpacyTagger
from processing.datasets import first_rows, load_corpus, read_stream
from processing.encoder_cache import build_cache
from processing.hub import CARD, shipped, start_processes
from processing.model_card import make_card, record_training
from processing.questions import (
    EpochSampler,
    Mixture,
    Stream,
    ask_once,
    count_audio_tokens,
    spread,
    usual_length,
    usual_rate,
)
from processing.recipe import SenseArguments, parse_recipe
from processing.report import plot_training, save_png, write_text
from processing.scoring import score
from processing.sharding import gather_state, gather_weights, shard_state, whole_weights
from processing.tasks import SENTIMENTS, TAG_SETS, Task, make_tasks
from processing.text_as_speech import TextCollator, measure_speech, read_words
from processing.warm_start import across_processes, warm_start


class TimeBudget(TrainerCallback, ExportableState):
    """Ends training after `minutes` of steps: loading data, evaluation, saving and interruptions do not count."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.seconds = 0.0  # spent

    @property
    def left(self) -> float:
        """Share of the budget that is left."""
        return max(0.0, 1 - self.seconds / (60 * self.minutes))

    def state(self) -> dict:
        return {"args": {"minutes": self.minutes}, "attributes": {"seconds": self.seconds}}

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        # One clock for all processes: their learning rates must be the same.
        self.seconds = broadcast_object_list([self.seconds + time.perf_counter() - self.began])[0]
        if not self.left:  # the last step is evaluated and kept, as Trainer does at max_steps
            control.should_training_stop = True
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS
            control.should_save |= args.save_strategy == SaveStrategy.STEPS


class LossSinceLog(TrainerCallback, ExportableState):
    """What the next entry of the log is the mean of: sum of the losses since the step `since`. Kept in checkpoints."""

    def __init__(self, total: float = 0.0, since: int | None = None):
        self.total, self.since = total, since  # None: not known, as of a checkpoint without it

    def state(self) -> dict:
        return {"args": {"total": self.total, "since": self.since}, "attributes": {}}


class SenseTrainer(Trainer):
    """
    Trainer whose checkpoints hold the trained weights only, and whose evaluation adds the loss on shuffled clips
    (`eval_shuffled_loss`: the gap to `eval_true_loss` is what the model hears) and each task's scores (`eval_wer`,
    `eval_ner_f1`, `eval_sa_f1`, ...).
    """

    def __init__(
        self,
        *args,
        eval_collator: SenseCollator,
        scored_rows,
        adapter_learning_rate: float | None = None,
        max_minutes: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, compute_metrics=mean_loss, **kwargs)
        self.model.backbone_fingerprint()  # while each process holds all weights; known from now on
        self.scored_rows = scored_rows
        self.eval_collator = eval_collator
        self.adapter_learning_rate = (
            self.args.learning_rate if adapter_learning_rate is None else adapter_learning_rate
        )
        self.max_minutes = max_minutes
        self.writing: Path | None = None  # where a checkpoint is being written
        self.add_callback(LossSinceLog())
        if max_minutes is not None:
            self.add_callback(TimeBudget(max_minutes))

    @property
    def budget(self) -> TimeBudget | None:
        """Looked up each time: on resuming, Trainer puts a copy that knows what was spent in its place."""
        found = self._callback(TimeBudget)
        if found is not None:
            found.minutes = self.max_minutes  # the recipe's, not the interrupted run's
        return found

    def _callback(self, kind):
        return next((c for c in self.callback_handler.callbacks if isinstance(c, kind)), None)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Counts the clips that the classifier learns from over all parts of a step, as Trainer does with tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and "classifier_labels" in batches[0]:
            labels = [batch["classifier_labels"].view(len(batch["classifier_labels"]), -1)[:, 0] for batch in batches]
            known = sum((first != -100).sum() for first in labels).to(device)
            known = self.accelerator.gather(known).sum().clamp(min=1)
            for batch in batches:
                batch["num_clips_in_batch"] = known
        return batches, num_items

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Under a budget of time the rate follows the clock, or the steps where these end first."""
        if self.budget is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warm_up = max(1, self.args.warmup_steps)

        def rate(step: int) -> float:
            left = min(self.budget.left, max(0.0, 1 - step / num_training_steps))
            return min(1.0, (step + 1) / warm_up) * left

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

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

    def _get_train_sampler(self, train_dataset=None):
        strategy, seed = self.args.train_sampling_strategy, self.args.data_seed
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if seed is None else seed
        return EpochSampler(self.train_dataset, seed, step if strategy == "group_by_length" else None)

    def get_train_dataloader(self):
        stream = self.train_dataset
        if not isinstance(stream, Stream):
            return super().get_train_dataloader()
        # As it is: accelerate would deal the rows out once more. A worker without a file of its own has none.
        return torch.utils.data.DataLoader(
            stream,
            batch_size=stream.batch_size,
            collate_fn=self.data_collator,
            num_workers=min(self.args.dataloader_num_workers, stream.rows.num_shards),
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory and torch.accelerator.is_available(),
        )

    def _run_epoch(self, *, epoch, epochs_trained, resume_from_checkpoint, **kwargs):
        """Trainer's, with what it does not bring back when a run goes on from a checkpoint."""
        if epoch == epochs_trained and resume_from_checkpoint is not None:
            loss = self._callback(LossSinceLog)
            if loss.since is not None:
                self._tr_loss += loss.total
                self._globalstep_last_logged = loss.since
            if self.state.global_step >= self.state.max_steps or self.budget is not None and not self.budget.left:
                self.control.should_training_stop = True  # it was the last step; Trainer would take another
                return
        how = {"epochs_trained": epochs_trained, "resume_from_checkpoint": resume_from_checkpoint, **kwargs}
        super()._run_epoch(epoch=epoch, **how)

    def get_eval_dataloader(self, eval_dataset=None):
        training = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False  # every row is judged
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, self.args.dataloader_drop_last = training

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        Each row's sum of token losses and number of tokens. Not a batch's mean, as Trainer takes it: that depends on
        who is in the batch, and in the last one may be rows that fill it up and are dropped afterwards.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        last = int((labels != -100).sum(1).max())  # answers are at the end
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, logits_to_keep=last + 1).logits
        targets = labels[:, -last:]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )
        return None, losses.sum(1), (targets != -100).sum(1)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None or isinstance(eval_dataset, dict):  # the outermost call, not one of its parts
            scores = {f"{metric_key_prefix}_{k}": v for k, v in self.score_answers().items()}
            self.log(scores)
            metrics |= scores
        return metrics

    def score_answers(self) -> dict[str, float]:
        """The scores of the answers to all tasks; prints some of them beside what was said."""
        rows, processor = self.scored_rows, self.processing_class
        model = self.accelerator.unwrap_model(self.model).eval()
        tasks = list(self.eval_collator.tasks)
        how = {"batch_size": self.args.per_device_eval_batch_size, "cache": self.eval_collator.cache}
        with whole_weights(model):
            answers = understand(model, processor, rows, tasks, **how)
        if self.is_world_process_zero():
            for i in range(min(3, len(rows))):
                print(
                    "\n".join([f"  said:  {rows[i]['text']}", *(f"  {t}: {answers[t][i]}" for t in tasks)]), flush=True
                )
        scores = score(list(rows.remove_columns("audio")), parse_answers(processor.prompts, answers))
        return {name: value for name, value in scores.items() if isinstance(value, float)}

    # Under FSDP2 a checkpoint is the same as under DDP or of one process, and each of them goes on from it.

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir)
        else:
            self.model.trained_state_dict()  # its part in the gathering

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = gather_state(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        self.optimizer.load_state_dict(shard_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(schedule)

    # A checkpoint is what was trained: megabytes, not the backbones again. Optimiser, schedule and random state are
    # written beside it by Trainer itself. All of it goes to another folder first: one that is called a checkpoint is
    # whole, whenever the run is killed.

    def _save_checkpoint(self, model, trial):
        output_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        loss = self._callback(LossSinceLog)
        loss.total = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        loss.since = self._globalstep_last_logged
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # Trainer wants those that an older checkpoint had not, too
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        try:
            with unfinished(output_dir, name, self._count_bytes) as self.writing:
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                written = self.writing / name
                # Trainer looks for it in `writing`, and remembers where it was: the folder may have another name now.
                best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                if best.name == name or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
                    if self.args.should_save:
                        self.state.save_to_json(written / TRAINER_STATE_NAME)
                self.accelerator.wait_for_everyone()  # each process writes its random state
                if self.args.should_save:
                    seal(written)
                    publish(written, output_dir / name)
                self.accelerator.wait_for_everyone()
        finally:
            self.writing = None
        if self.args.should_save:
            best, most = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(output_dir, most, best, use_mtime=True)

    def _get_output_dir(self, trial):
        return str(self.writing or super()._get_output_dir(trial))

    def _count_bytes(self) -> int:
        """Of the tensors in a checkpoint."""
        states = [state.values() for state in self.optimizer.state.values()]
        moments = [value for values in states for value in values if torch.is_tensor(value)]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return sum(tensor.nbytes for tensor in (*trained, *moments))

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:  # Trainer calls this on all processes
            return
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_adapter(folder)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, Path(folder) / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.accelerator.unwrap_model(model or self.model).load_adapter(resume_from_checkpoint)

    def _load_best_model(self):
        self.accelerator.unwrap_model(self.model).load_adapter(self.state.best_model_checkpoint)


def mean_loss(found: EvalPrediction) -> dict[str, float]:
    """Of what `SenseTrainer.prediction_step` gives for each row: the mean over all tokens."""
    return {"loss": float(found.predictions.sum(dtype=np.float64) / found.label_ids.sum())}


def build_model(args: SenseArguments) -> tuple[SenseForConditionalGeneration, SenseProcessor]:
    """Backbones with a new adapter (and LoRA), or the model of an earlier stage; and the processor."""
    with PartialState().main_process_first():  # one process downloads
        audio, text = resolve_backbone(args.audio_backbone), resolve_backbone(args.text_backbone)
    tokens = {"num_audio_tokens": args.num_audio_tokens, "audio_tokens": args.audio_tokens}
    processor = SenseProcessor.from_backbones(audio, text, prompts=args.prompts, gguf_file=args.gguf_file, **tokens)
    how: dict = {"dtype": args.dtype(PartialState().device.type)}
    if args.text_attn_implementation:
        how["attn_implementation"] = {"text_config": args.text_attn_implementation}
    if args.init_from and not (Path(args.init_from) / ADAPTER_CONFIG).is_file():
        model = SenseForConditionalGeneration.from_pretrained(args.init_from, **how)
        if "merged_lora" in (model.config.backbones or {}):
            raise ValueError(
                f"init_from: LoRA of {args.init_from} was merged, and checkpoints hold adapters: name the model that "
                "was merged"
            )
        _require_same(args, model.config)
        if args.quantize and model.quantization is None:
            model.quantize(args.quantize)
        if args.quantize != model.quantization:
            raise ValueError(f"{args.init_from} holds {model.quantization} weights, the recipe says {args.quantize}")
    else:
        how |= {"gguf_file": args.gguf_file, "quantize": args.quantize}
        model = SenseForConditionalGeneration.from_backbones(audio, text, **how, **tokens)
        # By the name in the recipe: a path of this machine would mean nothing on another.
        model.config.backbones["audio"]["id"] = args.audio_backbone
        model.config.backbones["text"]["id"] = args.text_backbone
        if args.init_from:
            model.load_adapter(args.init_from)
            model.remove_classifier()
    lora = {
        "r": args.lora_r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "target_modules": args.lora_target_modules,
    }
    if args.lora_r and model.config.lora is None:
        model.add_lora(**lora)
    elif args.lora_r or model.config.lora:
        found = model.config.lora
        if not args.lora_r or any(found[name] != value for name, value in lora.items()):
            raise ValueError(f"{args.init_from} has LoRA {found}, the recipe says {lora}")
    return model, processor


def _require_same(args: SenseArguments, config):
    """Raises ValueError where the model of an earlier stage is not the one that the recipe describes."""
    found = {name: config.backbones[name]["id"] for name in ("audio", "text")}
    found = {f"{name}_backbone": source for name, source in found.items()}
    found["gguf_file"] = config.backbones["text"].get("gguf_file")
    found |= {"num_audio_tokens": config.num_audio_tokens, "audio_tokens": config.audio_tokens}
    for name, value in found.items():
        if value != getattr(args, name):
            raise ValueError(f"{args.init_from}: {name} is {value!r} there, {getattr(args, name)!r} in the recipe")


def add_classifier(args: SenseArguments, model, train):
    """The regulariser of the recipe: tags weighted by how rare they are in the training set, or sentiment classes."""
    if args.classifier is None:
        return
    if args.classifier == "sa":
        labels, weights = list(SENTIMENTS), None
    else:
        labels = list(TAG_SETS[args.entity_tags])
        weights = tag_weights(train["entities"], labels, args.classifier_max_weight)
        if PartialState().is_main_process:
            listed = ", ".join(f"{tag} {weight:.1f}" for tag, weight in zip(labels, weights))
            print(f"classifier's tag weights (at most {args.classifier_max_weight:g}): {listed}", flush=True)
    model.add_classifier(labels, args.classifier == "ner", weights, args.classifier_alpha)


def count_trained(model) -> dict[str, int]:
    """Trained parameters by part of the model; the classifier's are gone after training."""
    sizes = {"adapter": 0, "LoRA": 0, "classifier": 0}
    for name, tensor in model.trained_state_dict().items():
        part = "classifier" if name.startswith("classifier.") else "LoRA" if ".lora_" in name else "adapter"
        sizes[part] += tensor.numel()
    return sizes


def open_corpus(args: SenseArguments, split: str, bad_rows: BadRows):
    """A split of the recipe's dataset; a stream where it says so."""
    return load_corpus(
        args.dataset_dir,
        split,
        config_name=args.config_name,
        audio_column=args.audio_column,
        text_column=args.text_column,
        entity_tags=args.entity_tags,
        lowercase=args.lowercase,
        streaming=args.streaming,
        bad_rows=bad_rows,
    )


def load_split(args: SenseArguments, split: str, most: int | None, bad_rows: BadRows):
    """The first rows of a split, in a dataset that knows its length."""
    rows = open_corpus(args, split, bad_rows)
    return read_stream(rows, most, bad_rows) if args.streaming else first_rows(rows, most)


def usable_rows(args: SenseArguments, rows, bad_rows: BadRows):
    """The rows whose clips can be heard, each with its place in the encoder cache."""
    rows = rows if args.streaming else bad_rows.check(rows)  # those of a stream were checked as they came
    return rows.add_column("cache_index", list(range(len(rows))))


def refuse_zero3():
    """Before a backbone is loaded: under ZeRO-3 its weights would be placeholders of size 0."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3: checkpoints and scoring need whole weights; shard them with FSDP2 in its place "
            "(recipes/accelerate/fsdp2.yaml), found stage 3 in the DeepSpeed config"
        )


def require_labels(tasks: dict[str, Task], splits: dict):
    """Raises ValueError where a split has no label for a task: better before the encoder has heard all clips."""
    for split, rows in splits.items():
        labels = rows.select_columns(["text", "entities", "sentiment"])
        for name, task in tasks.items():
            if all(task.target(row) is None for row in labels):
                raise ValueError(f"task {name!r}: not one of the {len(labels)} rows of {split!r} has a label for it")


def require_stream_settings(training: TrainingArguments):
    if training.max_steps <= 0:
        raise ValueError(f"streaming: a stream has no end; give max_steps, found {training.max_steps}")
    if training.train_sampling_strategy != "random":
        raise ValueError(
            f"streaming: rows come as they do; leave train_sampling_strategy out, found "
            f"{training.train_sampling_strategy!r}"
        )


def open_stream(
    args: SenseArguments, training: TrainingArguments, tasks, checkpoint: str | None, bad_rows: BadRows
) -> Stream:
    """The training questions; behind those that the checkpoint learnt from, which are read, but not decoded."""
    steps = 0
    if checkpoint is not None:
        state = TrainerState.load_from_json(Path(checkpoint) / TRAINER_STATE_NAME)
        _require_same_shares(training, checkpoint, state)
        steps = state.global_step
        training.ignore_data_skip = True  # done here
    batches = steps * training.gradient_accumulation_steps
    rows = open_corpus(args, args.train_split, bad_rows)
    return Stream(args, rows, tasks, training.seed, training.train_batch_size, bad_rows, batches)


def _require_same_shares(training: TrainingArguments, checkpoint: str, state: TrainerState):
    """Raises ValueError where other processes or batches than the checkpoint's would get rows twice or never."""
    processes = len(list(Path(checkpoint).glob("rng_state*.pth")))  # each writes one
    known = {
        "rows in a process's batch (per_device_train_batch_size)": (state.train_batch_size, training.train_batch_size),
        "processes": (processes, PartialState().num_processes),
    }
    for what, (found, now) in known.items():
        if found and found != now:
            raise ValueError(
                f"streaming: {checkpoint} was written with {found} {what}, now there are {now}: a stream goes on with "
                "as many as it began with"
            )


def training_labels(args: SenseArguments, train, seed: int):
    """The training rows with the entities that the recipe asks for: their own, spaCy's, or their own with noise."""
    how = {"writer_batch_size": 100}  # as in load_corpus
    if args.train_entities == "spacy":
        tagged = SpacyTagger.from_pretrained(combined=args.entity_tags == "combined").tag(train["text"])
        train = train.map(lambda _, index: {"entities": tagged[index]}, with_indices=True, **how)
    if args.label_noise is not None:
        rows = list(train.select_columns(["text", "entities"]))
        labelled = {index: row for index, row in enumerate(rows) if row["entities"] is not None}
        noisy = add_noise(list(labelled.values()), **args.label_noise, seed=seed)
        for index, pairs in zip(labelled, noisy):
            rows[index] = with_annotation(rows[index], pairs, args.filter_labels)
        train = train.map(lambda _, index: rows[index], with_indices=True, **how)
    return train


def build_caches(args: SenseArguments, model, processor, train, dev):
    """The encoder's output of both splits; `(None, None)` where no cache is asked for."""
    if args.encoder_cache is None:
        return None, None
    how = {"folder": args.encoder_cache, "storage": args.encoder_cache_storage}
    return build_cache(model, processor, train, speeds=args.speeds, **how), build_cache(model, processor, dev, **how)


def start_adapter(args: SenseArguments, model, processor, train):
    """The warm start, of which each process computes a part."""
    if not args.warm_start or args.init_from:
        return
    found = warm_start(
        model,
        processor,
        train,
        resolve_backbone(args.audio_backbone),
        gain=args.warm_start_gain,
        ridge=args.warm_start_ridge,
        max_clips=args.warm_start_clips,
    )
    if PartialState().is_main_process:
        print(f"warm start: {found}", flush=True)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data.copy_(across_processes(broadcast, parameter.data))  # to the last bit


def make_collator(args: SenseArguments, model, processor, tasks, train, cache, words: list[str] | None):
    """Of the training rows; of passages of a text, where there are `words`."""
    how = {"time_mask": args.time_mask, "time_stretch": args.time_stretch, "answer_noise": args.answer_noise}
    if words:
        speaker = measure_speech(model, processor, train, resolve_backbone(args.audio_backbone))
        if PartialState().is_main_process:
            print(f"text as speech: {len(words):,} words; r2 {speaker.r2:.2f}, carry {speaker.carry:.2f}", flush=True)
        return TextCollator(processor, tasks, cache, speaker=speaker, words=words, **how)
    return SenseCollator(processor, tasks, cache, classifier=model.config.classifier, **how)


def find_checkpoint(training: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one that is named, or the last whole one in the output folder."""
    if training.resume_from_checkpoint is None:
        return last_checkpoint(training.output_dir)
    require_whole(training.resume_from_checkpoint)
    return training.resume_from_checkpoint


def write_output(folder: Path, model, processor, metrics: dict, state, recipe: dict, train, sizes: dict[str, int]):
    """The finished model and what is told of it. Each file is whole when it comes to `folder`, `config.json` last."""
    tensors = model.state_dict().values()
    with unfinished(folder, "model.safetensors", lambda: sum(tensor.nbytes for tensor in tensors)) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        state.save_to_json(temporary / TRAINER_STATE_NAME)
        save_png(plot_training({"": state.log_history}), temporary / "training.png")
        write_text(temporary / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        record_training(temporary, recipe, train, state, sizes)
        write_text(temporary / CARD, str(make_card(model, processor, repo_id=folder.resolve().name, run=temporary)))
        files = sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG_NAME)
        for path in files:
            sync(path)
        for path in files:
            os.replace(path, folder / path.name)
        sync(folder)


def main(argv: list[str] | None = None) -> dict:
    start_processes()
    args, training = parse_recipe(sys.argv[1:] if argv is None else argv)
    args.init_from = args.init_from and str(shipped(args.init_from))
    refuse_zero3()
    if args.streaming:
        require_stream_settings(training)
    set_seed(training.seed)
    # The rows bring their own columns to the collator, and the model's labels are its own business.
    training.remove_unused_columns = False
    training.label_names = ["labels"]
    training.restore_callback_states_from_checkpoint = True
    if training.label_smoothing_factor:
        raise ValueError("label_smoothing_factor: Trainer would smooth labels that nobody shifted; leave it out")
    if training.push_to_hub:
        raise ValueError(
            "push_to_hub: Trainer would upload an adapter without its settings; when it is trained, run "
            f"sense export {training.output_dir} FOLDER --push OWNER/NAME"
        )
    metric = training.metric_for_best_model or ""  # of which transformers knows that a loss should be low, and no more
    if training.greater_is_better and re.search(r"(^|_)(wer|malformed)(_|$)", metric):
        raise ValueError(
            f"greater_is_better: of {metric} the lowest is the best; set greater_is_better: false beside "
            "metric_for_best_model"
        )
    if args.max_minutes is not None and 0 < training.warmup_steps < 1:
        raise ValueError(
            f"warmup_steps: {training.warmup_steps} is a share, and under max_minutes nobody knows of how many steps; "
            "give their number"
        )
    if training.dataloader_persistent_workers:
        raise ValueError("dataloader_persistent_workers: such workers go on with the first epoch's rows; leave it out")
    checkpoint = find_checkpoint(training)
    model, processor = build_model(args)
    tasks = make_tasks(args.prompts, args.tasks)
    bad_rows = BadRows(args.on_bad_row, training.output_dir, training=True)
    with PartialState().main_process_first():  # one process prepares a Hub dataset, the others find it prepared
        if args.streaming and checkpoint is None:
            bad_rows.start_over()
        most = args.warm_start_clips if args.streaming else args.max_train_samples
        train = load_split(args, args.train_split, most, bad_rows)
        dev = load_split(args, args.eval_split, args.max_eval_samples, bad_rows)
    train, dev = usable_rows(args, train, bad_rows), usable_rows(args, dev, bad_rows)
    if not args.streaming:
        bad_rows.settle()
    train = training_labels(args, train, training.seed)
    require_labels(tasks, {args.eval_split: dev} | ({} if args.streaming else {args.train_split: train}))
    words = read_words(args.text_as_speech, train["text"]) if args.text_as_speech else None
    train_cache, dev_cache = build_caches(args, model, processor, train, dev)
    if args.cache_only:
        return {}
    dev = dev.add_column(training.length_column_name, count_audio_tokens(dev, dev_cache, processor))
    audio_tokens = count_audio_tokens(train, train_cache, processor)
    add_classifier(args, model, train)
    processor.chunk_length_s = usual_length(train["duration"])
    processor.tokens_per_second = usual_rate(train, processor.tokenizer)
    processor.entity_tags = args.entity_tags

    if checkpoint is None:
        start_adapter(args, model, processor, train)
    collator = make_collator(args, model, processor, tasks, train, train_cache, words)
    encoder = model.detach_encoder() if train_cache else None  # no memory for it on the GPU, from here on
    questions = (
        open_stream(args, training, tasks, checkpoint, bad_rows)
        if args.streaming
        else Mixture(args, train, audio_tokens, tasks, processor.tokenizer, training.seed)
    )
    held_out = {"true": dev, "shuffled": shuffle_audio(dev)}
    trainer = SenseTrainer(
        model=model,
        args=training,
        train_dataset=questions,
        eval_dataset={name: ask_once(rows, tasks) for name, rows in held_out.items()},
        data_collator=collator,
        eval_collator=SenseCollator(processor, tasks, dev_cache),
        processing_class=processor,
        scored_rows=spread(dev, args.scored_samples),
        adapter_learning_rate=args.adapter_learning_rate,
        max_minutes=args.max_minutes,
    )
    sizes = count_trained(model)
    if PartialState().is_main_process:
        parts = ", ".join(f"{part} {size:,}" for part, size in sizes.items() if size)
        print(
            f"trained parameters: {sum(sizes.values()):,} ({parts}); "
            + ("a stream; " if args.streaming else f"clips: {len(train)}; rows an epoch: {len(questions)}; ")
            + f"resuming from: {checkpoint}",
            flush=True,
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    kept = sum(sizes.values()) - sizes["classifier"]
    metrics = trainer.evaluate() | {"trained_parameters": kept, "train_clips": None if args.streaming else len(train)}
    metrics["scored_clips"] = len(trainer.scored_rows)
    metrics["bad_rows"] = count_kinds(bad_rows.read_list().values()) if args.streaming else bad_rows.counts
    gather_weights(model, keep=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        model.remove_classifier()
        if encoder is not None:
            model.attach_encoder(encoder)
        recipe = {**vars(args), **training.to_dict()}
        write_output(Path(training.output_dir), model, processor, metrics, trainer.state, recipe, train, sizes)
    return metrics


if __name__ == "__main__":
    main()
