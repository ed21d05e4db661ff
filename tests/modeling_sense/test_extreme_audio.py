"""Numbers stay numbers: audio at its extremes, in every dtype of the frozen weights and of autocast; loss scaling."""

import io

import numpy as np
import pytest
import soundfile
import torch

from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor
from tests.conftest import tone


# Of the frozen weights, and of autocast; two kinds of half precision at once torch does not mix.
DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None)]
DTYPES += [(weights, half) for half in (torch.bfloat16, torch.float16) for weights in (torch.float32, half)]


def float_wav(clip: np.ndarray) -> bytes:
    """A WAV file of floats, which may hold samples beyond 1."""
    file = io.BytesIO()
    soundfile.write(file, clip, 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def extremes() -> dict[str, np.ndarray]:
    speech = tone(1.0)
    impulse = np.zeros(16000, np.float32)
    impulse[8000] = 1.0
    return {
        "clipped": np.sign(speech),
        "huge": 1e4 * np.sign(speech),
        "silent": np.zeros(16000, np.float32),
        "constant": np.full(16000, 0.7, np.float32),
        "impulse": impulse,
        "one sample": speech[1000:1001],
        "30 s, clipped": np.sign(tone(30.0)),
    }


@pytest.fixture(scope="module")
def processor(tiny_whisper, tiny_llama):
    return SenseProcessor.from_backbones(tiny_whisper, tiny_llama)


@pytest.fixture(scope="module")
def requests(processor):
    return processor.apply_request([float_wav(clip) for clip in extremes().values()])


def build(tiny_whisper, tiny_llama, dtype):
    torch.manual_seed(0)
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama, dtype=dtype)
    model.add_lora(r=4)
    model.add_classifier(["PERSON", "PLACE"])
    return model.train()


def training_batch(requests) -> dict:
    batch = {**requests, "labels": requests["input_ids"].clone()}
    batch["labels"][:, :-3] = -100
    present = torch.arange(len(batch["labels"])) % 2
    return {**batch, "classifier_labels": torch.stack([present, 1 - present], 1)}


@pytest.mark.parametrize("backbones, autocast", DTYPES, ids=str)
def test_loss_gradients_and_answers_stay_finite(tiny_whisper, tiny_llama, requests, backbones, autocast):
    model = build(tiny_whisper, tiny_llama, backbones)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = model(**training_batch(requests)).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
    how = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        answers = model.eval().generate(**requests, **how)
    assert torch.stack(answers.logits).isfinite().all()


def test_a_loss_that_overflows_is_scaled_down_and_its_step_skipped(tiny_whisper, tiny_llama, requests):
    """As Trainer does it with fp16: nothing is trained by a step whose gradients overflow, the next ones are right."""
    model, batch = (
        build(tiny_whisper, tiny_llama, torch.float16),
        training_batch({k: v[:2] for k, v in requests.items()}),
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19)
    before, scales = [p.detach().clone() for p in parameters], []

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = [parameter.grad.clone() for parameter in parameters]
        scaler.step(optimizer)
        scaler.update()
        return gradients

    while True:
        scales.append(scaler.get_scale())
        gradients = step()
        if all(gradient.isfinite().all() for gradient in gradients):
            break
        assert scaler.get_scale() == scales[-1] / 2
        assert all(map(torch.equal, before, parameters)) and len(scales) < 40
    assert len(scales) > 1 and scaler.get_scale() == scales[-1]
    assert not any(torch.equal(a, b) for a, b, g in zip(before, parameters, gradients) if g.any())

    reference = build(tiny_whisper, tiny_llama, torch.float32)
    reference(**batch).loss.backward()
    expected = [parameter.grad for parameter in reference.parameters() if parameter.requires_grad]
    for found, right in zip(gradients, expected, strict=True):
        assert (found - right).norm() <= 0.05 * right.norm() + 1e-6
