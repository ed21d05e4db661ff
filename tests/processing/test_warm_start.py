"""The closed-form warm start: the regression, the alignment, and what they do to the adapter."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor, load_audio
from processing.warm_start import (
    RidgeRegression,
    WordAligner,
    across_processes,
    speech_and_tokens,
    spoken_tokens,
    warm_start,
    whisper_language,
)
from tests.conftest import make_corpus, save_llm, tone


def test_ridge_regression_finds_the_line_in_pieces():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(500, 4), torch.randn(3, 4), torch.randn(3)
    y = x @ weight.T + bias
    regression = RidgeRegression(4, 3)
    for part in range(0, 500, 100):
        regression.add(x[part : part + 100], y[part : part + 100])
    found_weight, found_bias, r2 = regression.solve(1e-9)
    torch.testing.assert_close(found_weight.float(), weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_bias.float(), bias, atol=1e-4, rtol=1e-4)
    assert r2 == pytest.approx(1, abs=1e-6)


def test_ridge_regression_of_noise_explains_nothing():
    torch.manual_seed(0)
    regression = RidgeRegression(2, 2)
    regression.add(torch.randn(4000, 2), torch.randn(4000, 2) + 7)
    weight, bias, r2 = regression.solve(1e-3)
    assert abs(r2) < 0.01 and weight.abs().max() < 0.1
    torch.testing.assert_close(bias, torch.full((2,), 7.0, dtype=bias.dtype), atol=0.1, rtol=0)


def test_what_processes_exchange_is_where_their_network_takes_it(monkeypatch):
    PartialState()  # which all share
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))

    def add(tensors, kind):
        assert kind == "sum" and all(tensor.is_meta for tensor in tensors.values())
        return {name: torch.ones(tensor.shape) for name, tensor in tensors.items()}

    assert across_processes(add, {"rows": torch.tensor(3)}, "sum") == {"rows": torch.tensor(1.0)}


@pytest.fixture
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_spoken_tokens_are_those_at_the_centres(tokenizer):
    first = tokenizer("ab", add_special_tokens=False)["input_ids"]
    second = tokenizer(" cd", add_special_tokens=False)["input_ids"]
    assert len(first) == 2
    # Two words over 8 audio tokens of 6 frames: the first ends at frame 24, so it fills tokens 0-3.
    found = spoken_tokens("ab cd", [24, 48], num_tokens=8, frames_per_token=6, tokenizer=tokenizer).tolist()
    assert found[:4] == [first[0], first[0], first[1], first[1]]
    assert set(found[4:]) <= set(second) and found[4] == second[0] and found[-1] == second[-1]


def test_without_word_times_the_words_share_the_clip_evenly(tokenizer):
    found = spoken_tokens("a b c d", None, num_tokens=8, frames_per_token=6, tokenizer=tokenizer).tolist()
    assert found[0] == found[1]  # "a", one token over its two audio tokens
    assert [tokenizer.decode(found[at : at + 2]) for at in (2, 4, 6)] == [" b", " c", " d"]
    assert spoken_tokens("", None, num_tokens=8, frames_per_token=6, tokenizer=tokenizer) is None


def test_encoder_only_checkpoint_spreads_words_evenly(tiny_whisper, tmp_path):
    from transformers import WhisperModel

    WhisperModel.from_pretrained(tiny_whisper).encoder.save_pretrained(tmp_path)
    aligner = WordAligner.from_pretrained(tmp_path, "cpu")
    assert aligner.kind == "even" and aligner.word_times(torch.randn(1, 1500, 32), "a word", 10) is None


def start(tiny_whisper, tiny_llama, **kwargs):
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama)
    processor = SenseProcessor.from_backbones(tiny_whisper, tiny_llama)
    return model, processor, warm_start(model, processor, make_corpus(6), tiny_whisper, **kwargs)


def test_warm_start_uses_every_audio_token_of_the_clips_asked_for(tiny_whisper, tiny_llama):
    _, processor, found = start(tiny_whisper, tiny_llama, max_clips=4)
    expected = sum(processor.num_tokens(len(load_audio(row["audio"]))) for row in make_corpus(6).select(range(4)))
    assert found["audio_tokens"] == expected and found["clips"] == 4
    assert found["word_times"] == "even" and 0 < found["r2"] <= 1


def test_the_adapter_aims_at_embeddings_as_the_model_reads_them(tiny_whisper, tmp_path):
    """Gemma's table is scaled on the way."""
    llm = save_llm(Gemma3TextConfig, Gemma3ForCausalLM, tmp_path)
    model, _, _ = start(tiny_whisper, llm, gain=1.0)
    table = model.get_input_embeddings()
    length = table(torch.arange(200)).norm(dim=1).mean()
    assert length > 3 * table.weight[:200].norm(dim=1).mean()
    said = model.get_audio_features(**SenseProcessor.from_backbones(tiny_whisper, llm).audio_features([tone(1.0)]))
    assert said.pooler_output.norm(dim=1).mean() > 0.2 * length


def test_whisper_is_told_the_language_of_the_row():
    settings = SimpleNamespace(is_multilingual=True, lang_to_id={"<|en|>": 0, "<|de|>": 1})
    told = [whisper_language(settings, name) for name in ("de", "DE-de", "de_AT", " German", None, "", "tlh")]
    assert told == ["de", "de", "de", "de", "en", "en", "en"]
    assert whisper_language(SimpleNamespace(), "de") is None


@pytest.mark.parametrize("audio_tokens", ["trim", "fixed"])
def test_what_follows_a_clip_says_nothing(tiny_whisper, tiny_llama, audio_tokens):
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama, audio_tokens=audio_tokens)
    processor = SenseProcessor.from_backbones(tiny_whisper, tiny_llama, audio_tokens=audio_tokens)
    row = make_corpus(1)[0]  # of half a second: 25 of the encoder's frames
    heard, tokens = speech_and_tokens(model, processor, WordAligner(None), row)
    assert len(heard) == len(tokens) == 5 and len(set(tokens.tolist())) > 1


def test_gain_scales_what_the_adapter_says(tiny_whisper, tiny_llama):
    said = []
    for gain in (1.0, 1.5):
        model, processor, _ = start(tiny_whisper, tiny_llama, gain=gain)
        features = processor.audio_features([tone(1.0)])
        said.append(model.get_audio_features(**features).pooler_output)
    torch.testing.assert_close(said[1], 1.5 * said[0], rtol=1e-4, atol=1e-5)


def test_warm_start_lowers_the_distance_to_the_spoken_embeddings(tiny_whisper, tiny_llama):
    """Against an adapter that says the mean embedding always (R2 = 0) and a random one."""
    model, processor, found = start(tiny_whisper, tiny_llama, gain=1.0, ridge=1e-6)
    assert found["r2"] > 0.02
