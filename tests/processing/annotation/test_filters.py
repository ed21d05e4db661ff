"""The two filters: what stays, what falls and why."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from processing.annotation.filters import (
    REASONS,
    TAG_NAMES,
    filter_entities,
    filter_phrases,
    filter_tags,
    rename_tag,
    words_of,
)
from processing.tasks import RAW_TAGS, TAG_SETS, phrases


@pytest.mark.parametrize(
    "text, words",
    [
        ("Anna left, at last!", ["anna", "left", "at", "last"]),
        ("the U.S. and the u.k", ["the", "us", "and", "the", "uk"]),
        ("Europe's  mid-west's", ["europe", "'s", "mid", "west", "'s"]),
        ("europe 's dogs' 'tis o'clock 'quoted'", ["europe", "'s", "dogs", "tis", "o'clock", "quoted"]),
        ("Łódź 東京 naïve_café", ["łódź", "東京", "naïve", "café"]),
        ("\U0001f600 !? — ''", []),
        ("", []),
    ],
)
def test_words(text, words):
    assert [word for word, _, _ in words_of(text)] == words


@given(st.text())
@example("'\u0301a")
@example("a'\u0301 a\u0301's")
def test_words_stand_where_they_say(text):
    found = words_of(text)
    for word, start, end in found:
        assert 0 <= start < end <= len(text)
        assert [w for w, _, _ in words_of(text[start:end])] == [word]
    assert all(before[2] <= after[1] for before, after in zip(found, found[1:]))


@given(st.lists(st.sampled_from("anna anna's york new U.S. o'clock 7 left, Left".split())), st.data())
def test_every_run_of_words_is_found_in_its_text(words, data):
    text = " ".join(words)
    spans = words_of(text)
    if spans:
        first = data.draw(st.integers(0, len(spans) - 1))
        last = data.draw(st.integers(first, len(spans) - 1))
        phrase = text[spans[first][1] : spans[last][2]]
        found = filter_phrases(text, [["PERSON", phrase.upper()]])
        ((_, start, length),) = found.entities
        assert [w for w, _, _ in words_of(text[start : start + length])] == [w for w, _, _ in words_of(phrase)]


def test_hallucinated_phrases_fall_and_parts_of_words_are_hallucinated():
    found = filter_phrases("annabel left moscow", [["PERSON", "anna"], ["PLACE", "Moscow!"], ["PLACE", "paris"]])
    assert found.entities == [["PLACE", 13, 6]]
    assert found.rejected == [
        {"tag": "PERSON", "phrase": "anna", "reason": "hallucinated"},
        {"tag": "PLACE", "phrase": "paris", "reason": "hallucinated"},
    ]


def test_each_mention_has_its_own_words():
    text = "two and two are four"
    found = filter_phrases(text, [["QUANT", "two"]] * 3)
    assert found.entities == [["QUANT", 0, 3], ["QUANT", 8, 3]]
    assert [drop["reason"] for drop in found.rejected] == ["duplicate"]


def test_the_longer_of_two_that_overlap_stays():
    found = filter_phrases("new york times", [["PLACE", "york"], ["PLACE", "new york"], ["ORG", "new york times"]])
    assert found.entities == [["ORG", 0, 14]]
    assert {drop["phrase"]: drop["reason"] for drop in found.rejected} == {"york": "overlap", "new york": "overlap"}


def test_a_mention_that_is_free_is_taken_before_one_that_overlaps():
    found = filter_phrases("new york and york", [["ORG", "new york"], ["PLACE", "york"]])
    assert found.entities == [["ORG", 0, 8], ["PLACE", 13, 4]] and not found.rejected


def test_the_mention_nearest_to_the_start_is_taken():
    text = "we may leave in may or in may"
    assert filter_phrases(text, [["WHEN", "may", 16]]).entities == [["WHEN", 16, 3]]
    both = filter_entities(text, [["WHEN", "may", 26], ["DATE", "may", 17], ["PERSON", "me", 3]], "combined")
    assert both.entities == [["WHEN", 16, 3], ["WHEN", 26, 3]] and both.rejected[0]["reason"] == "hallucinated"


def test_possessives_are_words_of_their_own():
    found = filter_phrases("europe's north", [["PLACE", "Europe"]])
    assert found.entities == [["PLACE", 0, 6]]
    assert filter_phrases("europe 's north", [["PLACE", "europe's"]]).entities == [["PLACE", 0, 9]]


@pytest.mark.parametrize("word", ["दिल्ली", "Bogota\u0301", "தமிழ்"])
def test_marks_around_letters_are_of_their_word(word):
    assert filter_phrases(f"in {word} now", [["PLACE", word]]).entities == [["PLACE", 3, len(word)]]
    assert filter_phrases(f"in {word} now", [["PLACE", word[:-1]]]).rejected[0]["reason"] == "hallucinated"


def test_apostrophes_of_both_shapes_are_the_same():
    found = filter_phrases("o’connor, europe’s", [["PERSON", "O'Connor"], ["PLACE", "Europe's"]]).entities
    assert found == [["PERSON", 0, 8], ["PLACE", 10, 8]]


def test_phrases_without_a_word_are_empty():
    found = filter_phrases("anna", [["PERSON", ""], ["PERSON", "..."]])
    assert not found.entities and [drop["reason"] for drop in found.rejected] == ["empty", "empty"]


@pytest.mark.parametrize(
    "tag, tag_set, name",
    [
        ("PERSON", "combined", "PERSON"),
        ("person", "combined", "PERSON"),
        ("Per", "combined", "PERSON"),
        ("LOCATION", "combined", "PLACE"),
        ("LOCATION", "raw", "LOC"),
        ("GPE", "combined", "PLACE"),
        ("work-of art", "raw", "WORK_OF_ART"),
        ("PLACE", "raw", "GPE"),
        ("EVENT", "combined", None),
        ("FACILITY", "combined", None),
        ("BANANA", "raw", None),
        ("", "raw", None),
    ],
)
def test_tags_and_near_misses(tag, tag_set, name):
    assert rename_tag(tag, tag_set) == name


@pytest.mark.parametrize("tag_set", list(TAG_SETS))
def test_the_mapping_table_ends_in_the_tag_set(tag_set):
    assert set(TAG_NAMES[tag_set].values()) <= set(TAG_SETS[tag_set])
    assert all(rename_tag(tag, tag_set) == tag for tag in TAG_SETS[tag_set])


def test_meaningless_tags_fall_and_mappings_are_told():
    found = filter_tags([["LOCATION", "rome"], ["BANANA", "rome"], ["WHEN", "today"]], "combined")
    assert found.entities == [["PLACE", "rome"], ["WHEN", "today"]]
    assert found.rejected == [{"tag": "BANANA", "phrase": "rome", "reason": "meaningless"}]
    assert found.mapped == [{"tag": "LOCATION", "phrase": "rome", "to": "PLACE"}]


def test_a_meaningless_entity_takes_no_words_from_a_good_one():
    found = filter_entities("new york", [["BANANA", "new york"], ["PLACE", "york"]], "combined")
    assert found.entities == [["PLACE", 4, 4]]


TEXTS = st.text(st.sampled_from("ab '.,Ω"), max_size=30)
PAIRS = st.lists(st.tuples(st.sampled_from([*RAW_TAGS, "BANANA", "location"]), TEXTS).map(list), max_size=6)


@given(TEXTS, PAIRS, st.sampled_from(list(TAG_SETS)))
def test_nothing_is_lost_and_entities_fit_the_schema(text, pairs, tag_set):
    found = filter_entities(text, pairs, tag_set)
    assert len(found.entities) + len(found.rejected) == len(pairs)
    assert {drop["reason"] for drop in found.rejected} <= REASONS.keys()
    ends = 0
    for tag, start, length in found.entities:
        assert tag in TAG_SETS[tag_set] and ends <= start < start + length <= len(text)
        ends = start + length
    again = filter_entities(text, phrases(text, found.entities), tag_set)
    assert sorted(phrases(text, again.entities)) == sorted(phrases(text, found.entities)) and not again.rejected
