"""
How good synthetic labels are: compared with labels that one trusts, filter by filter.

    python annotate_sense.py compare GOLD SYNTHETIC --splits dev test --output_dir REPORT

GOLD is a dataset with labels, SYNTHETIC what annotate_sense.py made of the same transcripts (or any other labelling of
them; rows are matched by their id). Writes REPORT/report.html, report.md, quality.png and metrics.json.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..bad_rows import ON_BAD_ROW, BadRows
from ..datasets import load_corpus, read_json_lines
from ..metrics.slue_ner.slue_ner import count_matches
from ..page import Section, write_page
from ..report import SCORES, markdown_table, plot_quality, print_table, save_png, score_cell, write_text
from ..scoring import bootstrap, ratio, score_sa, sentiment_cells
from ..tasks import SENTIMENTS, TAG_SETS, Answer, phrases
from .filters import filter_entities, filter_phrases, filter_tags, plain_words


Pairs = list[list[str]]  # [tag, phrase]
FILTERS = ("none", "1: phrase in the transcript", "2: tag in the set", "both")
OTHER = "other"  # tags outside the set, where no filter drops them


def load_pairs(args) -> tuple[list[dict], list[dict], int]:
    """
    Rows of both datasets that have the label, matched by split and id; and the number of those that the synthetic one
    lacks, as a whole or their label. Synthetic rows have `annotated` too, what the annotator wrote.

    Raises:
        ValueError: the same row has another text, an id stands there twice, or nothing matches.
    """
    gold, synthetic, missing = [], [], 0
    column = "entities" if args.task == "ner" else "sentiment"
    how = {name: getattr(args, name) for name in ("config_name", "audio_column", "text_column", "lowercase")}
    bad_rows = BadRows(args.on_bad_row)
    for split in args.splits:
        same = {"entity_tags": args.entity_tags, "bad_rows": bad_rows}
        trusted = _by_id(load_corpus(args.gold, split, **how, **same), args.gold)
        made = _by_id(load_corpus(args.synthetic, split, **same), args.synthetic)
        bad_rows.settle()
        written = read_annotated(Path(args.synthetic), split, column)
        for name, row in trusted.items():
            if row[column] is None:
                continue
            other = made.get(name)
            annotated = written.get(name, other and _as_written(other, column))
            if other is None or annotated is None:
                missing += 1
                continue
            if other["text"] != row["text"]:
                raise ValueError(
                    f"{split}, {name}: the text is {row['text']!r} in {args.gold}, {other['text']!r} in "
                    f"{args.synthetic}; compare labels of the same transcripts (see --text_column)"
                )
            gold.append(row)
            synthetic.append({**other, "annotated": annotated})
    if not gold:
        raise ValueError(f"{args.gold} and {args.synthetic} share no row with {column} in {', '.join(args.splits)}")
    return gold, synthetic, missing


def _by_id(rows, where) -> dict[str, dict]:
    found = {}
    for row in rows.remove_columns(["audio", "where"]):
        if row["id"] in found:
            raise ValueError(f"{where}: two rows have the id {row['id']!r}; give each its own")
        found[row["id"]] = row
    return found


def read_annotated(folder: Path, split: str, column: str) -> dict[str, list | str | None]:
    """By id what the annotator wrote, of a dataset of annotate_sense.py that is about these labels."""
    provenance = folder / "provenance.json"
    if not provenance.is_file() or json.loads(provenance.read_text(encoding="utf-8"))["column"] != column:
        return {}
    return {row["id"]: row["annotated"] for row in read_json_lines(folder / split / "metadata.jsonl")}


def _as_written(row: dict, column: str) -> Pairs | str | None:
    """What somebody could have written who labelled a row so."""
    if row[column] is None or column == "sentiment":
        return row[column]
    return phrases(row["text"], row["entities"])


def filter_by_filter(rows: Sequence[dict], tag_set: str) -> dict[str, list[Pairs]]:
    """By filter (see `FILTERS`), the `[tag, phrase]` pairs of each row that it leaves."""
    found: dict[str, list[Pairs]] = {name: [] for name in FILTERS}
    for row in rows:
        text, pairs = row["text"], row["annotated"]
        upper = [[tag.upper(), *phrase] for tag, *phrase in pairs]
        one = filter_phrases(text, upper).entities
        both = filter_entities(text, pairs, tag_set).entities
        left = (upper, phrases(text, one), filter_tags(pairs, tag_set).entities, phrases(text, both))
        for name, kept in zip(FILTERS, left):
            found[name].append([[tag, normal(phrase)] for tag, phrase, *_ in kept])
    return found


def normal(phrase: str) -> str:
    """The words of a phrase, as the filters compare them."""
    return " ".join(plain_words(phrase))


def score_pairs(given: Sequence[Pairs], true: Sequence[Pairs], tags: Sequence[str]) -> dict[str, dict]:
    """
    Precision, recall, F1 and label-F1 (SLUE's: micro over utterances, exact pairs as a multiset, phrases ignored for
    the last), in per cent with 95 % intervals: over all under `all`, and by tag.
    """
    # By utterance, tag, exact or label: hit, given, true.
    counts = np.zeros((len(given), len(tags) + 1, 2, 3), dtype=int)
    for i, pair in enumerate(zip(given, true)):
        for kind, found in enumerate(count_matches(*pair)):
            for tag, numbers in found.items():
                counts[i, tags.index(tag) if tag in tags else -1, kind] += numbers
    scores = {"all": _score(counts.sum(1))}
    for t, tag in enumerate((*tags, OTHER)):
        if counts[:, t].any():
            scores[tag] = _score(counts[:, t])
    return scores


def _score(counts: np.ndarray) -> dict:
    """Scores of counts, (utterances, exact or label, (hit, given, true))."""
    measures = {
        "precision": lambda sums: ratio(sums[..., 0, 0], sums[..., 0, 1]),
        "recall": lambda sums: ratio(sums[..., 0, 0], sums[..., 0, 2]),
        "f1": lambda sums: ratio(2 * sums[..., 0, 0], sums[..., 0, 1] + sums[..., 0, 2]),
        "label_f1": lambda sums: ratio(2 * sums[..., 1, 0], sums[..., 1, 1] + sums[..., 1, 2]),
    }
    sums = counts.sum(0)
    scores: dict = {"given": int(sums[0, 1]), "true": int(sums[0, 2])}
    for name, measure in measures.items():
        scores[name] = 100 * float(measure(sums))
        scores[f"{name}_interval"] = bootstrap(counts, measure)
    return scores


def disagree(given: Pairs, true: Pairs) -> tuple[list[tuple[str, str]], Pairs, Pairs]:
    """Of one utterance: tags of the same phrase (true, given), equal ones too; pairs missed; pairs too many."""
    left, extra = Counter(map(tuple, true)), Counter(map(tuple, given))
    same = left & extra
    left, extra = left - same, extra - same
    tags = [(tag, tag) for tag, _ in same.elements()]
    for tag, phrase in sorted(left.elements()):
        other = next((found for found in sorted(extra.elements()) if found[1] == phrase), None)
        if other is not None:
            tags.append((tag, other[0]))
            left -= Counter([(tag, phrase)])
            extra -= Counter([other])
    return tags, [list(pair) for pair in sorted(left.elements())], [list(pair) for pair in sorted(extra.elements())]


def confusion(differences: Sequence[tuple], tags: Sequence[str]) -> list[list[int]]:
    """
    Numbers of phrases of all utterances (what `disagree` says of each), true tag by row and given tag by column; the
    last of both is "no entity".
    """
    cells = np.zeros((len(tags) + 1, len(tags) + 1), dtype=int)
    for same, missed, extra in differences:
        for said, heard in same:
            cells[tags.index(said), tags.index(heard)] += 1
        for tag, _ in missed:
            cells[tags.index(tag), -1] += 1
        for tag, _ in extra:
            cells[-1, tags.index(tag)] += 1
    return cells.tolist()


def compare_entities(gold: list[dict], synthetic: list[dict], tag_set: str) -> dict:
    """Scores filter by filter, by tag after both, the confusion of tags and the utterances that differ most."""
    tags = TAG_SETS[tag_set]
    if foreign := sorted({tag for row in gold for tag, _, _ in row["entities"]} - set(tags)):
        raise ValueError(f"the trusted labels have the tag {foreign[0]!r}, not one of {tag_set}: see --entity_tags")
    true = [[[tag, normal(p)] for tag, p in phrases(row["text"], row["entities"])] for row in gold]
    given = filter_by_filter(synthetic, tag_set)
    differences = [disagree(*pair) for pair in zip(given["both"], true)]
    worst = []
    for row, (same, missed, extra) in zip(gold, differences):
        wrong = [(said, heard) for said, heard in same if said != heard]
        if missed or extra or wrong:
            worst.append({"id": row["id"], "text": row["text"], "missed": missed, "extra": extra, "tags": wrong})
    worst.sort(key=lambda line: -sum(len(line[kind]) for kind in ("missed", "extra", "tags")))
    return {
        "filters": {name: score_pairs(kept, true, tags) for name, kept in given.items()},
        "tags": list(tags),
        "confusion": confusion(differences, tags),
        "worst": worst,
    }


def compare_sentiment(gold: list[dict], synthetic: list[dict]) -> dict:
    """SLUE's macro F1, accuracy, Cohen's kappa and the confusion; words that are no class count as unreadable."""
    answers = [Answer(sentiment=row["sentiment"]) for row in synthetic]
    scores = score_sa(gold, answers)
    cells = sentiment_cells([row["sentiment"] for row in gold], [row["sentiment"] or "" for row in synthetic])
    worst = [
        {"id": row["id"], "text": row["text"], "gold": row["sentiment"], "synthetic": other["annotated"]}
        for row, other in zip(gold, synthetic)
        if row["sentiment"] != other["sentiment"]
    ]
    kappa = {
        "kappa": float(cohen_kappa(cells.sum(0))),
        "kappa_interval": [b / 100 for b in bootstrap(cells, cohen_kappa)],
    }
    return scores | kappa | {"worst": worst}


def cohen_kappa(cells: np.ndarray) -> np.ndarray:
    """Agreement beyond chance of `(..., said, heard)` counts, -1 to 1; 0 where chance explains all (Cohen, 1960)."""
    total = cells.sum((-1, -2))
    agreed = ratio(np.diagonal(cells, axis1=-2, axis2=-1).sum(-1), total)
    heard = cells.sum(-2)[..., : cells.shape[-2]]
    chance = ratio((cells.sum(-1) * heard).sum(-1), total**2)
    return ratio(agreed - chance, 1 - chance)


def tables_of(found: dict, task: str) -> dict[str, tuple[list[str], list[list[str]]]]:
    """By title, the headers and rows of the report's tables."""
    if task == "sentiment":
        keys = {"sa_f1": "macro F1, %", "sa_accuracy": "accuracy, %", "kappa": "Cohen's kappa"}
        cells = [[title, score_cell(found, key, 2 if key == "kappa" else 1)] for key, title in keys.items()]
        rows = [[name, *map(str, row)] for name, row in zip(SENTIMENTS, found["sa_confusion"])]
        worst = [[line["id"], line["text"], line["gold"], str(line["synthetic"])] for line in found["worst"][:20]]
        return {
            "Agreement [95 % interval]": (["", ""], cells),
            "Gold (rows) and synthetic (columns)": (["", *SENTIMENTS, "no class"], rows),
            "Disagreements": (["id", "text", "gold", "synthetic"], worst),
        }
    headers = ["given", "true", *SCORES.values()]
    by_filter = [[name, *_score_cells(scores["all"])] for name, scores in found["filters"].items()]
    by_tag = [[tag, *_score_cells(scores)] for tag, scores in found["filters"]["both"].items() if tag != "all"]
    names = [*found["tags"], "none"]
    cells = [[name, *map(str, row)] for name, row in zip(names, found["confusion"])]
    worst = [
        [line["id"], line["text"], _listed(line["missed"]), _listed(line["extra"]), _listed(line["tags"])]
        for line in found["worst"][:20]
    ]
    return {
        "Filter by filter, per cent [95 % interval, bootstrap over utterances]": (["filter", *headers], by_filter),
        "By tag, after both filters": (["tag", *headers], by_tag),
        "Tags of the same phrase: gold (rows) and synthetic (columns), after both filters": (["", *names], cells),
        "Largest disagreements": (["id", "text", "missed", "too many", "other tag"], worst),
    }


def _score_cells(scores: dict) -> list[str]:
    return [str(scores["given"]), str(scores["true"]), *(score_cell(scores, name) for name in SCORES)]


def _listed(pairs: Sequence[Sequence[str]]) -> str:
    return "; ".join(": ".join(pair) for pair in pairs)


def compare(argv: list[str]) -> dict:
    """The command; returns what it found."""
    parser = argparse.ArgumentParser(
        prog="annotate_sense.py compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gold")
    parser.add_argument("synthetic")
    parser.add_argument("--task", choices=["ner", "sentiment"], default="ner")
    parser.add_argument("--splits", nargs="+", default=["train"])
    parser.add_argument("--config_name", help="configuration of GOLD on the Hub")
    parser.add_argument("--audio_column", default="audio", help="of GOLD")
    parser.add_argument("--text_column", default="text", help="of GOLD: the text that was annotated")
    parser.add_argument("--lowercase", action="store_true", help="GOLD's transcripts, as they were annotated")
    parser.add_argument("--entity_tags", default="combined", choices=list(TAG_SETS))
    parser.add_argument("--on_bad_row", default="stop", choices=ON_BAD_ROW, help="skip: compare the others")
    parser.add_argument("--output_dir", required=True, type=Path)
    args = parser.parse_args(argv)
    gold, synthetic, missing = load_pairs(args)
    if args.task == "ner":
        found = compare_entities(gold, synthetic, args.entity_tags)
    else:
        found = compare_sentiment(gold, synthetic)
    found |= {"rows": len(gold), "rows_without_synthetic_label": missing}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_report(args, found)
    return found


def write_report(args, found: dict):
    """metrics.json, quality.png, report.md, report.html; prints the tables."""
    tables = tables_of(found, args.task)
    title = f"{args.synthetic} compared with {args.gold}"
    lead = f"{found['rows']} utterances; {found['rows_without_synthetic_label']} more have no synthetic label."
    write_text(args.output_dir / "metrics.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    picture = plot_quality(found)
    save_png(picture, args.output_dir / "quality.png")
    listed = "\n\n".join(f"## {name}\n\n{markdown_table(*table)}" for name, table in tables.items())
    write_text(args.output_dir / "report.md", f"# {title}\n\n{lead}\n\n![Scores](quality.png)\n\n{listed}\n")
    scores = Section("Scores", figure=picture, alt="Scores and confusions; the tables below have the numbers.")
    sections = [scores, *(Section(name, table=table) for name, table in tables.items())]
    write_page(args.output_dir / "report.html", title, lead, sections)
    for name, table in tables.items():
        print_table(name, *table)
    print(f"{lead} Report: {args.output_dir / 'report.html'}", flush=True)
