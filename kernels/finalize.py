"""Finalizer: partial column sums to the gradients of all four parameters, KL gradient included, in their own dtype."""

import triton
import triton.language as tl

from .backward import BIAS_SUM, SCALE_SUM, SHIFT_SUM, WEIGHT_SUM
from .noise import SCALE_STREAM, SHIFT_STREAM, load_key, normals
from .posterior import kl_rho_gradient, sigmoid, softplus
from .rows import BATCH_SIZES, group_start, in_group, load_parameter


@triton.jit
def _reduce_partials(
    partial_ptr, n_programs, runs_per_share, group_draw, first_col, k0, k1,
    MEAN_SUM: tl.constexpr, STD_SUM: tl.constexpr, STREAM: tl.constexpr,
    NOISE: tl.constexpr, SPAN: tl.constexpr, FAST: tl.constexpr,
    N: tl.constexpr, SLOTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Column sums [1, BLOCK_N] of a mean's slot and its deviation's slot over a group's programs, in a fixed order.

    Shared draws, one per program: the deviation has no slot; its sum is the mean's with each program's noise put in.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    cols = first_col + tl.arange(0, BLOCK_N)[None, :]
    group_ptr = partial_ptr + n_programs.to(tl.int64) * tl.program_id(1) * (SLOTS * N)
    mean_sum, std_sum = tl.zeros((BLOCK_P, BLOCK_N), ACC), tl.zeros((BLOCK_P, BLOCK_N), ACC)
    for top in range(0, n_programs, BLOCK_P):
        program = top + tl.arange(0, BLOCK_P)[:, None]
        mask = (program < n_programs) & (cols < N)
        own_ptr = group_ptr + program.to(tl.int64) * (SLOTS * N) + cols
        mean_part = tl.load(own_ptr + MEAN_SUM * N, mask, other=0.0)
        mean_sum += mean_part
        if NOISE == "merged" or SPAN:
            std_sum += tl.load(own_ptr + STD_SUM * N, mask, other=0.0)
        elif NOISE == "shared":
            draw = (group_draw + program // runs_per_share).to(tl.uint32)
            std_sum += mean_part * normals(k0, k1, draw, first_col, STREAM, BLOCK_N, FAST).to(ACC)
    return tl.sum(mean_sum, axis=0, keep_dims=True), tl.sum(std_sum, axis=0, keep_dims=True)


@triton.jit
def _store_gradients(
    mean_ptr, rho_ptr, prior_ptr, mean_sum, std_sum, dkl, cols,
    dmean_ptr, drho_ptr,
    prior: tl.constexpr, prior_std: tl.constexpr, NOISE: tl.constexpr, GROUPED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Chain rule of the deviation and gradient of the KL divergence, for the scale or for the shift."""
    mask, own = cols < N, in_group(cols, N, GROUPED)
    ACC: tl.constexpr = mean_sum.dtype
    mean = load_parameter(mean_ptr, own, mask, 0.0, ACC)
    rho = load_parameter(rho_ptr, own, mask, 0.0, ACC)
    if NOISE == "merged":
        std_sum *= softplus(rho)
    dmean = mean_sum + dkl * (mean - load_parameter(prior_ptr, cols, mask, prior, ACC)) / (prior_std * prior_std)
    drho = std_sum * sigmoid(rho) + dkl * kl_rho_gradient(rho, prior_std)
    tl.store(dmean_ptr + own, dmean.to(dmean_ptr.dtype.element_ty), mask)
    tl.store(drho_ptr + own, drho.to(drho_ptr.dtype.element_ty), mask)


@triton.jit
def _store_deterministic_gradients(
    weight_ptr, bias_ptr, bias_prior_ptr, weight_sum, bias_sum, dkl, cols,
    dweight_ptr, dbias_ptr,
    bias_prior: tl.constexpr, prior_std: tl.constexpr, FLOOR: tl.constexpr, GROUPED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of the KL divergence in the deterministic reading, for scale and shift."""
    mask, own = cols < N, in_group(cols, N, GROUPED)
    ACC: tl.constexpr = weight_sum.dtype
    ratio = load_parameter(weight_ptr, own, mask, 0.0, ACC) / prior_std
    dweight = weight_sum + dkl * (ratio - ratio / (ratio * ratio + FLOOR * FLOOR)) / prior_std
    tl.store(dweight_ptr + own, dweight.to(dweight_ptr.dtype.element_ty), mask)
    if bias_ptr is not None:
        offset = load_parameter(bias_ptr, own, mask, 0.0, ACC) - load_parameter(
            bias_prior_ptr, cols, mask, bias_prior, ACC
        )
        dbias = bias_sum + dkl * offset / (prior_std * prior_std)
        tl.store(dbias_ptr + own, dbias.to(dbias_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def finalize_kernel(
    partial_ptr, dkl_ptr, weight_ptr, bias_ptr, weight_rho_ptr, bias_rho_ptr, weight_prior_ptr, bias_prior_ptr,
    dweight_ptr, dbias_ptr, dweight_rho_ptr, dbias_rho_ptr, seed,
    n_programs, runs_per_share, group_rows, all_draws, all_inner,
    weight_prior: tl.constexpr, bias_prior: tl.constexpr, prior_std: tl.constexpr, FLOOR: tl.constexpr,
    NOISE: tl.constexpr, SPAN: tl.constexpr, GROUPED: tl.constexpr, FAST: tl.constexpr,
    N: tl.constexpr, SLOTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program i owns features i * BLOCK_N + (0 .. BLOCK_N - 1) of all parameters, program_id(1) their group."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    first_col = tl.program_id(0) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)[None, :]
    k0, k1 = load_key(seed)
    _, group_draw = group_start(group_rows, all_draws, all_inner, GROUPED)
    dkl = tl.zeros((1, 1), ACC)
    if dkl_ptr is not None:
        dkl += tl.load(dkl_ptr + tl.program_id(1)).to(ACC)
    weight_sum, scale_sum = _reduce_partials(
        partial_ptr, n_programs, runs_per_share, group_draw, first_col, k0, k1,
        WEIGHT_SUM, SCALE_SUM, SCALE_STREAM, NOISE, SPAN, FAST, N, SLOTS, BLOCK_P, BLOCK_N,
    )  # fmt: skip
    bias_sum, shift_sum = weight_sum, scale_sum
    if bias_ptr is not None:
        bias_sum, shift_sum = _reduce_partials(
            partial_ptr, n_programs, runs_per_share, group_draw, first_col, k0, k1,
            BIAS_SUM, SHIFT_SUM, SHIFT_STREAM, NOISE, SPAN, FAST, N, SLOTS, BLOCK_P, BLOCK_N,
        )  # fmt: skip
    if weight_rho_ptr is None:
        _store_deterministic_gradients(
            weight_ptr, bias_ptr, bias_prior_ptr, weight_sum, bias_sum, dkl, cols, dweight_ptr, dbias_ptr,
            bias_prior, prior_std, FLOOR, GROUPED, N,
        )  # fmt: skip
    else:  # not after a return: the compiler reads what follows one all the same
        _store_gradients(
            weight_ptr, weight_rho_ptr, weight_prior_ptr, weight_sum, scale_sum, dkl, cols,
            dweight_ptr, dweight_rho_ptr, weight_prior, prior_std, NOISE, GROUPED, N,
        )  # fmt: skip
        if bias_ptr is not None:
            _store_gradients(
                bias_ptr, bias_rho_ptr, bias_prior_ptr, bias_sum, shift_sum, dkl, cols,
                dbias_ptr, dbias_rho_ptr, bias_prior, prior_std, NOISE, GROUPED, N,
            )  # fmt: skip
