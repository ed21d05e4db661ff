"""Converts a CTranslate2 Whisper model (`model.bin`) to a Hugging Face folder.

A model.bin that was split is given part by part; config.json and tokenizer.json, as published by
Systran/faster-whisper-*, are looked for next to the first part. The output is what
`WhisperForConditionalGeneration.from_pretrained` and `WhisperProcessor.from_pretrained` expect, weights in fp16.
"""

import io
import json
import re
import struct
from collections.abc import Set
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.modeling_whisper import sinusoids


# CTranslate2's DataType enum (include/ctranslate2/types.h).
# bfloat16 has no numpy type: it is read as raw 16 bits and widened below.
DTYPES = [np.float32, np.int8, np.int16, np.int32, np.float16, np.uint16]
BFLOAT16 = 5
N_TIMESTAMPS = 1501  # <|0.00|> ... <|30.00|> in steps of 0.02 s


# --------------------------------------------------------------------------- #
# reading model.bin


def read_ct2(data: bytes) -> dict[str, np.ndarray]:
    """Parse a model.bin; returns {variable name: array}, aliases resolved.

    Layout, little-endian (CTranslate2 python/ctranslate2/specs/model_spec.py):
        u32 version | str spec name | u32 spec revision
        u32 n  then n x (str name | u8 rank | u32 dims[rank] | u8 dtype | u32 nbytes | bytes)
        u32 m  then m x (str alias | str name)
    where str = u16 length (counting a trailing NUL) followed by the bytes.
    """
    f = io.BytesIO(data)

    def take(n: int) -> bytes:
        chunk = f.read(n)
        if len(chunk) != n:
            raise ValueError("model.bin is truncated (a part is missing?)")
        return chunk

    def num(fmt: str) -> int:
        return struct.unpack("<" + fmt, take(struct.calcsize(fmt)))[0]

    def string() -> str:
        return take(num("H"))[:-1].decode("utf-8")

    version = num("I")
    if not 4 <= version <= 6:  # dtype + nbytes fields exist since 4
        raise ValueError(f"unsupported CTranslate2 binary version {version}")
    name, revision = string(), num("I")
    if name != "WhisperSpec" or revision != 3:
        raise ValueError(f"expected WhisperSpec revision 3, found {name} revision {revision}")

    variables = {}
    for _ in range(num("I")):
        key = string()
        shape = [num("I") for _ in range(num("B"))]
        dtype, raw = num("B"), take(num("I"))
        array = np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
        if dtype == BFLOAT16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        variables[key] = array
    for _ in range(num("I")):
        alias, target = string(), string()
        variables[alias] = variables[target]
    if f.read(1):
        raise ValueError("trailing bytes after the last alias")
    return variables


def get(variables: dict, key: str) -> torch.Tensor:
    """A variable as fp32, dequantised: int8/int16 weights are stored as round(w * scale)."""
    value = variables[key].astype(np.float32)
    scale = variables.get(key + "_scale")
    if scale is not None:
        scale = scale.astype(np.float32)  # int8: one per output row; int16: a scalar
        value = value / scale.reshape(scale.shape + (1,) * (value.ndim - scale.ndim))
    return torch.from_numpy(np.array(value))


# --------------------------------------------------------------------------- #
# renaming the weights


def map_norm(v: dict, src: str, dst: str, out: dict) -> None:
    out[f"{dst}.weight"], out[f"{dst}.bias"] = get(v, f"{src}/gamma"), get(v, f"{src}/beta")


def map_linears(v: dict, src: str, names: list[str], out: dict) -> None:
    """Split one (possibly fused) CT2 linear layer into the HF linear layers ``names``."""
    weights = get(v, f"{src}/weight").chunk(len(names))
    biases = get(v, f"{src}/bias").chunk(len(names))
    for name, weight, bias in zip(names, weights, biases):
        out[f"{name}.weight"] = weight.contiguous()
        if name.endswith("k_proj"):  # Whisper's keys have no bias; CT2 fuses zeros in
            if bias.abs().max() != 0:
                raise ValueError(f"{src}: the key bias is not zero, so the fused order is not q,k,v")
        else:
            out[f"{name}.bias"] = bias.contiguous()


def map_layer(v: dict, src: str, dst: str, out: dict, cross: bool) -> None:
    a = f"{dst}.self_attn"
    map_linears(v, f"{src}/self_attention/linear_0", [f"{a}.{p}_proj" for p in "qkv"], out)
    map_linears(v, f"{src}/self_attention/linear_1", [f"{a}.out_proj"], out)
    map_norm(v, f"{src}/self_attention/layer_norm", f"{a}_layer_norm", out)
    if cross:
        a = f"{dst}.encoder_attn"
        map_linears(v, f"{src}/attention/linear_0", [f"{a}.q_proj"], out)
        map_linears(v, f"{src}/attention/linear_1", [f"{a}.k_proj", f"{a}.v_proj"], out)
        map_linears(v, f"{src}/attention/linear_2", [f"{a}.out_proj"], out)
        map_norm(v, f"{src}/attention/layer_norm", f"{a}_layer_norm", out)
    map_linears(v, f"{src}/ffn/linear_0", [f"{dst}.fc1"], out)
    map_linears(v, f"{src}/ffn/linear_1", [f"{dst}.fc2"], out)
    map_norm(v, f"{src}/ffn/layer_norm", f"{dst}.final_layer_norm", out)


def n_layers(v: dict, side: str) -> int:
    return 1 + max(int(m[1]) for k in v if (m := re.match(rf"{side}/layer_(\d+)/", k)))


def encoder_weights(v: dict) -> dict[str, torch.Tensor]:
    out = {}
    for conv in ("conv1", "conv2"):
        out[f"{conv}.weight"] = get(v, f"encoder/{conv}/weight")
        out[f"{conv}.bias"] = get(v, f"encoder/{conv}/bias")
    d_model = out["conv1.bias"].numel()
    # Not learned: generate the exact table rather than use CT2's fp16 copy, which is a check.
    table = sinusoids(1500, d_model)
    stored = v.get("encoder/position_encodings/encodings")
    if stored is not None and np.abs(stored.astype(np.float32) - table.numpy()).max() > 2e-3:
        raise ValueError("encoder position table is not the sinusoid table")
    out["embed_positions.weight"] = table
    for i in range(n_layers(v, "encoder")):
        map_layer(v, f"encoder/layer_{i}", f"layers.{i}", out, cross=False)
    map_norm(v, "encoder/layer_norm", "layer_norm", out)
    return out


def decoder_weights(v: dict) -> dict[str, torch.Tensor]:
    out = {
        "embed_tokens.weight": get(v, "decoder/embeddings/weight"),
        "embed_positions.weight": get(v, "decoder/position_encodings/encodings"),
    }
    for i in range(n_layers(v, "decoder")):
        map_layer(v, f"decoder/layer_{i}", f"layers.{i}", out, cross=True)
    map_norm(v, "decoder/layer_norm", "layer_norm", out)
    return out


# --------------------------------------------------------------------------- #
# configs and tokenizer


def make_config(v: dict, suppress_begin: list[int]) -> WhisperConfig:
    vocab, d_model = v["decoder/embeddings/weight"].shape
    eot = vocab - N_TIMESTAMPS - 107  # 107 special tokens follow the text tokens
    if suppress_begin and suppress_begin[-1] != eot:
        raise ValueError(f"end-of-text id {eot} disagrees with config.json {suppress_begin}")
    return WhisperConfig(
        vocab_size=vocab,
        d_model=d_model,
        num_mel_bins=v["encoder/conv1/weight"].shape[1],
        encoder_layers=n_layers(v, "encoder"),
        decoder_layers=n_layers(v, "decoder"),
        encoder_attention_heads=int(v["encoder/num_heads"]),
        decoder_attention_heads=int(v["decoder/num_heads"]),
        encoder_ffn_dim=v["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=v["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=1500,
        max_target_positions=v["decoder/position_encodings/encodings"].shape[0],
        decoder_start_token_id=eot + 1,
        bos_token_id=eot,
        eos_token_id=eot,
        pad_token_id=eot,
        begin_suppress_tokens=None,  # generation settings go to generation_config.json
    )


def make_generation_config(config: WhisperConfig, ct2: dict, tok: WhisperTokenizer) -> GenerationConfig:
    tid = tok.convert_tokens_to_ids
    multilingual = config.vocab_size >= 51865
    extra: dict = {}
    if multilingual:
        extra["lang_to_id"] = {tok.convert_ids_to_tokens(i): i for i in ct2["lang_ids"]}
        extra["task_to_id"] = {t: tid(f"<|{t}|>") for t in ("transcribe", "translate")}
    else:
        extra["forced_decoder_ids"] = [[1, tid("<|notimestamps|>")]]
    return GenerationConfig(
        is_multilingual=multilingual,
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        no_timestamps_token_id=tid("<|notimestamps|>"),
        prev_sot_token_id=tid("<|startofprev|>"),
        suppress_tokens=ct2["suppress_ids"],
        begin_suppress_tokens=ct2["suppress_ids_begin"],
        alignment_heads=ct2["alignment_heads"],
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        return_timestamps=False,
        **extra,
    )


def make_tokenizer(tokenizer_json: Path, dest: Path) -> WhisperTokenizer:
    """tokenizer.json plus the timestamp tokens, which this older file leaves out."""
    spec = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    specials = [t["content"] for t in spec["added_tokens"] if t["special"]]
    first = max(t["id"] for t in spec["added_tokens"]) + 1
    if specials[-1] == "<|notimestamps|>":
        plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
        spec["added_tokens"] += [
            {"id": first + i, "content": f"<|{i * 0.02:.2f}|>", **plain} for i in range(N_TIMESTAMPS)
        ]
    (dest / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    # WhisperTokenizer takes "last special id + 1" for the first timestamp, so keep this order.
    eot = "<|endoftext|>"
    settings = {
        "tokenizer_class": "WhisperTokenizer",
        **{f"{k}_token": eot for k in ("bos", "eos", "unk", "pad")},
        "extra_special_tokens": [t for t in specials if t != eot],
        "model_max_length": 1024,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    (dest / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return WhisperTokenizer.from_pretrained(dest)


# --------------------------------------------------------------------------- #


def load_strictly(model: torch.nn.Module, weights: dict, allowed_missing: Set[str] = frozenset()) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) - allowed_missing or unexpected:
        raise ValueError(f"weights do not match: missing {missing}, unexpected {unexpected}")


def convert(parts: list[Path], dest: Path) -> None:
    """Convert ``parts`` (model.bin, in one or more pieces) to the HF directory ``dest``."""
    dest.mkdir(parents=True, exist_ok=True)
    v = read_ct2(b"".join(p.read_bytes() for p in parts))
    ct2 = json.loads((parts[0].parent / "config.json").read_text())
    config = make_config(v, ct2.get("suppress_ids_begin", []))
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(dest)
    tokenizer = make_tokenizer(parts[0].parent / "tokenizer.json", dest)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"tokenizer has {len(tokenizer)} ids, model {config.vocab_size}")
    model = WhisperForConditionalGeneration(config)
    weights = {f"model.encoder.{k}": t for k, t in encoder_weights(v).items()}
    weights |= {f"model.decoder.{k}": t for k, t in decoder_weights(v).items()}
    load_strictly(model, weights, allowed_missing={"proj_out.weight"})  # tied to embed_tokens
    model.tie_weights()
    model.generation_config = make_generation_config(config, ct2, tokenizer)
    model.half().save_pretrained(dest)
