"""Scale and shift, or their means and variances, made once for all rows, in the dtype that rows are computed in."""

import triton
import triton.language as tl

from .gaussian import load_affine, load_variances, prepared_at
from .noise import load_key
from .rows import BATCH_SIZES, group_start


@triton.jit(do_not_specialize=BATCH_SIZES)
def prepare_kernel(
    parameters, seed, prepared_ptr, n_draws, rows_per_draw, all_draws, all_inner,
    LEAST: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N features of one draw, or of one group where every row has a draw of its own.

    `prepared_at` says what is stored where. LEAST: the least variance of a shift.
    """
    ACC: tl.constexpr = prepared_ptr.dtype.element_ty
    PIECES: tl.constexpr = (TILE.N + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    draw, first_col = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES * TILE.BLOCK_N
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    k0, k1 = load_key(seed)
    _, first_draw = group_start(n_draws, rows_per_draw, all_draws, all_inner, MODE)
    start, half = prepared_at(draw, n_draws, parameters, MODE, TILE.N)
    own_ptr = prepared_ptr + start
    scale, shift = load_affine(None, parameters, k0, k1, draw, first_draw, n_draws, first_col, MODE, TILE, ACC)
    _store(own_ptr, scale, shift, cols, parameters.bias is not None, TILE.N)
    if MODE.NOISE == "merged":
        scale_var, shift_var = load_variances(None, parameters, first_col, LEAST, MODE, TILE, ACC)
        _store(own_ptr + half, scale_var, shift_var, cols, parameters.bias is not None, TILE.N)


@triton.jit
def _store(ptr, scale, shift, cols, HAS_BIAS: tl.constexpr, N: tl.constexpr):
    tl.store(ptr + cols, scale, cols < N)
    if HAS_BIAS:
        tl.store(ptr + N + cols, shift, cols < N)
