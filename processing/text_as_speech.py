"""
Text in the place of speech: the language model learns to read what the adapter would make of it, before any clip.

What the adapter gets while a token is said is predicted from that token's embedding and its neighbours', by a ridge
regression on clips whose words have been timed: the warm start's, the other way round. About its prediction speech is
scattered; the noise is Gaussian, with the covariance that it has on clips which the regression has not seen, and
carries over from step to step:

    x[t] = b + A (e[t-1], e[t], e[t+1]) + noise[t]

Passages of a text are "said" by this formula and learnt from as clips are. Our own addition: the paper has none of it.
"""

import os
import random
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from .collator import SenseCollator
from .warm_start import RidgeRegression, WordAligner, heard_clips, spoken_tokens


MOST_CLIPS = 180  # to measure: some thousand audio tokens
HELD_OUT = 3  # of so many clips one is for the noise
RIDGE = 0.3  # per row, of the embeddings' variance
RATE_OF_WORDS = 0.3  # standard deviation of the logarithm of a word's length over its letters'


def read_words(path: str | os.PathLike, transcripts: list[str]) -> list[str]:
    """
    The words of a UTF-8 text, written as the transcripts are: marks that these never use are left out, and words with
    letters or digits that they never use; where they have no capitals, neither has it.

    Raises:
        ValueError: there is no such file, it is not UTF-8, or has fewer words than the longest transcript.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text_as_speech: {path} can't be read ({error}); give a file of text in UTF-8") from error
    used = set("".join(transcripts))
    if not any(letter.isupper() for letter in used):
        text = text.lower()
    elif not any(letter.islower() for letter in used):
        text = text.upper()
    text = text.replace("'", "’") if "’" in used and "'" not in used else text.replace("’", "'")
    words = "".join(letter if letter in used or letter.isalnum() else " " for letter in text).split()
    words = [word for word in words if used.issuperset(word) and any(map(str.isalnum, word))]
    longest = max(len(transcript.split()) for transcript in transcripts)
    if len(words) < longest:
        raise ValueError(
            f"text_as_speech: {path} has {len(words):,} words in the letters of the transcripts; passages as long as "
            f"the longest transcript need {longest:,}, and more of them are better"
        )
    return words


class TextAsSpeech:
    """
    Says text as the formula above has it.

    Args:
        embeddings: of the language model's vocabulary, `(vocab, hidden_size)`.
        tokenizer: of the language model.
        num_audio_tokens: in 30 s.
        heard: of each clip what `speech_and_tokens` gives: `(num_tokens, d_model)` and `(num_tokens,)`.

    Raises:
        ValueError: fewer than two clips.
    """

    def __init__(self, embeddings: torch.Tensor, tokenizer, num_audio_tokens: int, heard: list[tuple]):
        if len(heard) < 2:
            raise ValueError(f"text_as_speech measures speech on two clips with words at least, found {len(heard)}")
        self.tokenizer, self.frames_per_token = tokenizer, 1500 / num_audio_tokens
        self.embeddings = embeddings.detach().float().cpu()
        self.centre = self.embeddings.mean(0)
        regression = RidgeRegression(3 * embeddings.shape[1], heard[0][0].shape[1])
        for index, (speech, tokens) in enumerate(heard):
            if index % HELD_OUT:
                regression.add(self._around(tokens), speech)
        weight, bias, self.r2 = regression.solve(RIDGE * float((self.embeddings - self.centre).var()))
        self.weight, self.bias = weight.float(), bias.float()
        left = [speech.float() - self.expect(tokens) for speech, tokens in heard[::HELD_OUT]]
        scattered = torch.cat(left)
        self.carry = float(sum((part[1:] * part[:-1]).sum() for part in left) / scattered.square().sum())
        covariance = scattered.T @ scattered / len(scattered)
        jitter = 1e-4 * covariance.diagonal().mean() * torch.eye(len(covariance))  # rows may be fewer than columns
        self.scatter = torch.linalg.cholesky(covariance + jitter)

    def _around(self, tokens: torch.Tensor) -> torch.Tensor:
        """The embeddings of each token, of the one before and the one after: `(rows, 3 * hidden_size)`."""
        embedded = self.embeddings[tokens] - self.centre
        none = torch.zeros_like(embedded[:1])
        return torch.cat([torch.cat([none, embedded[:-1]]), embedded, torch.cat([embedded[1:], none])], 1)

    def expect(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the tokens, one an audio token, sound like without the noise: `(rows, d_model)`."""
        return self._around(tokens) @ self.weight.T + self.bias

    def say(self, text: str, steps: int, draws: random.Random) -> torch.Tensor:
        """
        What the adapter would get of a clip of `steps` audio tokens in which `text` is said, `(steps, d_model)`.
        `draws` gives each word its length, and the noise.
        """
        lengths = torch.tensor([(len(word) + 1) * draws.lognormvariate(0, RATE_OF_WORDS) for word in text.split()])
        ends = (lengths.cumsum(0) / lengths.sum() * steps * self.frames_per_token).tolist()
        tokens = spoken_tokens(
            text, ends, num_tokens=steps, frames_per_token=self.frames_per_token, tokenizer=self.tokenizer
        )
        generator = torch.Generator().manual_seed(draws.getrandbits(32))
        noise = torch.randn(steps, len(self.bias), generator=generator) @ self.scatter.T
        for step in range(1, steps):
            noise[step] = self.carry * noise[step - 1] + (1 - self.carry**2) ** 0.5 * noise[step]
        return self.expect(tokens) + noise


@torch.inference_mode()
def measure_speech(model, processor, dataset, whisper: str | os.PathLike) -> TextAsSpeech:
    """
    Measures the formula on the first clips of `dataset`, at most `MOST_CLIPS`; processes share them. `whisper` is as
    for `warm_start`.
    """
    aligner = WordAligner.from_pretrained(whisper, PartialState().device)
    clips = min(len(dataset), MOST_CLIPS)
    heard = list(heard_clips(model, processor, aligner, dataset, clips, "what words sound like"))
    heard = gather_object(heard) if PartialState().num_processes > 1 else heard
    embeddings = model.get_input_embeddings().weight
    return TextAsSpeech(embeddings, processor.tokenizer, processor.num_audio_tokens, heard)


class TextCollator(SenseCollator):
    """
    As `SenseCollator`, of whose rows only the measures are taken: as many words of the text as the row's transcript
    has, from where the row's seed says, in as many audio tokens as its clip has.
    """

    def __init__(self, *args, speaker: TextAsSpeech, words: list[str], **kwargs):
        super().__init__(*args, **kwargs)
        self.speaker, self.words = speaker, words

    def __call__(self, rows: list[dict]):
        return super().__call__([row | {"text": self.passage(row)} for row in rows])

    def passage(self, row: dict) -> str:
        number = max(1, len(row["text"].split()))
        start = random.Random(f"{row['seed']}/passage").randrange(len(self.words) - number + 1)
        return " ".join(self.words[start : start + number])

    def _clip(self, row: dict, draws: random.Random) -> torch.Tensor:
        return self.speaker.say(row["text"], len(super()._clip(row, draws)), draws)


__all__ = ["TextAsSpeech", "TextCollator", "measure_speech", "read_words"]
