"""What transformers asks of every processor of text and audio, asked of SenseProcessor."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, WhisperFeatureExtractor

from processing import SenseProcessor
from processing.processing_sense import AUDIO_TOKEN
from tests.conftest import make_tokenizer, tone


TEXT, CLIP = f"{AUDIO_TOKEN}\nlower newer", tone(0.6)
LENGTH = 5 + len(make_tokenizer()("\nlower newer")["input_ids"])  # 0.6 s are 5 audio tokens
OPTIONS = {"tokenize": True, "return_dict": True}


@pytest.fixture(scope="module")
def processor():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
    return SenseProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer)


def ask(seconds: float, seed: int = 0) -> list[dict]:
    content = [{"type": "audio", "audio": tone(seconds, seed=seed)}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": content}]


def equal(batch, other) -> bool:
    return batch.keys() == other.keys() and all(np.array_equal(batch[name], other[name]) for name in batch)


# ------------------------------------------------------------------ saving


def test_saved_parts_are_those_of_before(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    for loaded in (SenseProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        # What was saved notes where its code lies; the installed class does not.
        assert loaded.to_dict() == {k: v for k, v in processor.to_dict().items() if k != "auto_map"}
        assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert loaded.feature_extractor.to_dict() == processor.feature_extractor.to_dict()
    # The parts alone, too, as other programs take them.
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()
    assert WhisperFeatureExtractor.from_pretrained(tmp_path).to_dict() == processor.feature_extractor.to_dict()


def test_files_hold_each_thing_once(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir() if file.suffix != ".py"} == {
        "chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "SenseProcessor" and "chat_template" not in saved
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_keywords_change_what_was_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = SenseProcessor.from_pretrained(tmp_path, pad_token="<|im_start|>", num_audio_tokens=100)
    assert loaded.tokenizer.pad_token == "<|im_start|>" and loaded.num_audio_tokens == 100
    assert loaded.tokenizer.padding_side == "left"


def test_from_dict_and_text(processor):
    assert json.loads(processor.to_json_string())["processor_class"] == "SenseProcessor"
    assert repr(processor).startswith("SenseProcessor:\n- feature_extractor: WhisperFeatureExtractor")


# ------------------------------------------------------------------ calling it


def test_names_are_what_a_call_returns(processor):
    batch = processor(text=TEXT, audio=CLIP)
    assert type(batch) is BatchFeature
    assert set(processor.model_input_names) == set(batch)
    assert len(processor.model_input_names) == len(set(processor.model_input_names))


@pytest.mark.parametrize("text", [TEXT, [TEXT], (TEXT, TEXT)], ids=["one", "list", "tuple"])
@pytest.mark.parametrize("kind", [np.ndarray, torch.Tensor])
def test_tensors_of_the_kind_asked_for(processor, text, kind):
    name = {np.ndarray: "np", torch.Tensor: "pt"}[kind]
    clips = [CLIP] * (1 if isinstance(text, str) else len(text))
    batch = processor(text=text, audio=clips, return_tensors=name)
    assert all(type(value) is kind for value in batch.values())
    assert equal(batch, processor(text=text, audio=clips))
    assert all(len(value) == len(clips) for value in batch.values())
    lists = processor(text=text, audio=clips, return_tensors=None)
    assert type(lists["input_ids"]) is list and lists["input_ids"] == batch["input_ids"].tolist()


def test_parts_make_what_the_whole_makes(processor):
    batch = processor(text=TEXT, audio=CLIP)
    features = processor.feature_extractor(CLIP, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
    assert torch.equal(batch["input_features"], features["input_features"])
    assert torch.equal(batch["input_features_mask"], features["attention_mask"])
    expanded = TEXT.replace(AUDIO_TOKEN, AUDIO_TOKEN * 5)
    ids = processor.tokenizer(expanded, add_special_tokens=False, return_tensors="pt")
    assert torch.equal(batch["input_ids"], ids["input_ids"]) and batch["input_ids"].shape == (1, LENGTH)


# ------------------------------------------------------------------ keywords find their part


@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": "max_length", "max_length": 40},
        {"text_kwargs": {"padding": "max_length", "max_length": 40}},
        {"text_kwargs": {"padding": "max_length", "max_length": 40}, "audio_kwargs": {"max_length": 66}},
        {"common_kwargs": {"return_tensors": "pt"}, "text_kwargs": {"padding": "max_length", "max_length": 40}},
        {"text_kwargs": {"padding": "max_length"}, "max_length": 40},
    ],
    ids=str,
)
def test_text_keywords_are_for_the_tokenizer(processor, kwargs):
    batch = processor(text=[TEXT, AUDIO_TOKEN], audio=[CLIP, CLIP], **kwargs)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 40)
    # Padding is the text's; audio is always padded to what Whisper was trained with.
    assert batch["input_features"].shape == (2, 8, 3000)
    assert batch["input_features_mask"].sum(1).tolist() == [60, 60]


def test_a_call_overrides_defaults_for_itself_alone(processor):
    default = processor(text=["a", "longer text"])
    assert default["attention_mask"][0, 0] == 0  # padded, on the left
    unpadded = processor(text=["a", "longer text"], padding=False, return_tensors=None)
    assert len(unpadded["input_ids"][0]) < len(unpadded["input_ids"][1])
    right = processor(text=["a", "longer text"], padding_side="right")
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0
    assert equal(processor(text=["a", "longer text"]), default)


def test_settings_of_the_tokenizer_hold_if_a_call_says_nothing(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = SenseProcessor.from_pretrained(tmp_path, model_max_length=20)
    batch = loaded(text=TEXT, audio=CLIP, padding="max_length")
    assert batch["input_ids"].shape == (1, 20)


def test_a_keyword_given_twice_is_refused(processor):
    with pytest.raises(ValueError, match="padding was passed two times"):
        processor(text=TEXT, audio=CLIP, padding="max_length", text_kwargs={"padding": "max_length"})


def test_audio_tokens_are_marked_where_asked(processor):
    batch = processor(text=TEXT, audio=CLIP, return_mm_token_type_ids=True)
    audio = batch["input_ids"] == processor.audio_token_id
    assert torch.equal(batch["mm_token_type_ids"] != 0, audio) and audio.sum() == 5


# ------------------------------------------------------------------ chat


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
@pytest.mark.parametrize("conversations", [1, 2])
def test_chat_in_batches(processor, return_tensors, conversations):
    chats = [ask(0.6 + i, seed=i) for i in range(conversations)]
    batch = processor.apply_chat_template(
        chats, add_generation_prompt=True, **OPTIONS, processor_kwargs={"return_tensors": return_tensors}
    )
    assert set(batch) == set(processor.model_input_names)
    assert all(len(value) == conversations for value in batch.values())
    assert all(isinstance(v, np.ndarray if return_tensors == "np" else torch.Tensor) for v in batch.values())
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    clips = [chat[0]["content"][0]["audio"] for chat in chats]
    assert equal(batch, processor(text=prompts, audio=clips))


def test_chat_of_one_is_a_batch_of_one(processor):
    one = processor.apply_chat_template(ask(0.6), **OPTIONS)
    assert equal(one, processor.apply_chat_template([ask(0.6)], **OPTIONS))
    ids = processor.apply_chat_template(ask(0.6), tokenize=True)
    assert torch.equal(ids, one["input_ids"])
    assert type(processor.apply_chat_template(ask(0.6))) is str
    assert [type(prompt) for prompt in processor.apply_chat_template([ask(0.6), ask(0.7)])] == [str, str]


def test_chat_keywords(processor):
    batch = processor.apply_chat_template(
        ask(0.6), **OPTIONS, processor_kwargs={"padding": "max_length", "max_length": 50}
    )
    assert batch["input_ids"].shape == (1, 50) and batch["input_features"].shape == (1, 8, 3000)
    begun = [*ask(0.6), {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    assert processor.apply_chat_template(begun, continue_final_message=True).endswith("<|im_start|>assistant\nIt is")
    shout = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    text = [{"role": "user", "content": "aloud"}]
    assert processor.apply_chat_template(text, chat_template=shout) == "ALOUD"


# ------------------------------------------------------------------ decoding


def test_decoding_is_the_tokenizers(processor):
    ids = processor(text=["lower newer", "the user"], padding=False, return_tensors=None)["input_ids"]
    assert processor.batch_decode(ids) == processor.decode(ids) == ["lower newer", "the user"]
    assert processor.decode(ids[0]) == processor.decode(torch.tensor(ids[0])) == "lower newer"
    assert processor.decode(ids[0][0]) == processor.tokenizer.decode(ids[0][0])
    spoken = processor(text=TEXT, audio=CLIP)["input_ids"]
    assert processor.decode(spoken[0]) == TEXT.replace(AUDIO_TOKEN, AUDIO_TOKEN * 5)
    assert processor.batch_decode(spoken, skip_special_tokens=True) == ["\nlower newer"]
