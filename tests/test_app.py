"""The page: what stands behind it, and all of it in a browser."""

import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import gradio as gr
import httpx
import numpy as np
import pytest
import soundfile
import yaml

import app
from processing.pipeline_sense import SpokenLanguageUnderstandingPipeline
from processing.synthesis import Espeak, speak
from scripts.make_space import make_space
from tests.conftest import learn_by_heart


TEXT, ENTITY = "the user speaks", ["PERSON", 0, 8]
LEARNT = {"text": TEXT, "entities": [{"entity": "PERSON", "start": 0, "end": 8}]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A spoken sentence."""
    path = tmp_path_factory.mktemp("speech") / "clip.wav"
    soundfile.write(path, speak(Espeak(), TEXT, "en-us", random.Random(0), False, False), 16000)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tiny_whisper, tiny_llama, clip, tmp_path_factory) -> str:
    """Folder of a tiny SENSE that has learnt that one sentence by heart: its words, its entity, its sentiment."""
    learnt = {"audio": clip, "text": TEXT, "entities": [ENTITY], "sentiment": "Positive"}
    return learn_by_heart(tiny_whisper, tiny_llama, [learnt], tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def pipe(checkpoint) -> SpokenLanguageUnderstandingPipeline:
    model, processor = app.load_checkpoint(checkpoint)
    return SpokenLanguageUnderstandingPipeline(model=model, processor=processor)


def shown(updates) -> list:
    """What the page shows in the end: status, transcript, sentiment, times; updates that skip leave what is there."""
    state = [None] * 4
    for update in updates:
        state = [old if new == gr.skip() else new for old, new in zip(state, update)]
    return state


def test_a_recording_is_understood(pipe, clip):
    status, transcript, sentiment, times = shown(app.understand(pipe, clip))
    assert re.search(r"^<div>\d\.\d s of audio, understood in \d", status)
    assert transcript == LEARNT
    assert max(sentiment, key=sentiment.get) == "Positive" and sum(sentiment.values()) == pytest.approx(1, abs=1e-3)
    start, end = map(float, re.findall(r'<td class="number">([\d.]+) s</td>', times))
    assert 0 <= start < end <= soundfile.info(clip).duration + 0.02
    left = re.search(r'class="sense-span" style="left:([\d.]+)%', times)
    assert float(left[1]) == pytest.approx(100 * start / soundfile.info(clip).duration, abs=0.5)


def test_text_appears_while_it_is_written(pipe, clip):
    events = list(app.listen(pipe, clip))
    partial = [event for event in events if isinstance(event, str)]
    assert len(partial) > 2 and all(b.startswith(a) for a, b in zip(partial, partial[1:]))
    assert [isinstance(event, dict) for event in events] == [False] * len(partial) + [True]
    assert events[-1]["text"] == TEXT


def test_who_stops_reading_ends_the_generation(pipe, clip):
    before = threading.active_count()
    events = app.listen(pipe, clip)
    next(events)
    begin = time.monotonic()
    events.close()
    assert time.monotonic() - begin < 0.2  # Gradio does this in its event loop: nobody waits
    while threading.active_count() > before:
        assert time.monotonic() - begin < 60, "the generation goes on"
        time.sleep(0.05)
    assert list(app.listen(pipe, clip))[-1]["text"] == TEXT  # and the model is free for the next


def test_highlights_go_on_behind_what_was_heard():
    heard = {"text": "hello", "entities": []}
    answer = "<PERSON> anna karenina </PERSON> left <PL"
    found = app.highlights(heard, answer)
    assert found["text"] == "hello anna karenina left"
    assert found["entities"] == [{"entity": "PERSON", "start": 6, "end": 19}]
    assert app.highlights(heard, "<PERSON> anna") == {"text": "hello anna", "entities": []}
    assert app.highlights({"text": ""}) == {"text": "", "entities": []}


def test_long_recordings_are_heard_window_by_window(pipe, clip, tmp_path):
    sentence, rate = soundfile.read(clip, dtype="float32")
    path = tmp_path / "long.wav"
    soundfile.write(path, np.tile(np.concatenate([sentence, np.zeros(5 * rate, np.float32)]), 6), rate)
    updates = list(app.understand(pipe, str(path)))
    bars = [re.search(r'<progress max="1" value="([\d.]+)"', u[0]) for u in updates if isinstance(u[0], str)]
    shares = [float(bar[1]) for bar in bars if bar]
    assert len(shares) > 2 and shares == sorted(shares) and 0.8 < shares[-1] <= 1
    status, transcript, _, times = shown(updates)
    assert "understood" in status
    found = re.findall(r'<div class="sense-name".*?>(.*?)</div>', times)
    assert len(found) == len(transcript["entities"]) > 2
    for entity, name in zip(transcript["entities"], found):
        assert name == f"{entity['entity']} {transcript['text'][entity['start'] : entity['end']]}"


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"not a sound\n" * 9, "notes.wav: not readable as audio"),
        (b"", "notes.wav: not readable as audio"),
        (np.zeros(0), "notes.wav: 0 samples"),
        (np.zeros(16000), "No speech was found"),
        (np.full(16000, np.nan), "NaN"),
        (None, "There is no recording yet"),
    ],
)
def test_what_can_not_be_heard_is_said_in_words(pipe, tmp_path, content, problem):
    path = tmp_path / "notes.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, 16000, subtype="FLOAT")
    status, *results = shown(app.understand(pipe, None if content is None else str(path)))
    assert 'role="alert"' in status and problem in status
    assert str(tmp_path) not in status  # where the server keeps it is nobody's business
    assert results == [{"text": "", "entities": []}, None, ""]


def test_names_on_the_waveform_do_not_cover_each_other_and_are_escaped():
    entities = [
        {"entity": "ORG", "word": "<b>&", "timestamp": (0.0, 0.4)},
        {"entity": "WHEN", "word": "may", "timestamp": (0.5, 0.7)},
        {"entity": "EVENT", "word": "the games", "timestamp": (9.0, 10.0)},
    ]
    html = app.draw_times(np.ones(50), 10.0, entities)
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html
    assert re.findall(r"top:(\d+)px;--tag", html) == ["0", "22", "0"]
    assert len({app.COLOUR_OF[entity["entity"]] for entity in entities}) == 3
    assert app.COLOUR_OF["GPE"] == app.COLOUR_OF["PLACE"]


def test_waveform_of_any_length_has_few_points_and_its_true_length(tmp_path):
    path = tmp_path / "steps.flac"
    soundfile.write(path, np.repeat([0.0, 0.5, 0.25, 0.0], 44100 * 30), 44100)
    peaks, seconds, _ = app.read_waveform(str(path))
    assert seconds == 120 and 1400 < len(peaks) <= 1501
    quarters = np.array_split(peaks, 4)
    assert [float(np.median(quarter)) for quarter in quarters] == pytest.approx([0, 1, 0.5, 0], abs=0.1)


def test_examples_are_spoken_or_a_folders(tmp_path, clip):
    made = app.make_examples(tmp_path)
    assert len(made) == 3
    for path, text in made:
        assert app.read_waveform(path)[2] and 3 < len(text.split())
    shutil.copy(clip, tmp_path / "one.wav")
    (tmp_path / "README.md").write_text("no audio")
    assert (str(tmp_path / "one.wav"), "one") in app.find_examples(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no audio"):
        app.find_examples(tmp_path / "empty")


def test_the_model_comes_from_the_environment_or_with_the_package(monkeypatch):
    monkeypatch.setenv("SENSE_MODEL", "user/model")
    assert app.parse_args([]).model == "user/model"
    assert app.parse_args(["folder"]).model == "folder"
    monkeypatch.delenv("SENSE_MODEL")
    assert app.parse_args([]).model == "sense-mini"


def test_a_spaces_own_examples_are_offered(tmp_path, monkeypatch):
    assert app.parse_args([]).examples is None
    monkeypatch.setattr(app, "__file__", str(tmp_path / "app.py"))
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "notes.txt").write_text("of something else")
    assert app.parse_args([]).examples is None
    (tmp_path / "examples" / "one.wav").touch()
    assert app.parse_args([]).examples == tmp_path / "examples"
    assert app.parse_args(["--examples", str(tmp_path)]).examples == tmp_path


def test_a_space_is_complete(tmp_path):
    make_space(tmp_path / "space", "user/model")
    settings = yaml.safe_load((tmp_path / "space/README.md").read_text(encoding="utf-8").split("---")[1])
    assert settings["sdk"] == "gradio" and settings["sdk_version"] == gr.__version__
    assert settings["models"] == ["user/model"] and len(settings["short_description"]) <= 60  # the Hub's limit
    needed = (tmp_path / "space/requirements.txt").read_text()
    assert {"transformers", "gradio", "silero-vad"} <= set(re.findall(r"^[\w-]+", needed, flags=re.MULTILINE))
    assert "pytest" not in needed
    # It runs on its own files: -I keeps this repository off the path.
    ours = ("app", "benchmarks", "eval_sense", "modeling_sense", "processing", "scripts", "train_sense")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import app;"
    code += f"ours = [m for name, m in sys.modules.items() if name.partition('.')[0] in {ours}];"
    code += "print(*(m.__file__ for m in ours), sep='\\n')"
    space = str(tmp_path / "space")
    ran = subprocess.run([sys.executable, "-I", "-c", code, space], cwd=space, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    files = ran.stdout.splitlines()
    assert len(files) > 10 and all(file.startswith(space) for file in files), ran.stdout
    with pytest.raises(ValueError, match="exists already"):
        make_space(tmp_path / "space", "user/model")


@pytest.fixture(scope="module")
def address(checkpoint):
    """Where the page is served, as `python app.py MODEL` does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threading.Thread(target=app.main, args=([checkpoint, "--port", str(port)],), daemon=True).start()
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            httpx.get(address, timeout=30).raise_for_status()
            break
        except httpx.TransportError:
            time.sleep(0.1)
    yield address
    gr.close_all()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(60_000)
    page.goto(address)
    yield page
    page.close()


def test_an_upload_is_understood_in_the_browser(page, address, clip):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator("input[type=file]").set_input_files(clip)
    page.get_by_role("button", name="Play", exact=True).wait_for()
    page.get_by_role("button", name="Understand").press("Enter")
    page.get_by_text("understood in").wait_for()
    marked = page.locator("#transcript .highlighted")
    assert marked.locator(".text").inner_text() == "the user" and marked.locator(".label").inner_text() == "PERSON"
    assert " ".join(page.locator("#transcript .text").all_inner_texts()).split() == TEXT.split()
    assert page.locator("#sentiment h2").inner_text() == "Positive" and "%" in page.locator("#sentiment").inner_text()
    row = page.get_by_role("row", name=re.compile("PERSON the user"))
    assert len(re.findall(r"\d\.\d\d s", row.inner_text())) == 2
    assert page.get_by_role("img", name=re.compile(r"Waveform of .* seconds with 1 entities")).is_visible()
    colour = "getComputedStyle(document.querySelector('{}')).{}"
    label = page.evaluate(colour.format("#transcript .label", "backgroundColor"))
    assert label == page.evaluate(colour.format(".sense-span", "borderLeftColor"))  # one colour, in both places
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # a narrow screen needs no sideways scrolling
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)


def test_a_text_called_wav_is_refused_in_words_and_an_example_understood_after_it(page, tmp_path):
    (tmp_path / "letter.wav").write_text("Dear model, ...")
    page.locator("input[type=file]").set_input_files(tmp_path / "letter.wav")
    page.get_by_role("button", name="Clear").wait_for()
    page.get_by_role("button", name="Understand").click()
    alert = page.get_by_role("alert").filter(has_text="not readable as audio")
    alert.wait_for()
    assert alert.inner_text().startswith("letter.wav: not readable as audio")
    assert page.locator("#transcript .highlighted").count() == 0
    page.locator(".gallery-item").first.click()
    page.get_by_text("understood in").wait_for()
    assert page.get_by_role("img", name=re.compile("Waveform")).is_visible() and not alert.is_visible()


def test_files_of_the_server_are_out_of_reach(address, tmp_path):
    secret = tmp_path / "secret.wav"
    secret.write_text("for nobody")
    for path in (secret, f"../../..{secret}", "/etc/passwd"):
        answer = httpx.get(f"{address}/gradio_api/file={path}")
        assert answer.status_code in (403, 404) and "for nobody" not in answer.text
