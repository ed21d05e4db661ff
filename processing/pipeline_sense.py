"""
`pipeline("spoken-language-understanding", model=...)`: recordings of any length -> text, entities, sentiment, times.

Importing this package registers it; a saved model brings this file along as its custom pipeline.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSpeechSeq2Seq, LogitsProcessor, StoppingCriteria
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from .alignment import mean_embedding, word_times
from .long_audio import RATE, read_blocks, speech_windows
from .processing_sense import MAX_SECONDS, check_chunk_length, open_audio
from .tasks import SENTIMENTS, TASKS


TASK = "spoken-language-understanding"
SECONDS_PER_FRAME = 0.02  # of Whisper's encoder


class SpokenLanguageUnderstandingPipeline(ChunkPipeline):
    """
    Hears recordings: what was said, which entities were named, how it was meant. Each argument is one of a call, or of
    `pipeline(...)` for every call.

    Args:
        inputs: one recording or a list, generator or dataset (its column `audio`) of them, each a path, an address,
            bytes, a file object, an array, or a dict with `array` (or `raw`) and `sampling_rate`; of any length.
        batch_size (`int`, *optional*, defaults to 1): windows heard at a time, of one recording or of several.
        sampling_rate (`int`, *optional*): of arrays, in Hz; 16000 if not given.
        return_entities (`bool`, *optional*): by default where the model was trained to tag entities ("ner").
        return_sentiment (`bool`, *optional*): by default where the model was trained for sentiment ("sa").
        return_timestamps (`bool` or `"word"`, *optional*): times in seconds of each window (True) or each word
            (`"word"`) in `chunks`, and of each entity.
        chunk_length_s (`float`, *optional*): recordings that are longer are cut at pauses, into windows that are no
            longer. By default recordings above 30 s are, into windows that last at most as long as three of four
            training clips did.
        constrained (`bool`, *optional*, defaults to False): keep the answers to the grammar of tags, so that each of
            these is known, closed and not empty, whatever is heard. Sentiment is one of its classes anyway.
        generate_kwargs (`dict`, *optional*): for `generate`, such as `{"num_beams": 5}`. Without `max_new_tokens` an
            answer ends at as many as speech of the window's length could need.
        streamer (*optional*): a `TextStreamer`, to see the text as it is written; for one window, without beams.
        progress (`bool`, *optional*): a bar for recordings of more than one window. On by default in a terminal.

    Returns:
        a dict for each recording, with
        `text`, and `duration` in seconds;
        `entities`, each `{"entity": tag, "word": phrase, "start": first character, "end": the one after it}` and
        with times `"timestamp": (start, end)`;
        `sentiment`: `{"label", "score", "scores": {class: probability}}`, of windows weighted by their length; None
        where nobody spoke. Only recordings above 30 s are searched for speech: a shorter one is heard as it is;
        `chunks`, each `{"text", "timestamp": (start, end)}`, if times were asked for.

    Raises:
        ValueError: a recording that is no readable audio, a question that the model was not trained for, or an option
            out of range.
    """

    _load_processor = True
    _load_tokenizer = _load_feature_extractor = _load_image_processor = _load_video_processor = False
    _pipeline_calls_generate = False  # its settings come in generate_kwargs

    def __init__(self, model, processor=None, **kwargs):
        super().__init__(model=model, processor=processor, **kwargs)
        if self.processor is None:
            raise ValueError(f"task {TASK} needs the model's SenseProcessor: give processor=...")
        self.model.eval()

    def __call__(self, inputs, *args, **kwargs):
        if isinstance(inputs, tuple):  # to transformers a list alone is several
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        # transformers knows datasets of torch alone; a column of one, or a stream, would be one recording to it.
        is_theirs = type(inputs).__module__.partition(".")[0] == "datasets" and not isinstance(inputs, dict)
        if is_theirs and not hasattr(inputs, "get_all_samples"):
            inputs = (row["audio"] if isinstance(row, dict) and "audio" in row else row for row in inputs)
        elif isinstance(inputs, torch.utils.data.Dataset) and not hasattr(inputs, "__iter__"):
            rows = inputs
            inputs = (rows[i] for i in range(len(rows)))  # torch's datasets: read on, one may never end
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(
        self,
        sampling_rate: int | None = None,
        return_entities: bool | None = None,
        return_sentiment: bool | None = None,
        return_timestamps: bool | str | None = None,
        chunk_length_s: float | None = None,
        constrained: bool | None = None,
        generate_kwargs: dict | None = None,
        streamer=None,
        progress: bool | None = None,
    ) -> tuple[dict, ...]:
        if chunk_length_s is not None:
            check_chunk_length(chunk_length_s)
        if return_timestamps not in (None, False, True, "word"):
            raise ValueError(f"return_timestamps must be False, True or 'word', found {return_timestamps!r}")
        reading = {"sampling_rate": sampling_rate, "chunk_length_s": chunk_length_s, "progress": progress}
        asking = {"return_entities": return_entities, "return_sentiment": return_sentiment}
        writing = asking | {"return_timestamps": return_timestamps}
        hearing = writing | {"constrained": constrained, "generate_kwargs": generate_kwargs, "streamer": streamer}
        return tuple({k: v for k, v in each.items() if v is not None} for each in (reading, hearing, writing))

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """The results of recordings, in order; their windows are heard in batches, across recordings."""
        waiting: deque = deque()
        for recording, batch in self._batches(inputs, batch_size, preprocess_params):
            if recording is not None:
                waiting.append(recording)
            self._hear(batch, forward_params)
            while waiting and waiting[0].is_whole:
                yield self.postprocess(waiting.popleft(), **postprocess_params)

    def stream(self, inputs, **kwargs) -> Iterator[dict]:
        """
        The result for one recording so far, after each window; the last one is what a call returns. Arguments as of a
        call, without `batch_size`.
        """
        reading, asking, writing = self._sanitize_parameters(**kwargs)
        recording = self.preprocess(inputs, **self._preprocess_params | reading)
        for window in recording.windows:
            self._hear([(recording, window)], self._forward_params | asking)
            yield self.postprocess(recording, **self._postprocess_params | writing)
        if not recording.heard:
            yield self.postprocess(recording, **self._postprocess_params | writing)

    def _batches(self, inputs, batch_size: int, preprocess_params: dict) -> Iterator[tuple]:
        """Each recording when it is opened, or None; and full batches of `(recording, window)`, or an empty one."""
        batch = []
        try:
            for audio in inputs:
                recording = self.preprocess(audio, **preprocess_params)
                yield recording, []
                for window in recording.windows:
                    batch.append((recording, window))
                    recording.given += 1
                    if len(batch) == batch_size:
                        yield None, batch
                        batch = []
                recording.is_read = True
                yield None, []
        except Exception:  # whatever a recording or the caller's generator raises goes on to the caller
            yield None, batch  # what was heard before it is not lost
            raise
        yield None, batch

    def _hear(self, batch: list[tuple], forward_params: dict):
        if batch:
            found = self.forward([window for _, window in batch], **forward_params)
            for (recording, _), heard in zip(batch, found):
                recording.heard.append(heard)

    def preprocess(self, audio, sampling_rate=None, chunk_length_s=None, progress=None) -> "Recording":
        whole, chunk_length_s = chunk_length_s or MAX_SECONDS, chunk_length_s or self.processor.chunk_length_s
        source, rate, name = open_audio(audio, sampling_rate, RATE)
        duration = (len(source) if isinstance(source, np.ndarray) else source.frames) / rate
        windows = speech_windows(read_blocks(source, rate, name), chunk_length_s, whole)
        silent = not progress if progress is not None else None  # None: a bar in terminals only
        return Recording(duration, _with_bar(windows, duration, True if duration <= whole else silent))

    def _forward(
        self,
        windows: list[dict],
        return_entities=None,
        return_sentiment=None,
        return_timestamps=False,
        constrained=False,
        generate_kwargs=None,
        streamer=None,
    ) -> list[dict]:
        """What is heard in a batch of windows, of each a dict."""
        features = self.processor.audio_features([window["samples"] for window in windows]).to(self.device)
        encoded, mask = self.model.model.encode(**features)
        frames = encoded.last_hidden_state
        pooled, valid = self.model.model.multi_modal_projector.pool(frames, mask)
        audio = {"pooled_features": pooled, "pooled_features_mask": valid}
        lengths = valid.sum(1).tolist()
        task = "ner" if self._is_asked("ner", return_entities) else "asr"
        how = (generate_kwargs or {}) | ({"streamer": streamer} if streamer else {})
        heard = self._ask(task, audio, lengths, how, constrained)
        for found, window in zip(heard, windows):
            found |= {"start": window["start"], "end": window["start"] + len(window["samples"]) / RATE}
        if self._is_asked("sa", return_sentiment):
            for found, scores in zip(heard, self._sentiments(audio, lengths)):
                found["scores"] = scores
        if return_timestamps:
            for i, found in enumerate(heard):
                speech = self.model.model.multi_modal_projector(frames[i, mask[i].bool()])
                found["times"] = self._word_times(found, speech)
        return heard

    def _is_asked(self, task: str, wanted: bool | None) -> bool:
        """Whether a question is put; by default where the model was trained for it."""
        return task in self.processor.prompts if wanted is None else wanted

    def _ask(self, task: str, audio: dict, lengths: list[int], generate_kwargs: dict, constrained: bool) -> list[dict]:
        """The words of each clip and, from "ner", its entities."""
        seconds = [n * MAX_SECONDS / self.processor.num_audio_tokens for n in lengths]
        limits = [self.processor.most_tokens(task, s) for s in seconds]
        prompts = [self.processor.prompt_ids(n, [task]) for n in lengths]
        generate_kwargs = {name: value for name, value in generate_kwargs.items() if value is not None}
        most = generate_kwargs.get("max_new_tokens")
        if most is None and (config := generate_kwargs.get("generation_config")) is not None:
            most = config.max_new_tokens
        limits = limits if most is None else [most] * len(limits)
        constraint = self.processor.constrain([task] * len(prompts), limits) if constrained else None
        answers = self.model.generate_branches(
            prompts, **audio, **answer_settings(limits, constraint, **generate_kwargs)
        )
        texts = self.processor.batch_decode([of_clip[0] for of_clip in answers], skip_special_tokens=True)
        parsed = [TASKS[task](self.processor.prompts[task]).parse(text) for text in texts]
        return [{"text": " ".join(answer.text.split()), "entities": answer.entities} for answer in parsed]

    def _sentiments(self, audio: dict, lengths: list[int]) -> list[list[float]]:
        """The probability of each class, among the classes."""
        tokenizer = self.processor.tokenizer
        answers = tokenizer(list(SENTIMENTS), add_special_tokens=False)["input_ids"]
        choices = [ids + [tokenizer.eos_token_id] for ids in answers]
        prompts = [self.processor.prompt_ids(n, ["sa"])[0] for n in lengths]
        return self.model.score_choices(prompts, choices, **audio).softmax(-1).tolist()

    @cached_property
    def _mean_embedding(self) -> torch.Tensor:
        return mean_embedding(self.model.get_input_embeddings().weight)

    def _word_times(self, found: dict, speech: torch.Tensor) -> list[tuple[float, float]]:
        weights = self.model.get_input_embeddings().weight
        how = {"seconds_per_frame": SECONDS_PER_FRAME, "mean": self._mean_embedding}
        spans = word_times(speech, found["text"].split(), self.processor.tokenizer, weights, **how)
        # The encoder's last step may end after the window.
        edges = [[min(found["start"] + edge, found["end"]) for edge in span] for span in spans]
        return [(round(start, 3), round(end, 3)) for start, end in edges]

    def postprocess(
        self, recording: "Recording", return_entities=None, return_sentiment=None, return_timestamps=False
    ) -> dict:
        """What was heard in the windows of a recording, put together."""
        heard = [found for found in recording.heard if found["text"]]
        texts = [found["text"] for found in heard]
        result = {"text": " ".join(texts), "duration": recording.duration}
        if self._is_asked("ner", return_entities):
            offsets = accumulate((len(text) + 1 for text in texts), initial=0)
            result["entities"] = [entity for pair in zip(heard, offsets) for entity in _entities(*pair)]
        if self._is_asked("sa", return_sentiment):
            result["sentiment"] = _mean_sentiment(recording.heard) if recording.heard else None
        if return_timestamps == "word":
            words = [pair for found in heard for pair in zip(found["text"].split(), found["times"])]
            result["chunks"] = [{"text": word, "timestamp": times} for word, times in words]
        elif return_timestamps:
            result["chunks"] = [{"text": f["text"], "timestamp": (f["start"], f["end"])} for f in heard]
        return result


@dataclass
class Recording:
    """One input on its way: windows to hear, and what was heard in those so far."""

    duration: float  # seconds
    windows: Iterator[dict]
    heard: list[dict] = field(default_factory=list)
    given: int = 0  # windows read so far
    is_read: bool = False

    @property
    def is_whole(self) -> bool:
        return self.is_read and len(self.heard) == self.given


def _with_bar(windows: Iterator[tuple[float, np.ndarray]], seconds: float, disable: bool | None) -> Iterator[dict]:
    """Windows as dicts, and a bar of the seconds that are done with."""
    look = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
    with tqdm(total=seconds, desc="listening", disable=disable, bar_format=look) as bar:
        for start, samples in windows:
            yield {"start": start, "samples": samples}
            bar.update(start + len(samples) / RATE - bar.n)
        bar.update(seconds - bar.n)


def _entities(heard: dict, offset: int) -> list[dict]:
    """A window's entities, their characters counted in the recording's text."""
    text, found = heard["text"], []
    for tag, start, length in heard["entities"]:
        entity = {"entity": tag, "word": text[start : start + length]}
        entity |= {"start": offset + start, "end": offset + start + length}
        if "times" in heard:
            first = text[:start].count(" ")
            last = first + entity["word"].count(" ")
            entity["timestamp"] = (heard["times"][first][0], heard["times"][last][1])
        found.append(entity)
    return found


def _mean_sentiment(windows: list[dict]) -> dict:
    """The classes' probabilities, averaged over the windows by their seconds, and the likeliest class."""
    seconds = np.array([heard["end"] - heard["start"] for heard in windows])
    mean = (seconds[:, None] * np.array([heard["scores"] for heard in windows])).sum(0) / seconds.sum()
    scores = {label: round(float(score), 4) for label, score in zip(SENTIMENTS, mean)}
    label = max(SENTIMENTS, key=lambda name: scores[name])
    return {"label": label, "score": scores[label], "scores": scores}


def answer_settings(limits: list[int], constraint: LogitsProcessor | None = None, **asked) -> dict:
    """
    For `generate`: greedy, or what is `asked` for; each row's answer bounded by its own limit, in tokens, and kept to
    its grammar by what `SenseProcessor.constrain` makes, if that is given: after processors of the caller's own.
    Stopping criteria of the caller's own come beside the limits.
    """
    config = asked.get("generation_config")
    settings: dict = {"do_sample": False, "max_new_tokens": max(limits)}
    settings = {name: value for name, value in settings.items() if getattr(config, name, None) is None}
    settings |= {**asked, "stopping_criteria": [AnswerLimits(limits), *asked.get("stopping_criteria", ())]}
    if constraint is not None:
        settings["logits_processor"] = [*settings.get("logits_processor", ()), constraint]
    return settings


class AnswerLimits(StoppingCriteria):
    """Ends each row's answer by its own limit, so that an endless one is the same in whatever batch it stands."""

    def __init__(self, limits: list[int]):
        self.limits = torch.tensor(limits)
        self.start: int | None = None  # the prompt's length, known after the first token

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        if self.start is None:
            self.start = input_ids.shape[1] - 1
        beams = len(input_ids) // len(self.limits)
        return (input_ids.shape[1] - self.start >= self.limits.repeat_interleave(beams)).to(input_ids.device)


PIPELINE_REGISTRY.register_pipeline(
    TASK, SpokenLanguageUnderstandingPipeline, pt_model=AutoModelForSpeechSeq2Seq, type="audio"
)

__all__ = ["SpokenLanguageUnderstandingPipeline", "answer_settings"]
