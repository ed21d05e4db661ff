"""
Constrained decoding: whatever a model hears or makes of it, its answer keeps to the grammar of its task.

`SenseProcessor.constrain` makes what `generate` takes as a `logits_processor`. A grammar (see
`processing/answer_grammar.py`) is prepared for a tokenizer once: tokens that lead from every state to the same one are
of one class, so that a step looks up a row of a small table for each beam, whatever the vocabulary.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .answer_grammar import Grammar


NEVER = 2**30  # tokens to an end that can't be reached
MOST_STATES = 10_000
SPACE_MARK = "▁"  # SentencePiece's


class TokenGrammar:
    """
    A grammar in the tokens of one tokenizer. Its states are the grammar's own (the first one is 0), then one of
    answers that are over, then one of those that went astray.

    Attributes:
        classes: the class of each token, `(tokens,)`: tokens of a class are alike in every state.
        forbidden: the class of those that may never stand.
        following: the state after a token of a class, `(states, classes)`.
        needed: how many tokens the shortest way from there to a complete answer takes, `(states, classes)`; NEVER
            where the token may not stand. Nothing but the end follows the end; what went astray (padding, beams that
            are out of the running) may go on in any way.
        shortest: tokens of the shortest answer, its end not counted.

    Raises:
        ValueError: a tokenizer that can't end an answer, that is of another kind than `token_bytes` reads, or that
            can write no answer of the grammar; a grammar of too many states.
    """

    def __init__(self, grammar: Grammar, tokenizer):
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: it has no eos_token, so that no answer could end; give it one")
        steps, complete = _byte_steps(grammar)
        over, astray = len(complete), len(complete) + 1
        steps = np.vstack([np.where(steps < 0, astray, steps), np.full((2, 256), astray)])
        end = np.append(np.where(complete, over, astray), [over, astray])
        self.following, self.classes = _token_columns(steps, token_bytes(tokenizer), tokenizer.eos_token_id, end)
        self.forbidden = int(np.flatnonzero((self.following == astray).all(0))[0])
        distances = _distances(self.following, np.append(complete, [True, False]))
        self.needed = distances[self.following]
        self.needed[astray] = 0
        self.shortest = int(distances[0])
        if self.shortest == NEVER:
            raise ValueError(f"tokenizer: it can't write one answer of {grammar}")

    def classes_of_model(self, size: int) -> np.ndarray:
        """The class of each of `size` tokens: a model may have more than its tokenizer, which write nothing."""
        unknown = np.full(max(size - len(self.classes), 0), self.forbidden)
        return np.append(self.classes, unknown)[:size]

    def states(self, classes: np.ndarray) -> np.ndarray:
        """The state after tokens of these classes, `(rows, tokens)` -> `(rows,)`."""
        states = np.zeros(len(classes), int)
        for column in classes.T:
            states = self.following[states, column]
        return states


def _byte_steps(grammar: Grammar) -> tuple[np.ndarray, np.ndarray]:
    """The state after each byte, `(states, 256)`, -1 for none, and which states are complete, `(states,)`."""
    numbers, steps = {grammar.start: 0}, []
    states = [grammar.start]
    for state in states:  # which grows
        row = []
        for byte in range(256):
            after = grammar.step(state, byte)
            if after is not None and after not in numbers:
                if len(states) == MOST_STATES:
                    raise ValueError(f"{grammar} has more than {MOST_STATES:,} states: let `step` tell fewer apart")
                numbers[after] = len(states)
                states.append(after)
            row.append(-1 if after is None else numbers[after])
        steps.append(row)
    return np.array(steps), np.array([grammar.is_complete(state) for state in states])


def _token_columns(steps, pieces: list[bytes | None], eos: int, end) -> tuple[np.ndarray, np.ndarray]:
    """For each class of tokens, the state that follows each state, `(states, classes)`; and each token's class."""
    kinds, kind_of_byte = np.unique(steps, axis=1, return_inverse=True)  # bytes that are alike in every state
    table = kind_of_byte.astype(np.uint8).tobytes()
    spelt = [None if piece is None else piece.translate(table) for piece in pieces]
    columns, index = [np.full(len(steps), len(steps) - 1), end], {}
    for spelling in {piece for piece in spelt if piece is not None}:
        states = np.arange(len(steps))
        for kind in spelling:
            states = kinds[states, kind]
        if states.min() < len(steps) - 1:
            index[spelling] = len(columns)
            columns.append(states)
    classes, class_of_column = np.unique(np.stack(columns, 1), axis=1, return_inverse=True)
    found = class_of_column[[0 if spelling is None else index.get(spelling, 0) for spelling in spelt]]
    found[eos] = class_of_column[1]
    return classes, found


def _distances(columns: np.ndarray, complete: np.ndarray) -> np.ndarray:
    """Tokens from each state to the nearest complete one, `(states,)`."""
    distances = np.where(complete, 0, NEVER)
    while True:
        nearer = np.minimum(distances, distances[columns].min(1) + 1)
        if (nearer == distances).all():
            return distances
        distances = nearer


def token_bytes(tokenizer) -> list[bytes | None]:
    """
    What each token writes, in bytes of UTF-8: of byte-level tokenizers and of SentencePiece's, whose tokens may hold
    parts of words and characters. None for what may write nothing in an answer: special and other added tokens.

    Raises:
        ValueError: a tokenizer of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = (json.loads(backend.to_str())["decoder"] if backend else None) or {"type": "none"}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder])]
    if "ByteLevel" in kinds:
        read = _read_byte_level
    elif "Metaspace" in kinds or SPACE_MARK in json.dumps(decoder, ensure_ascii=False):
        read = _read_sentencepiece
    else:
        raise ValueError(
            f"tokenizer: its decoder is {' + '.join(kinds)}; constrained decoding reads byte-level "
            "tokenizers' and SentencePiece's"
        )
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    pieces: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)  # there may be gaps
    for piece, token in vocabulary.items():
        if token not in added:
            pieces[token] = read(piece) or None
    return pieces


BYTE_OF_CHAR = {char: byte for byte, char in bytes_to_unicode().items()}
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _read_byte_level(piece: str) -> bytes | None:
    return bytes(BYTE_OF_CHAR[char] for char in piece) if BYTE_OF_CHAR.keys() >= set(piece) else None


def _read_sentencepiece(piece: str) -> bytes | None:
    """Single bytes are `<0xE2>`. Those of ASCII are left out: beside a broken character they are lost in decoding."""
    if found := BYTE_TOKEN.fullmatch(piece):
        byte = int(found[1], 16)
        return bytes([byte]) if byte >= 0x80 else None
    return piece.replace(SPACE_MARK, " ").encode()


@lru_cache(maxsize=32)
def _prepared(grammar: Grammar, tokenizer, size: int) -> TokenGrammar:
    """Once for each pair; `size` is the tokenizer's length, which tokens that are added later change."""
    return TokenGrammar(grammar, tokenizer)


class GrammarConstraint(LogitsProcessor):
    """
    Rules out all tokens after which an answer could not keep to its grammar, or not be completed within its limit.
    Reads each row's state from what that row has written, so that beams may change places. For one generation.

    Args:
        grammars: of each row of the batch; None for rows that may answer anything. All beams of a row stand side by
            side.
        tokenizer: the language model's.
        limits: the tokens that each row may write: `max_new_tokens`, or its own bound.

    Raises:
        ValueError: a limit below the shortest answer, as many limits as grammars are not given, or what
            `TokenGrammar` refuses. When called: it was used before.
    """

    def __init__(self, grammars: Sequence[Grammar | None], tokenizer, limits: Sequence[int]):
        if len(grammars) != len(limits):
            raise ValueError(f"{len(grammars)} grammars and {len(limits)} limits: give one of each for each row")
        self.limits = np.array(limits)
        self.rows: dict[TokenGrammar, list[int]] = {}
        for row, grammar in enumerate(grammars):
            if grammar is not None:
                prepared = _prepared(grammar, tokenizer, len(tokenizer))
                if limits[row] < prepared.shortest:
                    least = f"the shortest answer of {grammar} takes {prepared.shortest} tokens"
                    raise ValueError(f"max_new_tokens {limits[row]}: {least}")
                self.rows.setdefault(prepared, []).append(row)
        self.start: int | None = None  # tokens of the prompt, known when it is called
        self.length = 0  # of prompt and answer
        self.classes: dict[TokenGrammar, np.ndarray] = {}  # of the model's tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.start is None:
            self.start = input_ids.shape[1]
            self.classes = {prepared: prepared.classes_of_model(scores.shape[1]) for prepared in self.rows}
        elif input_ids.shape[1] != self.length + 1:
            raise ValueError("logits_processor: this constraint was used before; make one for each generation")
        self.length = input_ids.shape[1]
        written = input_ids[:, self.start :].cpu().numpy()
        beams = len(input_ids) // len(self.limits)
        scores, kept = scores.clone(), []
        for prepared, of_batch in self.rows.items():
            rows = (np.array(of_batch)[:, None] * beams + np.arange(beams)).reshape(-1)
            left = np.maximum(self.limits[rows // beams] - written.shape[1], 1)
            states = prepared.states(self.classes[prepared][written[rows]])
            possible = prepared.needed[states] < left[:, None]
            # Most rows are in the same state: it is few patterns that are spread over the vocabulary.
            patterns, numbers = np.unique(possible, axis=0, return_inverse=True)
            for number, pattern in enumerate(patterns):
                kept.append((rows[numbers == number], pattern[self.classes[prepared]]))
                _keep_only(scores, *kept[-1])
        ruled_out = (scores.max(-1).values == -torch.inf).cpu().numpy()
        if ruled_out.any():  # other processors left nothing that is possible: the grammar goes first
            for rows, tokens in kept:
                scores[_grid(rows[ruled_out[rows]], tokens, scores.device)] = 0.0
        return scores


def _keep_only(scores: torch.Tensor, rows: np.ndarray, tokens: np.ndarray):
    """Rules out, in these rows, all but the tokens of this mask; touches the fewer of both."""
    if 2 * tokens.sum() > len(tokens):
        scores[_grid(rows, ~tokens, scores.device)] = -torch.inf
    else:
        possible = _grid(rows, tokens, scores.device)
        kept = scores[possible]
        scores[possible[0].squeeze(1)] = -torch.inf
        scores[possible] = kept


def _grid(rows: np.ndarray, tokens: np.ndarray, device) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The indices of all of these rows at the tokens of this mask."""
    return torch.from_numpy(rows).to(device)[:, None], torch.from_numpy(np.flatnonzero(tokens)).to(device)
