"""Synthetic labels beside trusted ones."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from annotate_sense import main
from processing.annotation.quality import (
    FILTERS,
    OTHER,
    cohen_kappa,
    confusion,
    disagree,
    filter_by_filter,
    score_pairs,
)
from processing.tasks import COMBINED_TAGS, SENTIMENTS
from tests.conftest import tone, wav


def write(folder, rows, column=None):
    """A dataset with one split, test, whose rows share a clip; with a column, as annotate_sense.py would write it."""
    (folder / "test").mkdir(parents=True)
    if column is not None:
        (folder / "provenance.json").write_text(json.dumps({"column": column}))
    (folder / "test" / "clip.wav").write_bytes(wav(tone(0.1)))
    lines = [json.dumps({"file_name": "clip.wav", "id": f"row-{i}", **row}) for i, row in enumerate(rows)]
    (folder / "test" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


GOLD = [
    {"text": "anna left moscow", "entities": [["PERSON", 0, 4], ["PLACE", 10, 6]], "sentiment": "Neutral"},
    {"text": "rome on monday", "entities": [["PLACE", 0, 4], ["WHEN", 8, 6]], "sentiment": "Positive"},
    {"text": "nothing here", "entities": [], "sentiment": "Negative"},
    {"text": "bob is not annotated", "entities": [["PERSON", 0, 3]], "sentiment": "Negative"},
    {"text": "not labelled", "entities": None, "sentiment": None},
]
WRITTEN = [
    [["PERSON", "Anna"], ["LOCATION", "moscow"], ["PERSON", "napoleon"]],
    [["ORG", "rome"], ["WHEN", "monday"], ["BANANA", "on"]],
    [],
    None,
    [["PERSON", "not"]],
]


@pytest.fixture
def datasets(tmp_path):
    made = [{"text": row["text"], "entities": None, "annotated": pairs} for row, pairs in zip(GOLD, WRITTEN)]
    return write(tmp_path / "gold", GOLD), write(tmp_path / "made", made, "entities")


def test_filter_by_filter(datasets, tmp_path):
    out = tmp_path / "report"
    found = main(["compare", *datasets, "--splits", "test", "--output_dir", str(out)])
    assert found["rows"] == 3 and found["rows_without_synthetic_label"] == 1
    scores = {name: found["filters"][name]["all"] for name in FILTERS}
    # 4 are true, 6 written: PERSON anna and WHEN monday right as they stand, PLACE moscow after filter 2's mapping
    assert [scores[name]["given"] for name in FILTERS] == [6, 5, 5, 4]
    assert [scores[name]["precision"] for name in FILTERS] == pytest.approx([100 * 2 / 6, 40, 60, 75])
    assert [scores[name]["recall"] for name in FILTERS] == pytest.approx([50, 50, 75, 75])
    assert scores["both"]["f1"] == pytest.approx(75) and scores["both"]["label_f1"] == pytest.approx(75)
    assert found["filters"]["none"][OTHER]["given"] == 2 and OTHER not in found["filters"]["both"]
    assert found["confusion"][COMBINED_TAGS.index("PLACE")][COMBINED_TAGS.index("ORG")] == 1
    (worst,) = found["worst"]
    assert worst["id"] == "row-1" and worst["tags"] == [("PLACE", "ORG")] and not worst["missed"] + worst["extra"]
    for low, high in (scores["both"][f"{name}_interval"] for name in ("precision", "recall", "f1", "label_f1")):
        assert 0 <= low <= high <= 100
    page = (out / "report.html").read_text()
    assert "<svg" in page and "rome on monday" in page
    assert "| both | 4 | 4 | 75.0 [" in (out / "report.md").read_text()
    assert json.loads((out / "metrics.json").read_text())["rows"] == 3
    assert (out / "quality.png").stat().st_size > 10_000


def test_labels_of_any_origin_are_compared(tmp_path):
    gold = write(tmp_path / "gold", GOLD[:3])
    found = main(["compare", gold, gold, "--splits", "test", "--output_dir", str(tmp_path / "report")])
    assert [found["filters"][name]["all"]["f1"] for name in FILTERS] == [100] * 4 and not found["worst"]


def test_sentiment(datasets, tmp_path):
    words = ["Neutral", "Negative", "angry", None, "Neutral"]
    rows = [{"text": row["text"], "annotated": word} for row, word in zip(GOLD, words)]
    rows = [row | {"sentiment": {"angry": "Negative"}.get(word, word)} for row, word in zip(rows, words)]
    made = write(tmp_path / "sentiment", rows, "sentiment")
    asked = ["compare", datasets[0], made, "--task", "sentiment", "--splits", "test"]
    found = main([*asked, "--output_dir", str(tmp_path / "report")])
    true, given = ["Neutral", "Positive", "Negative"], ["Neutral", "Negative", "Negative"]
    assert found["kappa"] == pytest.approx(cohen_kappa_score(true, given, labels=SENTIMENTS))
    assert found["rows_without_synthetic_label"] == 1 and [line["id"] for line in found["worst"]] == ["row-1"]
    assert "Cohen's kappa" in (tmp_path / "report" / "report.md").read_text()


def test_pages_are_not_broken_by_transcripts(tmp_path):
    text = "<script>alert(1)</script> a | b\nc"
    gold = write(tmp_path / "gold", [{"text": text, "entities": [["PERSON", 0, 8]]}])
    made = write(tmp_path / "made", [{"text": text, "entities": []}])
    main(["compare", gold, made, "--splits", "test", "--output_dir", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "| row-0 | <script>alert(1)</script> a \\| b c |" in (tmp_path / "report" / "report.md").read_text()


def test_labels_that_an_annotation_left_as_they_were_are_no_answers_of_it(datasets, tmp_path):
    """Sentiment was annotated on top of entities: the entities are compared as labels, not as those answers."""
    rows = [{**row, "annotated": "Neutral"} for row in GOLD[:3]]
    made = write(tmp_path / "both", rows, "sentiment")
    found = main(["compare", datasets[0], made, "--splits", "test", "--output_dir", str(tmp_path / "report")])
    assert found["filters"]["both"]["all"]["f1"] == 100


def test_tags_outside_the_set_are_told(tmp_path):
    gold = write(tmp_path / "gold", GOLD[:1])
    with pytest.raises(ValueError, match="the trusted labels have the tag 'PLACE', not one of raw"):
        asked = ["compare", gold, gold, "--entity_tags", "raw", "--splits", "test"]
        main([*asked, "--output_dir", str(tmp_path / "report")])


def test_gold_in_capitals_is_compared_in_lower_case(tmp_path):
    gold = write(tmp_path / "gold", [{**GOLD[0], "text": GOLD[0]["text"].upper()}])
    made = write(tmp_path / "made", GOLD[:1])
    asked = ["compare", gold, made, "--splits", "test", "--output_dir", str(tmp_path / "report")]
    assert main([*asked, "--lowercase"])["rows"] == 1


def test_rows_that_cant_be_read_are_left_out_where_asked(tmp_path):
    gold, made = write(tmp_path / "gold", GOLD[:1]), write(tmp_path / "made", GOLD[:1])
    with open(tmp_path / "gold" / "test" / "metadata.jsonl", "a") as lines:
        lines.write("{broken\n")
    asked = ["compare", gold, made, "--splits", "test", "--output_dir", str(tmp_path / "report")]
    with pytest.raises(ValueError, match="--on_bad_row skip"):
        main(asked)
    assert main([*asked, "--on_bad_row", "skip"])["rows"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: [rows[0] | {"text": "other"}], "row-0: the text is 'anna left moscow' in .* 'other'"),
        (lambda rows: [rows[4]], "share no row with entities in test"),
        (lambda rows: [rows[0], rows[0] | {"id": "row-0"}], "two rows have the id 'row-0'"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path, change, message):
    made = change([{**row, "entities": row["entities"] and []} for row in GOLD])
    gold, other = write(tmp_path / "gold", GOLD[:1]), write(tmp_path / "made", made)
    if "share" in message:
        gold = write(tmp_path / "unlabelled", GOLD[4:])
    with pytest.raises(ValueError, match=message):
        main(["compare", gold, other, "--splits", "test", "--output_dir", str(tmp_path / "report")])


def test_scores_are_those_of_counting_by_hand():
    rng = random.Random(0)

    def pairs():
        return [[rng.choice(COMBINED_TAGS[:3]), rng.choice("abc")] for _ in range(rng.randrange(4))]

    given, true = [pairs() for _ in range(50)], [pairs() for _ in range(50)]
    scores = score_pairs(given, true, COMBINED_TAGS)
    for tag in (None, *COMBINED_TAGS[:3]):
        hits = predicted = said = 0
        for one, other in zip(given, true):
            one = Counter(tuple(pair) for pair in one if tag in (None, pair[0]))
            other = Counter(tuple(pair) for pair in other if tag in (None, pair[0]))
            hits += (one & other).total()
            predicted, said = predicted + one.total(), said + other.total()
        found = scores[tag or "all"]
        assert found["precision"] == pytest.approx(100 * hits / predicted)
        assert found["recall"] == pytest.approx(100 * hits / said)
        assert found["f1"] == pytest.approx(200 * hits / (predicted + said))
    cells = np.array(confusion(list(map(disagree, given, true)), COMBINED_TAGS))
    assert cells[:-1].sum() == scores["all"]["true"] and cells[:, :-1].sum() == scores["all"]["given"]


def test_phrases_under_other_tags_are_no_misses():
    tags, missed, extra = disagree(
        [["ORG", "rome"], ["PLACE", "rome"], ["WHEN", "now"]], [["PLACE", "rome"], ["PERSON", "rome"], ["LAW", "x"]]
    )
    assert sorted(tags) == [("PERSON", "ORG"), ("PLACE", "PLACE")]
    assert missed == [["LAW", "x"]] and extra == [["WHEN", "now"]]


def test_filters_leave_what_they_are_named_for():
    found = filter_by_filter([{"text": "anna in rome", "annotated": [["per", "anna"], ["x", "y"]]}], "combined")
    assert list(found.values()) == [
        [[["PER", "anna"], ["X", "y"]]],
        [[["PER", "anna"]]],
        [[["PERSON", "anna"]]],
        [[["PERSON", "anna"]]],
    ]


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    said, heard = rng.integers(0, 3, 40), rng.integers(0, 3, 40)
    cells = np.zeros((3, 4), dtype=int)
    np.add.at(cells, (said, heard), 1)
    assert cohen_kappa(cells) == pytest.approx(cohen_kappa_score(said, heard))
