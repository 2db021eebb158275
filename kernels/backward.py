"""Backward of rows that fit into registers: dx, and column sums per program, which finalize.py makes gradients of."""

import triton
import triton.language as tl

from .gaussian import load_affine
from .gradients import add_sums, draws_of, load_normalized, merged_cotangent, store_dx, store_sums
from .noise import load_key
from .rows import BATCH_SIZES, among_all, group_start, rows_of, tiles_of


@triton.jit
def _piece(
    x_ptr, dy_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, x_stride, dy_stride, row, row_mask, scale,
    draw, first_draw, n_draws, first_col, sums, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(xhat, dxhat, rstd, sums of dxhat and dxhat * xhat along rows [BLOCK_M, 1], column sums with this tile added)."""
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    xhat, dy, rstd = load_normalized(
        x_ptr, dy_ptr, statistics_ptr, row, row_mask, cols, x_stride, dy_stride, MODE, TILE
    )
    u = dy
    if MODE.NOISE == "merged":  # loads parameters for every tile: kept, they would take the sums' registers
        u, scale_var = merged_cotangent(xhat, dy, row, prepared_ptr, parameters, k0, k1, first_col, MODE, TILE)
        scale, _ = load_affine(
            prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, first_col, MODE, TILE, xhat.dtype
        )
        dxhat = dy * scale + u * (scale_var * xhat)
    else:
        dxhat = dy * scale
    sums = add_sums(sums, xhat, dy, u, parameters.bias is not None, MODE)
    if MODE.IS_RMS:
        along_xhat = tl.sum(dxhat * xhat, axis=1, keep_dims=True)
        along_one = tl.zeros_like(along_xhat)
    else:  # both sums in one reduction, as every reduction waits at barriers
        one, along = tl.split(tl.sum(tl.join(dxhat, dxhat * xhat), axis=1))
        along_one, along_xhat = one[:, None], along[:, None]
    return xhat, dxhat, rstd, along_one, along_xhat, sums


@triton.jit
def _rows_of_draw(
    x_ptr, dy_ptr, dsum_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, outputs,
    x_stride, dy_stride, dsum_stride, n_draws, inner, rows_per_draw, draw, first_row, first_draw, first_tile, step,
    MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store dx of every `step`-th tile of a draw; return the column sums [BLOCK_M, BLOCK_N] of both halves of rows.

    A row is taken in two halves where the column sums leave too few registers for the parameters of a whole row.
    """
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    HALVES: tl.constexpr = TILE.N > TILE.BLOCK_N
    zeros = tl.full((TILE.BLOCK_M, TILE.BLOCK_N), 0.0, ACC)
    sums = zeros, zeros, zeros, zeros
    more_sums = sums
    scale = zeros
    if MODE.NOISE != "merged":
        scale, _ = load_affine(prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, 0, MODE, TILE, ACC)
    for tile in tl.range(first_tile, tiles_of(rows_per_draw, TILE.BLOCK_M), step, num_stages=TILE.STAGES):
        row, row_mask = rows_of(tile, draw, n_draws, inner, rows_per_draw, MODE, TILE.BLOCK_M)
        row = among_all(first_row, row, MODE)
        xhat, dxhat, rstd, along_one, along_xhat, sums = _piece(
            x_ptr, dy_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, x_stride, dy_stride, row, row_mask, scale,
            draw, first_draw, n_draws, 0, sums, MODE, TILE,
        )  # fmt: skip
        if HALVES:
            tl.debug_barrier()  # or the compiler would load the second half before it is done with the first
            more_xhat, more_dxhat, rstd, more_one, more_along, more_sums = _piece(
                x_ptr, dy_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, x_stride, dy_stride, row, row_mask,
                scale, draw, first_draw, n_draws, TILE.BLOCK_N, more_sums, MODE, TILE,
            )  # fmt: skip
            along_one += more_one
            along_xhat += more_along
        along_one, along_xhat = along_one / TILE.N * rstd, along_xhat / TILE.N * rstd
        store_dx(outputs, dsum_ptr, xhat, dxhat, rstd, along_one, along_xhat, row, row_mask, 0, dsum_stride, MODE, TILE)
        if HALVES:
            store_dx(
                outputs, dsum_ptr, more_xhat, more_dxhat, rstd, along_one, along_xhat, row, row_mask, TILE.BLOCK_N,
                dsum_stride, MODE, TILE,
            )  # fmt: skip
    return sums, more_sums


@triton.jit(do_not_specialize=BATCH_SIZES)
def backward_kernel(
    x_ptr, dy_ptr, dsum_ptr, statistics_ptr, prepared_ptr, parameters, seed, outputs, partial_ptr,
    x_stride, dy_stride, dsum_stride, n_draws, inner, rows_per_draw, all_draws, all_inner,
    MANY_DRAWS: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of at most BLOCK_N features, or two halves of that; `draws_of` says which rows a program owns.

    x: what was normalized, the sum if there was a residual. outputs: dx, and dresidual or None. partial: the column
    sums, (groups * programs, slots, N).
    """
    k0, k1 = load_key(seed)
    HAS_BIAS: tl.constexpr = parameters.bias is not None
    first_row, first_draw = group_start(n_draws, rows_per_draw, all_draws, all_inner, MODE)
    start, end, draw_step, first_tile, step = draws_of(n_draws, MANY_DRAWS)
    for draw in range(start, end, draw_step):
        sums, more_sums = _rows_of_draw(
            x_ptr, dy_ptr, dsum_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, outputs,
            x_stride, dy_stride, dsum_stride, n_draws, inner, rows_per_draw, draw, first_row, first_draw,
            first_tile, step, MODE, TILE,
        )  # fmt: skip
        store_sums(partial_ptr, sums, seed, draw, first_draw, 0, HAS_BIAS, MANY_DRAWS, MODE, TILE)
        if TILE.N > TILE.BLOCK_N:
            store_sums(partial_ptr, more_sums, seed, draw, first_draw, TILE.BLOCK_N, HAS_BIAS, MANY_DRAWS, MODE, TILE)
