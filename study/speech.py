"""The Free Spoken Digit Dataset: from its wav files to one archive, and from that to log-mel frames."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.io import wavfile

URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
LICENSE = "CC BY-SA 4.0"
ARCHIVE = "fsdd.npz"
BANDS = 40
WINDOW_MS, HOP_MS = 25, 20


def convert(source, folder):
    """Write the archive of a folder of wav files, {digit}_{speaker}_{take}.wav, into `folder`; returns its path.

    In the order of the names: `audio`, all samples one after the other, int16; `offset` (n + 1,), int64, where each
    begins; `digit` int8, `speaker` text and `take` int16, each (n,); `sample_rate` int32. Mono, 16 bits, one rate.
    """
    paths = sorted(Path(source).glob("*.wav"), key=lambda path: path.name)
    remedy = f"Remedy: the folder recordings/ of {URL}, unpacked."
    if not paths:
        raise ValueError(f"recordings is {source}, which holds no wav file. {remedy}")
    names = [re.fullmatch(r"(\d)_([a-z]+)_(\d+)\.wav", path.name) for path in paths]
    if None in names:
        found = paths[names.index(None)].name
        raise ValueError(f"recordings holds {found}, expected names like 7_theo_12.wav. {remedy}")
    rates, samples = zip(*(wavfile.read(path) for path in paths), strict=True)
    for path, rate, x in zip(paths, rates, samples, strict=True):
        if (rate, x.dtype, x.ndim) != (rates[0], np.int16, 1):
            raise ValueError(
                f"{path.name} holds {x.dtype} of shape {x.shape} at {rate} Hz, expected int16 of one channel at "
                f"{rates[0]} Hz, as in {paths[0].name}. {remedy}"
            )
    digits, speakers, takes = zip(*(name.groups() for name in names), strict=True)
    path = Path(folder) / ARCHIVE
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path, audio=np.concatenate(samples), offset=np.cumsum([0, *map(len, samples)]), digit=np.array(digits, np.int8),
        speaker=np.array(speakers), take=np.array(takes, np.int16), sample_rate=np.int32(rates[0]),
    )  # fmt: skip
    return path


@cache
def recordings(source):
    """The arrays of the archive in a folder, by name: see `convert`."""
    path = Path(source) / ARCHIVE
    if not path.exists():
        raise ValueError(
            f"data is {source}, which holds no {ARCHIVE}. Remedy: python -m study data says how to get it."
        )
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


@cache
def frames(source, index):
    """Log-mel frames (length, BANDS) of a recording, each band at mean 0, all at deviation 1."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    arrays = recordings(source)
    rate = int(arrays["sample_rate"])
    window, hop = rate * WINDOW_MS // 1000, rate * HOP_MS // 1000
    start, stop = arrays["offset"][index : index + 2]
    samples = arrays["audio"][start:stop].astype(np.float64) / 2**15
    filters = mel_filter_bank(129, BANDS, 50, rate / 2, rate)
    bands = spectrogram(
        np.pad(samples, (0, max(0, window - len(samples)))), window_function(window, "hann"), window, hop,
        fft_length=256, power=2.0, mel_filters=filters, log_mel="log",
    ).T  # fmt: skip
    found = torch.from_numpy(bands).float()
    found = found - found.mean(0)
    return found / found.std().clamp_min(1e-6)
