"""The Gaussian posteriors of scale and shift: deviations, sampling, and their divergence from the prior."""

import triton
import triton.language as tl

from .noise import normals
from .rows import load_parameter

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
def kl_terms(mean, rho, prior_mean, prior_std: tl.constexpr):
    """KL(N(mean, s^2) || N(prior_mean, prior_std^2)) of every element, in nats."""
    ratio = softplus(rho) / prior_std
    log_ratio = tl.where(rho < _TINY_RHO, rho - tl.log(prior_std + 0.0 * rho), tl.log(ratio))
    offset = (mean - prior_mean) / prior_std
    return 0.5 * (ratio * ratio - 1.0 + offset * offset) - log_ratio


@triton.jit
def kl_terms_deterministic(weight, bias, bias_prior, prior_std: tl.constexpr, FLOOR: tl.constexpr):
    """KL(N(bias, weight^2) || N(bias_prior, prior_std^2)) of every element, in nats; floored in the logarithm."""
    ratio = weight / prior_std
    offset = (bias - bias_prior) / prior_std
    return 0.5 * (ratio * ratio - 1.0 + offset * offset - tl.log(ratio * ratio + FLOOR * FLOOR))


@triton.jit
def kl_rho_gradient(rho, prior_std: tl.constexpr):
    """d KL / d rho = (s / prior_std^2 - 1 / s) ds/drho, finite where s underflows."""
    s, slope = softplus(rho), sigmoid(rho)
    inverse = tl.where(rho < _TINY_RHO, 1.0, slope / tl.where(rho < _TINY_RHO, 1.0, s))
    return s * slope / (prior_std * prior_std) - inverse


@triton.jit
def load_std(rho_ptr, cols, mask, NOISE: tl.constexpr, ACC: tl.constexpr):
    """Deviation [1, BLOCK_N] of a parameter; 0 where it is not sampled."""
    if NOISE == "none" or rho_ptr is None:
        return tl.zeros(cols.shape, ACC)
    else:
        return softplus(load_parameter(rho_ptr, cols, mask, 0.0, ACC))


@triton.jit
def shared_normals(k0, k1, draw, first_col, STREAM: tl.constexpr, BLOCK_N: tl.constexpr, FAST: tl.constexpr):
    """Normals [1, BLOCK_N] that all rows of one draw share."""
    draw = (tl.zeros((1, 1), tl.int64) + draw).to(tl.uint32)
    return normals(k0, k1, draw, first_col, STREAM, BLOCK_N, FAST)


@triton.jit
def sample(
    mean, std, k0, k1, draw, first_col,
    STREAM: tl.constexpr, NOISE: tl.constexpr, BLOCK_N: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scale or shift [1, BLOCK_N] of a draw; its mean in evaluation, and where every row has a draw of its own."""
    if NOISE == "shared":
        return mean + std * shared_normals(k0, k1, draw, first_col, STREAM, BLOCK_N, FAST).to(mean.dtype)
    return mean


@triton.jit
def merged_variance(xhat, scale_std, shift_std, HAS_BIAS: tl.constexpr):
    """Variance of gamma * xhat + beta of an element with a draw of its own."""
    variance = (scale_std * scale_std) * (xhat * xhat)
    if HAS_BIAS:
        variance += shift_std * shift_std
    return variance
