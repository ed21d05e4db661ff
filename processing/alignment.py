"""
When each word was said: the words of an answer laid along the audio.

The adapter turns audio into vectors of the language model's embedding space, each near the embedding of the token
that is being spoken, and it does so for any one encoder frame (20 ms) as for pooled ones: how far words can be told
apart in time does not hang on the pooling. Along these vectors the best monotonic path through the words' tokens, with
optional silence between words, is the alignment. Our own method; docs/word_times.md measures it beside others.
"""

import numpy as np
import torch

from .processing_sense import text_ids


SILENCE = 0.3  # what a frame without a word scores, in standard deviations above a token's mean; found on dev clips


def word_times(
    audio_embeds: torch.Tensor,
    words: list[str],
    tokenizer,
    embeddings: torch.Tensor,
    seconds_per_frame: float,
    mean: torch.Tensor | None = None,
) -> list[tuple[float, float]]:
    """
    Start and end of each word, in seconds.

    Args:
        audio_embeds (`torch.Tensor` of shape `(frames, hidden_size)`): the adapter's output for frames of speech.
        words: what was said. A clip that is too short for all their tokens shares its time out evenly.
        tokenizer: the language model's.
        embeddings (`torch.Tensor` of shape `(vocabulary, hidden_size)`): the language model's input embeddings.
        seconds_per_frame: 0.02 for the encoder's frames.
        mean: `mean_embedding` of the embeddings, for those who ask often.
    """
    if not words:
        return []
    pieces = word_pieces(words, tokenizer)
    tokens = [token for piece in pieces for token in piece]
    frames = len(audio_embeds)
    if frames < len(tokens):
        edges = [frames * seconds_per_frame * i / len(words) for i in range(len(words) + 1)]
        return list(zip(edges, edges[1:]))
    mean = mean_embedding(embeddings) if mean is None else mean
    scores = _similarity(embeddings[torch.tensor(tokens, device=embeddings.device)].float() - mean, audio_embeds)
    silence = np.full((1, frames), SILENCE, np.float32)
    rows, optional, at = [silence], [True], 0
    spans: list[tuple[int, int]] = []
    for piece in pieces:
        spans.append((len(optional), len(optional) + len(piece) - 1))
        rows += [scores[at : at + len(piece)], silence]
        optional += [False] * len(piece) + [True]
        at += len(piece)
    path = monotonic_path(np.concatenate(rows), optional)
    return [(path[first][0] * seconds_per_frame, path[last][1] * seconds_per_frame) for first, last in spans]


def word_pieces(words: list[str], tokenizer) -> list[list[int]]:
    """The token ids of each word of a text: all but the first with the space before them."""
    return text_ids([words[0], *(f" {word}" for word in words[1:])], tokenizer)


def mean_embedding(embeddings: torch.Tensor) -> torch.Tensor:
    """The mean of a vocabulary's embeddings, in float32, `(hidden_size,)`; never a copy of the whole table in it."""
    return torch.stack([rows.float().sum(0) for rows in embeddings.split(8192)]).sum(0) / len(embeddings)


def _similarity(tokens: torch.Tensor, audio: torch.Tensor) -> np.ndarray:
    """
    Cosines `(tokens, frames)` of tokens, given about their mean, and audio about its own, each token's in standard
    deviations over the frames: what counts is where a token fits best, not how well.
    """
    audio = audio.float() - audio.float().mean(0)
    cosines = torch.nn.functional.normalize(tokens, dim=-1) @ torch.nn.functional.normalize(audio, dim=-1).T
    return standardize(cosines, 1).cpu().numpy()


def standardize(scores: torch.Tensor, dim: int) -> torch.Tensor:
    """With mean 0 and standard deviation 1 along a dimension."""
    spread = scores.std(dim, correction=0, keepdim=True)
    return (scores - scores.mean(dim, keepdim=True)) / (spread + 1e-6)


def monotonic_path(scores: np.ndarray, optional: list[bool] | None = None) -> list[tuple[int, int] | None]:
    """
    The best way through `scores` `(states, frames)`, state after state: each frame belongs to one state, each state
    has at least one frame, but single `optional` ones may be left out (dynamic programming over frames).

    Returns:
        of each state its first frame and the first one after it, or None where it was left out.

    Raises:
        ValueError: fewer frames than states that must have one.
    """
    states, frames = scores.shape
    free = np.zeros(states, bool) if optional is None else np.array(optional)
    if frames < (~free).sum():
        raise ValueError(f"{frames} frames for {(~free).sum()} states")
    best = np.full(states, -np.inf)
    best[0] = scores[0, 0]
    if free[0] and states > 1:
        best[1] = scores[1, 0]
    moves = np.zeros((frames, states), np.int8)  # by how many states the path came forward to be here
    from_before = np.full((3, states), -np.inf)  # stay, one on, two on (over a state that may be left out)
    for frame in range(1, frames):
        from_before[0], from_before[1, 1:] = best, best[:-1]
        from_before[2, 2:] = np.where(free[1:-1], best[:-2], -np.inf)
        moves[frame] = from_before.argmax(0)
        best = from_before.max(0) + scores[:, frame]
    return _walk_back(moves, states - 2 if states > 1 and free[-1] and best[-2] >= best[-1] else states - 1)


def _walk_back(moves: np.ndarray, state: int) -> list[tuple[int, int] | None]:
    """The path that ends in this state."""
    spans: list[tuple[int, int] | None] = [None] * moves.shape[1]
    end = len(moves)
    for frame in range(len(moves) - 1, -1, -1):
        if frame == 0 or moves[frame, state]:
            spans[state] = (frame, end)
            end = frame
        state -= int(moves[frame, state])
    return spans


__all__ = ["monotonic_path", "standardize", "word_pieces", "word_times"]
