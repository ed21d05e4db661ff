"""Few-shot examples for an annotator: balanced over tags, fitted into its context, or the most similar ones."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

from sklearn.feature_extraction.text import TfidfVectorizer

from .prompting import FRAME


def select_examples(groups: Sequence[set[str]], number: int, seed: int = 0) -> list[int]:
    """
    Indices of up to `number` rows, balanced over their groups (tags, or classes): at each step the group that has the
    fewest examples yet, of equals the rarer one, gets one more row, by chance. So each beginning of the list is
    balanced too, as far as the rows allow.

    Args:
        groups: of each row, see `EntityAnnotation.groups`.
        number: of examples.
        seed: the same seed chooses the same rows.
    """
    rng = random.Random(f"examples {seed}")
    total = Counter(name for found in groups for name in found)
    order = rng.sample(range(len(groups)), len(groups))
    left = {name: [row for row in order if name in groups[row]] for name in total}
    chosen: dict[int, None] = {}
    counts: Counter[str] = Counter()
    while len(chosen) < number and left:
        name = min(left, key=lambda name: (counts[name], total[name], name))
        row = left[name].pop()
        if not left[name]:
            del left[name]
        if row not in chosen:
            chosen[row] = None
            counts.update(groups[row])
    return list(chosen)


def count_groups(groups: Sequence[set[str]], rows: Sequence[int]) -> dict[str, int]:
    """How many of these rows are in each group, the balance reached."""
    counts = Counter(name for row in rows for name in groups[row])
    return {name: counts[name] for name in sorted({name for found in groups for name in found})}


def fit(examples: Sequence[tuple[str, str]], tokens: int, count: Callable[[str], int]) -> list[tuple[str, str]]:
    """The longest beginning of the examples, (transcript, answer), that has at most so many tokens."""
    fitted = []
    for example in examples:
        tokens -= sum(count(part) + FRAME for part in example)
        if tokens < 0:
            break
        fitted.append(example)
    return fitted


class Retriever:
    """The k examples most similar to a transcript (TF-IDF of words and word pairs), the most similar one last."""

    def __init__(self, examples: Sequence[tuple[str, str]], k: int):
        self.examples, self.k = examples, k
        self.vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b")
        self.matrix = self.vectorizer.fit_transform(text for text, _ in examples)

    def nearest(self, text: str) -> list[tuple[str, str]]:
        """Examples, never the transcript itself: an annotator could copy its answer."""
        similar = (self.matrix @ self.vectorizer.transform([text]).T).toarray()[:, 0]
        order = sorted(range(len(self.examples)), key=lambda i: (-similar[i], i))
        found = [self.examples[i] for i in order if self.examples[i][0] != text][: self.k]
        return found[::-1]
