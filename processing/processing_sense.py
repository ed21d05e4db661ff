"""
Speech and text -> model inputs, and back. Loads from the Hub where this package is not installed: torchaudio is
needed for resampling only.
"""

import copy
import io
import math
import mmap
import os
import re
import time
import urllib.request
from fractions import Fraction
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import soundfile
import torch
from transformers import AddedToken, AutoFeatureExtractor, AutoTokenizer, BatchFeature, WhisperFeatureExtractor
from transformers.processing_utils import ProcessorMixin

from .constrained import GrammarConstraint
from .mp3 import with_length
from .tasks import ENGLISH_RATE, TAG_SETS, TASKS


if TYPE_CHECKING:
    # What else goes to the Hub: `save_pretrained` copies each file that is imported like this, and what that imports.
    from .pipeline_sense import SpokenLanguageUnderstandingPipeline  # noqa: F401


AUDIO_TOKEN = "<|audio|>"
MAX_SECONDS = 30
UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's, in samples
STREAMED = 0x7FFF0000  # from so many bytes on, a WAV's header says that nobody knew how long it would be
# What a recording may ask of this machine, whatever its header says (docs/security.md).
MAX_SAMPLE_RATE = 1_000_000  # Hz
MAX_SAMPLES_PER_SECOND = 2_000_000  # of all channels together: 8 at 192 kHz, 40 at 48 kHz
BLOCK_SAMPLES = 2**22  # of all channels together, that are decoded at a time: 16 MB
LOUDEST = 2.0**31  # PCM knows nothing above; squares of squares of it still fit into float32
MAX_DOWNLOAD = 2**30  # bytes of a recording behind an address
MAX_DOWNLOAD_SECONDS = 600
PROMPTS = {"asr": "Transcribe the speech."}  # of a processor that was not told any

# Put before the LLM's own chat template: it turns list content into the plain strings that every template knows,
# audio first, then the text parts, one a line.
FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string or message['content'] is not iterable -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set parts = namespace(audio='', texts=[]) -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'audio' -%}
                {%- set parts.audio = parts.audio + '<|audio|>' -%}
            {%- elif part['type'] == 'text' -%}
                {%- set parts.texts = parts.texts + [part['text']] -%}
            {%- else -%}
                {{- raise_exception('message content: type ' ~ part['type'] ~ ' is neither audio nor text') -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set lines = ([parts.audio] if parts.audio else []) + parts.texts -%}
        {%- set flat.messages = flat.messages + [dict(message, content=lines | join('\\n'))] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""
# For LLMs that come without a chat template.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def load_audio(audio, sampling_rate: int | None = None, target: int = 16000) -> np.ndarray:
    """
    Reads a clip of at most 30 s from whatever holds it, mixes its channels down and resamples it.

    Args:
        audio: a path, an http(s) or file address, a binary file object, the bytes of an audio file, an array or
            tensor of shape `(samples,)`, `(samples, channels)` or `(channels, samples)` (the shorter axis is the
            channels), a dict with `array` (or `raw`) and `sampling_rate`, or with `bytes` and/or `path`, or the
            `AudioDecoder` of torchcodec, which `datasets` gives.
        sampling_rate: rate of an array in Hz, `target` if not given. Files and dicts name their own.
        target: rate to return, in Hz.

    Returns:
        float32 samples of shape `(samples,)`, at least one, at the target rate.

    Raises:
        ValueError: missing or unreadable file, no samples, samples that are NaN, infinite or absurdly loud, more than
            30 s, a rate or a type that cannot be audio.
    """
    source, rate, name = open_audio(audio, sampling_rate, target)
    check_length(len(source) if isinstance(source, np.ndarray) else source.frames, rate, name)
    samples = source if isinstance(source, np.ndarray) else read_file(source, name)
    check_finite(samples, name)
    mono = np.ascontiguousarray(samples.mean(axis=1), dtype=np.float32)
    return resample(mono, rate, target)[: MAX_SECONDS * target]


def open_audio(audio, sampling_rate: int | None = None, target: int = 16000) -> tuple:
    """
    Opens what `load_audio` takes, of any length.

    Returns:
        an open `soundfile.SoundFile` or an array `(samples, channels)`, its rate in Hz, and its name for messages.
    """
    if isinstance(audio, dict):
        audio, sampling_rate, name = _open_dict(audio, sampling_rate)
    elif hasattr(audio, "get_all_samples"):
        name = "audio (AudioDecoder)"
        try:
            decoded = audio.get_all_samples()
        except RuntimeError as error:
            raise ValueError(f"{name}: not readable as audio ({error}); get the file again") from error
        audio, sampling_rate = decoded.data, decoded.sample_rate
    else:
        name = str(audio) if isinstance(audio, (str, Path)) else f"audio ({type(audio).__name__})"
    if isinstance(audio, (str, Path, bytes, bytearray)) or hasattr(audio, "read"):
        source = _open_file(audio, name)
        rate, empty = source.samplerate, source.frames == 0
    else:
        source = _as_samples(audio, name)
        rate, empty = target if sampling_rate is None else sampling_rate, source.size == 0
    if not isinstance(rate, int | float | np.integer | np.floating) or not 1000 <= rate <= MAX_SAMPLE_RATE:
        raise ValueError(f"{name}: sampling rate {rate!r}; give it in Hz, such as 16000")
    rate = int(rate)
    if empty:
        raise ValueError(f"{name}: 0 samples; give a clip that holds speech")
    channels = source.shape[1] if isinstance(source, np.ndarray) else source.channels
    if channels * rate > MAX_SAMPLES_PER_SECOND:
        raise ValueError(
            f"{name}: {channels} channels at {rate} Hz; the limit is {MAX_SAMPLES_PER_SECOND:,} samples a second in "
            "all: mix the channels down"
        )
    if isinstance(source, soundfile.SoundFile) and source.frames == UNKNOWN_LENGTH:
        raise ValueError(f"{name}: its header does not tell its length, as of a piped FLAC; give a whole file, or WAV")
    return source, rate, name


def _open_dict(audio: dict, sampling_rate: int | None) -> tuple:
    """The source in a dict in the manner of `datasets`, its rate, and its name for messages."""
    array = audio.get("raw") if audio.get("array") is None else audio["array"]
    if array is not None:
        return array, audio.get("sampling_rate", sampling_rate), audio.get("path") or "audio (array)"
    path, content = audio.get("path"), audio.get("bytes")
    if path is None and content is None:
        raise ValueError(f"audio dict with the keys {sorted(audio)}: give array and sampling_rate, bytes or path")
    return (path if content is None else content), None, str(path or "audio (bytes)")


def _open_file(source, name: str) -> soundfile.SoundFile:
    """A path, an address, bytes or a binary file object, opened for reading."""
    try:
        if isinstance(source, str) and source.startswith("file://"):
            source = Path(urllib.request.url2pathname(urlsplit(source).path))
        elif isinstance(source, str) and source.startswith(("http://", "https://")):
            source = _download(source)
        if isinstance(source, (str, Path)):
            source = os.path.expanduser(source)
            if not os.path.isfile(source):
                raise ValueError(f"{name}: no such audio file")
        elif isinstance(source, (bytes, bytearray)):
            source = io.BytesIO(source)
        # A name's bytes as they are: not all are UTF-8.
        file = soundfile.SoundFile(os.fsencode(source) if isinstance(source, str) else source)
        return _measured(file, source) if file.format == "MP3" else file
    except (soundfile.SoundFileError, TypeError, OSError, HTTPException) as error:
        raise ValueError(f"{name}: not readable as audio ({error}); give a WAV, FLAC, OGG or MP3 file") from error


def _measured(file: soundfile.SoundFile, source) -> soundfile.SoundFile:
    """An MP3 that was opened, or the same one opened anew where libsndfile was told another length than it has."""
    if isinstance(source, str):
        with open(source, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as content:
            mended = with_length(content, file.frames)
    else:
        position = source.seek(0, os.SEEK_CUR)
        source.seek(0)
        mended = with_length(source.read(), file.frames)
        source.seek(position)
    if mended is None:
        return file
    file.close()
    return soundfile.SoundFile(io.BytesIO(mended))


def _download(address: str) -> bytes:
    """What is behind an http(s) address, within limits: a server may send for ever, or a byte a minute."""
    content, deadline = bytearray(), time.monotonic() + MAX_DOWNLOAD_SECONDS
    with urllib.request.urlopen(address, timeout=60) as response:
        while part := response.read1(2**20):
            content += part
            if len(content) > MAX_DOWNLOAD or time.monotonic() > deadline:
                raise OSError(f"more than {MAX_DOWNLOAD:,} bytes, or more than {MAX_DOWNLOAD_SECONDS} s to fetch it")
    return bytes(content)


def read_file(file: soundfile.SoundFile, name: str) -> np.ndarray:
    """
    All samples of a file, its channels mixed down block by block: `(samples, 1)`, the memory of one channel.

    Raises:
        ValueError: some of them can't be read.
    """
    check_whole(file, name)
    blocks = []
    with file:
        while len(block := read_block(file, BLOCK_SAMPLES, name)):
            blocks.append(block.mean(axis=1, keepdims=True))
    samples = np.concatenate(blocks or [np.zeros((0, 1), np.float32)])
    if len(samples) < file.frames:
        missing = file.frames - len(samples)
        raise ValueError(f"{name}: corrupt, {missing} of its samples are missing; get the file again")
    return samples


def check_whole(file: soundfile.SoundFile, name: str):
    """Raises ValueError where a WAV's header tells of more bytes than there are. libsndfile reads what there is."""
    told = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if told and int(told[2]) < int(told[1]) < STREAMED:
        raise ValueError(
            f"{name}: corrupt, {int(told[1]) - int(told[2])} bytes of its {told[1]} are missing; get the file again"
        )


def read_block(file: soundfile.SoundFile, most: int, name: str) -> np.ndarray:
    """
    The next samples of a file, `(samples, channels)`, float32: `most` of them, or fewer where there are many channels;
    none at its end.

    Raises:
        ValueError: they can't be read.
    """
    try:
        return file.read(max(1, min(most, BLOCK_SAMPLES // file.channels)), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{name}: not readable as audio to its end ({error}); get the file again") from error


def _as_samples(audio, name: str) -> np.ndarray:
    """An array, tensor or list of numbers as floats of shape (samples, channels)."""
    samples = audio.detach().cpu().float().numpy() if _is_float_tensor(audio) else np.asarray(audio)
    if samples.dtype == np.int64:  # what lists of integers become
        raise ValueError(f"{name}: 64-bit integers, whose full scale nobody knows; give int16 or int32 PCM, or floats")
    if np.issubdtype(samples.dtype, np.signedinteger):  # PCM: full scale is 1.0
        samples = np.divide(samples, np.iinfo(samples.dtype).max + 1.0, dtype=np.float32)
    elif samples.dtype == np.float16:  # its infinity is nearer than any limit
        samples = samples.astype(np.float32)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"{name}: type {samples.dtype}; give floats or signed integers, a path, bytes or a file")
    if samples.ndim not in (1, 2):
        raise ValueError(f"{name}: shape {samples.shape}; give (samples,), (samples, channels) or (channels, samples)")
    if samples.ndim == 1:
        return samples[:, None]
    return samples.T if samples.shape[0] < samples.shape[1] else samples


def _is_float_tensor(audio) -> bool:
    """Float tensors of any width (numpy has no bfloat16) on any device."""
    return isinstance(audio, torch.Tensor) and audio.is_floating_point()


def check_length(num_samples: int, rate: int, name: str):
    """Raises ValueError where a clip is longer than the model hears."""
    if num_samples > MAX_SECONDS * rate:
        raise ValueError(
            f"{name}: {num_samples / rate:.2f} s of audio, the limit is {MAX_SECONDS} s; cut it into shorter clips"
        )


def check_finite(samples: np.ndarray, name: str):
    """Raises ValueError where samples are NaN or infinite, or so loud that features of them would be."""
    bad = samples.size - int((np.abs(samples) <= LOUDEST).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {samples.size} samples are NaN or infinite, or beyond {LOUDEST:.0f} times full scale; "
            "repair or drop the clip"
        )


def resample(mono: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Float32 samples of shape `(samples,)`, brought from one rate to another."""
    if rate == target:
        return mono
    # The filter grows with the terms of the ratio. Bounding them keeps usual rates exact (44100 / 16000 is 441 / 160)
    # and an odd one, such as 44101, right within 0.01 %, in place of gigabytes of filter.
    ratio = Fraction(int(rate), target).limit_denominator(640)
    try:
        from torchaudio.functional import resample
    except ImportError as error:
        raise ImportError(
            f"audio at {rate} Hz: pip install torchaudio, which brings it to {target} Hz, or give it at that rate"
        ) from error
    return resample(torch.from_numpy(mono), ratio.numerator, ratio.denominator).numpy()


class SenseProcessor(ProcessorMixin):
    """
    Whisper's feature extractor and an LLM's tokenizer as one. A text holds one `<|audio|>` for each clip; the
    processor repeats it once for each audio token that the model will put there.

    The chat template writes all special tokens, so that none is added when a text is tokenized.

    Args:
        feature_extractor: a `WhisperFeatureExtractor`.
        tokenizer: the LLM's, to which `<|audio|>` was added (`from_backbones` does that). It is made to pad left.
        chat_template: Jinja template; by default the tokenizer's own, taught to read audio content.
        num_audio_tokens: audio tokens of a clip of 30 s.
        audio_tokens: `"trim"` keeps the audio tokens that hold speech, `"fixed"` all of them.
        prompts: the instruction of each task that the model was trained with, such as `{"asr": "Transcribe the
            speech."}`, saved with it: another one costs accuracy.
        chunk_length_s: the length of clips that the model is used to, in seconds. Pipelines cut longer recordings.
        entity_tags: the tag set that the model was trained on, `"combined"` or `"raw"`: constrained decoding keeps to
            it.
        tokens_per_second: the tokenizer's tokens in a second of the speech that the model was trained on. Longer
            answers are allowed where it is above English's.

    Raises:
        ValueError: `<|audio|>` is not in the vocabulary, or `num_audio_tokens`, `audio_tokens`, `chunk_length_s`,
            `entity_tags` or `tokens_per_second` is out of range.
    """

    text_kwargs = {"padding": True, "add_special_tokens": False, "return_tensors": "pt"}

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template: str | None = None,
        num_audio_tokens: int = 250,
        audio_tokens: str = "trim",
        prompts: dict[str, str] | None = None,
        chunk_length_s: float = MAX_SECONDS,
        entity_tags: str = "combined",
        tokens_per_second: float = ENGLISH_RATE,
    ):
        if AUDIO_TOKEN not in tokenizer.get_vocab():
            raise ValueError(f"tokenizer: {AUDIO_TOKEN} is not in its vocabulary; use SenseProcessor.from_backbones")
        self.max_frames = feature_extractor.nb_max_frames // 2  # the encoder's second convolution has stride 2
        if not 1 <= num_audio_tokens <= self.max_frames:
            raise ValueError(f"num_audio_tokens {num_audio_tokens}: give a number from 1 to {self.max_frames}")
        if audio_tokens not in ("trim", "fixed"):
            raise ValueError(f"audio_tokens {audio_tokens!r}: give 'trim' or 'fixed'")
        check_chunk_length(chunk_length_s)
        if entity_tags not in TAG_SETS:
            raise ValueError(f"entity_tags {entity_tags!r}: give one of {', '.join(TAG_SETS)}")
        if not 0 < tokens_per_second < math.inf:
            raise ValueError(f"tokens_per_second {tokens_per_second}: give a number above 0")
        self.chunk_length_s = chunk_length_s
        self.entity_tags = entity_tags
        self.tokens_per_second = tokens_per_second
        self.num_audio_tokens = num_audio_tokens
        self.audio_tokens = audio_tokens
        self.prompts = dict(prompts or PROMPTS)
        self.audio_token = AUDIO_TOKEN
        self.audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or make_chat_template(tokenizer))

    @classmethod
    def from_backbones(
        cls,
        audio: str,
        text: str,
        num_audio_tokens: int = 250,
        audio_tokens: str = "trim",
        prompts: dict[str, str] | None = None,
        gguf_file: str | None = None,
    ) -> "SenseProcessor":
        """
        A processor for a Whisper encoder and an LLM, each a Hub id or a folder; `gguf_file` is one in that of the LLM,
        which its tokenizer is then taken from.

        Raises:
            ValueError: `audio` has no Whisper feature extractor.
        """
        try:
            feature_extractor = AutoFeatureExtractor.from_pretrained(audio, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"audio backbone {audio}: no feature extractor; give a Whisper model ({error})"
            ) from error
        if not isinstance(feature_extractor, WhisperFeatureExtractor):
            kind = type(feature_extractor).__name__
            raise ValueError(f"audio backbone {audio}: it has a {kind}; give a Whisper model")
        where = {"trust_remote_code": False} | ({"gguf_file": gguf_file} if gguf_file else {})
        tokenizer = AutoTokenizer.from_pretrained(text, **where)
        tokenizer.add_tokens([AddedToken(AUDIO_TOKEN, special=True, normalized=False)], special_tokens=True)
        return cls(
            feature_extractor,
            tokenizer,
            prompts=prompts,
            num_audio_tokens=num_audio_tokens,
            audio_tokens=audio_tokens,
        )

    def num_tokens(self, num_samples: int) -> int:
        """Audio tokens of a clip of `num_samples` samples at the feature extractor's rate."""
        limit = self.feature_extractor.n_samples
        if not 1 <= num_samples <= limit:
            raise ValueError(f"{num_samples} samples: a clip has from 1 to {limit}")
        return self._num_tokens_of_mel(-(-num_samples // self.feature_extractor.hop_length))

    def _num_tokens_of_mel(self, mel_frames: int) -> int:
        if self.audio_tokens == "fixed":
            return self.num_audio_tokens
        frames = (mel_frames - 1) // 2 + 1
        return -(-frames * self.num_audio_tokens // self.max_frames)

    def audio_features(self, clips: list[np.ndarray], **kwargs) -> BatchFeature:
        """
        Clips of shape `(samples,)` from `load_audio` -> `input_features` `(clips, mel bins, 3000)` and
        `input_features_mask` `(clips, 3000)`, 1 where there is speech. Always padded to 30 s, as Whisper was trained.
        """
        whisper = {"padding": "max_length", "max_length": None, "truncation": False, "pad_to_multiple_of": None}
        output = {"return_attention_mask": True, "return_tensors": "pt"}
        rate = self.feature_extractor.sampling_rate
        features = self.feature_extractor(clips, **{**kwargs, **whisper, **output, "sampling_rate": rate})
        features["input_features_mask"] = features.pop("attention_mask")
        return features

    def __call__(self, text=None, audio=None, sampling_rate: int | None = None, **kwargs) -> BatchFeature:
        """
        Args:
            text: one text or a list; together they hold one `<|audio|>` for each clip, in the same order.
            audio: one clip or a list of clips, each as `load_audio` takes it.
            sampling_rate: rate of the clips that are arrays, in Hz, also as one of `audio_kwargs`; 16000 if not given.
            kwargs: for the tokenizer, such as `max_length` and `truncation`; `return_tensors` is "pt" by default.

        Returns:
            `input_ids` and `attention_mask` of shape `(texts, length)`, left-padded, if there is text;
            `input_features` `(clips, mel bins, 3000)` and `input_features_mask` `(clips, 3000)` if there is audio.

        Raises:
            ValueError: other than one placeholder for each clip; truncation that would cut audio tokens; what
                `load_audio` refuses.
        """
        clips = None
        if audio is not None:
            told = _take_rate(kwargs) if sampling_rate is None else sampling_rate
            rate = self.feature_extractor.sampling_rate
            clips = [load_audio(clip, told, target=rate) for clip in as_clips(audio)]
        return super().__call__(audio=clips, text=text, **kwargs)

    def validate_inputs(self, audio=None, text=None, **kwargs) -> None:
        """Adds to the base class a count of placeholders and clips that says what to do."""
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            placeholders = sum(t.count(AUDIO_TOKEN) for t in texts if isinstance(t, str))
            clips = 0 if audio is None else len(audio)
            if placeholders != clips:
                raise ValueError(
                    f"text has {placeholders} {AUDIO_TOKEN} and audio has {clips} clips; "
                    f"give one {AUDIO_TOKEN} per clip"
                )
        super().validate_inputs(audio=audio, text=text, **kwargs)

    def _process_audio(self, audio: list[np.ndarray], **kwargs) -> tuple[BatchFeature, list[str]]:
        features = self.audio_features(audio, **kwargs)
        lengths = features["input_features_mask"].sum(-1).tolist()
        return features, [AUDIO_TOKEN * self._num_tokens_of_mel(n) for n in lengths]

    def expand_audio(self, text: str, num_tokens: list[int]) -> str:
        """
        Repeats the n-th `<|audio|>` of a text `num_tokens[n]` times.

        Raises:
            ValueError: the text holds more or fewer placeholders than there are numbers.
        """
        first, *rest = text.split(AUDIO_TOKEN)
        if len(rest) != len(num_tokens):
            raise ValueError(
                f"text has {len(rest)} {AUDIO_TOKEN} and num_tokens has {len(num_tokens)} clips; "
                f"give one {AUDIO_TOKEN} per clip"
            )
        return first + "".join(AUDIO_TOKEN * n + piece for n, piece in zip(num_tokens, rest))

    def control_tokens(self, text: str) -> list[str]:
        """What in a text the tokenizer would read as control tokens, such as `<|im_end|>` and `<|audio|>`."""
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return [token for token in special if token in text]

    def plain_text(self, text: str) -> str:
        """
        A text that may come from anywhere, its control tokens broken up by a space: none is left to act as one. Of one
        letter there is nothing to break.
        """
        while found := [token for token in self.control_tokens(text) if len(token) > 1]:
            for token in found:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def build_prompt(self, instruction: str) -> str:
        """
        The chat prompt that puts one clip, then the instruction, to the LLM; with one `<|audio|>`, not expanded.

        Raises:
            ValueError: control tokens in the instruction.
        """
        content = [{"type": "audio"}, {"type": "text", "text": instruction}]
        prompt = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        found = prompt.count(AUDIO_TOKEN)
        if found != 1:
            raise ValueError(
                f"instruction {instruction!r}: its prompt has {found} {AUDIO_TOKEN} in place of 1; "
                "take it out of the instruction, or mend the chat template"
            )
        return prompt

    def apply_request(self, audio, task: str = "asr", sampling_rate: int | None = None) -> BatchFeature:
        """
        Model inputs (see `__call__`) that put the question of `task` to each clip, one clip or a list, in one batch.

        Raises:
            ValueError: the model was not trained for the task: `prompts` does not have it.
        """
        prompt = self.build_prompt(self._prompt_of(task))
        clips = as_clips(audio)
        text = [prompt] * len(clips)
        return self(audio=clips, text=text, sampling_rate=sampling_rate)

    def apply_requests(self, audio, tasks, sampling_rate: int | None = None) -> BatchFeature:
        """
        Inputs of the model's `generate_branches`, which puts the questions of several tasks to each clip at once.

        Returns:
            `input_features` and `input_features_mask` as of `__call__`, and `prompts`: by clip, by task the token ids.

        Raises:
            ValueError: the model was not trained for a task: `prompts` does not have it.
        """
        rate = self.feature_extractor.sampling_rate
        features = self.audio_features([load_audio(clip, sampling_rate, target=rate) for clip in as_clips(audio)])
        lengths = features["input_features_mask"].sum(-1).tolist()
        features["prompts"] = [self.prompt_ids(self._num_tokens_of_mel(n), tasks) for n in lengths]
        return features

    def prompt_ids(self, num_tokens: int, tasks) -> list[list[int]]:
        """By task the token ids of its prompt for a clip of so many audio tokens."""
        texts = [self.expand_audio(self.build_prompt(self._prompt_of(task)), [num_tokens]) for task in tasks]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _prompt_of(self, task: str) -> str:
        if task not in self.prompts:
            raise ValueError(f"there is no prompt for task {task!r}; this model was trained for {list(self.prompts)}")
        return self.prompts[task]

    def constrain(self, tasks, limits) -> GrammarConstraint:
        """
        A logits processor, for one `generate` or `generate_branches`, that keeps each answer to its task's grammar:
        of entities, words and whole tags of the model's set; of sentiment, one of the classes. Transcripts stay free.

        Args:
            tasks: the task of each row of the batch: for `generate_branches` those of the first clip, then those of
                the second, and so on. `num_beams` does not matter.
            limits: the tokens that each row may write, at most; what is opened is closed within them.

        Raises:
            ValueError: no such task, a limit that is too short for any answer, or a tokenizer that is neither
                byte-level nor SentencePiece's.
        """
        if foreign := sorted(set(tasks) - TASKS.keys()):
            raise ValueError(f"there is no task {foreign[0]!r}; there are {', '.join(TASKS)}")
        grammars = [TASKS[task].grammar(TAG_SETS[self.entity_tags]) for task in tasks]
        return GrammarConstraint(grammars, self.tokenizer, limits)

    def most_tokens(self, task: str, seconds: float) -> int:
        """Bound on the answer to a task about a clip of so many seconds (`Task.most_tokens`)."""
        return TASKS[task].most_tokens(seconds, self.tokens_per_second)

    @property
    def longest_answer(self) -> int:
        """Tokens, of any task: more than 30 s of the speech that the model was trained on need."""
        return math.ceil(384 * max(1.0, self.tokens_per_second / ENGLISH_RATE))

    def apply_transcription_request(
        self, audio, prompt: str | list[str] | None = None, sampling_rate: int | None = None
    ) -> BatchFeature:
        """
        As transformers' audio models have it: `apply_request` for the transcript, or for a `prompt` of your own, one
        for all clips or one for each.

        Raises:
            ValueError: other than one prompt a clip.
        """
        if prompt is None:
            return self.apply_request(audio, "asr", sampling_rate)
        clips = as_clips(audio)
        prompts = [prompt] * len(clips) if isinstance(prompt, str) else prompt
        if len(prompts) != len(clips):
            raise ValueError(f"prompt: {len(prompts)} for {len(clips)} clips; give one, or one a clip")
        return self(audio=clips, text=[self.build_prompt(each) for each in prompts], sampling_rate=sampling_rate)

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, tokenize: bool = False, sampling_rate=None, **kwargs
    ):
        """
        Renders one conversation or a list of them, as `ProcessorMixin.apply_chat_template` does.

        Content may be a list of `{"type": "text", "text": ...}` and `{"type": "audio", ...}`, the latter with `path`,
        `url`, `audio` or `array` (and its `sampling_rate`): anything that `load_audio` takes. In the prompt, audio
        stands before the text of its message.

        Text is text: control tokens in it, which would end a turn or begin another, are an error; `plain_text` breaks
        them up. Only a string in place of a list of content may hold `<|audio|>`, for a clip that is given apart.

        Returns:
            The prompt as a string, or with `tokenize=True` its `input_ids`, or with `return_dict=True` too the model
            inputs (see `__call__`).

        Raises:
            ValueError: audio content without audio, control tokens in text, and what `load_audio` refuses.
        """
        self._check_conversation(conversation)
        if tokenize:
            processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
            told = _take_rate(processor_kwargs)
            sampling_rate = sampling_rate if told is None else told
            kwargs["processor_kwargs"] = processor_kwargs
            conversation = self._load_conversation(conversation, sampling_rate)
        return super().apply_chat_template(conversation, chat_template, tokenize=tokenize, **kwargs)

    def _check_conversation(self, conversation: list):
        """Raises ValueError where text of one conversation, or of a list of them, holds control tokens."""
        for message in conversation:
            if not isinstance(message, dict):
                self._check_conversation(message)
                continue
            content = message.get("content")
            parts = content if isinstance(content, (list, tuple)) else []
            texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
            if isinstance(content, str):
                texts = [content.replace(AUDIO_TOKEN, "")]
            for text in texts:
                if isinstance(text, str) and (found := self.control_tokens(text)):
                    raise ValueError(
                        f"text {text!r}: it has {found[0]}, a control token; take it out, or use plain_text"
                    )

    def _load_conversation(self, conversation: list, sampling_rate: int | None) -> list:
        """A copy of one conversation, or of a list of them, with every clip in it loaded and resampled."""
        if conversation and not isinstance(conversation[0], dict):
            return [self._load_conversation(each, sampling_rate) for each in conversation]
        loaded = []
        for message in conversation:
            content = message.get("content")
            if isinstance(content, (list, tuple)):
                parts = [self._load_part(p, sampling_rate) if p.get("type") == "audio" else p for p in content]
                message = {**message, "content": parts}
            loaded.append(message)
        return loaded

    def _load_part(self, part: dict, sampling_rate: int | None) -> dict:
        given = [key for key in ("audio", "path", "url", "array") if part.get(key) is not None]
        if len(given) != 1:
            raise ValueError(f"audio content with the keys {sorted(part)}: give one of audio, path, url and array")
        rate = part.get("sampling_rate", sampling_rate)
        clip = load_audio(part[given[0]], rate, target=self.feature_extractor.sampling_rate)
        return {"type": "audio", "audio": clip}

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "input_features_mask"]

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]


SenseProcessor.register_for_auto_class()


def _take_rate(kwargs: dict) -> int | None:
    """Of clips that are arrays, taken out of where it may stand: they are loaded by it, once."""
    nested = dict(kwargs.get("audio_kwargs") or {})
    found = [kwargs.pop("sampling_rate", None), nested.pop("sampling_rate", None)]
    if "audio_kwargs" in kwargs:
        kwargs["audio_kwargs"] = nested
    return next((rate for rate in found if rate is not None), None)


def check_chunk_length(seconds: float):
    """Raises ValueError where it is no length of a clip."""
    if not 1 <= seconds <= MAX_SECONDS:
        raise ValueError(f"chunk_length_s must be within 1 and {MAX_SECONDS} s, found {seconds}")


def as_clips(audio) -> list:
    """One clip or a list of clips -> a list of clips. A list of numbers is one clip."""
    if not isinstance(audio, (list, tuple)):
        return [audio]
    if not audio:
        raise ValueError("audio: an empty list; give at least one clip")
    return [audio] if isinstance(audio[0], (int, float)) else list(audio)


def text_ids(texts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of texts that may come from anywhere: what stands in them is text, control tokens too."""
    return _text_tokenizer(tokenizer)(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@lru_cache(maxsize=8)
def _text_tokenizer(tokenizer):
    """A copy: `split_special_tokens` sets a switch of the tokenizer itself, also for who reads a prompt meanwhile."""
    return copy.deepcopy(tokenizer)


def make_chat_template(tokenizer) -> str:
    """The tokenizer's chat template, or a plain one, taught to read audio content and to begin with its BOS."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
    return _bos_prefix(tokenizer, template) + FLATTEN_CONTENT.rstrip("\n") + template


def _bos_prefix(tokenizer, template: str) -> str:
    """Jinja for the BOS token where the tokenizer would add it to a text and the template does not write it."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if not adds_bos:
        return ""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template=template, tokenize=False
    )
    return "" if rendered.startswith(tokenizer.bos_token) else "{{- bos_token -}}"
