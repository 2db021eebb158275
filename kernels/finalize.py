"""Last kernel of the backward: adds the programs' column sums up to gradients of the parameters, the KL's included."""

import triton
import triton.language as tl

from .gaussian import FLOOR, kl_rho_gradient, load_prior, sigmoid, softplus
from .gradients import BIAS_SUM, SCALE_SUM, SHIFT_SUM, WEIGHT_SUM
from .noise import SCALE_STREAM, SHIFT_STREAM, load_key, normals
from .rows import BATCH_SIZES, among_all, group_start, in_group, load_parameter


@triton.jit
def _reduce_partials(
    partial_ptr, n_programs, n_draws, first_draw, first_col, k0, k1,
    MEAN_SUM: tl.constexpr, STD_SUM: tl.constexpr, STREAM: tl.constexpr,
    MANY_DRAWS: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Column sums [1, BLOCK_N] of a mean's slot and its deviation's slot over a group's programs, in a fixed order.

    Where every program worked on one draw, the deviation has no slot: its sum is made of what the programs have in the
    mean's slot, multiplied by the noise of their draws.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    SLOTS: tl.constexpr = 4 if MODE.NOISE == "merged" or MANY_DRAWS else 2
    N: tl.constexpr = TILE.N
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    group_ptr = partial_ptr + tl.program_id(1).to(tl.int64) * n_programs * (SLOTS * N)
    mean_sum = tl.full((TILE.BLOCK_M, TILE.BLOCK_N), 0.0, ACC)
    std_sum = mean_sum
    for top in range(0, n_programs, TILE.BLOCK_M):
        program = top + tl.arange(0, TILE.BLOCK_M)[:, None]
        mask = (program < n_programs) & (cols < N)
        own_ptr = group_ptr + program.to(tl.int64) * (SLOTS * N) + cols
        mean_part = tl.load(own_ptr + MEAN_SUM * N, mask, other=0.0)
        mean_sum += mean_part
        if SLOTS == 4:
            std_sum += tl.load(own_ptr + STD_SUM * N, mask, other=0.0)
        elif MODE.NOISE == "shared":
            draw = among_all(first_draw, program // (n_programs // n_draws), MODE).to(tl.uint32)
            std_sum += mean_part * normals(k0, k1, draw, first_col, STREAM, TILE.BLOCK_N, MODE.FAST).to(ACC)
    return tl.sum(mean_sum, axis=0, keep_dims=True), tl.sum(std_sum, axis=0, keep_dims=True)


@triton.jit
def _store_gradients(
    mean_ptr, rho_ptr, prior_ptr, dmean_ptr, drho_ptr, mean_sum, std_sum, dkl, cols, number, prior_std,
    MODE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Chain rule of the deviation and gradient of the KL divergence, for the scale or for the shift."""
    mask, own = cols < N, in_group(cols, MODE, N)
    ACC: tl.constexpr = mean_sum.dtype
    mean, rho = load_parameter(mean_ptr, own, mask, ACC), load_parameter(rho_ptr, own, mask, ACC)
    if MODE.NOISE == "merged":
        std_sum *= softplus(rho)
    dmean = mean_sum + dkl * (mean - load_prior(prior_ptr, cols, mask, number, MODE, N, ACC)) / (prior_std * prior_std)
    drho = std_sum * sigmoid(rho) + dkl * kl_rho_gradient(rho, prior_std)
    tl.store(dmean_ptr + own, dmean.to(dmean_ptr.dtype.element_ty), mask)
    tl.store(drho_ptr + own, drho.to(drho_ptr.dtype.element_ty), mask)


@triton.jit
def _store_deterministic_gradients(
    parameters, gradients, weight_sum, bias_sum, dkl, cols, bias_prior, prior_std,
    MODE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of the KL divergence in the deterministic reading, for scale and shift."""
    mask, own = cols < N, in_group(cols, MODE, N)
    ACC: tl.constexpr = weight_sum.dtype
    dweight_ptr, dbias_ptr, _, _ = gradients
    ratio = (load_parameter(parameters.weight, own, mask, ACC) + MODE.OFFSET) / prior_std
    dweight = weight_sum + dkl * (ratio - ratio / (ratio * ratio + FLOOR * FLOOR)) / prior_std
    tl.store(dweight_ptr + own, dweight.to(dweight_ptr.dtype.element_ty), mask)
    if parameters.bias is not None:
        prior = load_prior(parameters.bias_prior, cols, mask, bias_prior, MODE, N, ACC)
        offset = load_parameter(parameters.bias, own, mask, ACC) - prior
        dbias = bias_sum + dkl * offset / (prior_std * prior_std)
        tl.store(dbias_ptr + own, dbias.to(dbias_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def finalize_kernel(
    partial_ptr, dkl_ptr, parameters, seed, gradients,
    n_programs, n_draws, rows_per_draw, all_draws, all_inner,
    weight_prior: tl.float64, bias_prior: tl.float64, prior_std: tl.float64,
    MANY_DRAWS: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program i owns features i * BLOCK_N + (0 .. BLOCK_N - 1) of all parameters, program_id(1) their group.

    It adds the sums of BLOCK_M programs of the backward at a time.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    first_col = tl.program_id(0) * TILE.BLOCK_N
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    k0, k1 = load_key(seed)
    _, first_draw = group_start(n_draws, rows_per_draw, all_draws, all_inner, MODE)
    dkl, std = tl.full((1, 1), 0.0, ACC), tl.full((1, 1), prior_std, ACC)
    if dkl_ptr is not None:
        dkl += tl.load(dkl_ptr + tl.program_id(1)).to(ACC)
    weight_sum, scale_sum = _reduce_partials(
        partial_ptr, n_programs, n_draws, first_draw, first_col, k0, k1,
        WEIGHT_SUM, SCALE_SUM, SCALE_STREAM, MANY_DRAWS, MODE, TILE,
    )  # fmt: skip
    bias_sum, shift_sum = weight_sum, scale_sum
    if parameters.bias is not None:
        bias_sum, shift_sum = _reduce_partials(
            partial_ptr, n_programs, n_draws, first_draw, first_col, k0, k1,
            BIAS_SUM, SHIFT_SUM, SHIFT_STREAM, MANY_DRAWS, MODE, TILE,
        )  # fmt: skip
    if parameters.weight_rho is None:
        _store_deterministic_gradients(
            parameters, gradients, weight_sum, bias_sum, dkl, cols, bias_prior, std, MODE, TILE.N
        )
    else:  # no return above instead: Triton compiles what follows a return, too
        dweight_ptr, dbias_ptr, dweight_rho_ptr, dbias_rho_ptr = gradients
        _store_gradients(
            parameters.weight, parameters.weight_rho, parameters.weight_prior, dweight_ptr, dweight_rho_ptr,
            weight_sum, scale_sum, dkl, cols, weight_prior, std, MODE, TILE.N,
        )  # fmt: skip
        if parameters.bias is not None:
            _store_gradients(
                parameters.bias, parameters.bias_rho, parameters.bias_prior, dbias_ptr, dbias_rho_ptr,
                bias_sum, shift_sum, dkl, cols, bias_prior, std, MODE, TILE.N,
            )  # fmt: skip
