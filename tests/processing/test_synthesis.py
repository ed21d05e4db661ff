"""The grammar and the speech made from it."""

import hashlib
import json

import numpy as np
import pytest
import soundfile

from processing import grammar
from processing.grammar import GRAMMARS, SPLITS, sentences
from processing.synthesis import RATE, VOICES, Espeak, main


NUMBERS = {"train": 2000, "dev": 200, "test": 200}


@pytest.fixture(scope="module")
def espeak():
    return Espeak()


@pytest.fixture(params=GRAMMARS)
def utterances(request):
    return {split: sentences(request.param, split, number) for split, number in NUMBERS.items()}


def names(utterances, several_words=False):
    found = {u.text[start : start + length] for u in utterances for _, start, length in u.entities}
    return {name for name in found if " " in name} if several_words else found


def test_the_full_grammar_has_twenty_thousand_sentences():
    assert len({u.text for u in sentences("full", "train", 20_000)}) == 20_000


def test_sentences_are_disjoint_and_plain(utterances):
    texts = {split: {u.text for u in some} for split, some in utterances.items()}
    assert all(len(texts[split]) == number for split, number in NUMBERS.items())
    assert (
        not texts["train"] & texts["dev"] and not texts["train"] & texts["test"] and not texts["dev"] & texts["test"]
    )
    assert set("".join(set().union(*texts.values()))) <= set("abcdefghijklmnopqrstuvwxyz' ")


def test_entities_stand_where_they_say_and_moods_vary(utterances):
    for utterance in utterances["train"]:
        assert utterance.entities
        for tag, start, length in utterance.entities:
            before, after = utterance.text[:start], utterance.text[start + length :]
            assert tag.isupper() and length > 0
            assert (not before or before.endswith(" ")) and (not after or after.startswith(" "))
    assert {u.sentiment for u in utterances["test"]} == {"Positive", "Neutral", "Negative"}


def test_full_grammar_never_repeats_an_entity_in_another_split():
    found = {split: names(sentences("full", split, 3000)) for split in SPLITS}
    assert not found["train"] & (found["dev"] | found["test"]) and not found["dev"] & found["test"]


def test_quickstart_shares_words_but_not_names():
    found = {split: sentences("quickstart", split, number) for split, number in NUMBERS.items()}
    vocabulary = {split: {w for u in some for w in u.text.split()} for split, some in found.items()}
    assert 150 <= len(vocabulary["train"]) <= 300 and vocabulary["test"] <= vocabulary["train"]
    several = {split: names(some, several_words=True) for split, some in found.items()}
    assert not several["train"] & several["test"] and not several["train"] & several["dev"]


def test_voices_are_disjoint_and_all_speak(espeak):
    assert len(set(sum(VOICES.values(), []))) == sum(map(len, VOICES.values()))
    sounds = set()
    for voice in sum(VOICES.values(), []):
        clip = espeak.say("hello there", voice)
        assert len(clip) > 0.3 * espeak.sampling_rate and np.abs(clip).max() > 0.05, voice
        sounds.add(hashlib.sha256(clip.tobytes()).hexdigest())
    assert len(sounds) == sum(map(len, VOICES.values()))


def test_unknown_names_are_refused(espeak, monkeypatch):
    with pytest.raises(ValueError, match="no voice 'en-mars'"):
        espeak.say("hello", "en-mars")
    with pytest.raises(ValueError, match="unknown grammar 'tiny'; there are quickstart, full"):
        sentences("tiny", "train", 1)
    monkeypatch.setattr(grammar, "QUICK_TEMPLATES", {"Neutral": ["{PERSON:first last} left"]})
    with pytest.raises(ValueError, match="the quickstart grammar has fewer than 1000 sentences for dev"):
        sentences("quickstart", "dev", 1000)


@pytest.mark.parametrize("extra", [[], ["--noise", "--reverb"]])
def test_same_settings_same_bytes(tmp_path, extra):
    def digest(folder):
        main([str(folder), "--grammar", "quickstart", "--train", "4", "--dev", "2", "--test", "2", *extra])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    first = digest(tmp_path / "a")
    assert first == digest(tmp_path / "b")
    assert len(first) == 8 + 3 + 1
    line = json.loads((tmp_path / "a" / "train" / "metadata.jsonl").read_text().splitlines()[0])
    samples, rate = soundfile.read(tmp_path / "a" / "train" / line["file_name"])
    assert rate == RATE and len(samples) / rate == line["duration"] > 1 and np.abs(samples).max() > 0.4
    assert line["voice"] in VOICES["train"]


def test_noise_and_reverberation_change_the_sound(tmp_path):
    clips = []
    for extra in ([], ["--noise"], ["--reverb"]):
        folder = tmp_path / "-".join(["x", *extra])
        main([str(folder), "--grammar", "quickstart", "--train", "1", "--dev", "1", "--test", "1", *extra])
        clips.append(soundfile.read(folder / "test" / "test-00000.flac")[0])
    plain, noisy, roomy = (clip[: min(map(len, clips))] for clip in clips)
    speech = plain * (noisy @ plain) / (plain @ plain)  # its loudness in the noisy clip
    assert 10 < 10 * np.log10((speech**2).sum() / ((noisy - speech) ** 2).sum()) < 25
    assert np.abs(roomy - plain).max() > 0.01


def test_other_settings_in_the_same_folder_are_refused_and_a_broken_run_goes_on(tmp_path):
    numbers = ["--grammar", "quickstart", "--train", "2", "--dev", "1", "--test", "1"]
    main([str(tmp_path), *numbers])
    kept = (tmp_path / "train" / "metadata.jsonl").stat().st_mtime_ns
    (tmp_path / "test").rename(tmp_path / ".test.tmp")  # as if interrupted
    main([str(tmp_path), *numbers])
    assert (tmp_path / "train" / "metadata.jsonl").stat().st_mtime_ns == kept and (tmp_path / "test").is_dir()
    with pytest.raises(ValueError, match="holds speech of other settings"):
        main([str(tmp_path), *numbers, "--seed", "1"])
