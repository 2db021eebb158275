"""Draws the noise's seeds from torch's generators; on CUDA without launching a kernel.

A CUDA generator is a seed and an offset, both known to the host; every random operation increases the offset. The host
computes a 64-bit key from them: the output of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) at that offset, with the mixed seed as its state. `torch.manual_seed` and activation
checkpointing restore seed and offset, so they restore the key too.
"""

import functools
import threading

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_STEP = 4  # offsets are multiples of it
_lock = threading.Lock()  # two threads must not read the same offset


def mix64(z):
    """Apply SplitMix64's finalizer, a permutation of 64-bit numbers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


@functools.lru_cache
def _mixed_seed(seed):
    return mix64(seed & _MASK)


def known_to_host(x):
    """Whether the host knows the offset of a generator for `x`: on CUDA, except during graph capture."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def default_generator(device):
    return torch.cuda.default_generators[device.index]


def draw_key(generator):
    """Return a key for the present state of `generator`, an int in [2^62, 2^63), and advance the generator.

    The upper bits are fixed because Triton compiles a kernel anew for an integer of another width or sign.
    """
    with _lock:
        offset = generator.get_offset()
        generator.set_offset(offset + _STEP)
    key = mix64((_mixed_seed(generator.initial_seed()) + (offset // _STEP + 1) * _GOLDEN) & _MASK)
    return key >> 2 | 1 << 62
