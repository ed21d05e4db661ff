"""Tiny backbones, made here without a network, and signals to feed them."""

import io
import json
import shutil
from pathlib import Path

import datasets
import gguf
import numpy as np
import pytest
import soundfile
import torch
from playwright.sync_api import sync_playwright
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor
from processing.collator import SenseCollator
from processing.datasets import from_rows
from processing.tasks import make_tasks


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tone(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A tone in noise, float32 of shape (seconds * rate,); the seed sets the pitch and the noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = 150 + 50 * (seed % 10)
    return (0.3 * np.sin(2 * np.pi * pitch * time) + 0.05 * rng.standard_normal(len(time))).astype(np.float32)


def make_corpus(number: int) -> datasets.Dataset:
    """
    Rows in the project's schema: tones of 0.5 to 1.5 s, with texts of two to four words, of which the first may be an
    entity, and a sentiment, but in one row of eight.
    """
    words = ["the", "user", "speaks", "and", "transcribe"]
    sentiments = ["Neutral", "Positive", "Neutral", "Negative"]
    rows = []
    for i in range(number):
        clip = tone(0.5 + 0.25 * (i % 5), seed=i)
        text = " ".join(words[(i + k) % 5] for k in range(2 + i % 3))
        rows.append({"id": f"clip-{i}", "audio": {"bytes": wav(clip), "path": None}, "text": text})
        rows[-1] |= {"entities": [[["PERSON", "PLACE"][i % 2], 0, len(text.split()[0])]] if i % 3 else []}
        rows[-1] |= {"sentiment": None if i % 8 == 7 else sentiments[i % 4]}
        rows[-1] |= {"language": "en", "duration": len(clip) / 16000, "speaker": f"speaker-{i % 2}"}
    return from_rows(rows)


def wav(clip: np.ndarray, rate: int = 16000) -> bytes:
    """The bytes of a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, clip, rate, format="WAV")
    return file.getvalue()


def write_corpus(folder: Path, **splits: int) -> str:
    """The same as an audiofolder, `splits` giving the number of rows of each."""
    for split, number in splits.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for row in make_corpus(number):
            (folder / split / f"{row['id']}.wav").write_bytes(row["audio"]["bytes"])
            kept = {name: row[name] for name in ("text", "duration", "entities", "sentiment", "speaker")}
            lines.append(json.dumps({"file_name": f"{row['id']}.wav", **kept}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, about 300 tokens, ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["transcribe the speech", "the user and the assistant speak"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def save_llm(config_class, model_class, folder) -> str:
    """A random two-layer LLM with its tokenizer, saved in `folder`."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_whisper(folder) -> str:
    """A random Whisper (encoder and decoder, d_model 32, 30 s) with its feature extractor, saved in `folder`."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=300,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=1500,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return str(folder)


def learn_by_heart(whisper: str, llm: str, clips: list[dict], folder) -> str:
    """
    A tiny SENSE that has learnt its answers about a few clips by heart, saved in `folder`.

    Args:
        clips: `audio`, `text`, `entities` and `sentiment` of each.
    """
    torch.manual_seed(0)
    prompts = {"asr": "words?", "ner": "names?", "sa": "mood?"}
    model = SenseForConditionalGeneration.from_backbones(whisper, llm).float()
    processor = SenseProcessor.from_backbones(whisper, llm, prompts=prompts)
    batch = SenseCollator(processor, make_tasks(prompts))(
        [clip | {"task": task} for clip in clips for task in prompts]
    )
    pooled = model.model.get_pooled_features(batch.pop("input_features"), batch.pop("input_features_mask"))
    batch |= {"pooled_features": pooled[0].detach(), "pooled_features_mask": pooled[1]}
    parameters = [p.requires_grad_() for name, p in model.named_parameters() if "audio_tower" not in name]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(300):
        loss = model(**batch).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02
    for part in (model, processor):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory) -> str:
    """Folder of a random Whisper with its feature extractor."""
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """Folder of a random Llama with a ChatML tokenizer."""
    return save_llm(LlamaConfig, LlamaForCausalLM, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def parts(tiny_whisper, tiny_llama):
    """A random model that takes all three tasks, and its processor."""
    torch.manual_seed(0)
    prompts = {"asr": "Transcribe the speech.", "ner": "Transcribe and tag.", "sa": "How is it meant?"}
    model = SenseForConditionalGeneration.from_backbones(tiny_whisper, tiny_llama)
    return model, SenseProcessor.from_backbones(tiny_whisper, tiny_llama, prompts=prompts)


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory) -> str:
    """Folder of these two."""
    folder = tmp_path_factory.mktemp("saved")
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def browser():
    """Chromium, the system's or Playwright's own: `make browser` sees to it that one is there."""
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory) -> str:
    """Folder of a random Qwen2 with a ChatML tokenizer."""
    return save_llm(Qwen2Config, Qwen2ForCausalLM, tmp_path_factory.mktemp("qwen"))


def write_gguf(llm: str, path):
    """A Llama of transformers as a GGUF file, as llama.cpp's converter writes it: q and k with their rows permuted."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm), AutoTokenizer.from_pretrained(llm)
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    words = [tokenizer.convert_ids_to_tokens(i) for i in range(config.vocab_size)]
    writer.add_token_list(words)
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    writer.add_token_types([gguf.TokenType.CONTROL if w in special else gguf.TokenType.NORMAL for w in words])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        name = names.get_name(name, try_suffixes=(".weight",))
        for part, number in heads.items():
            if part in name:
                halves = tensor.view(number, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        tensor = tensor.contiguous().numpy()
        if tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama, tmp_path_factory) -> str:
    """Folder with `tiny.gguf` alone: 8 bits, 32 weights a scale."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(tiny_llama, folder / "tiny.gguf")
    return str(folder)
