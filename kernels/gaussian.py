"""The Gaussian posteriors of scale and shift: deviations, samples, and their divergence from the prior."""

import triton
import triton.language as tl

from .noise import SCALE_STREAM, SHIFT_STREAM, normals
from .rows import among_all, as_int64, in_group, load_parameter

FLOOR = tl.constexpr(1e-3)  # under weight / prior_std in the deterministic reading, see klnorm/reference/kl_norm.py
# The least variance of a shift in backward. It keeps the derivative of sqrt(scale_var * xhat^2 + shift_var) finite
# without a test per element. As the least normal number of fp32 it changes no deviation above 1e-19.
LEAST_VARIANCE = tl.constexpr(2.0**-126)

# Below this rho, softplus(rho) = exp(rho) to the last bit of fp64, and its logarithm is rho itself.
_TINY_RHO = tl.constexpr(-40.0)


@triton.jit
def _log1p(z):
    """log(1 + z) for z in [0, 1], accurate to a few ulp for tiny z as well."""
    if z.dtype == tl.float64:
        u = 1.0 + z
        return tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))
    # 2 atanh(w), w = z / (2 + z) <= 1/3: the first term left out is below 2^-27 of the sum.
    w = z / (2.0 + z)
    w2 = w * w
    series = 1.0 / 15
    for k in tl.static_range(6, -1, -1):
        series = series * w2 + 1.0 / (2 * k + 1)
    return 2.0 * w * series


@triton.jit
def softplus(rho):
    """The deviation s = log(1 + exp(rho))."""
    return tl.maximum(rho, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(tl.exp(-tl.abs(rho)))


@triton.jit
def sigmoid(rho):
    """ds/drho."""
    z = tl.exp(-tl.abs(rho))
    return tl.where(rho >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def kl_terms(mean, rho, prior_mean, prior_std):
    """KL(N(mean, s^2) || N(prior_mean, prior_std^2)) of every element, in nats."""
    ratio = softplus(rho) / prior_std
    log_ratio = tl.where(rho < _TINY_RHO, rho - tl.log(prior_std), tl.log(ratio))
    offset = (mean - prior_mean) / prior_std
    return 0.5 * (ratio * ratio - 1.0 + offset * offset) - log_ratio


@triton.jit
def kl_terms_deterministic(weight, bias, bias_prior, prior_std):
    """KL(N(bias, weight^2) || N(bias_prior, prior_std^2)) of every element, in nats; floored in the logarithm."""
    ratio = weight / prior_std
    offset = (bias - bias_prior) / prior_std
    return 0.5 * (ratio * ratio - 1.0 + offset * offset - tl.log(ratio * ratio + FLOOR * FLOOR))


@triton.jit
def kl_rho_gradient(rho, prior_std):
    """d KL / d rho = (s / prior_std^2 - 1 / s) ds/drho, finite where s underflows."""
    s, slope = softplus(rho), sigmoid(rho)
    inverse = tl.where(rho < _TINY_RHO, 1.0, slope / tl.where(rho < _TINY_RHO, 1.0, s))
    return s * slope / (prior_std * prior_std) - inverse


@triton.jit
def load_prior(ptr, cols, mask, number, MODE: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr):
    """A prior's means [1, BLOCK_N], of every head or for all groups; `number` everywhere where ptr is None."""
    if ptr is None:
        return tl.full(cols.shape, number, ACC)
    elif MODE.GROUPED == "heads":
        return tl.load(ptr + in_group(cols, MODE, N), mask, other=0.0).to(ACC)
    else:
        return tl.load(ptr + cols, mask, other=0.0).to(ACC)


@triton.jit
def store_kl(kl_ptr, parameters, weight_prior, bias_prior, prior_std, MODE: tl.constexpr, TILE: tl.constexpr):
    """KL divergence of the N scales and shifts of this program's group, summed in a fixed order.

    Parameters without deviations are of the deterministic reading. The features come by a quarter of a tile, so that
    this program takes no more registers than those with rows.
    """
    ACC: tl.constexpr = kl_ptr.dtype.element_ty
    BLOCK: tl.constexpr = TILE.BLOCK_N if TILE.BLOCK_M >= 4 else TILE.BLOCK_M * TILE.BLOCK_N // 4
    total, std = tl.full((1, BLOCK), 0.0, ACC), tl.full((1, 1), prior_std, ACC)
    for first_col in range(0, TILE.N, BLOCK):
        cols = first_col + tl.arange(0, BLOCK)[None, :]
        mask, own = cols < TILE.N, in_group(cols, MODE, TILE.N)
        weight = load_parameter(parameters.weight, own, mask, ACC)
        bias = load_parameter(parameters.bias, own, mask, ACC)
        prior = load_prior(parameters.bias_prior, cols, mask, bias_prior, MODE, TILE.N, ACC)
        if parameters.weight_rho is None:
            terms = kl_terms_deterministic(weight + MODE.OFFSET, bias, prior, std)
        else:
            terms = tl.full((1, BLOCK), 0.0, ACC)
            if parameters.bias is not None:
                terms += kl_terms(bias, load_parameter(parameters.bias_rho, own, mask, ACC), prior, std)
            prior = load_prior(parameters.weight_prior, cols, mask, weight_prior, MODE, TILE.N, ACC)
            terms += kl_terms(weight, load_parameter(parameters.weight_rho, own, mask, ACC), prior, std)
        total += tl.where(mask, terms, 0.0)
    tl.store(kl_ptr + tl.program_id(1), tl.sum(total))


@triton.jit
def _sample(
    mean_ptr, rho_ptr, k0, k1, draw, first_col, own, mask,
    STREAM: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scale or shift [1, BLOCK_N] of a draw that rows share; else its mean."""
    value = load_parameter(mean_ptr, own, mask, ACC)
    if MODE.NOISE == "shared" and rho_ptr is not None:
        std = softplus(load_parameter(rho_ptr, own, mask, ACC))
        draw = as_int64(draw).to(tl.uint32)[None, None]
        value += std * normals(k0, k1, draw, first_col, STREAM, TILE.BLOCK_N, MODE.FAST).to(ACC)
    return value


@triton.jit
def prepared_at(draw, n_draws, parameters, MODE: tl.constexpr, N: tl.constexpr):
    """(offset of a draw in the prepared numbers, distance there from the scale to its variance).

    Prepared numbers are (groups * n_draws, 2, N): scale and shift of every draw that rows share. Where every row has a
    draw of its own they are (groups, 4, N): two means, then two variances. Without a shift there is half of that.
    """
    HALF: tl.constexpr = N if parameters.bias is None else 2 * N
    WHOLE: tl.constexpr = 2 * HALF if MODE.NOISE == "merged" else HALF
    return (tl.program_id(1).to(tl.int64) * n_draws + draw) * WHOLE, HALF


@triton.jit
def load_affine(
    prepared_ptr, parameters, k0, k1, draw, first_draw, n_draws, first_col,
    MODE: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(scale, shift) [1, BLOCK_N] of a draw that rows share, prepared or made here; else their means."""
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    mask = cols < TILE.N
    if prepared_ptr is not None:
        start, _ = prepared_at(draw, n_draws, parameters, MODE, TILE.N)
        scale = load_parameter(prepared_ptr + start, cols, mask, ACC)
        shift = scale
        if parameters.bias is not None:
            shift = load_parameter(prepared_ptr + start + TILE.N, cols, mask, ACC)
    else:
        own, number = in_group(cols, MODE, TILE.N), among_all(first_draw, draw, MODE)
        scale = _sample(
            parameters.weight, parameters.weight_rho, k0, k1, number, first_col, own, mask,
            SCALE_STREAM, MODE, TILE, ACC,
        )  # fmt: skip
        if MODE.OFFSET != 0:
            scale += MODE.OFFSET
        shift = _sample(
            parameters.bias, parameters.bias_rho, k0, k1, number, first_col, own, mask,
            SHIFT_STREAM, MODE, TILE, ACC,
        )  # fmt: skip
    return scale, shift


@triton.jit
def load_variances(
    prepared_ptr, parameters, first_col,
    LEAST: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(variance of the scale, of the shift) [1, BLOCK_N], the latter at least LEAST, prepared or made here."""
    cols = first_col + tl.arange(0, TILE.BLOCK_N)[None, :]
    mask = cols < TILE.N
    shift = tl.full(cols.shape, LEAST, ACC)
    if prepared_ptr is not None:
        start, half = prepared_at(0, 1, parameters, MODE, TILE.N)
        scale = load_parameter(prepared_ptr + start + half, cols, mask, ACC)
        if parameters.bias is not None:
            shift = tl.load(prepared_ptr + start + half + TILE.N + cols, mask, other=1.0)  # 0 would be divided by
    else:
        own = in_group(cols, MODE, TILE.N)
        std = softplus(load_parameter(parameters.weight_rho, own, mask, ACC))
        scale = std * std
        if parameters.bias is not None:
            std = softplus(load_parameter(parameters.bias_rho, own, mask, ACC))
            shift = tl.maximum(std * std, LEAST, propagate_nan=tl.PropagateNan.ALL)
    return scale, shift
