"""Seeds of the noise from torch's generators, on CUDA without a kernel of their own.

A CUDA generator is a seed and an offset, both known to the host, which every random operation moves on. They name a
place in a stream, so a 64-bit key can be made of them on the host: the output at that place of SplitMix64 (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) under a mixed seed. What restores a
generator's state, `torch.manual_seed` or activation checkpointing, restores the key.
"""

import functools
import threading

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 4  # offsets are multiples of it
_lock = threading.Lock()  # two threads must not read the same offset


def mix64(z):
    """SplitMix64's finalizer, a permutation of 64-bit numbers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


@functools.lru_cache
def _mixed_seed(seed):
    return mix64(seed & _MASK)


def known_to_host(x):
    """Whether a generator for `x` is at a place that the host knows: on CUDA, but not while a graph is captured."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def default_generator(device):
    return torch.cuda.default_generators[device.index]


def draw_key(generator):
    """A key in [2^62, 2^63), an int, of where `generator` stands; moves it on.

    The upper bits are fixed as Triton compiles a kernel anew for an integer of another width or sign.
    """
    with _lock:
        offset = generator.get_offset()
        generator.set_offset(offset + _STEP)
    key = mix64((_mixed_seed(generator.initial_seed()) + (offset // _STEP + 1) * _GOLDEN) & _MASK)
    return key >> 2 | 1 << 62
