"""Forward of rows that fit into registers, and what the forward of wider rows shares with it."""

import triton
import triton.language as tl

from .gaussian import load_affine, load_variances, store_kl
from .noise import MERGED_STREAM, load_key, normals
from .rows import BATCH_SIZES, among_all, group_start, load_tile, rows_of, store_statistics, store_tile, tiles_of


@triton.jit
def load_sum(
    x_ptr, residual_ptr, sum_ptr, row, cols, mask, x_stride, residual_stride, TILE: tl.constexpr, ACC: tl.constexpr
):
    """A tile of x; with a residual, of x + residual, rounded to the residual's dtype and stored as well."""
    x = load_tile(x_ptr, row, x_stride, cols, mask, TILE, ACC)
    if residual_ptr is not None:
        x += load_tile(residual_ptr, row, residual_stride, cols, mask, TILE, ACC)
        store_tile(sum_ptr, row, cols, x, mask, TILE)
        x = x.to(sum_ptr.dtype.element_ty).to(ACC)
    return x


@triton.jit
def load_first(
    x_ptr, residual_ptr, sum_ptr, row, row_mask, x_stride, residual_stride, TILE: tl.constexpr, ACC: tl.constexpr
):
    """The first feature [rows, 1] of what `load_sum` loads.

    A row's mean is this feature plus the mean distance from it. So the mean of equal numbers is exactly that number.
    A rounded mean would leave x - mean an error, which 1 / sqrt(eps) multiplies.
    """
    first = tl.load(x_ptr + row * x_stride * TILE.VEC, row_mask, other=0.0).to(ACC)
    if residual_ptr is not None:
        first += tl.load(residual_ptr + row * residual_stride * TILE.VEC, row_mask, other=0.0).to(ACC)
        first = first.to(sum_ptr.dtype.element_ty).to(ACC)
    return first


@triton.jit
def reciprocal_root(squares, eps, N: tl.constexpr):
    """1 / sqrt(squares / N + eps); 0 for a row without spread where eps is 0."""
    variance = squares / N + tl.full((1, 1), eps, squares.dtype)
    return tl.where(variance == 0.0, 0.0, 1.0 / tl.sqrt(variance))


@triton.jit
def affine(
    xhat, row, prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, first_col,
    MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y of a tile: scale * xhat + shift, and one normal per element where every row has a draw of its own."""
    ACC: tl.constexpr = xhat.dtype
    scale, shift = load_affine(prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, first_col, MODE, TILE, ACC)
    y = scale * xhat
    if parameters.bias is not None:
        y += shift
    if MODE.NOISE == "merged":
        scale_var, shift_var = load_variances(prepared_ptr, parameters, first_col, 0.0, MODE, TILE, ACC)
        z = normals(k0, k1, row.to(tl.uint32), first_col, MERGED_STREAM, TILE.BLOCK_N, MODE.FAST).to(ACC)
        y += tl.sqrt(scale_var * (xhat * xhat) + shift_var) * z
    return y


@triton.jit
def rows_at(index, n_draws, inner, rows_per_draw, all_draws, all_inner, MODE: tl.constexpr, TILE: tl.constexpr):
    """(rows [BLOCK_M, 1], their mask, their draw in the group, the group's first draw) of the index-th tile."""
    first_row, first_draw = group_start(n_draws, rows_per_draw, all_draws, all_inner, MODE)
    tiles = tiles_of(rows_per_draw, TILE.BLOCK_M).to(tl.uint32)
    draw = (index.to(tl.uint32) // tiles).to(tl.int32)
    row, row_mask = rows_of(index.to(tl.uint32) % tiles, draw, n_draws, inner, rows_per_draw, MODE, TILE.BLOCK_M)
    return among_all(first_row, row, MODE), row_mask, draw, first_draw


@triton.jit(do_not_specialize=BATCH_SIZES)
def forward_kernel(
    x_ptr, residual_ptr, prepared_ptr, parameters, seed, outputs, kl_ptr,
    x_stride, residual_stride, n_draws, inner, rows_per_draw, all_draws, all_inner,
    weight_prior: tl.float64, bias_prior: tl.float64, prior_std: tl.float64, eps: tl.float64,
    MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of at most BLOCK_N features. Program 0 owns the KL divergence, program 1 + i tile i of rows of one draw.

    prepared: see prepare.py, or None. outputs: y, the sum with the residual, and the statistics of every row.
    """
    y_ptr, sum_ptr, statistics_ptr = outputs
    if tl.program_id(0) == 0:
        store_kl(kl_ptr, parameters, weight_prior, bias_prior, prior_std, MODE, TILE)
        return
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    row, row_mask, draw, first_draw = rows_at(
        tl.program_id(0) - 1, n_draws, inner, rows_per_draw, all_draws, all_inner, MODE, TILE
    )
    cols = tl.arange(0, TILE.BLOCK_N)[None, :]
    mask = row_mask & (cols < TILE.N)
    x = load_sum(x_ptr, residual_ptr, sum_ptr, row, cols, mask, x_stride, residual_stride, TILE, ACC)
    mean, centred = 0.0, x
    if not MODE.IS_RMS:
        origin = load_first(x_ptr, residual_ptr, sum_ptr, row, row_mask, x_stride, residual_stride, TILE, ACC)
        mean = origin + tl.sum(tl.where(cols < TILE.N, x - origin, 0.0), axis=1, keep_dims=True) / TILE.N
        centred = tl.where(cols < TILE.N, x - mean, 0.0)
    rstd = reciprocal_root(tl.sum(centred * centred, axis=1, keep_dims=True), eps, TILE.N)
    k0, k1 = load_key(seed)
    y = affine(centred * rstd, row, prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, 0, MODE, TILE)
    store_tile(y_ptr, row, cols, y, mask, TILE)
    store_statistics(statistics_ptr, mean, rstd, row, row_mask, MODE)
