"""Small kernels that write the noise of `kernels/noise.py` to memory, for tests to look at."""

import torch
import triton
import triton.language as tl

from klnorm import launch
from klnorm.kernels.noise import load_key, normals, philox4x32


@triton.jit
def _philox_kernel(counter_ptr, key_ptr, out_ptr, n, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    c0 = tl.load(counter_ptr + 4 * i, mask).to(tl.uint32)
    c1 = tl.load(counter_ptr + 4 * i + 1, mask).to(tl.uint32)
    c2 = tl.load(counter_ptr + 4 * i + 2, mask).to(tl.uint32)
    c3 = tl.load(counter_ptr + 4 * i + 3, mask).to(tl.uint32)
    k0 = tl.load(key_ptr + 2 * i, mask).to(tl.uint32)
    k1 = tl.load(key_ptr + 2 * i + 1, mask).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1, ROUNDS)
    tl.store(out_ptr + 4 * i, w0.to(tl.int64), mask)
    tl.store(out_ptr + 4 * i + 1, w1.to(tl.int64), mask)
    tl.store(out_ptr + 4 * i + 2, w2.to(tl.int64), mask)
    tl.store(out_ptr + 4 * i + 3, w3.to(tl.int64), mask)


def kernel_philox(counter, key, rounds):
    """Words (n, 4) of counters (n, 4) and keys (n, 2), all int64 holding 32-bit values."""
    out = torch.empty_like(counter)
    _philox_kernel[(triton.cdiv(len(counter), 128),)](counter, key, out, len(counter), ROUNDS=rounds, BLOCK=128)
    return out


@triton.jit
def _normals_kernel(
    seed_ptr, draw_ptr, out_ptr, n_draws, n_cols, first_col,
    STREAM: tl.constexpr, FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.program_id(1) * BLOCK_N
    k0, k1 = load_key(seed_ptr)
    draw = tl.load(draw_ptr + row, row < n_draws).to(tl.uint32)
    z = normals(k0, k1, draw, first_col + col, STREAM, BLOCK_N, FAST)
    cols = col + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + row * n_cols + cols, z, (row < n_draws) & (cols < n_cols))


def kernel_normals(seed, draw, n_cols, stream, first_col=0):
    """The kernels' normals (D, n_cols) of `draw` (D,), int64, and of the features from `first_col` on."""
    out = torch.empty((len(draw), n_cols), device=seed.device)
    tile = 256 if seed.is_cuda else 1 << 16  # in the interpreter time is in the number of programs
    if out.numel():
        block_n = min(tile, max(8, triton.next_power_of_2(n_cols)))
        block_m = min(tile // block_n, triton.next_power_of_2(len(draw)))
        _normals_kernel[(triton.cdiv(len(draw), block_m), triton.cdiv(n_cols, block_n))](
            seed, draw, out, len(draw), n_cols, first_col, STREAM=stream, FAST=launch._fast(seed.device),
            BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
    return out
