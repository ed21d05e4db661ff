"""Wrong labels at a known rate."""

from collections import Counter

import pytest

from processing.annotation.filters import filter_entities, words_of
from processing.annotation.noise import KINDS, MEANINGLESS_TAGS, add_noise, with_annotation
from processing.grammar import sentences
from processing.tasks import COMBINED_TAGS, combine, phrases, read_tags, write_tags


ROWS = [{"text": u.text, "entities": combine(u.entities)} for u in sentences("quickstart", "train", 300)]
TRUE = [phrases(row["text"], row["entities"]) for row in ROWS]


def wrong(noisy):
    """By row, the pairs that are not true."""
    return [list((pairs_of(found) - pairs_of(true)).elements()) for found, true in zip(noisy, TRUE)]


def pairs_of(found) -> Counter:
    """Without where they begin."""
    return Counter((tag, phrase) for tag, phrase, *_ in found)


def test_without_noise_labels_stay_whether_filtered_or_not():
    noisy = add_noise(ROWS)
    assert list(map(pairs_of, noisy)) == list(map(pairs_of, TRUE))
    for filtered in (True, False):
        for row, pairs in zip(ROWS, noisy):
            made = with_annotation(row, pairs, filtered)
            assert made["text"] == row["text"] and sorted(made["entities"]) == sorted(row["entities"])


def test_true_labels_stay_where_they_are():
    row = {"text": "we may leave in may", "entities": [["WHEN", 16, 3]]}
    (pairs,) = add_noise([row])
    for filtered in (True, False):
        assert with_annotation(row, pairs, filtered)["entities"] == row["entities"]


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_the_rate_is_the_share_of_all_labels_and_the_kinds_are_thirds(rate):
    noisy = add_noise(ROWS, false_positives=rate)
    false = wrong(noisy)
    number = sum(map(len, false))
    assert number / sum(map(len, noisy)) == pytest.approx(rate, abs=0.002)
    kinds = Counter()
    for row, pairs in zip(ROWS, false):
        said = [word for word, _, _ in words_of(row["text"])]
        for tag, phrase in pairs:
            words = [word for word, _, _ in words_of(phrase)]
            is_said = any(said[at : at + len(words)] == words for at in range(len(said)))
            kinds["hallucinated" if not is_said else "meaningless" if tag in MEANINGLESS_TAGS else "spurious"] += 1
    assert [kinds[kind] for kind in KINDS] == pytest.approx([number / 3] * 3, abs=1)


def test_filters_take_back_two_kinds_of_three():
    for row, pairs, true in zip(ROWS, add_noise(ROWS, false_positives=0.5), TRUE):
        left = phrases(row["text"], filter_entities(row["text"], pairs, "combined").entities)
        extra = Counter(map(tuple, left)) - Counter(map(tuple, true))
        assert all(tag in COMBINED_TAGS and phrase in row["text"] for tag, phrase in extra)
        assert not Counter(map(tuple, true)) - Counter(map(tuple, left))


def test_unfiltered_the_model_learns_to_write_all_of_it():
    noisy = add_noise(ROWS, false_positives=0.5)
    for row, pairs in zip(ROWS, noisy):
        made = with_annotation(row, pairs, filtered=False)
        assert Counter(map(tuple, phrases(made["text"], made["entities"]))) == pairs_of(pairs)
        assert made["text"].startswith(row["text"])
        answer = write_tags(made["text"], made["entities"])
        assert read_tags(answer).malformed >= sum(tag in MEANINGLESS_TAGS for tag, *_ in pairs)


def test_drops_and_swaps():
    total = sum(map(len, TRUE))
    dropped = add_noise(ROWS, drops=0.2)
    assert sum(map(len, dropped)) == total - round(0.2 * total) and not any(wrong(dropped))
    swapped = wrong(add_noise(ROWS, swaps=0.2))
    assert sum(map(len, swapped)) == round(0.2 * total)
    for found, true in zip(swapped, TRUE):
        assert all(tag in COMBINED_TAGS and phrase in [said for _, said in true] for tag, phrase in found)


def test_the_seed_makes_the_noise():
    rates = {"false_positives": 0.3, "drops": 0.1, "swaps": 0.1}
    assert add_noise(ROWS, **rates) == add_noise(ROWS, **rates) != add_noise(ROWS, **rates, seed=1)


@pytest.mark.parametrize("rate", [1, -0.1, "half", float("nan")])
def test_rates_that_are_none(rate):
    with pytest.raises(ValueError, match="drops: .* is no share; give a number from 0 to below 1"):
        add_noise(ROWS, drops=rate)


def test_rows_without_room_are_told():
    with pytest.raises(ValueError, match="no row for one more .* label: lower false_positives"):
        add_noise(
            [{"text": "anna bob", "entities": [["PERSON", 0, 4]]}, {"text": "rome", "entities": [["PLACE", 0, 4]]}],
            false_positives=0.9,
        )
