"""Checkpoints from a folder or the Hub, folders made ready for the Hub, and their upload."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file

from modeling_sense import SenseForConditionalGeneration, quantization_config
from modeling_sense.modeling_sense import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    fetch_adapter,
    is_hub_id,
    read_adapter_config,
)

from .backbones import BACKBONES, cache_folder, known_name, resolve_backbone
from .model_card import TRAINER_STATE, TRAINING, make_card
from .processing_sense import SenseProcessor
from .report import write_text


CARD = "README.md"
CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
SHIPPED = "sense-mini"  # comes with this package: what was trained; the backbones are fetched
# The Hub's copy follows the folder in these: an adapter that replaces a whole model leaves no weights of that behind.
REPLACED = [CONFIG_NAME, "generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors"]
REPLACED += ["model.safetensors.index.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS]
REPLACED += ["configuration_sense.py", "modeling_sense.py", "quantization_sense.py", "processing_sense.py"]
REPLACED += ["pipeline_sense.py", "alignment.py", "long_audio.py", "mp3.py", "tasks.py", "constrained.py"]
REPLACED += ["answer_grammar.py"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def start_processes():
    """Lets a launcher's processes find each other on machines without a GPU too; before anything asks for them."""
    if not torch.accelerator.is_available():
        PartialState(cpu=True)


def shipped(name: str | os.PathLike) -> str | os.PathLike:
    """The folder of the checkpoint that comes with this package, by its name; any other name as it is."""
    return CHECKPOINTS / SHIPPED if str(name) == SHIPPED and not Path(name).exists() else name


def public_name(model: str) -> str:
    """What a model is called before others: its Hub id, or the end of its folder's path."""
    folder = Path(model)
    return "/".join(folder.resolve().parts[1:][-2:]) if folder.is_dir() else model


def load_checkpoint(
    folder: str | os.PathLike,
    dtype: str = "auto",
    *,
    revision: str | None = None,
    token: str | None = None,
    quantize: str | None = None,
) -> tuple[SenseForConditionalGeneration, SenseProcessor]:
    """
    Model (eval mode, on the GPU where there is one) and processor of a whole model or an adapter.

    Args:
        folder: what `save_pretrained` or `save_adapter` wrote, the processor beside it: a folder or a Hub id. Or
            `"sense-mini"`, which comes with this package.
        dtype: auto (as saved; of an adapter: as trained), float32, bfloat16 or float16.
        revision: on the Hub: branch, tag or commit.
        token: for the Hub, where it is private.
        quantize: hold the language model as `"int8"` or `"int4"`; by default as saved.

    Raises:
        OSError: no processor there.
        ValueError: another kind of model, neither a whole model nor an adapter there, or what
            `SenseForConditionalGeneration.from_adapter` refuses.
    """
    folder, where = shipped(folder), {"revision": revision, "token": token}
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, **where)
    if not isinstance(processor, SenseProcessor):
        raise ValueError(f"{folder} is no SENSE model: what prepares its input is a {type(processor).__name__}")
    if _is_whole(folder, **where):
        how = {} if quantize is None else {"quantization_config": quantization_config(quantize)}
        model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=dtype, **where, **how)
    else:
        named = read_adapter_config(fetch_adapter(folder, **where))["backbones"] or {}
        named = {part: _resolved(named[part]["id"]) for part in ("audio", "text") if part in named}
        backbones = {part: folder for part, folder in named.items() if folder}
        how = {} if quantize is None else {"quantize": quantize}
        model = SenseForConditionalGeneration.from_adapter(folder, backbones=backbones, dtype=dtype, **where, **how)
    return model.to(PartialState().device).eval(), processor


def _is_whole(folder: str | os.PathLike, **where) -> bool:
    try:
        return bool(cached_file(folder, CONFIG_NAME, **where))
    except OSError:  # not there; whether there is an adapter is seen next
        return False


def _resolved(name: str) -> str | None:
    """The folder of a backbone that goes by a name of ours or its Hub id; None for any other."""
    folder = resolve_backbone(name)
    return None if folder == name else folder


def export_model(
    model: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    adapter_only: bool = False,
    dtype: str = "auto",
    metrics: Sequence[str | os.PathLike] = (),
    datasets: Sequence[str] = (),
    repo_id: str | None = None,
    language: Sequence[str] = (),
    license: str | None = None,
    notes: str | os.PathLike | None = None,
) -> Path:
    """
    Writes a folder that can be published as it is: weights (or the adapter alone), processor, code and model card.

    Args:
        model: output folder or checkpoint of train_sense.py, any other that `load_checkpoint` takes, or a Hub id.
        output_dir: of the new folder; it must not exist.
        adapter_only: what was trained alone, megabytes; whoever loads it gets the backbones from where it says.
        dtype: of the backbones' weights; auto as they are.
        metrics: metrics.json files of eval_sense.py, or their folders, for the card.
        datasets: Hub ids or names of what it was trained on, beside what the run itself recorded.
        repo_id: where it will be published, for the card.
        language: ISO codes, beside those that the run recorded.
        license: the Hub's identifier, such as apache-2.0. None is claimed by default.
        notes: Markdown file that the card begins with, in your own words: its data, what it is for, what it can't do.

    Returns:
        `output_dir`.

    Raises:
        ValueError: `output_dir` exists, a metrics file can't be read, there is no `notes`, `adapter_only` of a model
            whose LoRA was merged or whose backbones are folders of this machine.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists: name a folder that does not")
    if notes is not None and not Path(notes).is_file():
        raise ValueError(f"{notes}: no such file; give Markdown for the card")
    loaded, processor = load_checkpoint(model, dtype)
    loaded.remove_classifier()
    loaded.config.backbones = published_backbones(loaded.config.backbones, adapter_only)
    card = make_card(
        loaded,
        processor,
        run=model if Path(model).is_dir() else None,
        metrics=metrics,
        datasets=datasets,
        repo_id=repo_id or output_dir.name,
        language=language,
        license=license,
        notes=None if notes is None else Path(notes).read_text(encoding="utf-8"),
        adapter_only=adapter_only,
    )
    temporary = output_dir.with_name(f".{output_dir.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if adapter_only:
        loaded.save_adapter(temporary, inference=True)
        custom_object_save(loaded, temporary)  # the code, as save_pretrained writes it
    else:
        loaded.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    write_text(temporary / CARD, str(card))
    for weights in temporary.glob("*.safetensors"):
        weights.chmod(0o644)  # save_pretrained leaves them 0600
    os.replace(temporary, output_dir)
    return output_dir


def published_backbones(backbones: dict | None, needed: bool) -> dict | None:
    """
    The backbones as others can find them: by Hub id and revision where these very weights came from the Hub, by our
    name for them where they came from packages. Of a folder of this machine its own name is kept, or with `needed`
    none: ValueError.
    """
    found = dict(backbones or {})
    for part in ("audio", "text"):
        if part in found:
            found[part] = {**found[part], **_published(part, found[part], needed)}
        elif needed:
            raise ValueError(f"adapter_only: it is not known where the {part} backbone came from")
    return found or None


def _published(part: str, backbone: dict, needed: bool) -> dict:
    """The id and revision that others find a backbone by."""
    name, revision = backbone["id"], backbone.get("revision")
    known = known_name(name)
    if known and revision:  # from the Hub, past the folders of processing/backbones.py
        return {"id": name, "revision": revision}
    folder = cache_folder() / known if known else Path(name)  # only looked at: nothing is fetched for a name
    source = folder / "SOURCE.json"
    origin = json.loads(source.read_text())["source"] if source.is_file() else ""
    if origin.startswith("hub:"):
        name, _, commit = origin.removeprefix("hub:").partition("@")
        return {"id": name, "revision": commit}
    if origin.startswith("packages:") and folder.name in BACKBONES:
        return {"id": folder.name, "revision": None}
    if known or is_hub_id(name):
        return {"id": name, "revision": revision}
    if needed:
        raise ValueError(
            f"adapter_only: the {part} backbone is {name}, which others do not have; train on a Hub id, or export the "
            "whole model"
        )
    return {"id": folder.resolve().name, "revision": None}


def push_model(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Uploads what `export_model` wrote, in place of an earlier upload's weights and code; other files there stay.

    Args:
        folder: of `export_model`.
        repo_id: `name` or `owner/name`, created if it is not there.
        private: make a new repository private.
        revision: branch, created if it is not there; the main one by default.
        token: by default the one of `hf auth login`, or HF_TOKEN.

    Returns:
        address of the commit.

    Raises:
        ValueError: the folder is not whole, is a training's own, or holds pickles.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    folder = Path(folder)
    _check_export(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        delete_patterns=REPLACED,
        commit_message="Upload SENSE adapter" if (folder / ADAPTER_CONFIG).is_file() else "Upload SENSE model",
    )
    return commit.commit_url


def _check_export(folder: Path):
    for name in (TRAINING, TRAINER_STATE):
        if (folder / name).is_file():
            raise ValueError(f"{folder} can't be published: {name} is of a training; export it first (sense export)")
    weights = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if (folder / ADAPTER_CONFIG).is_file() else (CONFIG_NAME,)
    for name in (*weights, PROCESSOR_NAME, "modeling_sense.py", CARD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} can't be published: it has no {name}; make it with export_model")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} can't be published: it has no weights (*.safetensors); make it with export_model")
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.rglob(pattern)):
        raise ValueError(f"{folder} can't be published: it holds {pickles[0]}; make it with export_model")
