"""The page of an evaluation: what stands on it, that nothing breaks it, and that a browser shows it."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import eval_sense
from processing.evaluation_page import (
    MOST_CLIPS,
    compare_words,
    describe_run,
    encode_audio,
    mark,
    read_history,
    write_evaluation_page,
)
from processing.page import Section, number_columns, to_svg, write_page
from processing.report import plot_groups, plot_training
from processing.scoring import score
from processing.tasks import Answer
from tests.conftest import make_corpus, tone, wav


HOSTILE = (
    "<script>alert(1)</script> </title> <img src=http://evil.example/x.png onerror=alert(2)> & \" ' $\\frac{$ {{ 7 }}"
)
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """A page's elements, the cells of its tables and its text; fails where an end tag closes another element."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.tables, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def evaluate(folder, number=12, **changes):
    """Writes a page about made-up answers to a corpus; what the page was made of."""
    folder.mkdir(exist_ok=True)
    dataset = make_corpus(number)
    if changes:
        dataset = dataset.map(lambda row: changes)
    rows = list(dataset.remove_columns("audio"))
    seconds = [row["duration"] for row in rows]
    asr = [row["text"] if i % 2 else f"{row['text']} {HOSTILE}" for i, row in enumerate(rows)]
    ner = [f"<PERSON> {row['text']} </PERSON>" for row in rows]
    answers = {"asr": asr, "ner": ner, "sa": ["Neutral"] * number}
    parsed = eval_sense.parse_answers(dict.fromkeys(answers, "?"), answers)
    words = {"asr": [Answer(text=row["text"]) for row in rows]}
    metrics = score(rows, parsed) | eval_sense.wer_of_groups(rows, parsed, seconds, "asr")
    metrics |= {"n_utterances": number, "audio_seconds": sum(seconds), "rtf": 0.5}
    metrics["controls"] = {
        f"echo {HOSTILE}": score(rows, words) | eval_sense.wer_of_groups(rows, words, seconds, "asr")
    }
    table = eval_sense.utterance_table(rows, seconds, answers, parsed)
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_true_loss": 1.0, "eval_wer": 50.0}]
    about = {"model": HOSTILE, "dataset": "corpus", "machine": "one"}
    write_evaluation_page(folder / "report.html", metrics, table, parsed, dataset, about, history)
    return metrics, table, (folder / "report.html").read_text()


def test_the_page_says_what_the_metrics_say(tmp_path):
    metrics, table, text = evaluate(tmp_path)
    page = Page(text)
    assert json.loads(json.dumps(metrics)) == metrics  # so it stands in metrics.json
    scores = page.tables[0]
    assert scores[0] == [
        "",
        "WER",
        "WER, normalised",
        "NER F1",
        "NER F1, normalised",
        "label-F1",
        "sentiment macro F1",
    ]
    assert [row[0] for row in scores[1:]] == ["SENSE", f"echo {HOSTILE}"]
    for cell, key in zip(
        scores[1][1:], ("wer", "wer_normalized", "ner_f1", "ner_f1_normalized", "ner_label_f1", "sa_f1")
    ):
        low, high = metrics[f"{key}_interval"]
        assert cell == f"{metrics[key]:.1f} [{low:.1f}, {high:.1f}]"
    assert scores[2][1] == "0.0 [0.0, 0.0]" and scores[2][3:] == ["-"] * 4
    by_header = {tuple(found[0][:1]): found[1:] for found in page.tables}
    for name in ("duration", "speaking_rate", "speaker"):
        rows, groups = by_header[(name.replace("_", " "),)], metrics["wer_by"][name]
        assert [row[:3] for row in rows] == [[g["group"], str(g["n"]), str(g["words"])] for g in groups]
        assert [row[3].split()[0] for row in rows] == [f"{g['wer_normalized']:.1f}" for g in groups]
    tags = {row[0]: row[1:] for row in by_header[("tag",)]}
    assert tags.keys() == metrics["ner_per_tag"].keys()
    for tag, found in metrics["ner_per_tag"].items():
        assert tags[tag] == [str(found["support"]), str(found["predicted"])] + [
            f"{100 * found[key]:.1f}" for key in ("precision", "recall", "f1", "label_f1")
        ]
    confusion = next(found for found in page.tables if found[0][-1] == "unreadable")
    assert [list(map(int, row[1:])) for row in confusion[1:]] == metrics["sa_confusion"]
    assert [row[0] for row in by_header[("id",)]] == [line["id"] for line in table]
    assert ["machine", "one"] in by_header[("",)]


def test_nothing_hostile_gets_into_the_page_and_nothing_is_asked_of_the_net(tmp_path):
    _, _, text = evaluate(tmp_path, speaker=HOSTILE)
    page = Page(text)
    assert HOSTILE in page.text
    assert len(page.of("script")) == 1 and len(page.of("title")) == 1 and not page.of("img")
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
    assert not re.search(r"url\(['\"]?(?!#)|@import", re.sub(r"base64,[\w+/=]*", "", text))


def test_what_one_cannot_see_is_said(tmp_path):
    page = Page(evaluate(tmp_path)[2])
    assert page.of("html") == [{"lang": "en"}]
    figures, players = page.of("figure"), page.of("audio")
    assert len(figures) == 7 and all(found["role"] == "img" and found["aria-label"] for found in figures)
    assert len(players) == 6 and all(found["aria-label"] for found in players)
    ids = [found["id"] for _, found in page.elements if found.get("id")]
    assert len(ids) == len(set(ids))


def test_clips_can_be_heard(tmp_path):
    _, table, text = evaluate(tmp_path, number=2 * MOST_CLIPS + 4)
    players = Page(text).of("audio")
    assert len(players) == MOST_CLIPS
    heading = re.findall(r"<h3>(clip-\d+) ", text)
    assert heading == [line["id"] for line in table[:MOST_CLIPS]]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(players[0]["src"].partition(",")[2])))
    assert rate == 16000 and len(samples) / rate == pytest.approx(table[0]["duration"], abs=0.1)
    clip = tone(1.0, seed=3)
    address = encode_audio({"bytes": wav(clip), "path": None})
    assert len(address) < 10_000
    heard, _ = soundfile.read(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert np.corrcoef(clip, heard[: len(clip)])[0, 1] > 0.9


def test_words_and_entities_are_marked():
    said, heard = "anna left  moscow at noon", "hannah left at noon today"
    marks = compare_words(said, heard)
    assert marks[0] == ["substitute", "equal", "delete", "equal", "equal"]
    assert marks[1] == ["substitute", "equal", "equal", "equal", "insert"]
    runs = mark(said, marks[0], [["PERSON", 0, 4], ["PLACE", 11, 6]])
    assert [(run["tag"], [word for word, _ in run["words"]]) for run in runs] == [
        ("PERSON", ["anna"]),
        (None, ["left"]),
        ("PLACE", ["moscow"]),
        (None, ["at", "noon"]),
    ]
    assert len(mark("a b", ["equal"] * 2, [["PERSON", 0, 1], ["PERSON", 2, 1]])) == 2  # two, side by side
    assert compare_words(" ", "a b") == ([], ["insert", "insert"]) and compare_words("a", "") == (["delete"], [])


def test_words_stand_apart_and_marks_are_seen(tmp_path):
    text = evaluate(tmp_path)[2]
    shown = " ".join(re.search(r"<dt>heard \(asr\)</dt><dd>(.*?)</dd>", text, re.S)[1].split())
    assert "the user <ins>&lt;script&gt;alert(1)&lt;/script&gt;</ins> <ins>" in shown.replace("</mark>", "")
    assert '<span class="entity"><span class="tag">PERSON</span> ' in text


def test_without_labels_speakers_and_training(tmp_path):
    dataset = make_corpus(3).map(lambda row: {"speaker": None})
    rows = list(dataset.remove_columns("audio"))
    parsed = {"asr": [Answer(text=row["text"]) for row in rows]}
    seconds = [row["duration"] for row in rows]
    metrics = score(rows, parsed) | eval_sense.wer_of_groups(rows, parsed, seconds, "asr")
    metrics |= {"n_utterances": 3, "audio_seconds": 3.0, "controls": {}}
    table = eval_sense.utterance_table(rows, seconds, {"asr": [row["text"] for row in rows]}, parsed)
    write_evaluation_page(tmp_path / "report.html", metrics, table, parsed, dataset, {"model": "m", "dataset": "d"})
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.of("figure")) == 3 and not page.of("audio") and "speaker" not in metrics["wer_by"]


def test_black_is_the_pages_colour_of_text_and_ids_are_the_pictures_own():
    svg = to_svg(plot_training({"": [{"step": 1, "loss": 1.0}]}), "a-")
    assert "#000000" not in svg and "currentColor" in svg and "http" not in svg
    ids = set(re.findall(r'id="([^"]*)"', svg))
    assert all(name.startswith("a-") for name in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= ids


def test_of_many_groups_the_worst_are_drawn():
    groups = [{"group": f"speaker {i}", "n": 9, "wer_normalized": float(i)} for i in range(50)]
    labels = [label.get_text() for label in plot_groups({"SENSE": groups}).axes[0].get_yticklabels()]
    assert labels == [f"speaker {i} (9)" for i in range(20, 50)]


def test_columns_of_numbers():
    table = (["", "a", "b", "c"], [["x", "1.0 [0.5, 2.0]", "-", "1"], ["y", "-3", "1,000", "1 b"]])
    assert number_columns(table) == [False, True, True, False]


def test_the_history_is_that_of_the_models_folder(tmp_path):
    assert read_history(str(tmp_path)) is None and read_history("some/model") is None
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1}]}')
    assert read_history(str(tmp_path)) == [{"step": 1}]


def test_what_was_evaluated():
    args = {
        "model": "m",
        "revision": None,
        "dataset": "d",
        "config_name": None,
        "split": "test",
        "max_samples": 3,
        "audio_column": "audio",
        "text_column": "text",
        "lowercase": True,
        "constrained": False,
    }
    config = SimpleNamespace(backbones={"audio": {"id": "whisper-x"}, "text": {"id": "llama-y"}})
    model = SimpleNamespace(
        config=config,
        num_parameters=lambda: 1234,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        quantization="int4",
    )
    about = describe_run(SimpleNamespace(**args, num_beams=5, batch_size=8), model, 2, 0.25)
    assert about["backbones"] == "whisper-x, llama-y" and about["parameters"] == "1,234"
    config.backbones |= {"fingerprint": "12ab", "merged_lora": {"r": 4}}
    again = describe_run(SimpleNamespace(**args, num_beams=5, batch_size=8), model, 2, 0.25)
    assert again["backbones"] == about["backbones"]
    kept = describe_run(SimpleNamespace(**args | {"constrained": True}, num_beams=5, batch_size=8), model, 2, 0.25)
    assert kept["decoding"] == "5 beams, constrained"
    assert about["decoding"] == "5 beams" and about["split"] == "test, its first 3 rows at most"
    assert about["language model held in"] == "int4" and about["text column"] == "text, in lower case"
    assert about["number format"] == "bfloat16" and "configuration" not in about
    assert f"torch {torch.__version__.partition('+')[0]}" in about["versions"] and "2 processes" in about["machine"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_sorts_filters_and_plays(tmp_path, browser, scheme):
    _, table, _ = evaluate(tmp_path, speaker=HOSTILE)
    page, troubles, requests = browser.new_page(color_scheme=scheme), [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message) or dialog.dismiss())
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    play = "async e => { e.muted = true; await e.play(); return e.duration }"
    assert page.locator("audio").first.evaluate(play) == pytest.approx(table[0]["duration"], abs=0.2)
    contrast = """() => { const c = getComputedStyle(document.querySelector("section"));
        return [c.backgroundColor, c.color].map(x => x.match(/\\d+/g).reduce((a, b) => a + +b, 0) / 3) }"""
    background, text = page.evaluate(contrast)
    assert (background > 200 and text < 60) if scheme == "light" else (background < 60 and text > 200)

    shown = page.locator("table.sortable tbody tr:visible")
    seconds = page.get_by_role("button", name="seconds")
    for direction, order in (("ascending", sorted), ("descending", lambda values: sorted(values, reverse=True))):
        seconds.click()
        values = [float(row.locator("td").nth(2).inner_text()) for row in shown.all()]
        assert values == order(values) and values[0] != values[-1]
        assert page.locator(f"th[aria-sort={direction}]").count() == 1
    page.get_by_role("searchbox").fill(table[0]["id"])
    assert shown.count() == sum(table[0]["id"] in line["id"] for line in table)
    assert not troubles
    assert [url for url in requests if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
    page.close()


def test_a_page_of_tables_alone(tmp_path):
    write_page(tmp_path / "page.html", "a < b", "c & d", [Section("t", table=(["x"], [["1"]]))])
    page = Page((tmp_path / "page.html").read_text())
    assert page.tables == [[["x"], ["1"]]] and "a < b" in page.text and "c & d" in page.text
