"""Subtitles, read back by a grammar of their own."""

import random
import re

import pytest

from processing.subtitles import Word, make_cues, to_srt, to_vtt


TIME = r"(\d{2,}):([0-5]\d):([0-5]\d)[.,](\d{3})"
SRT_CUE = re.compile(rf"(\d+)\n{TIME} --> {TIME}\n((?:[^\n]+\n){{1,2}})")
VTT_CUE = re.compile(rf"{TIME} --> {TIME}\n((?:[^\n]+\n){{1,2}})")
VTT_LINE = re.compile(r"(?:[^<>&\n]|&(?:amp|lt|gt);|<c\.[A-Za-z_]+>(?:[^<>&\n]|&(?:amp|lt|gt);)+</c>)+")


def seconds(hours, minutes, rest, ms) -> float:
    return int(hours) * 3600 + int(minutes) * 60 + int(rest) + int(ms) / 1000


def read_srt(content: str) -> list[tuple[float, float, list[str]]]:
    """Start, end and lines of each subtitle; fails on anything that is no SubRip."""
    cues = []
    for block in content.split("\n\n") if content else []:
        found = SRT_CUE.fullmatch(block.rstrip("\n") + "\n")
        assert found and "-->" not in found[10], block
        assert int(found[1]) == len(cues) + 1
        cues.append((seconds(*found.groups()[1:5]), seconds(*found.groups()[5:9]), found[10].splitlines()))
    return cues


def read_vtt(content: str) -> list[tuple[float, float, list[str]]]:
    header, *blocks = content.split("\n\n")
    assert header.strip() == "WEBVTT"
    cues = []
    for block in filter(None, blocks):
        found = VTT_CUE.fullmatch(block.rstrip("\n") + "\n")
        assert found and all(VTT_LINE.fullmatch(line) for line in found[9].splitlines()), block
        cues.append((seconds(*found.groups()[:4]), seconds(*found.groups()[4:8]), found[9].splitlines()))
    return cues


def result(words: list[tuple[str, float, float]], entities=()) -> dict:
    """As the pipeline gives it; `entities` by tag and the numbers of their words."""
    text = " ".join(word for word, _, _ in words)
    found = []
    for tag, first, last in entities:
        start = len(" ".join(word for word, _, _ in words[:first])) + (first > 0)
        phrase = " ".join(word for word, _, _ in words[first:last])
        found.append({"entity": tag, "word": phrase, "start": start, "end": start + len(phrase)})
    chunks = [{"text": word, "timestamp": (start, end)} for word, start, end in words]
    return {"text": text, "entities": found, "chunks": chunks}


def speech(text: str, start: float = 0.0, each: float = 0.3, gap: float = 0.05) -> list[tuple[str, float, float]]:
    return [(word, start + i * (each + gap), start + i * (each + gap) + each) for i, word in enumerate(text.split())]


def assert_legible(cues, text: str):
    """Every word is there in order; lines, times and their order are within bounds."""
    assert " ".join(" ".join(lines) for _, _, lines in cues).split() == text.split()
    for start, end, lines in cues:
        assert len(lines) <= 2 and all(len(line) <= 42 for line in lines)
        assert 0 < end - start <= 6.001
    assert all(after[0] >= before[1] for before, after in zip(cues, cues[1:]))


def test_a_few_words():
    assert to_srt(result(speech("anna left moscow"))) == "1\n00:00:00,000 --> 00:00:01,000\nanna left moscow\n"
    assert to_vtt(result([])) == "WEBVTT\n" and to_srt(result([])) == ""


def test_speech_of_a_minute_is_cut_into_balanced_lines():
    text = " ".join(["the quick brown fox jumps over the lazy dog and runs away"] * 15)
    cues = read_srt(to_srt(result(speech(text))))
    assert_legible(cues, text)
    assert read_vtt(to_vtt(result(speech(text)))) == cues
    assert all(max(map(len, lines)) - min(map(len, lines)) <= 12 for _, _, lines in cues if len(lines) == 2)


def test_breaks_at_pauses():
    first, second = speech("one two three four"), speech("five six", start=4.0)
    assert [lines for _, _, lines in read_srt(to_srt(result(first + second)))] == [
        ["one two three four"],
        ["five six"],
    ]
    # Too long for one subtitle, no pause: parted at the longest gap of the second half.
    words = speech("word " * 24, each=0.25, gap=0.05)
    words = words[:13] + [(word, start + 0.3, end + 0.3) for word, start, end in words[13:]]
    number = [len(" ".join(lines).split()) for _, _, lines in read_srt(to_srt(result(words)))]
    assert number[0] == 13 and sum(number) == 24


def test_a_short_one_stays_for_a_second_unless_the_next_one_comes():
    words = [("yes", 1.0, 1.1), ("no", 1.75, 1.85), ("well", 9.0, 9.2)]
    assert [cue[:2] for cue in read_srt(to_srt(result(words)))] == [(1.0, 1.75), (1.75, 2.75), (9.0, 10.0)]


def test_words_that_overlap_stand_still_or_go_back():
    words = [("a", 0.0, 5.0), ("b", 1.0, 2.0), ("c", 0.5, 0.4), ("d", 9.0, 9.0), ("e", 9.0, 9.0), ("f", 8.0, 30.0)]
    words += [(f"pile{i}", 31.0, 31.0) for i in range(40)]
    assert_legible(read_srt(to_srt(result(words))), " ".join(word for word, _, _ in words))


def test_a_word_longer_than_a_line_is_broken():
    words = [("short", 0.0, 0.4), ("x" * 100, 0.4, 1.4), ("end", 1.4, 1.6)]
    cues = make_cues([Word(*word) for word in words])
    pieces = [word for cue in cues for line in cue.lines for word in line]
    assert [word.text for word in pieces] == ["short", "x" * 42, "x" * 42, "x" * 16, "end"]
    assert pieces[2].start == pytest.approx(0.82) and pieces[3].end == pytest.approx(1.4)


def test_hours():
    (cue,) = read_srt(to_srt(result([("late", 3661.9996, 3663.0)])))
    assert cue[0] == 3662.0 and to_vtt(result([("late", 3661.5, 3663.0)])).count("01:01:01.500 --> 01:01:03.000") == 1
    assert "100:00:00,000" in to_srt(result([("later", 360000.0, 360001.0)]))


def test_entities_in_spans_over_lines_and_side_by_side():
    text = "anna karenina moscow saw a & b <i> tuesday " + "very long words here " * 3 + "and count alexey vronsky"
    number = len(text.split())
    marks = [("PERSON", 0, 2), ("PLACE", 2, 3), ("ORG", 5, 8), ("PERSON", number - 3, number)]
    content = to_vtt(result(speech(text, each=0.1, gap=0.02), marks))
    lines = " ".join(line for _, _, of_cue in read_vtt(content) for line in of_cue)
    assert lines.startswith(
        "<c.PERSON>anna karenina</c> <c.PLACE>moscow</c> saw a <c.ORG>&amp; b &lt;i&gt;</c> tuesday"
    )
    # One that goes on in the next line is closed and opened again.
    wide = [("w" * 20, 0.0, 0.5), ("x" * 20, 0.5, 1.0), ("y" * 20, 1.0, 1.5)]
    marked = to_vtt(result(wide, [("PLACE", 0, 3)]))
    assert len(read_vtt(marked)[0][2]) == 2 and marked.count("<c.PLACE>") == marked.count("</c>") == 2


def test_an_arrow_that_was_heard_is_no_time():
    assert read_srt(to_srt(result(speech("a --> b"))))[0][2] == ["a -> b"]


@pytest.mark.parametrize("seed", range(20))
def test_anything_at_all_is_legible(seed):
    rng, words, at = random.Random(seed), [], 0.0
    for _ in range(rng.randint(1, 300)):
        at += rng.choice([0, 0, 0.05, 0.2, 0.7, 3])
        end = at + rng.choice([0, 0.02, 0.3, 1, 7])
        words.append(("w" * rng.choice([1, 3, 5, 9, 41, 42]), at, end))
        at = end - rng.choice([0, 0, 0.1, 2]) if end > 2 else end
    assert_legible(read_srt(to_srt(result(words))), " ".join(word for word, _, _ in words))
