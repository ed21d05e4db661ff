"""The `evaluate` modules: against brute force, against scikit-learn, on worked examples, and as Spaces."""

import ast
import doctest
import itertools
import math
import re
import runpy
import shutil
import socket
import sys
from collections import Counter
from pathlib import Path

import evaluate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from processing.metrics import FOLDER, METRICS, load_metric
from processing.metrics.slue_ner.slue_ner import count_matches, normalize_phrase
from processing.metrics.slue_score.slue_score import PARTS


ROOT = Path(__file__).parents[2]
settings.register_profile("metrics", deadline=None, database=None, max_examples=60, derandomize=True)
quick = settings.get_profile("metrics")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a metric wants to connect: {args}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def ner():
    return load_metric("slue_ner")


@pytest.fixture(scope="module")
def sentiment():
    return load_metric("slue_sentiment")


@pytest.fixture(scope="module")
def slue():
    return load_metric("slue_score")


@pytest.fixture(scope="module")
def wer():
    return load_metric("wer")


# ---------------------------------------------------------------------------------------------------------------------
# Named entities

TAGS = ("PLACE", "PERSON", "WHEN")
SURFACES = {  # what is said -> how it may be written
    "rome": ("rome", " rome ", "rome,", "rome."),
    "europe 's": ("europe's", "europe 's", "europe's!", " europe  's;"),
    "the us": ("the u.s.", "the us", "the  us?"),
}
# One entity: tag, what is said, how it is written.
entity = st.tuples(
    st.sampled_from(TAGS),
    st.sampled_from(list(SURFACES)).flatmap(lambda said: st.tuples(st.just(said), st.sampled_from(SURFACES[said]))),
).map(lambda drawn: (drawn[0], *drawn[1]))
utterance = st.lists(entity, max_size=5)
corpus = st.lists(st.tuples(utterance, utterance), min_size=1, max_size=4)


def written(entities):
    return [[tag, surface] for tag, _, surface in entities]


def said(entities, with_phrase=True):
    return [(tag, phrase) if with_phrase else (tag,) for tag, phrase, _ in entities]


def most_pairs(predicted, true):
    """The largest number of equal pairs over all ways to pair the items up."""
    short, long = sorted((predicted, true), key=len)
    return max(sum(map(lambda a, b: a == b, short, order)) for order in itertools.permutations(long, len(short)))


@given(utterance, utterance)
@settings(quick)
def test_count_matches_finds_the_best_pairing(predicted, true):
    for with_phrase, counts in zip((True, False), count_matches(written(predicted), written(true))):
        expected = {}
        for tag in {entity[0] for entity in predicted + true}:
            p = [item for item in said(predicted, with_phrase) if item[0] == tag]
            t = [item for item in said(true, with_phrase) if item[0] == tag]
            expected[tag] = (most_pairs(p, t), len(p), len(t))
        assert counts == expected


def cells(utterances, with_phrase=True):
    """
    The same question for scikit-learn: one binary case per utterance, item and copy of it, "is it there?".
    Returns lists of tags, of truths and of predictions.
    """
    tags, truths, predictions = [], [], []
    for predicted, true in utterances:
        p, t = Counter(said(predicted, with_phrase)), Counter(said(true, with_phrase))
        for item in p | t:
            for copy in range(max(p[item], t[item])):
                tags.append(item[0])
                truths.append(int(copy < t[item]))
                predictions.append(int(copy < p[item]))
    return tags, truths, predictions


@given(utterances=corpus)
@settings(quick)
def test_ner_agrees_with_scikit_learn(ner, utterances):
    predictions, references = zip(*[(written(p), written(t)) for p, t in utterances])
    found = ner.compute(predictions=list(predictions), references=list(references))
    for prefix, with_phrase in (("", True), ("label_", False)):
        tags, truths, heard = cells(utterances, with_phrase)
        if not tags:
            assert found[f"{prefix}f1"] == found[f"{prefix}macro_f1"] == 0 and found["per_tag"] == {}
            continue
        assert set(found["per_tag"]) == set(tags)
        for tag in (None, *set(tags)):
            scores = found if tag is None else found["per_tag"][tag]
            chosen = [(t, h) for other, t, h in zip(tags, truths, heard) if tag in (None, other)]
            expected = precision_recall_fscore_support(*zip(*chosen), average="binary", zero_division=0)[:3]
            assert [scores[prefix + key] for key in ("precision", "recall", "f1")] == pytest.approx(expected)
            if tag is not None:
                assert (scores["support"], scores["predicted"]) == tuple(map(sum, zip(*chosen)))
        macro = [scores[f"{prefix}f1"] for scores in found["per_tag"].values()]
        assert found[f"{prefix}macro_f1"] == pytest.approx(math.fsum(macro) / len(macro))


@given(utterances=corpus, data=st.data())
@settings(quick, max_examples=40)
def test_ner_ignores_order_and_mirrors_when_sides_change(ner, utterances, data):
    predictions, references = ([written(pair[side]) for pair in utterances] for side in (0, 1))
    found = ner.compute(predictions=predictions, references=references)
    shuffled = [data.draw(st.permutations(entities)) for entities in predictions]
    assert ner.compute(predictions=shuffled, references=references) == found
    mirrored = ner.compute(predictions=references, references=predictions)
    assert mirrored["precision"] == found["recall"] and mirrored["f1"] == pytest.approx(found["f1"])
    same = ner.compute(predictions=references, references=references)
    assert same["f1"] == same["label_f1"] == same["macro_f1"] == float(any(references))


@given(utterances=corpus, kept=st.sets(st.sampled_from(TAGS)))
@settings(quick, max_examples=40)
def test_ner_discards_tags_on_both_sides(ner, utterances, kept):
    predictions, references = ([written(pair[side]) for pair in utterances] for side in (0, 1))
    fewer = [[[e for e in entities if e[0] in kept] for entities in side] for side in (predictions, references)]
    expected = ner.compute(predictions=fewer[0], references=fewer[1])
    assert ner.compute(predictions=predictions, references=references, tag_set=sorted(kept)) == expected


def test_ner_worked_example(ner):
    references = [[["PLACE", "rome"], ["PLACE", "rome"], ["PERSON", "anna's"]], [["WHEN", "today"]], []]
    predictions = [[["PERSON", "anna 's"], ["PLACE", "rome"]], [["WHEN", "to day"]], [["ORG", "nato"]]]
    found = ner.compute(predictions=predictions, references=references)
    per_tag = found.pop("per_tag")
    assert found == pytest.approx(  # of 4 heard and 4 said: 2 pairs match, 3 tags
        {
            "precision": 2 / 4,
            "recall": 2 / 4,
            "f1": 2 / 4,
            "label_precision": 3 / 4,
            "label_recall": 3 / 4,
            "label_f1": 3 / 4,
            "macro_f1": (2 / 3 + 1 + 0 + 0) / 4,
            "label_macro_f1": (2 / 3 + 1 + 1 + 0) / 4,
        }
    )
    assert per_tag["PLACE"] == pytest.approx(
        {
            "precision": 1,
            "recall": 1 / 2,
            "f1": 2 / 3,
            "label_precision": 1,
            "label_recall": 1 / 2,
            "label_f1": 2 / 3,
            "support": 2,
            "predicted": 1,
        }
    )
    assert list(per_tag) == ["ORG", "PERSON", "PLACE", "WHEN"]
    assert (per_tag["ORG"]["support"], per_tag["ORG"]["predicted"], per_tag["ORG"]["label_f1"]) == (0, 1, 0)


def test_ner_matches_within_an_utterance_only(ner):
    rome, nothing = [["PLACE", "rome"]], []
    found = ner.compute(predictions=[rome, nothing], references=[nothing, rome])
    assert found["f1"] == found["label_f1"] == 0


@pytest.mark.parametrize("predictions", [[[]], [[], []], []])
def test_ner_of_nothing_is_zero(ner, predictions):
    found = ner.compute(predictions=predictions, references=predictions)
    assert found.pop("per_tag") == {} and len(found) == 8 and set(found.values()) == {0}


def test_ner_takes_utterances_one_by_one(ner):
    ner.add(prediction=[["PLACE", "rome"]], reference=[["PLACE", "rome"]])
    ner.add(prediction=[], reference=[["PLACE", "rome"]])
    ner.add_batch(predictions=[[], []], references=[[], [["WHEN", "today"]]])
    assert ner.compute()["recall"] == pytest.approx(1 / 3)


BAD_ENTITIES = {
    "predictions, utterance 1: an entity is a pair of strings.*found \\['PLACE', 3\\]": [[], [["PLACE", 3]]],
    "predictions, utterance 0: .*found \\['PLACE', 0, 4\\]": [[["PLACE", 0, 4]], []],
    "predictions, utterance 0: .*found 'PLACE'": [["PLACE", "rome"], []],
    "predictions, utterance 1: found None for a list": [[], None],
    "number of predictions \\(1\\) and references \\(2\\)": [[]],
    "predictions are missing": None,
}


@pytest.mark.parametrize("message, predictions", BAD_ENTITIES.items())
def test_ner_refuses_what_is_no_list_of_pairs_and_works_afterwards(ner, message, predictions):
    with pytest.raises(ValueError, match=message):
        ner.compute(predictions=predictions, references=[[], []])
    rome = [[["PLACE", "rome"]]]
    assert ner.compute(predictions=rome, references=rome)["f1"] == 1


def test_ner_refuses_a_string_for_tags(ner):
    with pytest.raises(ValueError, match="tag_set is a list of tags; found the string 'PLACE'"):
        ner.compute(predictions=[[]], references=[[]], tag_set="PLACE")


@pytest.mark.parametrize(
    "written, normal",
    [
        ("europe's", "europe 's"),
        ("europe 's", "europe 's"),
        ("EUROPE'S", "EUROPE 'S"),
        ("the member states'", "the member states'"),
        ("o'sullivan's", "o'sullivan 's"),
        (" mr.  Smith,\tjr.!? ;", "mr Smith jr"),
        ("3.5-7", "35-7"),
        (".", ""),
    ],
)
def test_normalize_phrase(written, normal):
    assert normalize_phrase(written) == normal


@given(st.text(alphabet="aS's .,!?;\t-"))
@settings(quick)
def test_normalize_phrase_is_idempotent_and_keeps_letters(phrase):
    normal = normalize_phrase(phrase)
    assert normalize_phrase(normal) == normal and not set(normal) & set(".,!?;\t")
    assert re.sub(r"[.,!?;\s]", "", phrase) == normal.replace(" ", "")


# ---------------------------------------------------------------------------------------------------------------------
# Sentiment

CLASSES = ("Negative", "Neutral", "Positive")
answers = st.lists(
    st.tuples(
        st.sampled_from((*CLASSES, "", "other", "positive")), st.sampled_from((*CLASSES, "Disagreement", "<mixed>"))
    ),
    min_size=1,
    max_size=20,
).filter(lambda rows: any(reference in CLASSES for _, reference in rows))


@given(rows=answers)
@settings(quick)
def test_sentiment_agrees_with_its_definition_and_scikit_learn(sentiment, rows):
    found = sentiment.compute(predictions=[p for p, _ in rows], references=[r for _, r in rows])
    kept = [(p, r) for p, r in rows if r in CLASSES]
    assert found["n_dropped"] == len(rows) - len(kept)
    assert found["accuracy"] == pytest.approx(sum(p == r for p, r in kept) / len(kept))
    for name in CLASSES:
        hits = sum(p == r == name for p, r in kept)
        predicted, true = sum(p == name for p, _ in kept), sum(r == name for _, r in kept)
        assert found["per_class"][name] == pytest.approx(
            {
                "precision": hits / predicted if predicted else 0,
                "recall": hits / true if true else 0,
                "f1": 2 * hits / (predicted + true) if predicted + true else 0,
                "support": true,
                "predicted": predicted,
            }
        )
    heard, truth = zip(*kept)
    expected = precision_recall_fscore_support(truth, heard, labels=CLASSES, average="macro", zero_division=0)[:3]
    assert [found[key] for key in ("precision", "recall", "f1")] == pytest.approx(expected)
    for y, true in enumerate(CLASSES):
        row = Counter(p if p in CLASSES else "other" for p, r in kept if r == true)
        assert found["confusion"][y] == [row[name] for name in (*CLASSES, "other")]


def test_sentiment_worked_example(sentiment):
    references = ["Negative", "Negative", "Neutral", "Positive", "Disagreement", "<mixed>"]
    predictions = ["Negative", "", "Neutral", "Neutral", "Positive", "Negative"]
    found = sentiment.compute(predictions=predictions, references=references)
    assert found["confusion"] == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0]] and found["n_dropped"] == 2
    # The unreadable answer costs recall, and is no false positive of any class.
    assert (found["precision"], found["recall"]) == pytest.approx(((1 + 1 / 2 + 0) / 3, (1 / 2 + 1 + 0) / 3))
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3) and found["accuracy"] == 2 / 4


@pytest.mark.parametrize(
    "references, message",
    [
        (["Positive", "neutral"], "references, utterance 1: found 'neutral'"),
        (["<mixed>", "Disagreement"], "not one of 2 is Negative.*found \\['<mixed>', 'Disagreement'\\]"),
    ],
)
def test_sentiment_refuses_references_that_score_nothing_or_are_misspelt(sentiment, references, message):
    with pytest.raises(ValueError, match=message):
        sentiment.compute(predictions=["Positive", "Neutral"], references=references)
    assert sentiment.compute(predictions=["Neutral"], references=["Neutral"])["accuracy"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# WER


def distance(heard, true):
    """Levenshtein's, by its recursion."""
    row = list(range(len(true) + 1))
    for i, a in enumerate(heard, 1):
        row, above = [i], row
        for j, b in enumerate(true, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]


text = st.text(alphabet="aB' \t.", max_size=12)


@given(
    rows=st.lists(st.tuples(text, text), min_size=1, max_size=5).filter(lambda rows: any(r.split() for _, r in rows))
)
@settings(quick)
def test_wer_agrees_with_levenshtein(wer, rows):
    found = wer.compute(predictions=[heard for heard, _ in rows], references=[true for _, true in rows])
    words = [(heard.split(), true.split()) for heard, true in rows]
    letters = [(" ".join(heard), " ".join(true)) for heard, true in words]
    n_heard, n_true = (sum(len(pair[side]) for pair in words) for side in (0, 1))
    errors = sum(distance(*pair) for pair in words)
    assert found["words"] == n_true and found["wer"] == pytest.approx(errors / n_true)
    assert found["substitutions"] + found["deletions"] + found["insertions"] == errors
    assert found["deletions"] - found["insertions"] == n_true - n_heard
    assert found["cer"] == pytest.approx(sum(distance(*pair) for pair in letters) / sum(len(t) for _, t in letters))


def test_wer_worked_example(wer):
    found = wer.compute(predictions=["the hat sat", "oh", ""], references=["the cat sat down", "", ""])
    expected = {"wer": 3 / 4, "cer": 8 / 16, "substitutions": 1, "deletions": 1, "insertions": 1, "words": 4}
    assert found == pytest.approx(expected)
    assert wer.compute(predictions=["a b c"], references=["x"])["wer"] == 3
    assert wer.compute(predictions=["Yes."], references=["yes"])["wer"] == 1  # as they are


@pytest.mark.parametrize("references", [["", " \t"], []])
def test_wer_needs_a_word_of_reference(wer, references):
    with pytest.raises(ValueError, match=f"not one of {len(references)} holds a word"):
        wer.compute(predictions=["a"] * len(references), references=references)
    with pytest.raises(ValueError, match="predictions, utterance 1: found None"):
        wer.compute(predictions=["a", None], references=["a", "b"])
    assert wer.compute(predictions=["a"], references=["a"])["wer"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# SLUE score


def results(*values, split="test"):
    """Of WER on VoxPopuli, WER on VoxCeleb, NER F1, sentiment F1."""
    return [
        {"metric": metric, "corpus": corpus, "split": split, "value": value}
        for (metric, corpus), value in zip(PARTS, values, strict=True)
    ]


def test_parts_of_the_slue_score():
    """`results` relies on their order."""
    assert [f"{metric} {corpus.removeprefix('slue-')}" for metric, corpus in PARTS] == [
        "wer voxpopuli",
        "wer voxceleb",
        "ner_f1 voxpopuli",
        "sentiment_f1 voxceleb",
    ]


@pytest.mark.parametrize(
    "published, digits, values",
    [
        (82.7, 1, (0, 0, 81.4, 66.8)),
        (75.7, 1, (9.3, 11.1, 71.8, 65.5)),
        (73.81, 2, (8.77, 11.47, 69.95, 61.60)),
        (71.47, 2, (11.63, 14.16, 64.05, 63.27)),
        (68.2, 1, (9.3, 11.1, 64.8, 50.1)),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_slue_score_of_published_systems(slue, published, digits, values, order):
    found = slue.compute(predictions=results(*values)[::order])
    # Half a unit of the last digit: the published numbers are rounded.
    assert found == {"slue_score": pytest.approx(published, abs=0.5001 * 10**-digits), "split": "test"}


def test_slue_score_of_dev_and_of_a_system_that_hears_nothing(slue):
    assert slue.compute(predictions=results(100, 100, 0, 0, split="dev")) == {"slue_score": 0, "split": "dev"}
    assert slue.compute(predictions=results(150, 50, 0.5, 20.5))["slue_score"] == pytest.approx(7)


FOUR = results(9.3, 11.1, 71.8, 65.5)
REFUSED = {
    "no SLUE score of 'wer' on corpus 'librispeech', split 'test'": [{**FOUR[0], "corpus": "librispeech"}, *FOUR[1:]],
    "no SLUE score of 'ner_f1' on corpus 'slue-voxceleb'": [
        *FOUR[:2],
        {**FOUR[2], "corpus": "slue-voxceleb"},
        FOUR[3],
    ],
    "no SLUE score of 'wer' on corpus 'slue-voxpopuli', split 'train'": [{**FOUR[0], "split": "train"}, *FOUR[1:]],
    "no SLUE score of 'cer'": [*FOUR, {**FOUR[0], "metric": "cer"}],
    "needs wer on slue-voxceleb too": [FOUR[0], *FOUR[2:]],
    "needs wer on slue-voxpopuli, wer on slue-voxceleb, ner_f1": [],
    "wer on slue-voxpopuli is given twice": [*FOUR, FOUR[0]],
    "split: found dev and test": [*FOUR[:3], {**FOUR[3], "split": "dev"}],
    "wer on slue-voxpopuli and wer on slue-voxceleb, which look like fractions": results(0.093, 0.111, 71.8, 65.5),
    "ner_f1 on slue-voxpopuli and sentiment_f1 on slue-voxceleb, which look": results(9.3, 11.1, 0.718, 0.655),
    "value: found nan for wer": results(9.3, float("nan"), 71.8, 65.5),
    "value: found -1.0 for ner_f1": results(9.3, 11.1, -1, 65.5),
    "value: found 101.0 for sentiment_f1": results(9.3, 11.1, 71.8, 101),
    "value: found None": results(9.3, 11.1, 71.8, None),
    "a result is a dict of metric, corpus, split, value; found {'value': 1}": [*FOUR[:3], {"value": 1}],
    "a result is a dict of metric, corpus, split, value; found 9.3": [9.3, 11.1, 71.8, 65.5],
}


@pytest.mark.parametrize("message, predictions", REFUSED.items())
def test_slue_score_refuses_anything_else(slue, message, predictions):
    with pytest.raises(ValueError, match=re.escape(message)):
        slue.compute(predictions=predictions)
    assert slue.compute(predictions=FOUR)["slue_score"] == pytest.approx(75.7)


# ---------------------------------------------------------------------------------------------------------------------
# Modules and Spaces


def test_every_folder_is_listed():
    assert sorted(path.parent.name for path in FOLDER.glob("*/app.py")) == sorted(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_loads_from_paths_without_a_network(name, no_network, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in (f"processing/metrics/{name}", str(FOLDER / name)):
        metric = evaluate.load(path)
        assert metric.name == name and metric.module_type == "metric"
        assert metric.description and metric.inputs_description


@pytest.mark.parametrize("name", METRICS)
def test_load_metric_from_any_folder(name, no_network, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    load_metric.cache_clear()
    metric = load_metric(name)
    assert metric.name == name and load_metric(name) is metric


def test_load_metric_names_what_there_is():
    with pytest.raises(ValueError, match="there is no metric 'bleu'; there are slue_ner, .*wer"):
        load_metric("bleu")


@pytest.mark.parametrize("name", METRICS)
def test_examples_of_card_and_inputs(name, no_network, monkeypatch):
    monkeypatch.chdir(ROOT)
    card = doctest.testfile(str(FOLDER / name / "README.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert card.attempted >= 4 and not card.failed
    inputs = doctest.DocTestParser().get_doctest(load_metric(name).inputs_description, {}, name, None, None)
    run = doctest.DocTestRunner().run(inputs)
    assert run.attempted >= 4 and not run.failed


@pytest.mark.parametrize("name", METRICS)
def test_module_stands_alone(name, no_network, tmp_path):
    """It loads from a folder of its own, and imports nothing that its requirements do not bring."""
    imports = set()
    for node in ast.walk(ast.parse((FOLDER / name / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imports.add(node.module.split(".")[0])
    required = (FOLDER / name / "requirements.txt").read_text(encoding="utf-8")
    brought = set(re.findall(r"^[a-z-]+", required, flags=re.MULTILINE))
    assert {{"sklearn": "scikit-learn"}.get(i, i) for i in imports - sys.stdlib_module_names} <= brought
    shutil.copytree(FOLDER / name, tmp_path / name)
    assert evaluate.load(str(tmp_path / name)).name == name


@pytest.mark.parametrize("name", METRICS)
def test_space_has_a_page_and_a_card(name, no_network, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr("evaluate.utils.launch_gradio_widget", shown.append)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / name / "app.py"))
    assert [metric.name for metric in shown] == [name]
    _, front, card = (FOLDER / name / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["sdk"] == "gradio" and meta["app_file"] == "app.py" and meta["tags"] == ["evaluate", "metric"]
    # evaluate's page uses gr.inputs, which gradio 4 no longer has.
    assert meta["sdk_version"].startswith("3.") and meta["title"] and meta["description"]
    assert card.lstrip().startswith("# Metric card")
