"""Forward: normalize, sample scale and shift, accumulate the KL divergence."""

import triton
import triton.language as tl

from .noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, load_key, normals
from .posterior import kl_terms, kl_terms_deterministic, load_std, merged_variance, sample
from .rows import BATCH_SIZES, draws_of, group_start, in_group, load_parameter, load_statistics, row_at, run_of, tile_at


@triton.jit
def _store_kl(
    weight_ptr, bias_ptr, weight_rho_ptr, bias_rho_ptr, weight_prior_ptr, bias_prior_ptr,
    kl_ptr,
    weight_prior: tl.constexpr, bias_prior: tl.constexpr, prior_std: tl.constexpr, FLOOR: tl.constexpr,
    GROUPED: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """KL divergence of the N scales and shifts of a group, summed in a fixed order."""
    ACC: tl.constexpr = kl_ptr.dtype.element_ty
    total = tl.zeros((1, BLOCK_N), ACC)
    for first_col in range(0, N, BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)[None, :]
        mask, own = cols < N, in_group(cols, N, GROUPED)
        weight = load_parameter(weight_ptr, own, mask, 0.0, ACC)
        bias = load_parameter(bias_ptr, own, mask, 0.0, ACC)
        prior = load_parameter(bias_prior_ptr, cols, mask, bias_prior, ACC)
        if weight_rho_ptr is None:
            terms = kl_terms_deterministic(weight, bias, prior, prior_std, FLOOR)
        else:
            terms = tl.zeros((1, BLOCK_N), ACC)
            if bias_ptr is not None:
                terms += kl_terms(bias, load_parameter(bias_rho_ptr, own, mask, 0.0, ACC), prior, prior_std)
            prior = load_parameter(weight_prior_ptr, cols, mask, weight_prior, ACC)
            terms += kl_terms(weight, load_parameter(weight_rho_ptr, own, mask, 0.0, ACC), prior, prior_std)
        total += tl.where(mask, terms, 0.0)
    tl.store(kl_ptr + tl.program_id(1), tl.sum(total))


@triton.jit
def _affine(
    xhat, row, gamma, beta, scale_std, shift_std, k0, k1, first_col,
    NOISE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y of a tile: gamma * xhat + beta, and one normal per element where every row has a draw of its own."""
    y = gamma * xhat
    if HAS_BIAS:
        y += beta
    if NOISE == "merged":
        z = normals(k0, k1, row.to(tl.uint32), first_col, MERGED_STREAM, BLOCK_N, FAST)
        y += tl.sqrt(merged_variance(xhat, scale_std, shift_std, HAS_BIAS)) * z.to(xhat.dtype)
    return y


@triton.jit
def _load_sum(
    x_ptr, residual_ptr, sum_ptr, row, cols, mask, x_stride, residual_stride,
    N: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of x; with a residual, of their sum, rounded to the residual's dtype and stored."""
    x = tl.load(tile_at(x_ptr, row, x_stride, cols, VEC), mask, other=0.0).to(ACC)
    if residual_ptr is not None:
        x += tl.load(tile_at(residual_ptr, row, residual_stride, cols, VEC), mask, other=0.0).to(ACC)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(tile_at(sum_ptr, row, N // VEC, cols, VEC), x, mask)
        x = x.to(ACC)
    return x


@triton.jit
def _load_first(
    x_ptr, residual_ptr, sum_ptr, row, row_mask, x_stride, residual_stride, VEC: tl.constexpr, ACC: tl.constexpr
):
    """The first feature [rows, 1] of what `_load_sum` loads.

    A mean is taken of distances from it: the mean of equal numbers is then that number, to the last bit, where their
    sum would be rounded and 1 / sqrt(eps) make a thousand or a million times that error of it.
    """
    first = tl.load(x_ptr + row * x_stride * VEC, row_mask, other=0.0).to(ACC)
    if residual_ptr is not None:
        first += tl.load(residual_ptr + row * residual_stride * VEC, row_mask, other=0.0).to(ACC)
        first = first.to(sum_ptr.dtype.element_ty).to(ACC)
    return first


@triton.jit
def _rstd(squares, eps: tl.constexpr, N: tl.constexpr):
    """1 / sqrt(squares / N + eps); 0 for a row without spread where eps is 0."""
    variance = squares / N + eps
    return tl.where(variance == 0.0, 0.0, 1.0 / tl.sqrt(variance))


@triton.jit(do_not_specialize=BATCH_SIZES)
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, weight_rho_ptr, bias_rho_ptr, weight_prior_ptr, bias_prior_ptr,
    y_ptr, sum_ptr, statistics_ptr, kl_ptr, seed,
    x_stride, residual_stride, n_draws, inner, rows_per_draw, run_rows, runs_per_share, share_rows,
    group_rows, all_draws, all_inner,
    weight_prior: tl.constexpr, bias_prior: tl.constexpr, prior_std: tl.constexpr, FLOOR: tl.constexpr,
    eps: tl.constexpr, IS_RMS: tl.constexpr,
    NOISE: tl.constexpr, SPAN: tl.constexpr, ORDER: tl.constexpr, GROUPED: tl.constexpr, FAST: tl.constexpr,
    N: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of at most BLOCK_N features, whole in registers. Program 0 owns the KL, program 1 + i the run i of rows.

    weight_rho_ptr is None: the deterministic reading.
    """
    if tl.program_id(0) == 0:
        _store_kl(
            weight_ptr, bias_ptr, weight_rho_ptr, bias_rho_ptr, weight_prior_ptr, bias_prior_ptr, kl_ptr,
            weight_prior, bias_prior, prior_std, FLOOR, GROUPED, N, BLOCK_N,
        )  # fmt: skip
        return
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    cols = tl.arange(0, BLOCK_N)[None, :]
    col_mask = cols < N
    own = in_group(cols, N, GROUPED)
    k0, k1 = load_key(seed)
    group_row, group_draw = group_start(group_rows, all_draws, all_inner, GROUPED)
    start, stop = run_of(tl.program_id(0) - 1, run_rows, runs_per_share, share_rows)
    first_draw, count = draws_of(start, stop, rows_per_draw, SPAN)
    for draw in range(first_draw, first_draw + count):
        # Loaded again for every draw: kept across draws, they would take registers that 8,192 features do not leave.
        scale_std = load_std(weight_rho_ptr, own, col_mask, NOISE, ACC)
        shift_std = load_std(bias_rho_ptr, own, col_mask, NOISE, ACC)
        weight = load_parameter(weight_ptr, own, col_mask, 0.0, ACC)
        bias = load_parameter(bias_ptr, own, col_mask, 0.0, ACC)
        gamma = sample(weight, scale_std, k0, k1, group_draw + draw, 0, SCALE_STREAM, NOISE, BLOCK_N, FAST)
        beta = bias
        if HAS_BIAS:
            beta = sample(bias, shift_std, k0, k1, group_draw + draw, 0, SHIFT_STREAM, NOISE, BLOCK_N, FAST)
        last = tl.minimum(stop, (draw + 1) * rows_per_draw)
        for first in tl.range(tl.maximum(start, draw * rows_per_draw), last, BLOCK_M, num_stages=STAGES):
            position = (first + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
            row_mask = position < last
            row = group_row + row_at(position, draw, n_draws, inner, rows_per_draw, ORDER)
            mask = row_mask & col_mask
            x = _load_sum(x_ptr, residual_ptr, sum_ptr, row, cols, mask, x_stride, residual_stride, N, VEC, ACC)
            centred = x
            if not IS_RMS:
                origin = _load_first(x_ptr, residual_ptr, sum_ptr, row, row_mask, x_stride, residual_stride, VEC, ACC)
                mean = origin + tl.sum(tl.where(col_mask, x - origin, 0.0), axis=1, keep_dims=True) / N
                centred = tl.where(col_mask, x - mean, 0.0)
            rstd = _rstd(tl.sum(centred * centred, axis=1, keep_dims=True), eps, N)
            y = _affine(
                centred * rstd, row, gamma, beta, scale_std, shift_std, k0, k1, 0, NOISE, HAS_BIAS, BLOCK_N, FAST
            )
            tl.store(tile_at(y_ptr, row, N // VEC, cols, VEC), y.to(y_ptr.dtype.element_ty), mask)
            if IS_RMS:
                tl.store(statistics_ptr + row, rstd, row_mask)
            else:
                tl.store(statistics_ptr + 2 * row, mean, row_mask)
                tl.store(statistics_ptr + 2 * row + 1, rstd, row_mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def forward_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, weight_rho_ptr, bias_rho_ptr, weight_prior_ptr, bias_prior_ptr,
    y_ptr, sum_ptr, statistics_ptr, kl_ptr, seed,
    x_stride, residual_stride, n_draws, inner, rows_per_draw, run_rows, runs_per_share, share_rows,
    group_rows, all_draws, all_inner,
    weight_prior: tl.constexpr, bias_prior: tl.constexpr, prior_std: tl.constexpr, FLOOR: tl.constexpr,
    eps: tl.constexpr, IS_RMS: tl.constexpr,
    NOISE: tl.constexpr, SPAN: tl.constexpr, ORDER: tl.constexpr, GROUPED: tl.constexpr, FAST: tl.constexpr,
    N: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of any width, in pieces of BLOCK_N: the statistics of the run's rows first, then y piece by piece."""
    if tl.program_id(0) == 0:
        _store_kl(
            weight_ptr, bias_ptr, weight_rho_ptr, bias_rho_ptr, weight_prior_ptr, bias_prior_ptr, kl_ptr,
            weight_prior, bias_prior, prior_std, FLOOR, GROUPED, N, BLOCK_N,
        )  # fmt: skip
        return
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    k0, k1 = load_key(seed)
    group_row, group_draw = group_start(group_rows, all_draws, all_inner, GROUPED)
    start, stop = run_of(tl.program_id(0) - 1, run_rows, runs_per_share, share_rows)
    first_draw, count = draws_of(start, stop, rows_per_draw, SPAN)
    for draw in range(first_draw, first_draw + count):
        first = tl.maximum(start, draw * rows_per_draw)
        last = tl.minimum(stop, (draw + 1) * rows_per_draw)
        for top in range(first, last, BLOCK_M):
            position = (top + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
            row = group_row + row_at(position, draw, n_draws, inner, rows_per_draw, ORDER)
            mean, rstd = _wide_statistics(
                x_ptr, residual_ptr, sum_ptr, row, position < last, x_stride, residual_stride, eps,
                IS_RMS, N, VEC, BLOCK_M, BLOCK_N, STAGES, ACC,
            )  # fmt: skip
            if IS_RMS:
                tl.store(statistics_ptr + row, rstd, position < last)
            else:
                tl.store(statistics_ptr + 2 * row, mean, position < last)
                tl.store(statistics_ptr + 2 * row + 1, rstd, position < last)
        tl.debug_barrier()  # threads load below what others have stored
        for first_col in range(0, N, BLOCK_N):
            cols = first_col + tl.arange(0, BLOCK_N)[None, :]
            col_mask, own = cols < N, in_group(cols, N, GROUPED)
            weight = load_parameter(weight_ptr, own, col_mask, 0.0, ACC)
            bias = load_parameter(bias_ptr, own, col_mask, 0.0, ACC)
            scale_std = load_std(weight_rho_ptr, own, col_mask, NOISE, ACC)
            shift_std = load_std(bias_rho_ptr, own, col_mask, NOISE, ACC)
            gamma = sample(weight, scale_std, k0, k1, group_draw + draw, first_col, SCALE_STREAM, NOISE, BLOCK_N, FAST)
            beta = bias
            if HAS_BIAS:
                beta = sample(bias, shift_std, k0, k1, group_draw + draw, first_col, SHIFT_STREAM, NOISE, BLOCK_N, FAST)
            for top in tl.range(first, last, BLOCK_M, num_stages=STAGES):
                position = (top + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
                row = group_row + row_at(position, draw, n_draws, inner, rows_per_draw, ORDER)
                mask = (position < last) & col_mask
                if residual_ptr is None:
                    x = tl.load(tile_at(x_ptr, row, x_stride, cols, VEC), mask, other=0.0).to(ACC)
                else:
                    x = tl.load(tile_at(sum_ptr, row, N // VEC, cols, VEC), mask, other=0.0).to(ACC)
                mean, rstd = load_statistics(statistics_ptr, row, position < last, IS_RMS)
                x -= mean
                y = _affine(
                    x * rstd, row, gamma, beta, scale_std, shift_std, k0, k1, first_col,
                    NOISE, HAS_BIAS, BLOCK_N, FAST,
                )  # fmt: skip
                tl.store(tile_at(y_ptr, row, N // VEC, cols, VEC), y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _wide_statistics(
    x_ptr, residual_ptr, sum_ptr, row, row_mask, x_stride, residual_stride, eps: tl.constexpr,
    RMS: tl.constexpr, N: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(var + eps) of wide rows [BLOCK_M, 1]: those of their pieces, merged (Chan et al., 1983)."""
    mean, squares = tl.zeros((BLOCK_M, 1), ACC), tl.zeros((BLOCK_M, 1), ACC)
    origin = mean
    if not RMS:
        origin = _load_first(x_ptr, residual_ptr, sum_ptr, row, row_mask, x_stride, residual_stride, VEC, ACC)
    for first_col in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        cols = first_col + tl.arange(0, BLOCK_N)[None, :]
        x = _load_sum(
            x_ptr, residual_ptr, sum_ptr, row, cols, row_mask & (cols < N), x_stride, residual_stride, N, VEC, ACC
        )
        if RMS:
            squares += tl.sum(x * x, axis=1, keep_dims=True)
        else:
            count = tl.minimum(N - first_col, BLOCK_N).to(ACC)
            x = tl.where(cols < N, x - origin, 0.0)
            piece_mean = tl.sum(x, axis=1, keep_dims=True) / count
            centred = tl.where(cols < N, x - piece_mean, 0.0)
            shift = piece_mean - mean
            share = count / (first_col + count)
            squares += tl.sum(centred * centred, axis=1, keep_dims=True) + shift * shift * (first_col * share)
            mean += shift * share
    return origin + mean, _rstd(squares, eps, N)
