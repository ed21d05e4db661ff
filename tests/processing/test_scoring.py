"""Metrics of answers and their intervals."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from processing.scoring import FEWEST, bootstrap, plain, ratio, score, score_asr, score_ner, score_sa, wer_by
from processing.tasks import SENTIMENTS, Answer, make_tasks


def make_rows(number: int, seed: int = 0) -> tuple[list[dict], list[Answer]]:
    """References and answers that agree in about two of three words, entities and sentiments."""
    rng = np.random.default_rng(seed)
    rows, answers = [], []
    for _ in range(number):
        words = [f"w{rng.integers(9)}" for _ in range(rng.integers(2, 8))]
        heard = [word if rng.random() < 0.7 else "x" for word in words]
        entity = [["PLACE", 0, 2]] if rng.random() < 0.7 else []
        found = [[["PERSON", "PLACE"][rng.random() < 0.7], 0, len(heard[0])]] if rng.random() < 0.7 else []
        rows.append({"text": " ".join(words), "entities": entity, "sentiment": str(rng.choice(SENTIMENTS))})
        sentiment = rows[-1]["sentiment"] if rng.random() < 0.6 else str(rng.choice(SENTIMENTS))
        answers.append(Answer(text=" ".join(heard), entities=found, sentiment=sentiment))
    return rows, answers


def test_wer_counts_words_as_they_are_and_normalised():
    rows = [{"text": "the colour of the sea"}, {"text": "it is ten"}]
    answers = [Answer(text="The color of the sea."), Answer(text="it is 10")]
    found = score_asr(rows, answers)
    assert found["wer"] == pytest.approx(100 * 4 / 8) and found["wer_normalized"] == 0
    assert found["wer_normalized_interval"] == [0, 0]


def test_where_nothing_is_said_there_is_no_rate():
    rows = [{"text": "", "entities": None, "sentiment": None}] * 6
    assert score(rows, {"asr": [Answer("hello")] * 6}) == {}


@pytest.mark.parametrize(
    "language, said, heard, rate",
    [("pt", "um homem", "homem", 50), ("de", "schön", "schon", 100), ("en", "um i", "i", 0)],
)
def test_other_languages_keep_their_words_and_letters(language, said, heard, rate):
    row = {"text": said, "language": language, "speaker": None}
    assert score_asr([row], [Answer(heard)])["wer_normalized"] == rate
    assert wer_by([row], [Answer(heard)], [1.0])["duration"][0]["wer_normalized"] == rate


def test_groups_of_utterances_share_out_the_errors():
    rows, answers = make_rows(60)
    rows = [row | {"speaker": ["ann", "bob", None][i % 3]} for i, row in enumerate(rows)]
    seconds = [1 + i / 4 for i in range(60)]
    found = wer_by(rows, answers, seconds)
    assert [group["group"] for group in found["speaker"]] == ["ann", "bob", "unknown"]
    assert [group["group"] for group in found["duration"]][:2] == ["below 2 s", "2 to 4 s"]
    assert [group["n"] for group in found["duration"]] == [4, 8, 8, 8, 8, 20, 4]  # up to 15.75 s, each its lower edge
    total = score_asr(rows, answers)["wer_normalized"]
    for groups in found.values():
        assert sum(group["n"] for group in groups) == 60
        errors, words = (sum(group[key] for group in groups) for key in ("errors", "words"))
        assert 100 * errors / words == pytest.approx(total)
        for group in groups:
            assert ("wer_normalized_interval" in group) == (group["n"] >= FEWEST)
            low, high = group.get("wer_normalized_interval", (0, 1000))
            assert low <= group["wer_normalized"] <= high
    silent = [{"text": "", "speaker": None}] * FEWEST
    (nothing_said,) = wer_by(silent, [Answer(text="hello there")] * FEWEST, [1.0] * FEWEST)["duration"]
    assert nothing_said == {"group": "below 2 s", "n": FEWEST, "words": 0, "errors": 2 * FEWEST}
    slow = wer_by([{"text": "anna left", "speaker": None}], [Answer(text="anna")], [1.0])
    assert slow == {
        "duration": [{"group": "below 2 s", "n": 1, "words": 2, "errors": 1, "wer_normalized": 50}],
        "speaking_rate": [{"group": "2 to 2.5 words/s", "n": 1, "words": 2, "errors": 1, "wer_normalized": 50}],
    }


def test_point_values_lie_on_the_counts_that_the_intervals_are_of():
    """A bootstrap over one utterance can only draw that one: both its ends are the point value."""
    for seed in range(20):
        rows, answers = make_rows(1, seed)
        found = score(rows, {"asr": answers, "ner": answers, "sa": answers})
        for name in ("wer", "wer_normalized", "ner_f1", "ner_label_f1", "ner_f1_normalized", "sa_f1"):
            assert found[f"{name}_interval"] == pytest.approx([found[name]] * 2), name


def test_words_are_parted_by_any_white_space_in_rate_and_interval():
    rows, answers = [{"text": "one\u00a0two\tthree"}], [Answer(text="one two\nfour")]
    found = score([{**rows[0], "entities": None, "sentiment": None}], {"asr": answers})
    assert found["wer"] == pytest.approx(100 / 3) and found["wer_interval"] == pytest.approx([100 / 3] * 2)


def test_intervals_hold_the_value_and_shrink_with_the_number_of_utterances():
    widths = []
    for number in (30, 480):
        rows, answers = make_rows(number)
        found = score(rows, {"asr": answers, "ner": answers, "sa": answers})
        for name in ("wer", "ner_f1", "sa_f1"):
            low, high = found[f"{name}_interval"]
            assert low < found[name] < high
            widths.append(high - low)
    assert all(few > 2 * many for few, many in zip(widths[:3], widths[3:]))


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(1).random(400)
    counts = np.stack([values, np.ones(400)], axis=1)
    low, high = bootstrap(counts, lambda sums: ratio(sums[..., 0], sums[..., 1]))
    error = 1.96 * values.std() / 20
    assert [low, high] == pytest.approx([100 * (values.mean() - error), 100 * (values.mean() + error)], abs=0.5)


def test_entities_are_compared_in_plain_lower_case():
    assert plain("  Anna-Karenina's   BOOK, 2nd_ed. U.S.") == "anna karenina's book 2nd ed us"
    assert plain("Don\u2019t go to Cafe\u0301s") == "don't go to caf\u00e9s"
    assert plain("I \u2764\ufe0f co\u00adoperation") == "i cooperation" and plain("می\u200cخواهم") == "می\u200cخواهم"
    assert plain("मैं हिन्दी में बोलता हूँ।") == "मैं हिन्दी में बोलता हूँ"
    rows = [{"text": "anna karenina has two dogs", "entities": [["PERSON", 0, 13], ["QUANT", 18, 3]]}]
    whisper = Answer(text="Anna Karenina, has 2 dogs.", entities=[["PERSON", 0, 14], ["CARDINAL", 19, 1]])
    found = score_ner(rows, [whisper])
    assert found["ner_f1"] == 50 and found["ner_label_f1"] == 100
    assert found["ner_f1_normalized"] == 100


def test_malformed_answers_are_a_share_and_unlabelled_rows_do_not_count():
    rows = [
        {"text": "a", "entities": []},
        {"text": "a b", "entities": [["LAW", 0, 1]]},
        {"text": "c", "entities": None},
    ]
    answers = [Answer("a", [], None, 2), Answer("a b", [["LAW", 0, 1]]), Answer("x", [["LAW", 0, 1]], None, 1)]
    found = score_ner(rows, answers)
    assert found["ner_malformed_rate"] == 50 and found["ner_f1"] == 100 and found["ner_wer"] == 0


def test_sentiment_is_scikit_learns_macro_f1_and_unreadable_answers_are_wrong():
    rows, answers = make_rows(60)
    answers[0] = Answer(malformed=1)
    rows.append({"text": "", "entities": None, "sentiment": None})
    answers.append(Answer(sentiment="Positive"))
    found = score_sa(rows, answers)
    said, heard = [row["sentiment"] for row in rows[:-1]], [answer.sentiment or "" for answer in answers[:-1]]
    expected = f1_score(said, heard, labels=SENTIMENTS, average="macro", zero_division=0)
    assert found["sa_f1"] == pytest.approx(100 * expected)
    assert found["sa_malformed_rate"] == pytest.approx(100 / 60)
    assert np.sum(found["sa_confusion"]) == 60 and np.sum(found["sa_confusion"], axis=0)[-1] == 1


def test_tasks_without_labels_are_left_out():
    rows = [{"text": "a b", "entities": None, "sentiment": None}]
    found = score(rows, {"asr": [Answer("a b")], "ner": [Answer("a", [])], "sa": [Answer(sentiment="Neutral")]})
    assert found.keys() == score_asr(rows, [Answer("a b")]).keys()


def test_slues_text_rule_drops_marks_and_splits_possessives():
    rows = [{"text": "europe's plan, 2nd draft."}]
    found = score_asr(rows, [Answer(text="europe 's plan 2nd draft")])
    assert found["wer"] == 100 and found["wer_slue"] == 0  # three other words, one new


def test_a_perfect_answer_has_no_errors_where_a_tag_parts_a_possessive():
    task = make_tasks({"ner": "Tag."})["ner"]
    row = {"text": "mister quilter's manner", "entities": [["PERSON", 7, 7]]}
    assert task.target(row) == "mister <PERSON> quilter </PERSON> 's manner"
    found = score_ner([row], [task.parse(task.target(row))])
    assert found["ner_wer"] == found["ner_wer_normalized"] == 0 and found["ner_f1"] == 100
    assert found["ner_macro_f1"] == found["ner_label_macro_f1"] == found["ner_label_recall"] == 100
