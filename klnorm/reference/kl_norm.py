"""KL-Norm in the symbols of its definition. Every function here is differentiable by autograd.

posterior  gamma_j ~ N(weight_j, s_j^2), s = softplus(weight_rho);   beta_j ~ N(bias_j, t_j^2), t = softplus(bias_rho)
prior      gamma_j ~ N(weight_prior_j, p^2);                         beta_j ~ N(bias_prior_j, p^2)

Deterministic reading, without rho: y_j itself is treated as N(bias_j, weight_j^2), with the prior N(bias_prior_j, p^2).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from .noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, normals

Noise = Literal["batch", "sample", "token"]  # which rows share a draw
Posterior = Literal["sampled", "deterministic"]  # how to read KL-Norm

TINY_RHO = -40.0  # below it softplus(rho) = exp(rho) to the last bit of fp64
# Deterministic reading: sqrt(weight^2 + (FLOOR p)^2) replaces |weight| in the logarithm. At weight = 0 the KL is then
# log(1000) - 1/2 nats, not infinite, and its slope is at most 500 / p; at |weight| = p / 10 it is 5e-5 nats off.
FLOOR = 1e-3


def accumulation_dtype(x):
    """Return the dtype of all arithmetic on `x`: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def draw_layout(shape, n_normalized, noise, sample_dim):
    """Return (draws, inner) of an input: row r uses draw (r // inner) % draws.

    `shape` is the whole shape of x, the last `n_normalized` dimensions of which are normalized together.
    """
    leading = shape[: len(shape) - n_normalized]
    if noise == "batch":
        return 1, math.prod(leading)
    if noise == "token":
        return math.prod(leading), 1
    if not leading:
        return 1, 1
    return leading[sample_dim], math.prod(leading[sample_dim + 1 :])


def softplus(rho):
    """Return the deviation log(1 + exp(rho)); above the threshold it is rho to the last bit of fp64."""
    return F.softplus(rho, threshold=-TINY_RHO)


def log_softplus(rho):
    """Return log(softplus(rho)); that is rho itself where softplus(rho) may underflow."""
    return torch.where(rho < TINY_RHO, rho, softplus(rho.clamp(min=TINY_RHO)).log())


def kl_normal(
    mean: torch.Tensor, rho: torch.Tensor, prior_mean: float | torch.Tensor, prior_std: float
) -> torch.Tensor:
    """Return KL(N(mean, softplus(rho)^2) || N(prior_mean, prior_std^2)), element by element, in nats."""
    s, p = softplus(rho), prior_std
    return math.log(p) - log_softplus(rho) + (s**2 + (mean - prior_mean) ** 2) / (2 * p**2) - 0.5


def kl_deterministic(weight, bias, bias_prior, prior_std):
    """Return KL(N(bias, weight^2) || N(bias_prior, prior_std^2)) by element, in nats, with `FLOOR` in the logarithm."""
    std, mean = weight / prior_std, (bias - bias_prior) / prior_std
    return -0.5 * (std**2 + FLOOR**2).log() + (std**2 + mean**2) / 2 - 0.5


def row_mean(rows):
    """Return the mean (M, 1) of every row, computed from the distances to its first feature.

    The mean of equal numbers is then exactly that number. A plain sum would be rounded, and the factor 1 / sqrt(eps)
    would amplify the error a thousand or a million times.
    """
    first = rows[:, :1].detach()  # the derivative of the mean, 1 / N, needs no part of it
    return first + (rows - first).mean(1, keepdim=True)


def residual_sum(x, residual):
    """Return x + residual in the dtype of the residual, rounded once; x if the residual is None."""
    if residual is None:
        return x
    acc = accumulation_dtype(x)
    return (x.to(acc) + residual.to(acc)).to(residual.dtype)


def reciprocal_root(variance):
    """Return 1 / sqrt(variance); 0 with derivative 0 for variance 0: without eps, a row of equal numbers has xhat 0."""
    spread = variance != 0
    return torch.where(spread, torch.where(spread, variance, 1).rsqrt(), 0)


def kl_layer_norm(
    x: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_rho: torch.Tensor | None,
    bias_rho: torch.Tensor | None,
    *,
    weight_prior: float | torch.Tensor = 1.0,
    bias_prior: float | torch.Tensor = 0.0,
    prior_std: float = 0.1,
    eps: float = 1e-5,
    noise: Noise = "sample",
    sample_dim: int = 0,
    sample: bool = True,
    seed: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    posterior: Posterior = "sampled",
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    per_head: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The specification of `klnorm.functional.kl_layer_norm`: same arguments and results, without checks.

    A seed of None is drawn from `generator` or torch's own; on the CPU it is the seed that the functional form draws.
    """
    parameters = weight, bias, weight_rho, bias_rho, weight_prior, bias_prior
    draw = noise, sample_dim, sample and posterior == "sampled", seed, generator, per_head
    return _kl_norm(x, residual, normalized_shape, parameters, prior_std, eps, draw, row_mean, out_dtype, weight_offset)


def kl_rms_norm(
    x: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor,
    weight_rho: torch.Tensor | None,
    *,
    bias: torch.Tensor | None = None,
    bias_rho: torch.Tensor | None = None,
    weight_prior: float | torch.Tensor = 1.0,
    bias_prior: float | torch.Tensor = 0.0,
    prior_std: float = 0.1,
    eps: float | None = None,
    noise: Noise = "sample",
    sample_dim: int = 0,
    sample: bool = True,
    seed: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    posterior: Posterior = "sampled",
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    per_head: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The specification of `klnorm.functional.kl_rms_norm`: same arguments and results, without checks."""
    parameters = weight, bias, weight_rho, bias_rho, weight_prior, bias_prior
    draw = noise, sample_dim, sample and posterior == "sampled", seed, generator, per_head
    eps = torch.finfo(accumulation_dtype(x)).eps if eps is None else eps
    return _kl_norm(
        x, residual, normalized_shape, parameters, prior_std, eps, draw, lambda rows: 0.0, out_dtype, weight_offset
    )


def _kl_norm(x, residual, normalized_shape, parameters, prior_std, eps, draw, centre, out_dtype, offset):
    """Return (y, kl), or (y, sum, kl) with a residual; `centre(rows)` is subtracted from the rows (M, N).

    Parameters may be (G, *normalized_shape): row r of M then has those of group r // (M / G), or with `per_head` those
    of head r % G, and kl is (G,).
    """
    shape = tuple(normalized_shape) if isinstance(normalized_shape, Iterable) else (normalized_shape,)
    acc, n = accumulation_dtype(x), math.prod(shape)
    has_groups = parameters[0].dim() > len(shape)
    parameters = [v.reshape(-1, n).to(acc) if torch.is_tensor(v) else v for v in parameters]
    kl = _kl(*parameters, prior_std, offset)

    z = residual_sum(x, residual)
    rows = z.reshape(-1, n).to(acc)
    centred = rows - centre(rows)
    xhat = centred * reciprocal_root((centred**2).mean(1, keepdim=True) + eps)

    row, groups = torch.arange(len(rows), device=x.device), len(parameters[0])
    group = row % groups if draw[-1] else row // max(1, len(rows) // groups)
    w, b, w_rho, b_rho = (v if v is None else v[group] for v in parameters[:4])
    y = _affine(xhat, offset + w, b, w_rho, b_rho, x.shape, len(shape), *draw).reshape(x.shape).to(out_dtype or x.dtype)
    kl = kl if has_groups else kl[0]
    return (y, kl) if residual is None else (y, z, kl)


def _kl(w, b, w_rho, b_rho, w_prior, b_prior, prior_std, offset):
    """Return the KL divergence (G,) of parameters (G, N)."""
    if w_rho is None:
        return kl_deterministic(offset + w, torch.zeros_like(w) if b is None else b, b_prior, prior_std).sum(1)
    kl = kl_normal(w, w_rho, w_prior, prior_std).sum(1)
    return kl if b is None else kl + kl_normal(b, b_rho, b_prior, prior_std).sum(1)


def _affine(xhat, w, b, w_rho, b_rho, x_shape, n_normalized, noise, sample_dim, sample, seed, generator, per_head):
    """Return y (M, N), given the parameters (M, N) of every row.

    With `per_head`, x is (..., H, *normalized_shape) and row r is head r % H at position r // H. The heads of a
    position that uses draw d use draws d H + 0, ..., d H + H - 1.
    """
    if not sample:
        return w * xhat if b is None else w * xhat + b
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=xhat.device, generator=generator)
    s, t = (rho if rho is None else softplus(rho) for rho in (w_rho, b_rho))
    draws, inner = draw_layout(x_shape, n_normalized + per_head, noise, sample_dim)
    heads = x_shape[-n_normalized - 1] if per_head else 1
    if draws * heads == len(xhat):
        return _merged(xhat, w, b, s, t, seed)
    n, row = xhat.shape[1], torch.arange(len(xhat), device=xhat.device)
    d = row // heads // inner % draws * heads + row % heads
    every = torch.arange(draws * heads, device=xhat.device)
    y = (w + s * normals(seed, every, n, SCALE_STREAM).to(xhat)[d]) * xhat
    return y if b is None else y + b + t * normals(seed, every, n, SHIFT_STREAM).to(xhat)[d]


def _merged(xhat, w, b, s, t, seed):
    """Return y where each row has its own draw: one normal for scale and shift (local reparameterization)."""
    rows = torch.arange(len(xhat), device=xhat.device)
    eps = normals(seed, rows, xhat.shape[1], MERGED_STREAM).to(xhat.dtype)
    variance = s**2 * xhat**2 + (0 if t is None else t**2)
    # sqrt with derivative 0 at 0 instead of infinity
    std = torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
    return w * xhat + (0 if b is None else b) + std * eps
