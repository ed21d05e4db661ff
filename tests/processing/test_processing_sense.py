"""The processor: audio of every kind in, prompts expanded, saved and loaded, bad input named."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer

from processing import SenseProcessor, load_audio
from processing.processing_sense import AUDIO_TOKEN, text_ids
from tests import conftest
from tests.conftest import tone


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def processor(tiny_whisper, tiny_llama):
    return SenseProcessor.from_backbones(tiny_whisper, tiny_llama)


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(1.0), 16000, subtype="FLOAT")
    return path


def equal(batch, other) -> bool:
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


# --- load_audio: what it takes


@pytest.mark.parametrize(
    "source",
    [
        lambda path: path,
        str,
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"bytes": path.read_bytes(), "path": "elsewhere.wav"},
        lambda path: {"bytes": None, "path": str(path)},
        lambda path: path.as_uri(),
        lambda path: tone(1.0),
        lambda path: {"array": tone(1.0), "sampling_rate": 16000},
        lambda path: torch.from_numpy(tone(1.0)),
        lambda path: tone(1.0).tolist(),
        lambda path: tone(1.0)[:, None],
        lambda path: tone(1.0)[None],
        lambda path: tone(1.0).astype(np.float64),
    ],
)
def test_every_source_gives_the_same_samples(wav, source):
    samples = load_audio(source(wav))
    assert samples.dtype == np.float32 and samples.shape == (16000,)
    np.testing.assert_array_equal(samples, tone(1.0))


def test_open_file(wav):
    with open(wav, "rb") as file:
        np.testing.assert_array_equal(load_audio(file), tone(1.0))


def test_pcm_integers_are_scaled():
    pcm = np.array([-32768, 0, 16384], dtype=np.int16)
    assert load_audio(pcm).tolist() == [-1.0, 0.0, 0.5]
    assert load_audio(torch.from_numpy(pcm)).tolist() == [-1.0, 0.0, 0.5]


def test_bfloat16_tensor():
    assert load_audio(torch.full((100,), 0.5, dtype=torch.bfloat16)).tolist() == [0.5] * 100


def pitch(samples: np.ndarray) -> float:
    """Strongest frequency in Hz of samples at 16 kHz."""
    spectrum = np.abs(np.fft.rfft(samples))
    return spectrum.argmax() * 16000 / len(samples)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 44101, 48000, 96000])
def test_any_sampling_rate(rate):
    samples = load_audio(tone(2.0, rate=rate), sampling_rate=rate)
    assert abs(len(samples) - 32000) <= 3
    assert abs(pitch(samples) - 150) < 1


def test_rate_in_the_dict_wins_over_the_argument():
    clip = {"array": tone(1.0, rate=8000), "sampling_rate": 8000}
    assert len(load_audio(clip, sampling_rate=44100)) == 16000


def test_eight_channels_at_44100(tmp_path, processor):
    channels = np.stack([tone(1.0, rate=44100, seed=0) * gain for gain in np.linspace(0, 1, 8)], axis=1)
    path = tmp_path / "eight.wav"
    soundfile.write(path, channels, 44100, subtype="FLOAT")
    from_file = load_audio(path)
    assert from_file.shape == (16000,) and abs(pitch(from_file) - 150) < 1
    np.testing.assert_allclose(from_file, load_audio(tone(1.0, rate=44100) * 0.5, 44100), atol=1e-6)
    for shaped in (channels, channels.T):
        np.testing.assert_allclose(load_audio(shaped, sampling_rate=44100), from_file, atol=1e-6)
    assert processor.apply_transcription_request(path)["input_features_mask"].sum() == 100


@pytest.mark.parametrize("rate", [16000, 22050, 44100, 44101])
def test_thirty_seconds_are_taken(rate, processor):
    samples = load_audio(np.zeros(30 * rate, np.float32), sampling_rate=rate)
    assert 479990 <= len(samples) <= 480000
    assert processor.num_tokens(len(samples)) == 250


# --- load_audio: what it refuses


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere.wav: no such audio file"):
        load_audio(tmp_path / "nowhere.wav")


@pytest.mark.parametrize("name", ["a" * 300 + ".wav", "~nobody-of-that-name.wav"])
def test_names_that_no_file_has(name):
    with pytest.raises(ValueError, match="no such audio file"):
        load_audio(name)


def test_missing_address(tmp_path):
    with pytest.raises(ValueError, match="nowhere.wav: no such audio file"):
        load_audio((tmp_path / "nowhere.wav").as_uri())


def test_a_name_that_is_no_utf8(wav, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    shutil.copy(wav, path)
    assert np.array_equal(load_audio(path), load_audio(wav))


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(ValueError, match="no such audio file"):
        load_audio(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not audio at all" * 100])
def test_corrupt_file(tmp_path, content):
    path = tmp_path / "broken.flac"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.flac: not readable as audio"):
        load_audio(path)
    with pytest.raises(ValueError, match="not readable as audio"):
        load_audio({"bytes": content, "path": None})


def test_file_cut_short(tmp_path):
    path = tmp_path / "cut.flac"
    soundfile.write(path, tone(4.0), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="cut.flac: (corrupt|not readable)"):
        load_audio(path)


@pytest.mark.parametrize("told", [0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF])
def test_a_wav_cut_short_and_one_whose_writer_did_not_know_its_length(tmp_path, told):
    whole, path = conftest.wav(tone(4.0)), tmp_path / "cut.wav"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.wav: corrupt, 64022 bytes of its 128000 are missing"):
        load_audio(path)
    at = whole.index(b"data") + 4
    path.write_bytes(whole[:at] + told.to_bytes(4, "little") + whole[at + 4 :])
    assert len(load_audio(path)) == 64000


def test_no_samples(tmp_path):
    path = tmp_path / "empty.wav"
    soundfile.write(path, np.zeros(0, np.float32), 16000)
    with pytest.raises(ValueError, match="empty.wav: 0 samples"):
        load_audio(path)
    with pytest.raises(ValueError, match="0 samples"):
        load_audio(np.zeros(0, np.float32))


def test_thirty_one_seconds(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(31 * 8000, np.float32), 8000)
    with pytest.raises(ValueError, match=r"long.wav: 31.00 s of audio, the limit is 30 s"):
        load_audio(path)
    with pytest.raises(ValueError, match=r"31.00 s of audio, the limit is 30 s"):
        load_audio(np.zeros(31 * 44100, np.float32), sampling_rate=44100)


def test_half_precision_has_an_infinity_too():
    clip = tone(0.5).astype(np.float16)
    np.testing.assert_array_equal(load_audio(clip), clip.astype(np.float32))
    clip[10] = np.inf
    with pytest.raises(ValueError, match="1 of 8000 samples are NaN or infinite"):
        load_audio(clip)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(bad):
    samples = tone(0.5)
    samples[10:13] = bad
    with pytest.raises(ValueError, match="3 of 8000 samples are NaN or infinite"):
        load_audio(samples)


@pytest.mark.parametrize(
    "audio, rate, message",
    [
        (np.zeros((2, 3, 4), np.float32), None, r"shape \(2, 3, 4\)"),
        (np.zeros(100, np.float32), 16, "sampling rate 16; give it in Hz"),
        (np.array(["a", "b"]), None, "type <U1"),
        (None, None, "type object"),
        ([0, 812, -300], None, "64-bit integers, whose full scale nobody knows"),
        ({"array": torch.tensor([0, 812]), "sampling_rate": 16000}, None, "64-bit integers"),
        ({"path": None, "bytes": None}, None, "give array and sampling_rate, bytes or path"),
        ({"waveform": [0.0]}, None, r"keys \['waveform'\]"),
    ],
)
def test_what_cannot_be_audio(audio, rate, message):
    with pytest.raises(ValueError, match=message):
        load_audio(audio, sampling_rate=rate)


# --- tokens of a clip


LENGTHS = [1, 159, 160, 161, 319, 320, 321, 480, 1919, 1920, 1921, 16000, 123457, 479839, 479840, 479999, 480000]


@pytest.mark.parametrize("num_audio_tokens", [250, 1, 77, 1500])
def test_num_tokens_agrees_with_the_mask(tiny_whisper, tiny_llama, num_audio_tokens):
    processor = SenseProcessor.from_backbones(tiny_whisper, tiny_llama, num_audio_tokens=num_audio_tokens)
    for samples in LENGTHS:
        mel = math.ceil(samples / 160)
        frames = (mel - 1) // 2 + 1
        assert processor.num_tokens(samples) == math.ceil(frames * num_audio_tokens / 1500), samples
        # The mask alone, without the spectrogram, which is slow.
        padded = np.zeros(480000)
        padded[:samples] = 1
        assert padded[::160].sum() == mel
    assert processor.num_tokens(480000) == num_audio_tokens


@pytest.mark.parametrize("samples", [1, 160, 161, 50000, 479999])
def test_expansion_agrees_with_the_mask_of_whisper(processor, samples):
    batch = processor(audio=np.full(samples, 0.1, np.float32), text=AUDIO_TOKEN)
    assert batch["input_features_mask"].sum() == math.ceil(samples / 160)
    assert batch["input_ids"].tolist() == [[processor.audio_token_id] * processor.num_tokens(samples)]


def test_fixed_keeps_all_tokens(tiny_whisper, tiny_llama):
    processor = SenseProcessor.from_backbones(tiny_whisper, tiny_llama, audio_tokens="fixed")
    assert processor.num_tokens(1) == processor.num_tokens(480000) == 250
    assert processor(audio=tone(0.1), text=AUDIO_TOKEN)["input_ids"].shape == (1, 250)


@pytest.mark.parametrize("samples", [0, -1, 480001])
def test_num_tokens_of_no_clip(processor, samples):
    with pytest.raises(ValueError, match=f"{samples} samples: a clip has from 1 to 480000"):
        processor.num_tokens(samples)


@pytest.mark.parametrize(
    "field, value", [("num_audio_tokens", 0), ("num_audio_tokens", 1501), ("audio_tokens", "cut")]
)
def test_settings_out_of_range(tiny_whisper, tiny_llama, field, value):
    with pytest.raises(ValueError, match=f"{field} '?{value}"):
        SenseProcessor.from_backbones(tiny_whisper, tiny_llama, **{field: value})


def test_text_backbone_in_the_place_of_whisper(tiny_llama):
    with pytest.raises(ValueError, match="no feature extractor; give a Whisper model"):
        SenseProcessor.from_backbones(tiny_llama, tiny_llama)


def test_tokenizer_without_the_audio_token(tiny_llama, processor):
    with pytest.raises(ValueError, match="use SenseProcessor.from_backbones"):
        SenseProcessor(processor.feature_extractor, AutoTokenizer.from_pretrained(tiny_llama))


# --- calling it


def test_call_returns_padded_tensors(processor):
    texts = [f"{AUDIO_TOKEN}\nSay it.", f"{AUDIO_TOKEN}?"]
    batch = processor(audio=[tone(1.0), tone(2.0, seed=1)], text=texts)
    assert set(batch) == {"input_ids", "attention_mask", "input_features", "input_features_mask"}
    assert batch["input_features"].shape == (2, 80, 3000) and batch["input_features_mask"].shape == (2, 3000)
    counts = [processor.num_tokens(16000), processor.num_tokens(32000)]
    assert (batch["input_ids"] == processor.audio_token_id).sum(1).tolist() == counts
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"].min(1).values.tolist() == [0, 1]
    assert set(batch) <= set(processor.model_input_names)


def test_padding_and_truncation_are_for_the_text_alone(processor):
    batch = processor(audio=tone(1.0), text=AUDIO_TOKEN, padding="max_length", max_length=64, truncation=True)
    assert batch["input_ids"].shape == (1, 64) and batch["input_features"].shape == (1, 80, 3000)
    assert batch["input_features_mask"].sum() == 100


def test_sampling_rate_is_of_the_arrays(processor, wav):
    batch = processor(audio=[wav, tone(2.0, rate=8000)], text=AUDIO_TOKEN * 2, sampling_rate=8000)
    assert batch["input_features_mask"].sum(1).tolist() == [100, 200]
    nested = processor(AUDIO_TOKEN, tone(2.0, rate=8000), audio_kwargs={"sampling_rate": 8000})
    assert nested["input_features_mask"].sum() == 200


def test_audio_alone_and_text_alone(processor):
    assert set(processor(audio=[tone(0.5)])) == {"input_features", "input_features_mask"}
    assert set(processor(text=["Yes.", "No, thanks."])) == {"input_ids", "attention_mask"}
    features = processor.audio_features([tone(0.5)])
    assert torch.equal(features["input_features"], processor(audio=tone(0.5))["input_features"])


def test_batch_equals_singles(processor):
    clips = [tone(0.7), tone(3.1, seed=1), tone(1.6, seed=2)]
    batch = processor.apply_transcription_request(clips)
    for i, clip in enumerate(clips):
        single = processor.apply_transcription_request(clip)
        ids = batch["input_ids"][i][batch["attention_mask"][i] == 1]
        assert torch.equal(ids, single["input_ids"][0])
        torch.testing.assert_close(batch["input_features"][i], single["input_features"][0])


@pytest.mark.parametrize(
    "audio, text, message",
    [
        ([0.5], AUDIO_TOKEN * 2, r"text has 2 <\|audio\|> and audio has 1 clips"),
        ([0.5, 0.5], ["x", AUDIO_TOKEN], r"text has 1 <\|audio\|> and audio has 2 clips"),
        (None, AUDIO_TOKEN, r"text has 1 <\|audio\|> and audio has 0 clips"),
        ([0.5], "no placeholder", r"text has 0 <\|audio\|> and audio has 1 clips"),
    ],
)
def test_placeholders_and_clips_differ(processor, audio, text, message):
    clips = None if audio is None else [tone(seconds) for seconds in audio]
    with pytest.raises(ValueError, match=message):
        processor(audio=clips, text=text)


def test_truncation_that_cuts_audio(processor):
    with pytest.raises(ValueError, match="audio.* token count.*disable truncation or increase `max_length`"):
        processor(audio=tone(1.0), text=f"{AUDIO_TOKEN} and text", max_length=4, truncation=True)


def test_other_bad_calls(processor):
    with pytest.raises(ValueError, match="empty list"):
        processor(audio=[], text="x")
    with pytest.raises(ValueError, match="at least one input"):
        processor()


def test_expand_audio(processor):
    text = processor.expand_audio(f"a{AUDIO_TOKEN}b{AUDIO_TOKEN}", [2, 3])
    assert text == f"a{AUDIO_TOKEN * 2}b{AUDIO_TOKEN * 3}"
    assert processor.expand_audio("none", []) == "none"
    with pytest.raises(ValueError, match=r"text has 1 <\|audio\|> and num_tokens has 2 clips"):
        processor.expand_audio(AUDIO_TOKEN, [1, 2])


# --- prompts and chat


PROMPT = "<|im_start|>user\n<|audio|>\nSay it.<|im_end|>\n<|im_start|>assistant\n"


def test_build_prompt_puts_the_audio_first(tiny_whisper, tiny_llama, tiny_qwen):
    for text in (tiny_llama, tiny_qwen):
        assert SenseProcessor.from_backbones(tiny_whisper, text).build_prompt("Say it.") == PROMPT


def test_instruction_with_a_placeholder(processor):
    with pytest.raises(ValueError, match=r"it has <\|audio\|>, a control token; take it out"):
        processor.build_prompt(f"Say {AUDIO_TOKEN}.")


def test_transcription_request_is_the_prompt_with_the_clip(processor):
    asked = processor.apply_transcription_request(tone(1.0), prompt="Say it.")
    assert equal(asked, processor(audio=tone(1.0), text=PROMPT))
    default = processor.apply_transcription_request(tone(1.0))
    assert equal(default, processor(audio=tone(1.0), text=processor.build_prompt(processor.prompts["asr"])))
    at_8k = processor.apply_transcription_request([tone(1.0, rate=8000)], sampling_rate=8000)
    assert at_8k["input_features_mask"].sum() == 100
    clips = [tone(1.0), tone(0.5)]
    several = processor.apply_transcription_request(audio=clips, prompt=["Say it.", "Say."])
    assert equal(several, processor(audio=clips, text=[PROMPT, PROMPT.replace(" it", "")]))
    with pytest.raises(ValueError, match="prompt: 1 for 2 clips; give one, or one a clip"):
        processor.apply_transcription_request(clips, prompt=["Say it."])


@pytest.mark.parametrize(
    "part",
    [
        lambda path: {"audio": tone(1.0)},
        lambda path: {"array": tone(1.0)},
        lambda path: {"array": tone(1.0), "sampling_rate": 16000},
        lambda path: {"audio": {"array": tone(1.0), "sampling_rate": 16000}},
        lambda path: {"path": str(path)},
        lambda path: {"path": path},
        lambda path: {"audio": str(path)},
        lambda path: {"url": path.as_uri()},
    ],
)
def test_chat_loads_audio(processor, wav, part):
    content = [{"type": "text", "text": "Say it."}, {"type": "audio", **part(wav)}]
    conversation = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(conversation, **options)
    assert equal(batch, processor(audio=tone(1.0), text=PROMPT))
    assert content[1].keys() == {"type"} | part(wav).keys()  # the caller's conversation is left as it was


def test_chat_resamples_once(processor):
    conversation = [{"role": "user", "content": [{"type": "audio", "array": tone(1.0, rate=8000)}]}]
    options = {"tokenize": True, "return_dict": True}
    batch = processor.apply_chat_template(conversation, sampling_rate=8000, **options)
    assert batch["input_features_mask"].sum() == 100
    nested = processor.apply_chat_template(conversation, processor_kwargs={"sampling_rate": 8000}, **options)
    assert equal(batch, nested)
    deeper = {"audio_kwargs": {"sampling_rate": 8000}}
    assert equal(batch, processor.apply_chat_template(conversation, processor_kwargs=deeper, **options))


def test_chat_of_several_turns_and_conversations(processor):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "audio", "audio": tone(0.5)}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two."}]},
        {"role": "user", "content": [{"type": "audio", "audio": tone(1.0)}, {"type": "audio", "audio": tone(2.0)}]},
    ]
    rendered = processor.apply_chat_template(turns)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|audio|>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nOne\ntwo.<|im_end|>\n<|im_start|>user\n<|audio|><|audio|><|im_end|>\n"
    )
    batch = processor.apply_chat_template([turns, turns[:2]], tokenize=True, return_dict=True)
    assert batch["input_ids"].shape[0] == 2
    assert batch["input_features_mask"].sum(1).tolist() == [50, 100, 200, 50]


def test_chat_with_bad_parts(processor):
    def chat(part):
        return processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True, return_dict=True)

    with pytest.raises(ValueError, match="give one of audio, path, url and array"):
        chat({"type": "audio"})
    with pytest.raises(ValueError, match="no such audio file"):
        chat({"type": "audio", "path": "nowhere.wav"})
    with pytest.raises(Exception, match="type image is neither audio nor text"):
        chat({"type": "image", "url": "x.png"})


def test_tokenizer_without_a_chat_template(tiny_whisper, tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    processor = SenseProcessor.from_backbones(tiny_whisper, str(tmp_path))
    assert processor.build_prompt("Say it.") == "<|audio|>\nSay it.\n"


def test_bos_is_written_once_where_the_tokenizer_adds_it(tiny_whisper, tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    processor = SenseProcessor.from_backbones(tiny_whisper, str(tmp_path))
    assert processor.build_prompt("Say it.") == "<|endoftext|>" + PROMPT
    ids = processor.apply_transcription_request(tone(0.5))["input_ids"][0].tolist()
    assert ids[0] == processor.tokenizer.bos_token_id and ids.count(ids[0]) == 1
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert again.apply_transcription_request(tone(0.5))["input_ids"][0].tolist() == ids


def test_padding_without_a_pad_token(tiny_whisper, tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    processor = SenseProcessor.from_backbones(tiny_whisper, str(tmp_path))
    assert processor.tokenizer.pad_token == "<|im_end|>" and processor.tokenizer.padding_side == "left"


def test_decoding_skips_audio_and_chat_tokens(processor):
    batch = processor.apply_transcription_request([tone(0.5), tone(1.0)], prompt="Héllo, wörld")
    texts = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == ["user\n\nHéllo, wörld\nassistant\n"] * 2
    assert processor.decode(batch["input_ids"][0], skip_special_tokens=True) == texts[0]


# --- saving


def test_auto_processor_gives_back_what_was_saved(tiny_whisper, tiny_qwen, tmp_path):
    options = {"num_audio_tokens": 100, "audio_tokens": "fixed", "prompts": {"asr": "Write it down."}}
    processor = SenseProcessor.from_backbones(tiny_whisper, tiny_qwen, **options)
    processor.save_pretrained(tmp_path)
    for loaded in (AutoProcessor.from_pretrained(tmp_path), SenseProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is SenseProcessor
        assert (loaded.num_audio_tokens, loaded.audio_tokens) == (100, "fixed")
        assert loaded.prompts == {"asr": "Write it down."}
        assert loaded.chat_template == processor.chat_template
        assert loaded.audio_token_id == processor.audio_token_id
        clips = [tone(0.5), tone(1.0)]
        assert equal(loaded.apply_transcription_request(clips), processor.apply_transcription_request(clips))
    assert SenseProcessor.from_pretrained(tmp_path, audio_tokens="trim").audio_tokens == "trim"


def test_auto_processor_in_a_fresh_process(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    script = (
        "import sys; from transformers import AutoProcessor; import processing, numpy\n"
        "p = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "print(p.apply_transcription_request(numpy.ones(16000, numpy.float32))['input_ids'].tolist())"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    expected = processor.apply_transcription_request(np.ones(16000, np.float32))["input_ids"].tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_it_loads_as_custom_code(tiny_whisper, tiny_llama, tmp_path):
    """As on the Hub: the files beside the checkpoint, in a process that has not loaded this package."""
    SenseProcessor.from_backbones(tiny_whisper, tiny_llama).save_pretrained(tmp_path / "model")
    script = (
        "import sys; from transformers import AutoProcessor\n"
        "p = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(p.build_prompt('Say it.').count('<|audio|>'), 'processing' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=modules)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "False"]


def test_texts_do_not_change_how_prompts_are_read_meanwhile(processor):
    """`split_special_tokens` sets a switch of the tokenizer itself."""
    with ThreadPoolExecutor(2) as pool:
        texts = pool.submit(lambda: [text_ids(["the user speaks"], processor.tokenizer) for _ in range(2000)])
        expected, found = processor.prompt_ids(2, ["asr"]), []
        while not texts.done():
            found.append(processor.prompt_ids(2, ["asr"]) == expected)
    assert found and all(found)
    texts = text_ids(["<|im_end|> and <|audio|>"], processor.tokenizer)[0]
    assert not set(texts) & set(processor.tokenizer.all_special_ids)
