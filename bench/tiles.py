"""The tiles that a kernel could have beside the tuned one, and what the compiler makes of them."""

import itertools
from unittest import mock

import torch

from klnorm import tuning

from .launches import ARCHITECTURES, calls, compile_ahead
from .report import reason
from .sass import usage

DIRECTIONS = "forward", "backward", "sums", "finalize"
ELEMENTS = 64 << 20
CAPABILITY, MULTIPROCESSORS = ARCHITECTURES["sm_90"]  # where there is no GPU
REGISTERS, SHARED_BYTES, MOST_WARPS, MOST_PROGRAMS = 65536, 227 << 10, 64, 32  # of a multiprocessor


def tuner_of(direction, noise, n):
    """(name of the function of `tuning` whose answer is swept, its arguments)."""
    merged = noise == "token"
    if direction == "backward":
        return ("dx_wide_shape", (n, 2)) if tuning.is_wide(n, 2) else ("backward_shape", (n, 2, merged))
    return {
        "forward": ("forward_shape", (n, 2)),
        "sums": ("sums_wide_shape", (n, 2, merged)),
        "finalize": ("finalizer_shape", (n,)),
    }[direction]


def candidates(direction, noise, n):
    """Shapes, the tuned one first."""
    merged, wide = noise == "token", tuning.is_wide(n, 2)
    if direction == "sums" and not wide:
        return []
    name, arguments = tuner_of(direction, noise, n)
    tuned = getattr(tuning, name)(*arguments)
    if direction == "finalize":
        shapes = itertools.product((64, 128, 256, 512), (8, 16, 32), (2, 4, 8))
        shapes = [(m, n, warps) for m, n, warps in shapes if 4 <= m * n // (32 * warps) <= 64]
    elif direction == "sums":
        shapes = itertools.product((1,), (512, 1024, 2048), (4, 8), (1, 2) if merged else (3, 4), (2, 4, 8))
    elif wide:
        shapes = itertools.product((1,), (1024, 2048, 4096, 8192), (4, 8, 16))
    else:
        rows = {max(1, elements // n) for elements in (512, 1024, 2048, 4096)}
        shapes = [(m, n, warps) for m in rows for warps in (1, 2, 4, 8, 16) if 8 <= m * n // (32 * warps) <= 64]
        if direction == "backward":
            tiles = [tile for tile in {*shapes, tuned[:3]} if tile[0] * tile[1] <= 32 * 32 * tile[2]]
            shapes = itertools.product(tiles, (1, 2) if merged else (1, 3, 4), (1, 2, 3, 4))
            shapes = [(*tile, stages, max(1, k * 4 // tile[2])) for tile, stages, k in shapes]
    return list(dict.fromkeys([tuned, *(tuning.Shape(*shape) for shape in shapes)]))


def call_of(direction, noise, n, shape, multiprocessors=MULTIPROCESSORS, device="meta"):
    """(Call, arguments of its launch) of a candidate."""
    with mock.patch.object(tuning, tuner_of(direction, noise, n)[0], return_value=shape):
        return calls(n, torch.bfloat16, noise, multiprocessors, ELEMENTS // n, device)[direction]


def compile_candidate(case, capability):
    """What the compiler made of a candidate, which it leaves in Triton's cache as well."""
    *_, shape = case
    found = dict.fromkeys(("registers", "spilled", "shared", "warps", "why"))
    try:
        compiled = compile_ahead(*call_of(*case), capability)
        registers, spilled = usage(compiled)
    except Exception as error:  # a tile may be too large for the compiler
        return found | {"why": reason(error)}
    shared = compiled.metadata.shared
    warps = resident_warps(registers, shared, shape.num_warps)
    return found | {"registers": registers, "spilled": spilled, "shared": shared, "warps": warps}


def resident_warps(registers, shared, num_warps):
    """Warps of programs of `num_warps` that a multiprocessor holds."""
    by_registers = REGISTERS // (32 * num_warps * -(-registers // 8) * 8)
    by_shared = SHARED_BYTES // (shared + 1024)  # each program has a kilobyte beside
    return num_warps * min(by_registers, by_shared, MOST_WARPS // num_warps, MOST_PROGRAMS)
