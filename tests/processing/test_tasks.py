"""The tasks: what is asked, what is to be answered, and answers of every kind read back."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processing.tasks import (
    ALL_TAGS,
    COMBINED_TAGS,
    DROPPED_TAGS,
    RAW_TAGS,
    SENTIMENTS,
    Answer,
    check_trained,
    combine,
    make_tasks,
    mix,
    phrases,
    read_tags,
    write_tags,
)


TASKS = make_tasks({"asr": "Transcribe.", "ner": "Tag.", "sa": "Sentiment?"})
WORDS = st.lists(st.text("abcdefghij'", min_size=1, max_size=6), min_size=1, max_size=12)


@st.composite
def tagged_texts(draw):
    """A text of single-spaced words and entities on some of its spans of words, none over another."""
    words = draw(WORDS)
    cuts = sorted(draw(st.sets(st.integers(0, len(words)), max_size=6)))
    entities = []
    for first, last in zip(cuts[::2], cuts[1::2]):
        start = len(" ".join(words[:first])) + (first > 0)
        entities.append([draw(st.sampled_from(sorted(ALL_TAGS))), start, len(" ".join(words[first:last]))])
    return " ".join(words), entities


def test_tag_sets_are_those_of_slue():
    assert len(RAW_TAGS) == 18 and set(COMBINED_TAGS) == {"WHEN", "QUANT", "PLACE", "NORP", "ORG", "LAW", "PERSON"}
    entities = [[tag, i, 1] for i, tag in enumerate(RAW_TAGS)]
    assert len(combine(entities)) == 18 - len(DROPPED_TAGS) == 13
    assert combine([["GPE", 3, 4], ["EVENT", 0, 1], ["WHEN", 5, 6], ["FOO", 1, 1]]) == [
        ["PLACE", 3, 4],
        ["WHEN", 5, 6],
    ]
    assert combine(combine(entities)) == combine(entities)


def test_target_of_each_task():
    row = {"text": "anna karenina left moscow", "entities": [["PERSON", 0, 13], ["PLACE", 19, 6]]}
    row["sentiment"] = "Neutral"
    assert TASKS["asr"].target(row) == row["text"]
    assert TASKS["ner"].target(row) == "<PERSON> anna karenina </PERSON> left <PLACE> moscow </PLACE>"
    assert TASKS["sa"].target(row) == "Neutral"
    unlabelled = {"text": "a", "entities": None, "sentiment": None}
    assert [task.target(unlabelled) for task in TASKS.values()] == ["a", None, None]
    assert TASKS["ner"].target({"text": "a  b", "entities": []}) == "a b"


@given(tagged_texts())
def test_a_transcript_has_no_tags(tagged):
    """Of a model that learnt to tag too: it writes tags at times where it was asked for the words alone."""
    text, entities = tagged
    assert TASKS["asr"].parse(write_tags(text, entities)) == Answer(text=text)
    assert TASKS["asr"].parse("a < place >b</PLACE> <unk> c") == Answer(
        text="a b <unk> c"
    )  # what the data may hold stays


@given(tagged_texts())
def test_what_is_written_is_read_back(tagged):
    text, entities = tagged
    answer = read_tags(write_tags(text, entities))
    assert (answer.text, answer.entities, answer.malformed) == (text, entities, 0)


@given(st.text())
def test_any_answer_is_read(answer):
    for task in TASKS.values():
        read = task.parse(answer)
        if read.text is not None and read.entities is not None:
            assert all(phrase.strip() == phrase != "" for _, phrase in phrases(read.text, read.entities))


@given(st.lists(st.sampled_from(["<PERSON>", "</PERSON>", "<PLACE>", "</PLACE>", "<FOO>", "</FOO>", "<", "a", "b"])))
def test_any_mess_of_tags_keeps_its_words_and_counts_what_is_dropped(pieces):
    read = read_tags(" ".join(pieces))
    tags = [piece for piece in pieces if piece[0] == "<" and len(piece) > 1]
    assert read.text.split() == [piece for piece in pieces if piece not in tags]
    # Each good entity takes two tags; of the others at most two share one mistake.
    left = len(tags) - 2 * len(read.entities)
    assert left / 2 <= read.malformed <= left


@pytest.mark.parametrize(
    "answer, text, found, malformed",
    [
        ("<PERSON> anna </PERSON> left", "anna left", [["PERSON", "anna"]], 0),
        ("<person>anna</person> left", "anna left", [["PERSON", "anna"]], 0),
        ("< PERSON > anna < / PERSON >", "anna", [["PERSON", "anna"]], 0),
        ("<PERSON> anna left", "anna left", [], 1),  # never closed
        ("anna left <PLA", "anna left", [], 1),  # broken off
        ("<PERSON> anna </PERSON> left <", "anna left <", [["PERSON", "anna"]], 0),
        ("anna </PERSON> left", "anna left", [], 1),  # never opened
        ("<PERSON> anna </PLACE> left", "anna left", [], 1),  # closed by another
        ("<PERSON> anna <PLACE> rome </PLACE>", "anna rome", [["PLACE", "rome"]], 1),
        ("<FOO> anna </FOO>", "anna", [], 2),  # unknown
        ("<PERSON></PERSON> anna", "anna", [], 1),  # empty
        ("<LAW> a </LAW> b <LAW> a </LAW>", "a b a", [["LAW", "a"], ["LAW", "a"]], 0),
        ("", "", [], 0),
        ("a < b > c", "a c", [], 1),
        ("a < 5 and b > 3", "a < 5 and b > 3", [], 0),
    ],
)
def test_malformed_answers(answer, text, found, malformed):
    read = read_tags(answer)
    assert (read.text, phrases(read.text, read.entities), read.malformed) == (text, found, malformed)


def test_of_overlapping_entities_the_first_and_longer_stays():
    text = "the bank of england"
    entities = [["PLACE", 12, 7], ["ORG", 0, 19], ["ORG", 0, 8]]
    assert write_tags(text, entities) == "<ORG> the bank of england </ORG>"


@pytest.mark.parametrize("entity", [["LAW", 0, 9], ["LAW", -1, 2], ["LAW", 2, 0]])
def test_entities_outside_the_text_are_refused(entity):
    with pytest.raises(ValueError, match="reaches out of its text of 4 characters"):
        write_tags("anna", [entity])


@pytest.mark.parametrize(
    "answer, sentiment",
    [("Positive", "Positive"), ("negative.", "Negative"), ("It is NEUTRAL, not positive", "Neutral"), ("", None)]
    + [("unpositively", None), ("good", None)],
)
def test_sentiment_is_the_first_class_named(answer, sentiment):
    assert TASKS["sa"].parse(answer) == Answer(sentiment=sentiment, malformed=int(sentiment is None))


def test_tasks_without_a_prompt_or_of_no_name():
    with pytest.raises(ValueError, match="there is no task 'st'; there are asr, ner, sa"):
        make_tasks({"st": "Translate."})
    with pytest.raises(ValueError, match="task 'ner' has no prompt; the prompts are for asr"):
        make_tasks({"asr": "Transcribe."}, ["ner"])
    assert list(make_tasks({"asr": "Transcribe.", "ner": "Tag."}, ["ner"])) == ["ner"]


ROWS = [{"text": str(i), "entities": [] if i % 2 else None, "sentiment": "Neutral"} for i in range(20)]
ROWS += [{"text": "p", "entities": [], "sentiment": "Positive"}, {"text": "x", "entities": None, "sentiment": None}]


def test_mix_shows_each_labelled_row_as_often_as_its_weight():
    pairs = mix(ROWS, TASKS, {"asr": 1, "ner": 2.5, "sa": 0.5})
    counts = Counter(task for _, task in pairs)
    assert counts == {"asr": 22, "ner": round(2.5 * 11), "sa": round(0.5 * 21)}
    shown = Counter(row for row, task in pairs if task == "ner")
    assert set(shown.values()) == {2, 3} and all(ROWS[row]["entities"] is not None for row in shown)
    assert sorted(row for row, task in pairs if task == "asr") == list(range(22))


def test_mix_balances_classes_without_growing():
    pairs = mix(ROWS, TASKS, {"sa": 2}, balance=True)
    assert Counter(ROWS[row]["sentiment"] for row, _ in pairs) == {"Neutral": 21, "Positive": 21}


def test_mix_is_seeded_and_wants_labels():
    weights = {"ner": 0.5}
    assert mix(ROWS, TASKS, weights, seed=1) == mix(ROWS, TASKS, weights, seed=1) != mix(ROWS, TASKS, weights, seed=2)
    with pytest.raises(ValueError, match="task 'sa': not one of 1 rows has a label for it"):
        mix(ROWS[-1:], TASKS, {"sa": 1})
    with pytest.raises(ValueError, match="tasks: sa: 0.01 of 21 labelled rows is none; give a larger weight"):
        mix(ROWS, TASKS, {"sa": 0.01})


def test_answers_are_bounded_by_the_length_of_the_clip():
    assert TASKS["sa"].most_tokens(30) == 16 and TASKS["asr"].most_tokens(30) < TASKS["ner"].most_tokens(30)
    assert set(SENTIMENTS) == {"Negative", "Neutral", "Positive"}


def test_the_bound_grows_with_what_a_script_takes():
    bounds = [TASKS["asr"].most_tokens(20, rate) for rate in (2, 3.5, 7, 16.3)]
    assert bounds == [156, 156, 296, 668]


@pytest.mark.parametrize(
    "trained, commands",
    [
        ("asr", {"transcribe", "serve"}),
        ("ner", {"understand", "serve"}),
        ("sa", set()),
        ("asr sa", {"transcribe", "understand", "serve"}),
        ("ner sa", {"understand", "serve"}),
    ],
)
def test_what_models_are_let_into_by_their_tasks(trained, commands):
    for command in ("transcribe", "understand", "serve"):
        if command in commands:
            check_trained("m", trained.split(), command)
        else:
            with pytest.raises(ValueError, match="m was trained for .*; this needs "):
                check_trained("m", trained.split(), command)
