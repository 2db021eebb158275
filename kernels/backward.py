"""Backward: dx, and per program the column sums that the finalizer turns into parameter gradients."""

import triton
import triton.language as tl

from .noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, load_key, normals
from .posterior import load_std, sample, shared_normals
from .rows import BATCH_SIZES, draws_of, group_start, in_group, load_parameter, load_statistics, row_at, run_of, tile_at

# Slots of the partial sums [program, slot, feature].
WEIGHT_SUM = tl.constexpr(0)  # of dy * xhat
BIAS_SUM = tl.constexpr(1)  # of dy
SCALE_SUM = tl.constexpr(2)  # of dy * xhat * eps_gamma (shared draws), of u * xhat^2 (merged draws)
SHIFT_SUM = tl.constexpr(3)  # of dy * eps_beta (shared draws), of u (merged draws)


@triton.jit
def _deviations(weight_rho_ptr, bias_rho_ptr, own, mask, NOISE: tl.constexpr, ACC: tl.constexpr):
    """(scale_std, scale variance, shift variance) [1, BLOCK_N].

    The shift's variance is kept above 0, so that the derivative of sqrt(scale_var * xhat^2 + shift_var) is
    finite without a test per element; the least normal number changes no deviation above 1e-19.
    """
    scale_std = load_std(weight_rho_ptr, own, mask, NOISE, ACC)
    shift_std = load_std(bias_rho_ptr, own, mask, NOISE, ACC)
    shift_var = tl.maximum(shift_std * shift_std, 2.0**-126, propagate_nan=tl.PropagateNan.ALL)
    return scale_std, scale_std * scale_std, shift_var


@triton.jit
def _tile_gradients(
    x_ptr, dy_ptr, statistics_ptr, row, row_mask, cols, gamma, scale_var, shift_var, k0, k1, first_col,
    x_stride, dy_stride,
    IS_RMS: tl.constexpr, NOISE: tl.constexpr, N: tl.constexpr, VEC: tl.constexpr,
    BLOCK_N: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(xhat, dy, dxhat, u, rstd) of a tile; u = dy * eps / std where every row has a draw of its own, else dy."""
    mask = row_mask & (cols < N)
    mean, rstd = load_statistics(statistics_ptr, row, row_mask, IS_RMS)
    x = tl.load(tile_at(x_ptr, row, x_stride, cols, VEC), mask, other=0.0).to(rstd.dtype)
    dy = tl.load(tile_at(dy_ptr, row, dy_stride, cols, VEC), mask, other=0.0).to(rstd.dtype)
    xhat = (x - mean) * rstd  # not x * rstd - mean * rstd, one multiply-add, in which equal numbers do not cancel
    dxhat, u = dy * gamma, dy
    if NOISE == "merged":
        z = normals(k0, k1, row.to(tl.uint32), first_col, MERGED_STREAM, BLOCK_N, FAST).to(rstd.dtype)
        u = dy * z * tl.rsqrt(scale_var * (xhat * xhat) + shift_var)
        dxhat += u * (scale_var * xhat)
    return xhat, dy, dxhat, u, rstd


@triton.jit
def _row_sums(xhat, dxhat, IS_RMS: tl.constexpr):
    """Sums [rows, 1] of dxhat, which RMSNorm does not need, and of dxhat * xhat, in one reduction.

    Two would wait for each other's barriers.
    """
    if IS_RMS:
        along_xhat = tl.sum(dxhat * xhat, axis=1, keep_dims=True)
        return tl.zeros(along_xhat.shape, along_xhat.dtype), along_xhat
    else:
        sums = tl.sum(tl.join(dxhat, dxhat * xhat), axis=1)
        one, along_xhat = tl.split(sums)
        return one[:, None], along_xhat[:, None]


@triton.jit
def _store_input_gradient(
    xhat, dxhat, rstd, along_one, along_xhat, dsum_ptr, dx_ptr, dresidual_ptr, row, cols, mask, dsum_stride,
    IS_RMS: tl.constexpr, N: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """rstd * (dxhat - along_one - xhat * along_xhat), two multiply-adds an element, plus the gradient of the sum.

    A row of one feature has no gradient, which rounding in multiply-adds would not leave at 0.
    """
    dx = dxhat * rstd
    if not IS_RMS:
        dx -= along_one * rstd
    dx -= xhat * (along_xhat * rstd)
    if N == 1 and not IS_RMS:
        dx = tl.zeros_like(dx)
    if dsum_ptr is not None:
        dx += tl.load(tile_at(dsum_ptr, row, dsum_stride, cols, VEC), mask, other=0.0).to(dx.dtype)
    tl.store(tile_at(dx_ptr, row, N // VEC, cols, VEC), dx.to(dx_ptr.dtype.element_ty), mask)
    if dresidual_ptr is not None:
        tl.store(tile_at(dresidual_ptr, row, N // VEC, cols, VEC), dx.to(dresidual_ptr.dtype.element_ty), mask)


@triton.jit
def _add_tile(sum_w, sum_b, sum_s, sum_t, xhat, dy, u, NOISE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The running column sums, one per slot, with a tile added; sums that are not needed stay 0."""
    sum_w += dy * xhat
    if HAS_BIAS:
        sum_b += dy
    if NOISE == "merged":
        sum_s += u * (xhat * xhat)
        if HAS_BIAS:
            sum_t += u
    return sum_w, sum_b, sum_s, sum_t


@triton.jit
def _halves(tile):
    """The left and the right half [rows, n] of a tile [rows, 2 n]."""
    halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def _beside(left, right):
    """The tile [rows, 2 n] of two halves [rows, n]."""
    halves = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(halves, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _add_half(
    sum_w, sum_b, sum_s, sum_t,
    x_ptr, dy_ptr, statistics_ptr, own_ptr, row, row_mask, k0, k1, first_col, x_stride, dy_stride,
    IS_RMS: tl.constexpr, HAS_BIAS: tl.constexpr, NOISE: tl.constexpr, FAST: tl.constexpr,
    N: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(xhat, dxhat, rstd, the column sums with the tile added); the parameters come from this program's slots."""
    cols = first_col + tl.arange(0, BLOCK_N)[None, :]
    weight = tl.load(own_ptr + WEIGHT_SUM * N + cols, cols < N, other=0.0)
    scale_var = tl.load(own_ptr + SCALE_SUM * N + cols, cols < N, other=0.0)
    shift_var = tl.load(own_ptr + SHIFT_SUM * N + cols, cols < N, other=1.0)  # never 0: its root divides
    xhat, dy, dxhat, u, rstd = _tile_gradients(
        x_ptr, dy_ptr, statistics_ptr, row, row_mask, cols, weight, scale_var, shift_var,
        k0, k1, first_col, x_stride, dy_stride, IS_RMS, NOISE, N, VEC, BLOCK_N, FAST,
    )  # fmt: skip
    sum_w, sum_b, sum_s, sum_t = _add_tile(sum_w, sum_b, sum_s, sum_t, xhat, dy, u, NOISE, HAS_BIAS)
    return xhat, dxhat, rstd, sum_w, sum_b, sum_s, sum_t


@triton.jit
def _add_halves(
    sum_w, sum_b, sum_s, sum_t,
    x_ptr, dy_ptr, statistics_ptr, own_ptr, row, row_mask, k0, k1, x_stride, dy_stride,
    IS_RMS: tl.constexpr, HAS_BIAS: tl.constexpr, NOISE: tl.constexpr, FAST: tl.constexpr,
    N: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(xhat, dxhat, rstd, the column sums with the tile added), one half of the row after the other.

    A half loads its parameters just before use, from L1: those of the whole row do not fit beside the sums.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    w0, w1 = _halves(sum_w)
    b0, b1 = _halves(sum_b)
    s0, s1 = _halves(sum_s)
    t0, t1 = _halves(sum_t)
    xhat0, dxhat0, rstd, w0, b0, s0, t0 = _add_half(
        w0, b0, s0, t0, x_ptr, dy_ptr, statistics_ptr, own_ptr, row, row_mask, k0, k1, 0, x_stride, dy_stride,
        IS_RMS, HAS_BIAS, NOISE, FAST, N, VEC, HALF,
    )  # fmt: skip
    xhat1, dxhat1, rstd, w1, b1, s1, t1 = _add_half(
        w1, b1, s1, t1, x_ptr, dy_ptr, statistics_ptr, own_ptr, row, row_mask, k0, k1, HALF, x_stride, dy_stride,
        IS_RMS, HAS_BIAS, NOISE, FAST, N, VEC, HALF,
    )  # fmt: skip
    xhat, dxhat = _beside(xhat0, xhat1), _beside(dxhat0, dxhat1)
    return xhat, dxhat, rstd, _beside(w0, w1), _beside(b0, b1), _beside(s0, s1), _beside(t0, t1)


@triton.jit
def _own_slots(partial_ptr, N: tl.constexpr, SLOTS: tl.constexpr):
    """The partial sums [SLOTS, N] of this program."""
    return partial_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (SLOTS * N)


@triton.jit
def _store_sum(ptr, cols, value, FIRST, SPAN: tl.constexpr, N: tl.constexpr):
    """ptr[cols] += value [1, BLOCK_N]; = value where a program has a single draw, or has its first."""
    if SPAN:
        value += tl.load(ptr + cols, (cols < N) & (FIRST == 0), other=0.0)
    tl.store(ptr + cols, value, cols < N)


@triton.jit
def _store_sums(
    own_ptr, sum_w, sum_b, sum_s, sum_t, k0, k1, draw, first_col, cols, FIRST,
    NOISE: tl.constexpr, SPAN: tl.constexpr, HAS_BIAS: tl.constexpr, N: tl.constexpr,
    BLOCK_N: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write the column sums [BLOCK_M, BLOCK_N] of a draw; SPAN: a program adds up draws, each with its noise."""
    sum_w = tl.sum(sum_w, axis=0, keep_dims=True)
    sum_b = tl.sum(sum_b, axis=0, keep_dims=True)
    _store_sum(own_ptr + WEIGHT_SUM * N, cols, sum_w, FIRST, SPAN, N)
    if HAS_BIAS:
        _store_sum(own_ptr + BIAS_SUM * N, cols, sum_b, FIRST, SPAN, N)
    if NOISE == "merged":
        _store_sum(own_ptr + SCALE_SUM * N, cols, tl.sum(sum_s, axis=0, keep_dims=True), FIRST, SPAN, N)
        if HAS_BIAS:
            _store_sum(own_ptr + SHIFT_SUM * N, cols, tl.sum(sum_t, axis=0, keep_dims=True), FIRST, SPAN, N)
    if SPAN:
        z = shared_normals(k0, k1, draw, first_col, SCALE_STREAM, BLOCK_N, FAST).to(sum_w.dtype)
        _store_sum(own_ptr + SCALE_SUM * N, cols, sum_w * z, FIRST, SPAN, N)
        if HAS_BIAS:
            z = shared_normals(k0, k1, draw, first_col, SHIFT_STREAM, BLOCK_N, FAST).to(sum_b.dtype)
            _store_sum(own_ptr + SHIFT_SUM * N, cols, sum_b * z, FIRST, SPAN, N)
        tl.debug_barrier()  # the next draw reads these sums back


@triton.jit(do_not_specialize=BATCH_SIZES)
def backward_kernel(
    x_ptr, dy_ptr, dsum_ptr, weight_ptr, weight_rho_ptr, bias_rho_ptr, statistics_ptr,
    dx_ptr, dresidual_ptr, partial_ptr, seed,
    x_stride, dy_stride, dsum_stride, n_draws, inner, rows_per_draw, run_rows, runs_per_share, share_rows,
    group_rows, all_draws, all_inner,
    IS_RMS: tl.constexpr, HAS_BIAS: tl.constexpr, NOISE: tl.constexpr, SPAN: tl.constexpr, ORDER: tl.constexpr,
    GROUPED: tl.constexpr, FAST: tl.constexpr,
    N: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr,
    SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of at most BLOCK_N features, whole in registers; program i owns the i-th run of rows."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    cols = tl.arange(0, BLOCK_N)[None, :]
    own = in_group(cols, N, GROUPED)
    own_ptr = _own_slots(partial_ptr, N, SLOTS)
    k0, k1 = load_key(seed)
    group_row, group_draw = group_start(group_rows, all_draws, all_inner, GROUPED)
    start, stop = run_of(tl.program_id(0), run_rows, runs_per_share, share_rows)
    first_draw, count = draws_of(start, stop, rows_per_draw, SPAN)
    for draw in range(first_draw, first_draw + count):
        # Loaded again for every draw: kept across draws, they would take registers that 8,192 features do not leave.
        scale_std, scale_var, shift_var = _deviations(weight_rho_ptr, bias_rho_ptr, own, cols < N, NOISE, ACC)
        weight = load_parameter(weight_ptr, own, cols < N, 0.0, ACC)
        gamma = sample(weight, scale_std, k0, k1, group_draw + draw, 0, SCALE_STREAM, NOISE, BLOCK_N, FAST)
        if HALVES:  # until the sums are stored, their slots hold the parameters
            tl.store(own_ptr + WEIGHT_SUM * N + cols, weight, cols < N)
            tl.store(own_ptr + SCALE_SUM * N + cols, scale_var, cols < N)
            tl.store(own_ptr + SHIFT_SUM * N + cols, shift_var, cols < N)
            tl.debug_barrier()
        sum_w = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        sum_b, sum_s, sum_t = sum_w, sum_w, sum_w
        last = tl.minimum(stop, (draw + 1) * rows_per_draw)
        for top in tl.range(tl.maximum(start, draw * rows_per_draw), last, BLOCK_M, num_stages=STAGES):
            position = (top + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
            row = group_row + row_at(position, draw, n_draws, inner, rows_per_draw, ORDER)
            if HALVES:
                xhat, dxhat, rstd, sum_w, sum_b, sum_s, sum_t = _add_halves(
                    sum_w, sum_b, sum_s, sum_t, x_ptr, dy_ptr, statistics_ptr, own_ptr,
                    row, position < last, k0, k1, x_stride, dy_stride,
                    IS_RMS, HAS_BIAS, NOISE, FAST, N, VEC, BLOCK_N,
                )  # fmt: skip
            else:
                xhat, dy, dxhat, u, rstd = _tile_gradients(
                    x_ptr, dy_ptr, statistics_ptr, row, position < last, cols, gamma, scale_var, shift_var,
                    k0, k1, 0, x_stride, dy_stride, IS_RMS, NOISE, N, VEC, BLOCK_N, FAST,
                )  # fmt: skip
                sum_w, sum_b, sum_s, sum_t = _add_tile(sum_w, sum_b, sum_s, sum_t, xhat, dy, u, NOISE, HAS_BIAS)
            along_one, along_xhat = _row_sums(xhat, dxhat, IS_RMS)
            _store_input_gradient(
                xhat, dxhat, rstd, along_one / N, along_xhat / N, dsum_ptr, dx_ptr, dresidual_ptr,
                row, cols, (position < last) & (cols < N), dsum_stride, IS_RMS, N, VEC,
            )  # fmt: skip
        if HALVES:
            tl.debug_barrier()  # no thread still loads the parameters from the slots that are written next
        _store_sums(
            own_ptr, sum_w, sum_b, sum_s, sum_t, k0, k1, group_draw + draw, 0, cols, draw == first_draw,
            NOISE, SPAN, HAS_BIAS, N, BLOCK_N, FAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=BATCH_SIZES)
def backward_wide_kernel(
    x_ptr, dy_ptr, dsum_ptr, weight_ptr, weight_rho_ptr, bias_rho_ptr, statistics_ptr,
    dx_ptr, dresidual_ptr, partial_ptr, row_sum_ptr, seed,
    x_stride, dy_stride, dsum_stride, n_draws, inner, rows_per_draw, run_rows, runs_per_share, share_rows,
    group_rows, all_draws, all_inner,
    IS_RMS: tl.constexpr, HAS_BIAS: tl.constexpr, NOISE: tl.constexpr, SPAN: tl.constexpr, ORDER: tl.constexpr,
    GROUPED: tl.constexpr, FAST: tl.constexpr,
    N: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of any width, in pieces of BLOCK_N: first the run's row sums [n_rows, 2], then dx and the column sums."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    own_ptr = _own_slots(partial_ptr, N, SLOTS)
    k0, k1 = load_key(seed)
    group_row, group_draw = group_start(group_rows, all_draws, all_inner, GROUPED)
    start, stop = run_of(tl.program_id(0), run_rows, runs_per_share, share_rows)
    first_draw, count = draws_of(start, stop, rows_per_draw, SPAN)
    for draw in range(first_draw, first_draw + count):
        first, last = tl.maximum(start, draw * rows_per_draw), tl.minimum(stop, (draw + 1) * rows_per_draw)
        for first_col in range(0, N, BLOCK_N):
            cols = first_col + tl.arange(0, BLOCK_N)[None, :]
            own = in_group(cols, N, GROUPED)
            weight = load_parameter(weight_ptr, own, cols < N, 0.0, ACC)
            scale_std, scale_var, shift_var = _deviations(weight_rho_ptr, bias_rho_ptr, own, cols < N, NOISE, ACC)
            gamma = sample(weight, scale_std, k0, k1, group_draw + draw, first_col, SCALE_STREAM, NOISE, BLOCK_N, FAST)
            for top in tl.range(first, last, BLOCK_M, num_stages=STAGES):
                position = (top + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
                row = group_row + row_at(position, draw, n_draws, inner, rows_per_draw, ORDER)
                xhat, dy, dxhat, u, rstd = _tile_gradients(
                    x_ptr, dy_ptr, statistics_ptr, row, position < last, cols, gamma, scale_var, shift_var,
                    k0, k1, first_col, x_stride, dy_stride, IS_RMS, NOISE, N, VEC, BLOCK_N, FAST,
                )  # fmt: skip
                seen = (position < last) & (first_col > 0)
                along_one = tl.load(row_sum_ptr + 2 * row, seen, other=0.0)
                along_xhat = tl.load(row_sum_ptr + 2 * row + 1, seen, other=0.0)
                piece_one, piece_xhat = _row_sums(xhat, dxhat, IS_RMS)
                tl.store(row_sum_ptr + 2 * row, along_one + piece_one, position < last)
                tl.store(row_sum_ptr + 2 * row + 1, along_xhat + piece_xhat, position < last)
            tl.debug_barrier()  # one thread stored what all threads load next
        for first_col in range(0, N, BLOCK_N):
            cols = first_col + tl.arange(0, BLOCK_N)[None, :]
            own = in_group(cols, N, GROUPED)
            weight = load_parameter(weight_ptr, own, cols < N, 0.0, ACC)
            scale_std, scale_var, shift_var = _deviations(weight_rho_ptr, bias_rho_ptr, own, cols < N, NOISE, ACC)
            gamma = sample(weight, scale_std, k0, k1, group_draw + draw, first_col, SCALE_STREAM, NOISE, BLOCK_N, FAST)
            sum_w = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            sum_b, sum_s, sum_t = sum_w, sum_w, sum_w
            for top in tl.range(first, last, BLOCK_M, num_stages=STAGES):
                position = (top + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
                row = group_row + row_at(position, draw, n_draws, inner, rows_per_draw, ORDER)
                xhat, dy, dxhat, u, rstd = _tile_gradients(
                    x_ptr, dy_ptr, statistics_ptr, row, position < last, cols, gamma, scale_var, shift_var,
                    k0, k1, first_col, x_stride, dy_stride, IS_RMS, NOISE, N, VEC, BLOCK_N, FAST,
                )  # fmt: skip
                sum_w, sum_b, sum_s, sum_t = _add_tile(sum_w, sum_b, sum_s, sum_t, xhat, dy, u, NOISE, HAS_BIAS)
                along_one = tl.load(row_sum_ptr + 2 * row, position < last, other=0.0)
                along_xhat = tl.load(row_sum_ptr + 2 * row + 1, position < last, other=0.0)
                _store_input_gradient(
                    xhat, dxhat, rstd, along_one / N, along_xhat / N, dsum_ptr, dx_ptr, dresidual_ptr,
                    row, cols, (position < last) & (cols < N), dsum_stride, IS_RMS, N, VEC,
                )  # fmt: skip
            _store_sums(
                own_ptr, sum_w, sum_b, sum_s, sum_t, k0, k1, group_draw + draw, first_col, cols, draw == first_draw,
                NOISE, SPAN, HAS_BIAS, N, BLOCK_N, FAST,
            )  # fmt: skip
