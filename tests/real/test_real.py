"""On real backbones, whisper-tiny.en and SmolLM2-135M-Instruct, and on speech that one can follow."""

import numpy as np
import pytest
import torch
from jiwer import wer
from transformers import AutoFeatureExtractor

from benchmarks.word_times import Hearing, choose_clips, errors
from eval_sense import transcribe_whisper, understand
from modeling_sense import SenseForConditionalGeneration
from processing import SenseProcessor
from processing.backbones import backbone_path
from processing.collator import SenseCollator
from processing.datasets import load_corpus
from processing.processing_sense import load_audio
from processing.recipe import SenseArguments
from processing.scoring import NORMALIZE
from processing.synthesis import main as synthesize
from processing.tasks import make_tasks
from processing.warm_start import WordAligner, warm_start


pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def whisper():
    return str(backbone_path("whisper-tiny.en"))


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech") / "speech"
    synthesize([str(folder), "--grammar", "quickstart", "--train", "40", "--dev", "8", "--test", "8"])
    return str(folder)


@pytest.fixture(scope="module")
def sense(whisper):
    llm = str(backbone_path("SmolLM2-135M-Instruct"))
    torch.manual_seed(0)
    dtype = SenseArguments(dataset_dir="any").dtype("cpu")
    model = SenseForConditionalGeneration.from_backbones(whisper, llm, dtype=dtype)
    return model, SenseProcessor.from_backbones(whisper, llm)


def test_sizes(sense):
    model, processor = sense
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 384 + 384 * 576 + 576 == 222_528
    assert model.config.audio_token_id == processor.audio_token_id == 49152
    assert processor.build_prompt("Transcribe the speech.").endswith(
        "<|im_start|>user\n<|audio|>\nTranscribe the speech.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_whispers_own_decoder_follows_the_speech(whisper, speech):
    rows = load_corpus(speech, "test")
    heard = transcribe_whisper(whisper, rows)
    assert wer([NORMALIZE(t) for t in rows["text"]], [NORMALIZE(h) for h in heard]) < 0.5


def test_word_times_find_the_pause(whisper, speech, sense):
    """Two utterances a second apart: the last word of the first ends before the second begins."""
    model, _ = sense
    first, second = load_corpus(speech, "test").select(range(2))
    clips = [load_audio(row["audio"]) for row in (first, second)]
    joined = np.concatenate([clips[0], np.zeros(16000, np.float32), clips[1]])
    features = AutoFeatureExtractor.from_pretrained(whisper)(joined, sampling_rate=16000, return_tensors="pt")
    aligner = WordAligner.from_pretrained(whisper, "cpu")
    frames = aligner.whisper.model.encoder(features["input_features"]).last_hidden_state
    ends = aligner.word_times(frames, f"{first['text']} {second['text']}", len(joined) // 320)
    assert aligner.kind == "attention" and ends == sorted(ends)
    assert len(ends) == len(f"{first['text']} {second['text']}".split())
    cut = ends[len(first["text"].split()) - 1] / 50  # 20 ms a frame
    assert len(clips[0]) / 16000 - 0.4 < cut < len(clips[0]) / 16000 + 1.4


@pytest.fixture(scope="module")
def warm(sense, speech, whisper):
    """The same after the warm start, and what that says of itself."""
    model, processor = sense
    return model, processor, warm_start(model, processor, load_corpus(speech, "train"), whisper)


def test_warm_start_hears_before_any_training(warm, speech):
    """The loss with the true clips falls below the one with the clips shuffled, by regression alone."""
    model, processor, found = warm
    assert found["word_times"] == "attention" and found["r2"] > 0.1
    rows = [{**row, "task": "asr"} for row in load_corpus(speech, "dev")]
    collate = SenseCollator(processor, make_tasks(processor.prompts))
    texts = [row["text"] for row in rows]
    shuffled = [{**row, "text": text} for row, text in zip(rows, texts[1:] + texts[:1])]
    with torch.no_grad():
        true, false = (model(**collate(batch), skip_logits=True).loss for batch in (rows, shuffled))
    assert true < false


def test_words_are_found_in_time_by_the_warm_start_alone(warm, speech):
    """Nearer to a forced alignment than words that are spread evenly over the clip."""
    model, processor, _ = warm
    rows = choose_clips(load_corpus(speech, "test"), 8)
    assert len(rows) >= 4
    with torch.inference_mode():
        mine = [Hearing(model, processor, row).by_frames() for row in rows]
    even = [[(i * s / n, (i + 1) * s / n) for i in range(n)] for row in rows for n, s in [size(row)]]
    truth = [row["sphinx"] for row in rows]
    found, spread = errors(rows, mine, truth), errors(rows, even, truth)
    for kind in ("words", "entities"):
        assert found[kind]["median"] < 0.8 * spread[kind]["median"]


def size(row) -> tuple[int, float]:
    """Words and seconds."""
    return len(row["text"].split()), len(load_audio(row["audio"])) / 16000


def test_batch_equals_singles_on_real_speech(sense, speech):
    model, processor = sense
    model.float()
    rows = load_corpus(speech, "test")
    assert understand(model, processor, rows, batch_size=8) == understand(model, processor, rows, batch_size=1)
