"""The best path through scores, and words laid along audio whose embeddings are known."""

import itertools

import numpy as np
import pytest
import torch

from processing.alignment import monotonic_path, word_times
from tests.conftest import make_tokenizer


def test_the_path_follows_the_bright_states():
    spans = [(0, 3), (3, 4), (4, 9), (9, 12)]
    scores = np.zeros((4, 12))
    for state, (start, end) in enumerate(spans):
        scores[state, start:end] = 1
    assert monotonic_path(scores) == spans


def total(scores, spans):
    return sum(scores[state, slice(*span)].sum() for state, span in enumerate(spans) if span)


def every_path(frames, optional):
    """All ways to share the frames out among the states, in order."""
    choices = [[True, False] if may_go else [True] for may_go in optional]
    for present in itertools.product(*choices):
        here = [state for state, is_here in enumerate(present) if is_here]
        for cuts in itertools.combinations(range(1, frames), len(here) - 1):
            spans = [None] * len(optional)
            for state, *span in zip(here, (0, *cuts), (*cuts, frames)):
                spans[state] = tuple(span)
            yield spans


@pytest.mark.parametrize("seed", range(20))
def test_the_path_beats_every_other_one(seed):
    scores = np.random.default_rng(seed).standard_normal((5, 7))
    optional = [True, False, True, False, True]
    best = max(total(scores, spans) for spans in every_path(7, optional))
    assert total(scores, monotonic_path(scores, optional)) == pytest.approx(best)
    best = max(total(scores, spans) for spans in every_path(7, [False] * 5))
    found = monotonic_path(scores)
    assert None not in found and total(scores, found) == pytest.approx(best)


def test_more_states_than_frames_is_refused():
    with pytest.raises(ValueError, match="2 frames for 3 states"):
        monotonic_path(np.zeros((3, 2)))
    assert monotonic_path(np.zeros((3, 2)), [True, False, True])[1] is not None


def speak(tokenizer, embeddings, plan):
    """Audio embeddings of `(word or None, frames)`: a word's tokens share its frames, None is noise."""
    frames = []
    for word, number in plan:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"] if word else []
        frames += [embeddings[ids[i * len(ids) // number]] if ids else embeddings.mean(0) for i in range(number)]
    return torch.stack(frames) + 0.1 * embeddings.std() * torch.randn(len(frames), embeddings.shape[1])


def test_words_and_pauses_come_back_where_they_were_put():
    torch.manual_seed(0)
    tokenizer, embeddings = make_tokenizer(), torch.randn(400, 64)
    plan = [(None, 10), ("the", 8), (" user", 12), (None, 25), (" speaks", 15), (None, 5)]
    found = word_times(
        speak(tokenizer, embeddings, plan), ["the", "user", "speaks"], tokenizer, embeddings, seconds_per_frame=0.02
    )
    assert np.allclose(found, [(0.20, 0.36), (0.36, 0.60), (1.10, 1.40)], atol=0.021)


def test_a_repeated_word_is_found_twice():
    torch.manual_seed(0)
    tokenizer, embeddings = make_tokenizer(), torch.randn(400, 64)
    audio = speak(tokenizer, embeddings, [("the", 10), (" user", 10), (None, 10), (" the", 10)])
    (first, _), _, (second, end) = word_times(audio, ["the", "user", "the"], tokenizer, embeddings, 0.02)
    assert first < 0.05 and second == pytest.approx(0.6, abs=0.05) and end == pytest.approx(0.8)


def test_too_many_words_for_the_audio_share_it_out():
    tokenizer, embeddings = make_tokenizer(), torch.randn(400, 64)
    found = word_times(torch.randn(4, 64), ["transcribe"] * 8, tokenizer, embeddings, 0.02)
    assert len(found) == 8 and found[0][0] == 0 and found[-1][1] == pytest.approx(0.08)
    assert all(start < end for start, end in found)
    assert word_times(torch.randn(4, 64), [], tokenizer, embeddings, 0.02) == []
