"""`pipeline("spoken-language-understanding")` on tiny random models, and on answers that are known."""

import http.server
import io

import datasets
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from processing import SenseProcessor, SpokenLanguageUnderstandingPipeline, pipeline_sense
from processing.long_audio import RATE
from processing.pipeline_sense import TASK, answer_settings
from processing.tasks import SENTIMENTS, TASKS
from tests.conftest import make_corpus, tone, wav
from tests.local_server import LocalServer


SHORT = {"generate_kwargs": {"max_new_tokens": 5}}


@pytest.fixture
def pipe(parts):
    return SpokenLanguageUnderstandingPipeline(*parts, device="cpu")


@pytest.fixture
def said(pipe, monkeypatch):
    """A pipeline whose model answers what the test wants, window after window."""
    answers = []

    def answer(prompts, **kwargs):
        ids = pipe.processor.tokenizer([answers.pop(0) for _ in prompts], add_special_tokens=False)["input_ids"]
        return [[torch.tensor(row)] for row in ids]

    monkeypatch.setattr(pipe.model, "generate_branches", answer)
    return pipe, answers


def test_it_is_registered_and_loads_by_its_name(saved):
    pipe = pipeline(TASK, model=saved)
    assert isinstance(pipe, SpokenLanguageUnderstandingPipeline)
    assert set(pipe(tone(1), **SHORT)) == {"text", "duration", "entities", "sentiment"}


def test_the_name_asr_gives_the_transcript_with_this_class(saved):
    pipe = pipeline("automatic-speech-recognition", model=saved, pipeline_class=SpokenLanguageUnderstandingPipeline)
    found = pipe(tone(1), return_timestamps="word", return_entities=False, return_sentiment=False, **SHORT)
    assert set(found) == {"text", "duration", "chunks"}


def test_transformers_own_asr_pipeline_is_told_the_right_call(saved):
    pipe = pipeline("automatic-speech-recognition", model=saved)
    with pytest.raises(ValueError, match=r'pipeline\("spoken-language-understanding"'):
        pipe(tone(1))


def every_source(tmp_path):
    clip = tone(1.2)
    path = tmp_path / "clip.wav"
    path.write_bytes(wav(clip))
    pcm = np.round(clip * 32767).astype(np.int16)
    return [
        path,
        str(path),
        path.as_uri(),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        pcm,
        torch.from_numpy(pcm / np.float32(32768)),
        {"array": pcm, "sampling_rate": 16000},
        {"raw": pcm, "sampling_rate": 16000},
        {"bytes": path.read_bytes(), "path": None},
    ]


def test_all_ways_to_hand_audio_over_give_the_same(pipe, tmp_path):
    found = pipe(every_source(tmp_path), batch_size=3, **SHORT)
    assert len(found) == 10
    for each in found[1:]:
        assert each["text"] == found[0]["text"] and each["duration"] == pytest.approx(1.2)
        assert each["sentiment"]["scores"] == pytest.approx(found[0]["sentiment"]["scores"], abs=2e-3)


def test_addresses_are_fetched(pipe, tmp_path):
    (tmp_path / "clip.wav").write_bytes(wav(tone(1)))

    class Folder(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

    class FolderServer(LocalServer):
        def handler(self):
            return Folder

    with FolderServer() as server:
        assert pipe(f"{server.url}/clip.wav", **SHORT) == pipe(tmp_path / "clip.wav", **SHORT)
        with pytest.raises(ValueError, match="none.wav.*404"):
            pipe(f"{server.url}/none.wav")


def test_torchcodecs_decoder_is_read(pipe):
    class Decoder:
        def get_all_samples(self):
            return type("Samples", (), {"data": torch.from_numpy(tone(1, 8000))[None], "sample_rate": 8000})

    assert pipe(Decoder(), **SHORT) == pipe(tone(1, 8000), sampling_rate=8000, **SHORT)


def test_batches_generators_and_datasets_give_what_singles_give(pipe):
    clips = [tone(0.5 + 0.3 * i, seed=i) for i in range(5)]
    single = [pipe(clip, return_timestamps="word", **SHORT) for clip in clips]
    how = {"batch_size": 2, "return_timestamps": "word", **SHORT}
    for several in (clips, (clip for clip in clips)):
        for found, expected in zip(pipe(several, **how), single, strict=True):
            assert found["text"] == expected["text"] and found["chunks"] == expected["chunks"]
            assert found["sentiment"]["scores"] == pytest.approx(expected["sentiment"]["scores"], abs=2e-3)
    rows = make_corpus(3)
    assert isinstance(rows, datasets.Dataset)
    for of_datasets in (KeyDataset(rows, "audio"), rows, rows["audio"], rows.to_iterable_dataset()):
        assert [found["duration"] for found in pipe(of_datasets, **how)] == rows["duration"]
    assert pipe([]) == []

    class Endless(torch.utils.data.Dataset):  # no error behind the last one
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return clips[index % 2]

    assert [found["text"] for found in pipe(Endless(), **how)] == [found["text"] for found in single[:2]]


@pytest.mark.parametrize("asked", [5, 300, None])
def test_max_new_tokens_that_are_asked_for_count(pipe, monkeypatch, asked):
    seen = []
    monkeypatch.setattr(pipe.model, "generate_branches", lambda *a, **k: seen.append(k) or [[torch.tensor([1])]])
    pipe(tone(0.5), return_sentiment=False, generate_kwargs={"max_new_tokens": asked})
    expected = asked or TASKS["ner"].most_tokens(0.6)
    assert seen[0]["stopping_criteria"][0].limits.tolist() == [expected] == [seen[0]["max_new_tokens"]]


def test_a_generation_config_counts(pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(pipe.model, "generate_branches", lambda *a, **k: seen.append(k) or [[torch.tensor([1])]])
    config = GenerationConfig(do_sample=True, max_new_tokens=5)
    pipe(tone(0.5), return_sentiment=False, generate_kwargs={"generation_config": config})
    assert seen[0]["generation_config"] is config and not seen[0].keys() & {"do_sample", "max_new_tokens"}
    assert seen[0]["stopping_criteria"][0].limits.tolist() == [5]


def test_criteria_of_the_callers_own_come_beside_the_limits():
    own = StoppingCriteria()
    limits, second = answer_settings([5, 7], stopping_criteria=[own])["stopping_criteria"]
    assert limits.limits.tolist() == [5, 7] and second is own


def test_the_vocabulary_is_averaged_once(said, monkeypatch):
    pipe, answers = said
    answers[:] = ["anna left moscow"] * 3
    pipe = SpokenLanguageUnderstandingPipeline(model=pipe.model, processor=pipe.processor)
    seen = []
    monkeypatch.setattr(pipeline_sense, "mean_embedding", lambda table: seen.append(table) or table.mean(0))
    pipe([tone(0.8, seed=i) for i in range(3)], return_timestamps="word", return_sentiment=False)
    assert len(seen) == 1


def test_words_end_with_the_recording(said, monkeypatch):
    pipe, answers = said
    answers[:] = ["anna left moscow"]
    monkeypatch.setattr("processing.pipeline_sense.word_times", lambda *_, **how: [(0, 0.3), (0.3, 0.6), (0.6, 0.82)])
    found = pipe(tone(0.81), return_timestamps="word", return_sentiment=False)
    assert found["chunks"][-1]["timestamp"] == (0.6, 0.81) and found["duration"] == 0.81


def test_a_result_comes_before_the_next_recordings_are_read(pipe):
    read = []

    def recordings():
        for i in range(4):
            read.append(i)
            yield tone(0.5, seed=i)

    results = iter(pipe(recordings(), **SHORT))
    next(results)
    assert read in ([0], [0, 1])  # transformers itself looks at the first one


# ------------------------------------------------------------------ what comes out


def test_entities_stand_where_they_say_in_text_and_time(said):
    pipe, answers = said
    answers[:] = ["<PERSON> anna karenina </PERSON> left <PLACE> moscow </PLACE>"]
    found = pipe(tone(4), return_timestamps="word")
    assert found["text"] == "anna karenina left moscow"
    person, place = found["entities"]
    assert person | {"timestamp": 0} == {
        "entity": "PERSON",
        "word": "anna karenina",
        "start": 0,
        "end": 13,
        "timestamp": 0,
    }
    assert found["text"][place["start"] : place["end"]] == place["word"] == "moscow"
    words = found["chunks"]
    assert [word["text"] for word in words] == ["anna", "karenina", "left", "moscow"]
    assert person["timestamp"] == (words[0]["timestamp"][0], words[1]["timestamp"][1])
    assert place["timestamp"] == words[3]["timestamp"]
    edges = [edge for word in words for edge in word["timestamp"]]
    assert edges == sorted(edges) and 0 <= edges[0] and edges[-1] <= 4


def speech_and_silence(pipe, monkeypatch, *windows):
    """Makes the voice detector find these windows, `(start, end)` in seconds."""

    def cut(blocks, max_seconds, whole_seconds):
        recording = np.concatenate(list(blocks))
        for start, end in windows:
            yield start, recording[int(start * RATE) : int(end * RATE)]

    monkeypatch.setattr("processing.pipeline_sense.speech_windows", cut)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_windows_are_stitched_and_keep_their_times(said, monkeypatch, batch_size):
    pipe, answers = said
    speech_and_silence(pipe, monkeypatch, (1.0, 3.0), (5.0, 6.0), (50.0, 58.0))
    answers[:] = ["<PLACE> rome </PLACE> is old", "", "he met <PERSON> anna </PERSON>"]
    found = pipe(tone(60), batch_size=batch_size, return_timestamps=True)
    assert found["text"] == "rome is old he met anna" and found["duration"] == 60
    assert found["chunks"] == [
        {"text": "rome is old", "timestamp": (1.0, 3.0)},
        {"text": "he met anna", "timestamp": (50.0, 58.0)},
    ]
    for entity in found["entities"]:
        assert found["text"][entity["start"] : entity["end"]] == entity["word"]
    rome, anna = (entity["timestamp"] for entity in found["entities"])
    assert 1.0 <= rome[0] < rome[1] <= 3.0 and 50.0 <= anna[0] < anna[1] <= 58.0


def test_stream_gives_the_result_so_far(said, monkeypatch):
    pipe, answers = said
    speech_and_silence(pipe, monkeypatch, (0.0, 3.0), (5.0, 6.0))
    answers[:] = ["rome is old", "anna left"]
    texts = [found["text"] for found in pipe.stream(tone(60), return_timestamps="word")]
    assert texts == ["rome is old", "rome is old anna left"]
    speech_and_silence(pipe, monkeypatch)
    assert [found["text"] for found in pipe.stream(tone(60))] == [""]


def test_nobody_spoke(pipe):
    found = pipe(np.zeros(RATE * 65, np.float32), return_timestamps="word")
    assert found == {"text": "", "duration": 65, "entities": [], "sentiment": None, "chunks": []}


def test_silence_between_recordings_keeps_the_order(pipe):
    silent = np.zeros(RATE * 40, np.float32)
    found = pipe([tone(1), silent, tone(2), silent], batch_size=4, **SHORT)
    assert [each["duration"] for each in found] == [1, 40, 2, 40]
    assert [each["sentiment"] is None for each in found] == [False, True, False, True]


def test_sentiment_is_the_models_own_probability_of_each_answer(parts, pipe):
    model, processor = parts
    clip = tone(1.5)
    totals = []
    for label in SENTIMENTS:
        inputs = processor.apply_request(clip, "sa")
        ids = processor.tokenizer(label, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
        answer = torch.tensor([ids])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[:, -len(ids) - 1 : -1].log_softmax(-1)
        totals.append(logits.gather(-1, answer.unsqueeze(-1)).sum())
    expected = torch.stack(totals).softmax(0).tolist()
    found = pipe([clip, tone(0.4)], batch_size=2, **SHORT)[0]["sentiment"]
    assert list(found["scores"].values()) == pytest.approx(expected, abs=1e-3)
    assert found["label"] == SENTIMENTS[int(np.argmax(expected))] and found["score"] == max(found["scores"].values())


def test_a_streamer_writes_the_answer_alone(pipe):
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    found = pipe(tone(1), streamer=streamer, return_entities=False, **SHORT)
    assert " ".join("".join(streamer).split()) == found["text"]


def test_long_recordings_are_cut_to_what_the_model_is_used_to(parts, monkeypatch, tmp_path):
    model, processor = parts[0], SenseProcessor.from_pretrained(_saved(parts[1], tmp_path))
    assert processor.chunk_length_s == 12
    asked = []

    def cut(blocks, *seconds):
        asked.append(seconds)
        return iter(())

    monkeypatch.setattr("processing.pipeline_sense.speech_windows", cut)
    pipe = SpokenLanguageUnderstandingPipeline(model, processor)
    pipe(tone(1))
    pipe(tone(1), chunk_length_s=20)
    assert asked == [(12, 30), (20, 20)]  # up to 30 s they stay whole, unless it is asked for otherwise


def _saved(processor, folder):
    before, processor.chunk_length_s = processor.chunk_length_s, 12
    processor.save_pretrained(folder)
    processor.chunk_length_s = before
    return folder


# ------------------------------------------------------------------ what is refused


def test_questions_that_the_model_was_not_trained_for(tiny_whisper, tiny_llama, parts):
    processor = SenseProcessor.from_backbones(tiny_whisper, tiny_llama)  # asr alone
    pipe = SpokenLanguageUnderstandingPipeline(parts[0], processor)
    assert set(pipe(tone(1), **SHORT)) == {"text", "duration"}
    with pytest.raises(ValueError, match="no prompt for task 'ner'"):
        pipe(tone(1), return_entities=True)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"chunk_length_s": 31}, "chunk_length_s must be within 1 and 30 s, found 31"),
        ({"return_timestamps": "letter"}, "return_timestamps must be False, True or 'word', found 'letter'"),
    ],
)
def test_options_out_of_range(pipe, option, message):
    with pytest.raises(ValueError, match=message):
        pipe(tone(1), **option)


def test_bad_recordings_are_named(pipe, tmp_path):
    (tmp_path / "notes.wav").write_text("not audio")
    with pytest.raises(ValueError, match="notes.wav: not readable as audio"):
        pipe([tone(1), tmp_path / "notes.wav"])
    with pytest.raises(ValueError, match="none.wav: no such audio file"):
        pipe(tmp_path / "none.wav")


def test_without_the_processor(parts):
    with pytest.raises(ValueError, match="needs the model's SenseProcessor"):
        SpokenLanguageUnderstandingPipeline(parts[0])


def test_what_was_heard_before_a_generator_failed_comes_out(pipe):
    def recordings():
        yield from (tone(1), tone(2))
        raise RuntimeError("the disk is gone")

    results = iter(pipe(recordings(), batch_size=8, **SHORT))
    assert [next(results)["duration"], next(results)["duration"]] == [1, 2]
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(results)


def test_what_was_heard_before_a_bad_recording_comes_out(pipe, tmp_path):
    (tmp_path / "notes.wav").write_text("not audio")
    results = iter(
        pipe((audio for audio in [tone(1), tone(2), tmp_path / "notes.wav", tone(1)]), batch_size=8, **SHORT)
    )
    assert [next(results)["duration"], next(results)["duration"]] == [1, 2]
    with pytest.raises(ValueError, match="notes.wav"):
        next(results)
