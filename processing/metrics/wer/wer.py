"""Word error rate of a corpus, as a module of Hugging Face `evaluate`."""

import datasets
import evaluate
import jiwer


_DESCRIPTION = """\
Word error rate of a corpus: all substituted, deleted and inserted words over all words of the references; beside it \
the same of characters. Strings are scored as they are: normalising case, punctuation or numbers is up to the caller.
"""

_CITATION = ""

_INPUTS = """
Args:
    predictions: one string an utterance, what was heard. It may be empty.
    references: one string an utterance, what was said. It may be empty: all words heard there are insertions. At least
        one must hold a word.

White space parts words and is not scored itself, but for the single spaces between words in `cer`.

Returns:
    wer: word errors over reference words, from 0; more than 1 where much was inserted.
    cer: character errors over reference characters, spaces between words included.
    substitutions, deletions, insertions: numbers of words.
    words: number of words in the references.

Examples:
    >>> import evaluate
    >>> wer = evaluate.load("processing/metrics/wer")
    >>> found = wer.compute(predictions=["the cat sat", "oh"], references=["the cat sat down", ""])
    >>> found["wer"], found["deletions"], found["insertions"]
    (0.5, 1, 1)
"""


class Wer(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://github.com/jitsi/jiwer"],
        )

    def _compute(self, predictions, references):
        # jiwer parts words at spaces alone: a tab would join two.
        heard = [" ".join(text.split()) for text in _strings("predictions", predictions)]
        said = [" ".join(text.split()) for text in _strings("references", references)]
        if not any(said):
            raise ValueError(
                f"references: not one of {len(said)} holds a word, so there is no rate; give the text of the speech"
            )
        words, characters = jiwer.process_words(said, heard), jiwer.process_characters(said, heard)
        return {
            "wer": words.wer,
            "cer": characters.cer,
            "substitutions": words.substitutions,
            "deletions": words.deletions,
            "insertions": words.insertions,
            "words": words.hits + words.substitutions + words.deletions,
        }


def _strings(name: str, texts: list) -> list[str]:
    for i, text in enumerate(texts):
        if text is None:
            raise ValueError(f"{name}, utterance {i}: found None for a string; give '' where there are no words")
    return texts
