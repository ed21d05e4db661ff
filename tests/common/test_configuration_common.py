"""SenseConfig as a composite configuration of transformers."""

import copy
import pickle

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config, WhisperConfig

from modeling_sense import SenseConfig
from tests.common.conftest import CLASSIFIER, LORA, tiny_config


def without_origin(config) -> dict:
    """A configuration's fields, without the name of the folder that it came from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


FULL = {"lora": LORA, "classifier": CLASSIFIER, "audio_tokens": "fixed"}


def through_a_dict(config, folder):
    return SenseConfig.from_dict(config.to_dict())


def through_a_file(config, folder):
    config.to_json_file(folder / "config.json")
    return SenseConfig.from_json_file(folder / "config.json")


def through_a_folder(config, folder):
    config.save_pretrained(folder)
    return SenseConfig.from_pretrained(folder)


def through_auto(config, folder):
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


def through_pickle(config, folder):
    return pickle.loads(pickle.dumps(config))


def through_a_copy(config, folder):
    return copy.deepcopy(config)


@pytest.mark.parametrize(
    "way", [through_a_dict, through_a_file, through_a_folder, through_auto, through_pickle, through_a_copy]
)
@pytest.mark.parametrize("config", [SenseConfig(), tiny_config(tied=True, **FULL)], ids=["default", "full"])
def test_round_trip(config, way, tmp_path):
    again = way(config, tmp_path)
    assert type(again) is SenseConfig and again is not config
    assert type(again.audio_config) is WhisperConfig and type(again.text_config) is LlamaConfig
    assert without_origin(again) == without_origin(config)


def test_sub_configs_are_named_and_may_be_dicts():
    config = tiny_config()
    assert set(SenseConfig.sub_configs) == {"audio_config", "text_config"}
    dicts = {name: getattr(config, name).to_dict() for name in SenseConfig.sub_configs}
    from_dicts = SenseConfig(**dicts, audio_token_id=config.audio_token_id, num_audio_tokens=10)
    assert from_dicts.to_dict() == config.to_dict()
    other = SenseConfig(text_config={"model_type": "qwen2", "hidden_size": 48})
    assert type(other.text_config) is Qwen2Config and other.hidden_size == 48


def test_sub_configs_load_from_the_composites_folder(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    for sub, sub_class in (("audio_config", WhisperConfig), ("text_config", LlamaConfig)):
        assert without_origin(sub_class.from_pretrained(tmp_path)) == without_origin(getattr(config, sub))


def test_text_config_is_the_language_models():
    config = tiny_config()
    assert config.get_text_config() is config.text_config
    assert config.get_text_config(decoder=True) is config.text_config
    assert config.get_text_config().vocab_size == 99 and config.hidden_size == 32
    assert not config.is_encoder_decoder


def test_keywords_override_what_was_saved(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert SenseConfig.from_pretrained(tmp_path, audio_tokens="fixed").audio_tokens == "fixed"


def test_configs_share_nothing():
    one, other = SenseConfig(), SenseConfig()
    one.text_config.hidden_size = 7
    assert other.text_config.hidden_size == 2048 and SenseConfig().text_config.hidden_size == 2048
