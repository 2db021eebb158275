"""Kernels for rows too wide for registers, which they take in pieces of BLOCK_N features.

A kernel that needs the whole row reads it twice, the second time from L2. Column sums have a kernel of their own,
whose programs stay in one piece each.
"""

import triton
import triton.language as tl

from .forward import affine, load_first, load_sum, reciprocal_root, rows_at
from .gaussian import load_affine, store_kl
from .gradients import add_sums, draws_of, load_normalized, merged_cotangent, store_dx, store_sums
from .noise import load_key
from .rows import (
    BATCH_SIZES,
    among_all,
    as_int64,
    group_start,
    load_tile,
    rows_of,
    store_statistics,
    store_tile,
    tiles_of,
)


@triton.jit
def _statistics(
    x_ptr, residual_ptr, sum_ptr, row, row_mask, x_stride, residual_stride, eps,
    MODE: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(var + eps) of rows [BLOCK_M, 1].

    Every lane keeps mean and squared distances of its own features (Welford, 1962); in the end they are merged.
    """
    lane_mean = tl.full((TILE.BLOCK_M, TILE.BLOCK_N), 0.0, ACC)
    squares, mean = lane_mean, tl.full((TILE.BLOCK_M, 1), 0.0, ACC)
    for first_col in tl.range(0, TILE.N, TILE.BLOCK_N, num_stages=TILE.STAGES):
        cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
        mask = row_mask & (cols < TILE.N)
        x = load_sum(x_ptr, residual_ptr, sum_ptr, row, cols, mask, x_stride, residual_stride, TILE, ACC)
        if MODE.IS_RMS:
            squares += x * x
        else:
            distance = tl.where(cols < TILE.N, x - lane_mean, 0.0)
            lane_mean += distance * (1.0 / as_int64(first_col // TILE.BLOCK_N + 1).to(ACC))
            squares += distance * tl.where(cols < TILE.N, x - lane_mean, 0.0)
    if not MODE.IS_RMS:
        lane = tl.arange(0, TILE.BLOCK_N)[None, :]
        count = ((TILE.N - lane + TILE.BLOCK_N - 1) // TILE.BLOCK_N).to(ACC)  # features of a lane
        origin = load_first(x_ptr, residual_ptr, sum_ptr, row, row_mask, x_stride, residual_stride, TILE, ACC)
        mean = origin + tl.sum(count * (lane_mean - origin), axis=1, keep_dims=True) / TILE.N
        distance = lane_mean - mean
        squares += count * (distance * distance)
    return mean, reciprocal_root(tl.sum(squares, axis=1, keep_dims=True), eps, TILE.N)


@triton.jit(do_not_specialize=BATCH_SIZES)
def forward_wide_kernel(
    x_ptr, residual_ptr, prepared_ptr, parameters, seed, outputs, kl_ptr,
    x_stride, residual_stride, n_draws, inner, rows_per_draw, all_draws, all_inner,
    weight_prior: tl.float64, bias_prior: tl.float64, prior_std: tl.float64, eps: tl.float64,
    MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, for rows of any width: their statistics first, then y piece by piece."""
    y_ptr, sum_ptr, statistics_ptr = outputs
    if tl.program_id(0) == 0:
        store_kl(kl_ptr, parameters, weight_prior, bias_prior, prior_std, MODE, TILE)
        return
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    row, row_mask, draw, first_draw = rows_at(
        tl.program_id(0) - 1, n_draws, inner, rows_per_draw, all_draws, all_inner, MODE, TILE
    )
    mean, rstd = _statistics(
        x_ptr, residual_ptr, sum_ptr, row, row_mask, x_stride, residual_stride, eps, MODE, TILE, ACC
    )
    store_statistics(statistics_ptr, mean, rstd, row, row_mask, MODE)
    k0, k1 = load_key(seed)
    if residual_ptr is not None:
        tl.debug_barrier()  # below, threads load what other threads have stored
    for first_col in tl.range(0, TILE.N, TILE.BLOCK_N, num_stages=TILE.STAGES):
        cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
        mask = row_mask & (cols < TILE.N)
        if residual_ptr is None:
            x = load_tile(x_ptr, row, x_stride, cols, mask, TILE, ACC)
        else:
            x = load_tile(sum_ptr, row, TILE.N // TILE.VEC, cols, mask, TILE, ACC)
        xhat = (x - mean) * rstd
        y = affine(xhat, row, prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, first_col, MODE, TILE)
        store_tile(y_ptr, row, cols, y, mask, TILE)


@triton.jit
def _gradient_of_piece(
    x_ptr, dy_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, x_stride, dy_stride, n_draws,
    row, row_mask, draw, first_draw, first_col, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(xhat, dxhat, rstd) of BLOCK_N features."""
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    xhat, dy, rstd = load_normalized(
        x_ptr, dy_ptr, statistics_ptr, row, row_mask, cols, x_stride, dy_stride, MODE, TILE
    )
    scale, _ = load_affine(
        prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, first_col, MODE, TILE, xhat.dtype
    )
    dxhat = dy * scale
    if MODE.NOISE == "merged":
        u, scale_var = merged_cotangent(xhat, dy, row, prepared_ptr, parameters, k0, k1, first_col, MODE, TILE)
        dxhat += u * (scale_var * xhat)
    return xhat, dxhat, rstd


@triton.jit(do_not_specialize=BATCH_SIZES)
def dx_wide_kernel(
    x_ptr, dy_ptr, dsum_ptr, statistics_ptr, prepared_ptr, parameters, seed, outputs,
    x_stride, dy_stride, dsum_stride, n_draws, inner, rows_per_draw, all_draws, all_inner,
    MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx, and dresidual or None, of rows of any width: first the sums along a row, then dx. Program i owns tile i."""
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    row, row_mask, draw, first_draw = rows_at(
        tl.program_id(0), n_draws, inner, rows_per_draw, all_draws, all_inner, MODE, TILE
    )
    k0, k1 = load_key(seed)
    along_one = tl.full((TILE.BLOCK_M, TILE.BLOCK_N), 0.0, ACC)
    along_xhat = along_one
    for first_col in range(0, TILE.N, TILE.BLOCK_N):
        xhat, dxhat, _ = _gradient_of_piece(
            x_ptr, dy_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, x_stride, dy_stride, n_draws,
            row, row_mask, draw, first_draw, first_col, MODE, TILE,
        )  # fmt: skip
        along_one += dxhat
        along_xhat += dxhat * xhat
    mean_one = tl.sum(along_one, axis=1, keep_dims=True) / TILE.N
    mean_xhat = tl.sum(along_xhat, axis=1, keep_dims=True) / TILE.N
    for first_col in range(0, TILE.N, TILE.BLOCK_N):
        xhat, dxhat, rstd = _gradient_of_piece(
            x_ptr, dy_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, x_stride, dy_stride, n_draws,
            row, row_mask, draw, first_draw, first_col, MODE, TILE,
        )  # fmt: skip
        store_dx(
            outputs, dsum_ptr, xhat, dxhat, rstd, mean_one * rstd, mean_xhat * rstd, row, row_mask, first_col,
            dsum_stride, MODE, TILE,
        )  # fmt: skip


@triton.jit(do_not_specialize=BATCH_SIZES)
def sums_wide_kernel(
    x_ptr, dy_ptr, statistics_ptr, prepared_ptr, parameters, seed, partial_ptr,
    x_stride, dy_stride, n_draws, inner, rows_per_draw, all_draws, all_inner,
    MANY_DRAWS: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Column sums of the program_id(2)-th piece of BLOCK_N features; `draws_of` says which rows a program owns."""
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    HAS_BIAS: tl.constexpr = parameters.bias is not None
    first_col = tl.program_id(2) * TILE.BLOCK_N
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    k0, k1 = load_key(seed)
    first_row, first_draw = group_start(n_draws, rows_per_draw, all_draws, all_inner, MODE)
    start, end, draw_step, first_tile, step = draws_of(n_draws, MANY_DRAWS)
    zeros = tl.full((TILE.BLOCK_M, TILE.BLOCK_N), 0.0, ACC)
    for draw in range(start, end, draw_step):
        sums = zeros, zeros, zeros, zeros
        for tile in tl.range(first_tile, tiles_of(rows_per_draw, TILE.BLOCK_M), step, num_stages=TILE.STAGES):
            row, row_mask = rows_of(tile, draw, n_draws, inner, rows_per_draw, MODE, TILE.BLOCK_M)
            row = among_all(first_row, row, MODE)
            xhat, dy, _ = load_normalized(
                x_ptr, dy_ptr, statistics_ptr, row, row_mask, cols, x_stride, dy_stride, MODE, TILE
            )
            u = dy
            if MODE.NOISE == "merged":
                u, _ = merged_cotangent(xhat, dy, row, prepared_ptr, parameters, k0, k1, first_col, MODE, TILE)
            sums = add_sums(sums, xhat, dy, u, HAS_BIAS, MODE)
        store_sums(partial_ptr, sums, seed, draw, first_draw, first_col, HAS_BIAS, MANY_DRAWS, MODE, TILE)
