"""Few-shot examples: balance, room, likeness."""

from processing.annotation.fewshot import Retriever, count_groups, fit, select_examples


GROUPS = [{"PERSON"}] * 60 + [{"PERSON", "PLACE"}] * 20 + [{"LAW"}] * 5 + [{"-"}] * 115


def test_rare_tags_come_first_and_counts_are_level():
    chosen = select_examples(GROUPS, 20)
    assert len(chosen) == len(set(chosen)) == 20
    assert count_groups(GROUPS, chosen) == {"-": 7, "LAW": 5, "PERSON": 8, "PLACE": 8}
    assert "LAW" in GROUPS[chosen[0]]


def test_each_beginning_is_as_level_as_the_rows_allow():
    chosen = select_examples(GROUPS, 40)
    for length in range(4, 41):
        counts = count_groups(GROUPS, chosen[:length])
        assert abs(counts["-"] - counts["PLACE"]) <= 1 and counts["LAW"] >= min(5, counts["PLACE"])


def test_all_rows_if_so_many_are_asked_for():
    assert sorted(select_examples(GROUPS, 1000)) == list(range(len(GROUPS)))


def test_the_seed_chooses():
    assert select_examples(GROUPS, 20, seed=1) == select_examples(GROUPS, 20, seed=1)
    assert select_examples(GROUPS, 20, seed=1) != select_examples(GROUPS, 20, seed=2)


def test_the_longest_beginning_that_fits():
    examples = [("one two", "{}"), ("three", "{}"), ("four", "{}")]
    count = len  # a token a letter; the frame of an example is 16
    assert fit(examples, 24, count) == []
    assert fit(examples, 25, count) == examples[:1]
    assert fit(examples, 25 + 22, count) == examples[:1]
    assert fit(examples, 25 + 23, count) == examples[:2]


def test_the_most_similar_example_stands_last_and_never_the_transcript_itself():
    texts = ["the train to paris", "anna likes cats", "a train in the morning", "anna likes dogs"]
    retriever = Retriever([(text, str(i)) for i, text in enumerate(texts)], 2)
    assert [text for text, _ in retriever.nearest("anna likes dogs and cats")][-1] in texts[1::2]
    nearest = [text for text, _ in retriever.nearest("the train to paris")]
    assert nearest[-1] == "a train in the morning" and "the train to paris" not in nearest and len(nearest) == 2
    assert len(retriever.nearest("\U0001f600")) == 2
