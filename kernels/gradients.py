"""What the kernels of the backward share: gradients of a tile, column sums of a program, which rows it owns."""

import triton
import triton.language as tl

from .gaussian import LEAST_VARIANCE, load_variances
from .noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, load_key, normals
from .rows import among_all, as_int64, load_statistics, load_tile, store_tile

# Slots of the partial sums [program, slot, feature].
WEIGHT_SUM = tl.constexpr(0)  # of dy * xhat
BIAS_SUM = tl.constexpr(1)  # of dy
SCALE_SUM = tl.constexpr(2)  # of dy * xhat * eps_gamma (many shared draws), of u * xhat^2 (merged draws)
SHIFT_SUM = tl.constexpr(3)  # of dy * eps_beta (many shared draws), of u (merged draws)


@triton.jit
def load_normalized(
    x_ptr, dy_ptr, statistics_ptr, row, row_mask, cols, x_stride, dy_stride, MODE: tl.constexpr, TILE: tl.constexpr
):
    """(xhat, dy, rstd) of a tile."""
    mask = row_mask & (cols < TILE.N)
    mean, rstd = load_statistics(statistics_ptr, row, row_mask, MODE)
    x = load_tile(x_ptr, row, x_stride, cols, mask, TILE, rstd.dtype)
    dy = load_tile(dy_ptr, row, dy_stride, cols, mask, TILE, rstd.dtype)
    return (x - mean) * rstd, dy, rstd  # x * rstd - mean * rstd would be a multiply-add, not 0 for x = mean


@triton.jit
def merged_cotangent(
    xhat, dy, row, prepared_ptr, parameters, k0, k1, first_col, MODE: tl.constexpr, TILE: tl.constexpr
):
    """(u, scale variance) of a tile whose rows have a draw each; u = dy * eps / deviation of y."""
    z = normals(k0, k1, row.to(tl.uint32), first_col, MERGED_STREAM, TILE.BLOCK_N, MODE.FAST).to(dy.dtype)
    scale_var, shift_var = load_variances(prepared_ptr, parameters, first_col, LEAST_VARIANCE, MODE, TILE, dy.dtype)
    return dy * z * tl.rsqrt(scale_var * (xhat * xhat) + shift_var), scale_var


@triton.jit
def add_sums(sums, xhat, dy, u, HAS_BIAS: tl.constexpr, MODE: tl.constexpr):
    """The running column sums, one per slot, with a tile added; sums that are not needed stay 0."""
    sum_w, sum_b, sum_s, sum_t = sums
    sum_w += dy * xhat
    if HAS_BIAS:
        sum_b += dy
    if MODE.NOISE == "merged":
        sum_s += u * (xhat * xhat)
        if HAS_BIAS:
            sum_t += u
    return sum_w, sum_b, sum_s, sum_t


@triton.jit
def store_dx(
    outputs, dsum_ptr, xhat, dxhat, rstd, along_one, along_xhat, row, row_mask, first_col, dsum_stride,
    MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store dx, and dresidual where its dtype is another; dsum, the gradient of the sum of both, is added to them.

    along_one, along_xhat: means along a row of dxhat and dxhat * xhat, times rstd.
    """
    dx_ptr, dresidual_ptr = outputs
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    mask = row_mask & (cols < TILE.N)
    dx = dxhat * rstd
    if not MODE.IS_RMS:
        dx -= along_one
    dx -= xhat * along_xhat
    if TILE.N == 1 and not MODE.IS_RMS:  # dx is 0, and would be a rounding error of multiply-adds
        dx = tl.zeros_like(dx)
    if dsum_ptr is not None:
        dx += load_tile(dsum_ptr, row, dsum_stride, cols, mask, TILE, dx.dtype)
    store_tile(dx_ptr, row, cols, dx, mask, TILE)
    if dresidual_ptr is not None:
        store_tile(dresidual_ptr, row, cols, dx, mask, TILE)


@triton.jit
def _store_sum(ptr, cols, value, draw, MANY_DRAWS: tl.constexpr, N: tl.constexpr):
    """ptr[cols] = value [1, BLOCK_N]; += value from a program's second draw on."""
    if MANY_DRAWS:
        value += tl.load(ptr + cols, (cols < N) & (draw >= tl.num_programs(0)), other=0.0)
    tl.store(ptr + cols, value, cols < N)


@triton.jit
def store_sums(
    partial_ptr, sums, seed, draw, first_draw, first_col,
    HAS_BIAS: tl.constexpr, MANY_DRAWS: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store a program's column sums [BLOCK_M, BLOCK_N] over the rows of a draw.

    Of a program with many draws they are added to those of its earlier draws; the deviations' sums are the means' times
    the noise of the draw.
    """
    SLOTS: tl.constexpr = 4 if MODE.NOISE == "merged" or MANY_DRAWS else 2
    N: tl.constexpr = TILE.N
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    own_ptr = partial_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (SLOTS * N)
    sum_w, sum_b, sum_s, sum_t = sums
    sum_w, sum_b = tl.sum(sum_w, axis=0, keep_dims=True), tl.sum(sum_b, axis=0, keep_dims=True)
    _store_sum(own_ptr + WEIGHT_SUM * N, cols, sum_w, draw, MANY_DRAWS, N)
    if HAS_BIAS:
        _store_sum(own_ptr + BIAS_SUM * N, cols, sum_b, draw, MANY_DRAWS, N)
    if MANY_DRAWS:
        k0, k1 = load_key(seed)  # loaded again: to keep it through the rows would cost registers
        draw_of_noise = as_int64(among_all(first_draw, draw, MODE)).to(tl.uint32)[None, None]
        z = normals(k0, k1, draw_of_noise, first_col, SCALE_STREAM, TILE.BLOCK_N, MODE.FAST)
        sum_s = sum_w * z.to(sum_w.dtype)
    if SLOTS == 4:
        _store_sum(own_ptr + SCALE_SUM * N, cols, tl.sum(sum_s, axis=0, keep_dims=True), draw, MANY_DRAWS, N)
    if MANY_DRAWS and HAS_BIAS:
        z = normals(k0, k1, draw_of_noise, first_col, SHIFT_STREAM, TILE.BLOCK_N, MODE.FAST)
        sum_t = sum_b * z.to(sum_b.dtype)
    if SLOTS == 4 and HAS_BIAS:
        _store_sum(own_ptr + SHIFT_SUM * N, cols, tl.sum(sum_t, axis=0, keep_dims=True), draw, MANY_DRAWS, N)
    if MANY_DRAWS:
        tl.debug_barrier()  # the next draw reads these sums back


@triton.jit
def draws_of(n_draws, MANY_DRAWS: tl.constexpr):
    """(first draw, end of draws, step, first tile, step of tiles) of this program.

    With MANY_DRAWS it takes all tiles of every n-th draw, where n is the number of programs. Otherwise k programs share
    a draw, and each takes every k-th tile of it.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    if MANY_DRAWS:
        return program, n_draws, programs, 0, 1
    else:
        share = programs // n_draws
        draw = program // share
        return draw, draw + 1, 1, program % share, share
