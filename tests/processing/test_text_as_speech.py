"""Text in the place of speech: what is measured, what is said, and the text itself."""

import random
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer

from processing.text_as_speech import TextAsSpeech, read_words


WIDTH, HIDDEN = 6, 10


@pytest.fixture
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def make_speaker(tokenizer, heard=None, clips=60):
    """A speaker measured on `heard`, or on clips whose steps are drawn by their tokens."""
    torch.manual_seed(0)
    embeddings, towards = torch.randn(len(tokenizer), HIDDEN), torch.randn(HIDDEN, WIDTH)
    if heard is None:
        said = [torch.randint(len(tokenizer), (50,)) for _ in range(clips)]
        heard = [(3 + embeddings[tokens] @ towards + torch.randn(50, WIDTH), tokens) for tokens in said]
    return TextAsSpeech(embeddings, tokenizer, 250, heard)


def test_who_is_measured_on_what_it_says_says_the_same(tokenizer):
    first = make_speaker(tokenizer)
    first.carry = 0.6
    words = "".join(random.Random(0).choices("abcdefghijklmnop ", k=18000))
    heard = []
    for seed in range(300):
        with mock.patch.object(first, "expect", side_effect=first.expect) as expect:
            said = first.say(words[60 * seed : 60 * seed + 60], 60, random.Random(seed))
        heard.append((said, expect.call_args.args[0]))
    second = make_speaker(tokenizer, heard)
    tokens = heard[0][1]
    one, two = first.expect(tokens), second.expect(tokens)
    assert (one - two).norm() < 0.3 * (one - first.bias).norm()
    assert second.carry == pytest.approx(0.6, abs=0.15) and 0.3 < second.r2 < 1
    scattered = [float(each.scatter.square().sum()) for each in (first, second)]
    assert scattered[1] == pytest.approx(scattered[0], rel=0.3)


def test_what_is_said_is_drawn_by_its_words_and_its_seed(tokenizer):
    speaker = make_speaker(tokenizer)
    said = speaker.say("ab cd", 12, random.Random("1"))
    assert said.shape == (12, WIDTH) and said.isfinite().all()
    torch.testing.assert_close(said, speaker.say("ab cd", 12, random.Random("1")), atol=0, rtol=0)
    assert not torch.equal(said, speaker.say("ab cd", 12, random.Random("2")))
    assert not torch.equal(said, speaker.say("cd ab", 12, random.Random("1")))


def test_more_words_than_audio_tokens_are_said_all_the_same(tokenizer):
    speaker = make_speaker(tokenizer, clips=2)
    assert speaker.say("one two three four five", 2, random.Random(0)).isfinite().all()


def test_one_clip_is_too_few(tokenizer):
    with pytest.raises(ValueError, match="on two clips with words at least, found 1"):
        make_speaker(tokenizer, clips=1)


@pytest.mark.parametrize(
    "transcripts, words",
    [
        (["it's a cat"], ["it's", "a", "cat", "a", "a"]),
        (["IT'S A CAT"], ["IT'S", "A", "CAT", "A", "A"]),
        (["It's a cat."], ["It's", "a", "cat", "a.", "a"]),
        (["it’s a cat"], ["it’s", "a", "cat", "a", "a"]),
    ],
)
def test_a_text_is_written_as_the_transcripts_are(tmp_path, transcripts, words):
    (tmp_path / "book.txt").write_text("It’s a _cat_ — a. 5 dogs 7a a", encoding="utf-8")
    assert read_words(tmp_path / "book.txt", transcripts) == words


def test_texts_that_are_refused(tmp_path):
    for content, told in ((None, "can't be read"), (b"\xff\xfe", "can't be read"), (b"one two", "has 2 words in the")):
        if content is not None:
            (tmp_path / "book.txt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"text_as_speech: .*book.txt.* {told}"):
            read_words(tmp_path / "book.txt", ["one two three", "two"])
