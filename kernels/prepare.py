"""What rows need of the parameters, made once for all of them, in the dtype that rows are computed in."""

import triton
import triton.language as tl

from .noise import load_key
from .posterior import load_affine, load_variances, prepared_at
from .rows import BATCH_SIZES, group_start


@triton.jit(do_not_specialize=BATCH_SIZES)
def prepare_kernel(
    parameters, seed, prepared_ptr, n_draws, rows_per_draw, all_draws, all_inner,
    LEAST: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N features of one draw: their scale and shift, or both variances where rows share no draw.

    prepared: (groups * n_draws, 2, N), or 1 without a shift. LEAST: of a shift's variance.
    """
    ACC: tl.constexpr = prepared_ptr.dtype.element_ty
    PIECES: tl.constexpr = (TILE.N + TILE.BLOCK_N - 1) // TILE.BLOCK_N
    draw, first_col = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES * TILE.BLOCK_N
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    if MODE.NOISE == "shared":
        k0, k1 = load_key(seed)
        _, first_draw = group_start(n_draws, rows_per_draw, all_draws, all_inner, MODE)
        scale, shift = load_affine(None, parameters, k0, k1, draw, first_draw, n_draws, first_col, MODE, TILE, ACC)
    else:
        scale, shift = load_variances(None, parameters, first_col, LEAST, MODE, TILE, ACC)
    own = prepared_at(draw, n_draws, parameters, TILE) + cols
    tl.store(prepared_ptr + own, scale, cols < TILE.N)
    if parameters.bias is not None:
        tl.store(prepared_ptr + own + TILE.N, shift, cols < TILE.N)
