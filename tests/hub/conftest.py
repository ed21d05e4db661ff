"""A Hub of our own, models on it, and what they answer."""

import pytest
import torch
import transformers
from huggingface_hub import HfApi, constants

from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor
from processing.hub import export_model, push_model
from tests.conftest import tone
from tests.hub_server import HubServer


PROMPTS = {"asr": "Transcribe the speech.", "ner": "Tag the speech."}
CODE = {"configuration_sense.py", "modeling_sense.py", "processing_sense.py"}
CODE |= {"pipeline_sense.py", "alignment.py", "long_audio.py", "mp3.py", "tasks.py", "quantization_sense.py"}
CODE |= {"constrained.py", "answer_grammar.py"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Hub that this process takes for the Hub, signed in."""
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # made by an earlier test, for the real Hub
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture(scope="module")
def backbones(server, tiny_whisper, tiny_llama):
    """Ids of tiny backbones on that Hub."""
    for name, folder in (("tester/whisper", tiny_whisper), ("tester/llama", tiny_llama)):
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    return "tester/whisper", "tester/llama"


def compose(backbones, seed=0):
    """A model with an adapter that makes itself heard, and its processor."""
    torch.manual_seed(seed)
    model = SenseForConditionalGeneration.from_backbones(*backbones)
    model.model.multi_modal_projector.linear.weight.data.normal_(0, 1)
    return model, SenseProcessor.from_backbones(*backbones, prompts=PROMPTS)


def answer(model, processor):
    return model.generate(**processor.apply_request(tone(1.0)), max_new_tokens=8)[:, -8:].tolist()


@pytest.fixture(scope="module")
def whole(backbones, tmp_path_factory):
    """A model pushed twice by transformers' own method, its answers at both revisions, and a folder of the first."""
    folder = str(tmp_path_factory.mktemp("saved") / "sense.v-1")  # such names stand in the way of careless imports
    model, processor = compose(backbones)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    answers = {"v1": answer(model, processor)}
    model.push_to_hub("tester/sense"), processor.push_to_hub("tester/sense")
    HfApi().create_tag("tester/sense", tag="v1")
    model.lm_head.weight.data.normal_(0, 1)
    answers["main"] = answer(model, processor)
    model.push_to_hub("tester/sense")
    return {"folder": folder, "repo": "tester/sense", "answers": answers, "model": model, "processor": processor}


@pytest.fixture(scope="module")
def adapter(backbones, tmp_path_factory):
    """An adapter, exported alone and pushed, and its answers."""
    folder = tmp_path_factory.mktemp("adapter")
    model, processor = compose(backbones, seed=1)
    model.add_classifier(["PERSON"])
    model.save_adapter(folder / "run"), processor.save_pretrained(folder / "run")
    export_model(folder / "run", folder / "export", adapter_only=True, repo_id="tester/adapter")
    address = push_model(folder / "export", "adapter", private=True)
    return {"folder": folder, "repo": "tester/adapter", "answers": answer(model, processor), "address": address}
