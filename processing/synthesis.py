"""
Speech to train on without a download: espeak-ng speaks sentences of a grammar.

    python -m processing.synthesis DIR --grammar quickstart --train 2000 --dev 60 --test 100 [--noise] [--reverb]

Writes DIR/{train,dev,test}/ in the audiofolder convention: 16 kHz FLAC files and a metadata.jsonl with `file_name,
text, entities, sentiment, language, duration, voice`. The same settings give the same bytes. Sentences, the fillers of
their entities (see processing/grammar.py) and voices are disjoint between the splits.
"""

import argparse
import ctypes
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import torch
import torchaudio
from tqdm.auto import tqdm

from .grammar import GRAMMARS, SPLITS, sentences
from .report import write_text


RATE = 16000
# Accent and speaker, as espeak-ng names them. No speaker and accent together is in two splits.
VOICES = {
    "train": "en-us en-us+m1 en-us+m3 en-us+m7 en-us+f1 en-us+f2 en-us+f4 en+m2 en+f5 en-gb-x-rp+m3".split(),
    "dev": ["en-us+m2", "en+f3"],
    "test": ["en-us+f3", "en+m3", "en-us+m6"],
}
WORDS_PER_MINUTE = (145, 185)
PITCH = (35, 65)  # espeak's scale: 50 is the voice's own


class Espeak:
    """
    The espeak-ng library that the package `espeakng-loader` brings, called directly: no program needs installing.

    Constants and signatures are those of espeak-ng's `speak_lib.h`. What it says depends, by a few samples, on what it
    said before (its pitch flutters on from clip to clip). So each object loads a copy of the library, with a state of
    its own: the same calls on a new object give the same samples.
    """

    _SYNCHRONOUS, _NO_EXIT = 2, 1 << 15
    _RATE, _PITCH = 1, 3
    _UTF8 = 1
    _CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

    def __init__(self):
        with tempfile.TemporaryDirectory() as folder:
            self._library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
        data = espeakng_loader.get_data_path().encode()
        self.sampling_rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, data, self._NO_EXIT)
        if self.sampling_rate <= 0:
            raise RuntimeError(f"espeak-ng can't read its data in {data.decode()}")
        self._samples: list[np.ndarray] = []
        self._callback = self._CALLBACK(self._collect)  # kept: the library holds a bare pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, number: int, events) -> int:
        if samples and number:
            self._samples.append(np.ctypeslib.as_array(samples, (number,)).copy())
        return 0  # go on

    def say(self, text: str, voice: str, words_per_minute: int = 170, pitch: int = 50) -> np.ndarray:
        """
        Speaks `text`.

        Returns:
            float32 samples `(samples,)` at `sampling_rate`.

        Raises:
            ValueError: espeak-ng has no such voice.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self._library.espeak_ng_SetRandSeed(0)  # it seeds by the clock else
        self._library.espeak_SetParameter(self._RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(self._PITCH, pitch, 0)
        self._samples = []
        content = text.encode() + b"\0"
        self._library.espeak_Synth(content, len(content), 0, 0, 0, self._UTF8, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._samples).astype(np.float32) / 32768


def add_noise(clip: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """White noise at 10 to 25 dB below the speech."""
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    return torchaudio.functional.add_noise(clip, noise, torch.tensor(rng.uniform(10, 25)))


def add_reverberation(clip: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """A room: noise that decays by 60 dB in 0.1 to 0.4 s, after the direct sound."""
    seconds = rng.uniform(0.1, 0.4)
    time = torch.arange(int(seconds * RATE)) / RATE
    noise = torch.randn(time.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    room = 0.05 * noise * 10 ** (-3 * time / seconds)
    room[0] = 1.0
    return torchaudio.functional.fftconvolve(clip, room)[: len(clip)]


def speak(espeak: Espeak, text: str, voice: str, rng: random.Random, noise: bool, reverb: bool) -> np.ndarray:
    """One clip at 16 kHz, peak 0.5, at a speed and pitch drawn by `rng`."""
    clip = espeak.say(text, voice, rng.randint(*WORDS_PER_MINUTE), rng.randint(*PITCH))
    clip = torchaudio.functional.resample(torch.from_numpy(clip), espeak.sampling_rate, RATE)
    if reverb:
        clip = add_reverberation(clip, rng)
    if noise:
        clip = add_noise(clip, rng)
    return (0.5 * clip / clip.abs().max()).numpy()


def write_split(folder: Path, split: str, number: int, args: argparse.Namespace):
    """Speaks one split into `folder`, by way of a temporary one: a split is there whole or not at all."""
    work = folder.with_name(f".{split}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    espeak, rng = Espeak(), random.Random(f"{args.seed} {split}")
    lines = []
    for i, utterance in enumerate(tqdm(sentences(args.grammar, split, number, args.seed), desc=split, unit="clip")):
        voice = rng.choice(VOICES[split])
        clip = speak(espeak, utterance.text, voice, rng, args.noise, args.reverb)
        name = f"{split}-{i:05d}.flac"
        soundfile.write(work / name, clip, RATE, subtype="PCM_16")
        line = {"file_name": name, "text": utterance.text, "entities": utterance.entities}
        line |= {"sentiment": utterance.sentiment, "language": "en", "duration": len(clip) / RATE, "voice": voice}
        lines.append(json.dumps(line))
    (work / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(work, folder)


def main(argv: list[str] | None = None) -> None:
    """
    Raises:
        ValueError: the folder holds speech of other settings.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--grammar", choices=GRAMMARS, default="full")
    for split, number in zip(SPLITS, (20000, 500, 1000)):
        parser.add_argument(f"--{split}", type=int, default=number, help=f"clips (default: {number})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", action="store_true", help="white noise at 10 to 25 dB")
    parser.add_argument("--reverb", action="store_true", help="rooms of 0.1 to 0.4 s")
    args = parser.parse_args(argv)

    settings = {name: value for name, value in vars(args).items() if name != "folder"}
    about = args.folder / "settings.json"
    if about.is_file() and json.loads(about.read_text()) != settings:
        raise ValueError(f"{args.folder} holds speech of other settings ({about}): name another folder or remove it")
    args.folder.mkdir(parents=True, exist_ok=True)
    write_text(about, json.dumps(settings, indent=2) + "\n")
    for split in SPLITS:
        if not (args.folder / split).is_dir():  # what is there is whole: an interrupted run goes on after it
            write_split(args.folder / split, split, getattr(args, split), args)


if __name__ == "__main__":
    main()
