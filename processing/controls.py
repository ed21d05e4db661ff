"""
Text-side controls for evaluation: what stock tools make of a transcript, without hearing the speech.

spaCy tags entities, VADER rates sentiment, and the majority class knows nothing at all. A speech model that does not
beat them on its own transcripts has learnt little from the audio. spaCy and vaderSentiment are optional:
`pip install '.[controls]'`.
"""

import importlib
import os
from collections import Counter
from collections.abc import Iterable
from types import ModuleType

from .tasks import RAW_TAGS, SENTIMENTS, Entity, combine


SPACY_MODEL = "en_core_web_sm"


class SpacyTagger:
    """
    Named entities of English text from a spaCy pipeline `nlp` whose labels are OntoNotes' 18 tags.

    `combined=True` gives SLUE's 7 tags instead, the tags that SLUE drops left out.
    """

    def __init__(self, nlp, combined: bool = False):
        self.nlp = nlp
        self.combined = combined

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike = SPACY_MODEL, combined: bool = False) -> "SpacyTagger":
        """
        With an installed spaCy model, by name, or one in a folder. Where en_core_web_sm is not installed, it is loaded
        from the cache of `processing/backbones.py`, fetched if it is not there yet.

        Raises:
            ImportError: spaCy is not installed.
            OSError: there is no such model, or en_core_web_sm is neither installed nor can it be fetched.
            ValueError: the fetched package is not the pinned one.
        """
        spacy = _optional("spacy")
        if model == SPACY_MODEL and not spacy.util.is_package(model):
            model = _fetch_model()
        return cls(spacy.load(model), combined)

    @property
    def name(self) -> str:
        """Language, name and version of the model, for reports: an installed one may be of another version."""
        return "{lang}_{name}-{version}".format(**self.nlp.meta)

    def tag(self, texts: Iterable[str]) -> list[list[Entity]]:
        """
        For each text its entities, `[[tag, first character, number of characters], ...]` on exactly that text.

        Texts are taken as they are: spaCy's models learnt from cased, punctuated text and find less without.

        Raises:
            ValueError: the model has a tag set of its own.
        """
        tagged = []
        for doc in self.nlp.pipe(texts):
            entities = [[e.label_, e.start_char, e.end_char - e.start_char] for e in doc.ents]
            if unknown := [tag for tag, _, _ in entities if tag not in RAW_TAGS]:
                raise ValueError(
                    f"spaCy model {self.name} gave the tag {unknown[0]!r}, not one of OntoNotes' {len(RAW_TAGS)}: "
                    f"use an English model such as {SPACY_MODEL}"
                )
            tagged.append(combine(entities) if self.combined else entities)
        return tagged


class VaderSentiment:
    """Sentiment of English text by VADER, a lexicon with rules (Hutto and Gilbert, 2014)."""

    def __init__(self):
        self.analyzer = _optional("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()

    def classify(self, texts: Iterable[str]) -> list[str]:
        """One of `SENTIMENTS` for each text."""
        return [sentiment_of(self.analyzer.polarity_scores(text)["compound"]) for text in texts]


def sentiment_of(compound: float) -> str:
    """Class of VADER's compound score (-1 to 1), by the thresholds that its README documents."""
    if compound >= 0.05:
        return "Positive"
    return "Negative" if compound <= -0.05 else "Neutral"


def majority_sentiment(train_labels: Iterable[str | None]) -> str:
    """
    The most frequent class of the training labels, None (unlabelled) not counted; of equals the first in `SENTIMENTS`.

    Raises:
        ValueError: a label that is no class, or no label at all.
    """
    counts = Counter(label for label in train_labels if label is not None)
    if unknown := sorted(set(counts) - set(SENTIMENTS)):
        raise ValueError(f"unknown sentiment {unknown[0]!r} in the training labels; there are {', '.join(SENTIMENTS)}")
    if not counts:
        raise ValueError("none of the training rows has a sentiment: use a corpus with that column filled")
    return max(SENTIMENTS, key=lambda sentiment: counts[sentiment])


def _optional(module: str) -> ModuleType:
    """Imports a package of the extra `controls`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} can't be imported ({error}): `pip install '.[controls]'`") from error


def _fetch_model() -> str:
    """Folder of the pinned en_core_web_sm."""
    from .backbones import backbone_path

    try:
        return str(backbone_path(SPACY_MODEL))
    except OSError as error:
        raise OSError(
            f"spaCy's {SPACY_MODEL} is not installed and can't be fetched ({error}). Where GitHub can be reached, run "
            f"`python -m spacy download {SPACY_MODEL}`; else give the folder of a spaCy model as `model`"
        ) from error
