"""Backward of rows that fit into registers: dx, and per program the column sums of which finalize.py makes gradients."""

import triton
import triton.language as tl

from .noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, load_key, normals
from .posterior import LEAST_VARIANCE, load_affine, load_variances
from .rows import BATCH_SIZES, as_int64, group_start, load_statistics, load_tile, rows_of, store_tile

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
    return (x - mean) * rstd, dy, rstd  # not x * rstd - mean * rstd, one multiply-add: equal numbers do not cancel


@triton.jit
def merged_cotangent(
    xhat, dy, row, prepared_ptr, parameters, k0, k1, first_col, MODE: tl.constexpr, TILE: tl.constexpr
):
    """(u, scale variance) of a tile whose rows have a draw each; u = dy * eps / deviation of y."""
    z = normals(k0, k1, row.to(tl.uint32), first_col, MERGED_STREAM, TILE.BLOCK_N, MODE.FAST).to(dy.dtype)
    if TILE.BLOCK_N > 4096:  # keeps the compiler from loading parameters early: 120 bytes of spill become 32
        tl.debug_barrier()
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
def store_dx(outputs, dsum_ptr, dx, row, cols, mask, dsum_stride, MODE: tl.constexpr, TILE: tl.constexpr):
    """The gradient of x and, in another dtype, of the residual: dx plus that of their sum."""
    dx_ptr, dresidual_ptr = outputs
    if TILE.N == 1 and not MODE.IS_RMS:  # no gradient, which rounding in multiply-adds would not leave at 0
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
    partial_ptr, sums, k0, k1, draw, first_draw, first_col,
    HAS_BIAS: tl.constexpr, MANY_DRAWS: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the column sums [BLOCK_M, BLOCK_N] of a draw; of many a program, add them up, each with its noise."""
    SLOTS: tl.constexpr = 4 if MODE.NOISE == "merged" or MANY_DRAWS else 2
    N: tl.constexpr = TILE.N
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    own_ptr = partial_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (SLOTS * N)
    sum_w, sum_b, sum_s, sum_t = sums
    sum_w, sum_b = tl.sum(sum_w, axis=0, keep_dims=True), tl.sum(sum_b, axis=0, keep_dims=True)
    _store_sum(own_ptr + WEIGHT_SUM * N, cols, sum_w, draw, MANY_DRAWS, N)
    if HAS_BIAS:
        _store_sum(own_ptr + BIAS_SUM * N, cols, sum_b, draw, MANY_DRAWS, N)
    if SLOTS == 4:
        if MANY_DRAWS:
            draw_of_noise = as_int64(first_draw + draw).to(tl.uint32)[None, None]
            z = normals(k0, k1, draw_of_noise, first_col, SCALE_STREAM, TILE.BLOCK_N, MODE.FAST)
            sum_s = sum_w * z.to(sum_w.dtype)
            if HAS_BIAS:
                z = normals(k0, k1, draw_of_noise, first_col, SHIFT_STREAM, TILE.BLOCK_N, MODE.FAST)
                sum_t = sum_b * z.to(sum_b.dtype)
        _store_sum(own_ptr + SCALE_SUM * N, cols, tl.sum(sum_s, axis=0, keep_dims=True), draw, MANY_DRAWS, N)
        if HAS_BIAS:
            _store_sum(own_ptr + SHIFT_SUM * N, cols, tl.sum(sum_t, axis=0, keep_dims=True), draw, MANY_DRAWS, N)
    if MANY_DRAWS:
        tl.debug_barrier()  # the next draw reads these sums back


@triton.jit
def draws_of(n_draws, MANY_DRAWS: tl.constexpr):
    """(first draw, end of draws, step, first tile, step of tiles) of this program.

    Every n_programs-th draw with all of its tiles or, of a draw that several programs share, every so many-th tile.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    if MANY_DRAWS:
        return program, n_draws, programs, 0, 1
    else:
        share = programs // n_draws
        draw = program // share
        return draw, draw + 1, 1, program % share, share


@triton.jit
def _rows_of_draw(
    x_ptr, dy_ptr, dsum_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, outputs,
    x_stride, dy_stride, dsum_stride, n_draws, inner, rows_per_draw, draw, first_row, first_draw, first_tile, step,
    MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store dx of every `step`-th tile of a draw; return the column sums [BLOCK_M, BLOCK_N]."""
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    HAS_BIAS: tl.constexpr = parameters.bias is not None
    cols = tl.arange(0, TILE.BLOCK_N)[None, :]
    if MODE.NOISE != "merged":
        scale, _ = load_affine(prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, 0, MODE, TILE, ACC)
    zeros = tl.full((TILE.BLOCK_M, TILE.BLOCK_N), 0.0, ACC)
    sums = zeros, zeros, zeros, zeros
    for tile in tl.range(first_tile, tl.cdiv(rows_per_draw, TILE.BLOCK_M), step, num_stages=TILE.STAGES):
        row, row_mask = rows_of(tile, draw, n_draws, inner, rows_per_draw, MODE, TILE.BLOCK_M)
        row += first_row
        xhat, dy, rstd = load_normalized(
            x_ptr, dy_ptr, statistics_ptr, row, row_mask, cols, x_stride, dy_stride, MODE, TILE
        )
        u = dy
        if MODE.NOISE == "merged":  # parameters again for every row: kept, they would take the registers of the sums
            u, scale_var = merged_cotangent(xhat, dy, row, prepared_ptr, parameters, k0, k1, 0, MODE, TILE)
            scale, _ = load_affine(prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, 0, MODE, TILE, ACC)
            dxhat = dy * scale + u * (scale_var * xhat)
        else:
            dxhat = dy * scale
        sums = add_sums(sums, xhat, dy, u, HAS_BIAS, MODE)
        if MODE.IS_RMS:
            dx = dxhat * rstd
            along_xhat = tl.sum(dxhat * xhat, axis=1, keep_dims=True)
        else:  # in one reduction: two would wait for each other's barriers
            along_one, along_xhat = tl.split(tl.sum(tl.join(dxhat, dxhat * xhat), axis=1))
            dx = dxhat * rstd - along_one[:, None] / TILE.N * rstd
            along_xhat = along_xhat[:, None]
        dx -= xhat * (along_xhat / TILE.N * rstd)
        store_dx(outputs, dsum_ptr, dx, row, cols, row_mask & (cols < TILE.N), dsum_stride, MODE, TILE)
    return sums


@triton.jit(do_not_specialize=BATCH_SIZES)
def backward_kernel(
    x_ptr, dy_ptr, dsum_ptr, statistics_ptr, prepared_ptr, parameters, seed, outputs, partial_ptr,
    x_stride, dy_stride, dsum_stride, n_draws, inner, rows_per_draw, all_draws, all_inner,
    MANY_DRAWS: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of at most BLOCK_N features; programs and their rows: see `draws_of`.

    x is what was normalized. outputs: dx, and dresidual or None. partial: (groups * programs, slots, N).
    """
    k0, k1 = load_key(seed)
    HAS_BIAS: tl.constexpr = parameters.bias is not None
    first_row, first_draw = group_start(n_draws, rows_per_draw, all_draws, all_inner, MODE)
    start, end, draw_step, first_tile, step = draws_of(n_draws, MANY_DRAWS)
    for draw in range(start, end, draw_step):
        sums = _rows_of_draw(
            x_ptr, dy_ptr, dsum_ptr, statistics_ptr, prepared_ptr, parameters, k0, k1, outputs,
            x_stride, dy_stride, dsum_stride, n_draws, inner, rows_per_draw, draw, first_row, first_draw,
            first_tile, step, MODE, TILE,
        )  # fmt: skip
        store_sums(partial_ptr, sums, k0, k1, draw, first_draw, 0, HAS_BIAS, MANY_DRAWS, MODE, TILE)
