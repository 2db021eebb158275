"""Forward and backward in explicit PyTorch formulas: what the kernels compute, for tensors on the CPU.

Same arguments and results as `klnorm.launch`. Backward regenerates the noise and saves nothing of the size of x but x.
Groups of rows are worked through one after the other. The rows of a group are viewed as (outer, draws, inner, N), so
that every draw's sample (draws, 1, N) broadcasts over its rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .layout import first_draw, group_layout
from .reference.kl_norm import (
    FLOOR,
    TINY_RHO,
    accumulation_dtype,
    kl_deterministic,
    kl_normal,
    reciprocal_root,
    row_mean,
)
from .reference.noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, normals


class Posterior(NamedTuple):
    """Parameters (N,) of one group of rows in the accumulation dtype; deviations and shift may be None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_rho: torch.Tensor | None
    bias_rho: torch.Tensor | None


class Noise(NamedTuple):
    """The noise of one group: its rows' draws and where among all rows and draws they begin."""

    mode: str
    seed: torch.Tensor | None
    draws: int
    inner: int
    first_draw: int
    first_row: int


def forward(
    x, residual, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed,
    weight_prior_value, bias_prior_value, prior_std, eps, draws, inner, groups, rms,
):  # fmt: skip
    """(y, sum, kl, mean, rstd); the arguments are those of the operator in `klnorm.ops`."""
    acc = accumulation_dtype(x)
    z = x if residual is None else (x.to(acc) + residual.to(acc)).to(residual.dtype).contiguous()
    posteriors = _posteriors(acc, groups, weight, bias, weight_rho, bias_rho)
    priors = _priors(acc, weight_prior, bias_prior, weight_prior_value, bias_prior_value)
    kl = [_kl(posterior, priors, prior_std) for posterior in posteriors]
    kl = kl[0] if groups == 1 else torch.stack(kl)

    rows = z.reshape(-1, weight.numel() // groups)
    all_rows = rows.to(acc).contiguous()
    mean = None if rms else row_mean(all_rows)[:, 0]
    centred = all_rows if rms else all_rows - mean[:, None]
    rstd = reciprocal_root((centred**2).mean(1) + eps)
    parts = _parts(len(rows), groups, seed, draws, inner)
    xhat = centred * rstd[:, None]
    y = [_affine(xhat[part], *each) for part, *each in zip(parts[0], posteriors, parts[1], strict=True)]
    y = (y[0] if groups == 1 else torch.cat(y)).reshape(x.shape).to(x.dtype)
    # .data is no view, which autograd would not let anyone change in place, as nn.ReLU(inplace=True) does.
    return y.data, None if residual is None else z, kl, mean, rstd


def backward(
    dy, dsum, dkl, z, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed, mean, rstd,
    weight_prior_value, bias_prior_value, prior_std, draws, inner, groups,
):  # fmt: skip
    """(dx, dresidual, dweight, dbias, dweight_rho, dbias_rho), None where there is none, and dresidual like dx as well.

    `z` is what was normalized, x or its sum with the residual; `dy` and `dkl` may be None.
    """
    acc = accumulation_dtype(z)
    posteriors = _posteriors(acc, groups, weight, bias, weight_rho, bias_rho)
    priors = _priors(acc, weight_prior, bias_prior, weight_prior_value, bias_prior_value)
    n = weight.numel() // groups
    sums = [_zero_sums(posterior) for posterior in posteriors]
    dz = None
    if dy is not None:
        xhat = z.reshape(-1, n).to(acc).contiguous()
        xhat = (xhat if mean is None else xhat - mean[:, None]) * rstd[:, None]
        g = dy.reshape(-1, n).to(acc).contiguous()
        parts, noises = _parts(len(rstd), groups, seed, draws, inner)
        dxhat = torch.empty_like(xhat)
        for i, (part, noise) in enumerate(zip(parts, noises, strict=True)):
            dxhat[part], sums[i] = _affine_backward(g[part], xhat[part], posteriors[i], noise)
        along_xhat = (dxhat * xhat).mean(1, keepdim=True)
        along_one = 0 if mean is None else dxhat.mean(1, keepdim=True)
        dz = (rstd[:, None] * (dxhat - along_one - xhat * along_xhat)).reshape(z.shape)
        if dsum is not None:
            dz = dz + dsum.to(acc)
    gradients = [
        _parameter_gradients(posterior, priors, prior_std, *group_sums, None if dkl is None else dkl.reshape(-1)[i])
        for i, (posterior, group_sums) in enumerate(zip(posteriors, sums, strict=True))
    ]
    like = weight, bias, weight_rho, bias_rho
    gradients = [
        None if p is None else torch.stack(part).to(p.dtype).view_as(p)
        for p, part in zip(like, zip(*gradients, strict=True), strict=True)
    ]
    dx = None if dz is None else dz.to(dy.dtype)
    dresidual = dz.to(z.dtype) if dz is not None and z.dtype != dy.dtype else None
    return dx, dresidual, *gradients


def noise_mode(sampled, n_rows, draws):
    """ "none" (evaluation), "merged" (every row its own draw) or "shared"."""
    if not sampled:
        return "none"
    return "merged" if draws == n_rows else "shared"


def _posteriors(acc, groups, *parameters):
    """The posterior of every group."""
    split = [[None] * groups if p is None else p.reshape(groups, -1).to(acc) for p in parameters]
    return [Posterior(*each) for each in zip(*split, strict=True)]


def _priors(acc, weight_prior, bias_prior, weight_prior_value, bias_prior_value):
    return (
        weight_prior_value if weight_prior is None else weight_prior.reshape(-1).to(acc),
        bias_prior_value if bias_prior is None else bias_prior.reshape(-1).to(acc),
    )


def _parts(n_rows, groups, seed, draws, inner):
    """(slices of the rows, Noise) of the groups."""
    group_rows = n_rows // groups
    mode = noise_mode(seed is not None, n_rows, draws)
    shared = mode == "shared" and n_rows
    layout = group_layout(draws, inner, group_rows) if shared else (1, group_rows)
    starts = [i * group_rows for i in range(groups)]
    firsts = [first_draw(i, draws, inner, group_rows) if shared else 0 for i in range(groups)]
    noises = [Noise(mode, seed, *layout, first, start) for first, start in zip(firsts, starts, strict=True)]
    return [slice(start, start + group_rows) for start in starts], noises


def _kl(posterior, priors, prior_std):
    weight_prior, bias_prior = priors
    w, b, w_rho, b_rho = posterior
    if w_rho is None:
        return kl_deterministic(w, torch.zeros_like(w) if b is None else b, bias_prior, prior_std).sum()
    kl = kl_normal(w, w_rho, weight_prior, prior_std).sum()
    return kl if b is None else kl + kl_normal(b, b_rho, bias_prior, prior_std).sum()


def _affine(xhat, posterior, noise):
    """y (M, N) of a group's rows."""
    w, b, w_rho, b_rho = posterior
    rows = _by_draw(xhat, noise)
    eps = _shared_normals(noise, w, b)
    y = rows * _sample(w, w_rho, eps, SCALE_STREAM)
    if b is not None:
        y += _sample(b, b_rho, eps, SHIFT_STREAM)
    if noise.mode == "merged":
        y += _merged_variance(rows, w_rho, b_rho).sqrt() * _merged_normals(noise, rows)
    return y.view_as(xhat)


def _affine_backward(g, xhat, posterior, noise):
    """dxhat (M, N) of a group's rows, and the sums over them that are the gradients of (weight, s, bias, t)."""
    w, b, w_rho, b_rho = posterior
    shape = xhat.shape
    xhat, g = _by_draw(xhat, noise), _by_draw(g, noise)
    eps = _shared_normals(noise, w, b)
    dxhat = g * _sample(w, w_rho, eps, SCALE_STREAM)
    dw_by_draw, db_by_draw = (g * xhat).sum((0, 2)), g.sum((0, 2))
    ds = dt = torch.zeros_like(w)
    if noise.mode == "shared":
        ds = (dw_by_draw * eps[SCALE_STREAM]).sum(0)
        dt = dt if b is None else (db_by_draw * eps[SHIFT_STREAM]).sum(0)
    elif noise.mode == "merged":
        s = F.softplus(w_rho)
        variance = _merged_variance(xhat, w_rho, b_rho)
        u = g * _merged_normals(noise, xhat) * torch.where(variance > 0, variance.rsqrt(), 0)
        dxhat += u * s**2 * xhat
        ds = s * (u * xhat**2).sum((0, 1, 2))
        dt = dt if b is None else F.softplus(b_rho) * u.sum((0, 1, 2))
    return dxhat.view(shape), (dw_by_draw.sum(0), ds, db_by_draw.sum(0), dt)


def _zero_sums(posterior):
    return (torch.zeros_like(posterior.weight),) * 4


def _by_draw(rows, noise):
    """(M, N) as (outer, draws, inner, N)."""
    if not len(rows):
        return rows.view(1, 1, 0, rows.shape[1])
    return rows.view(-1, noise.draws, noise.inner, rows.shape[1])


def _shared_normals(noise, w, b):
    """Normals (1 or 2, draws, N) of scale and, if there is one, shift, from one call; None where no draw is shared."""
    if noise.mode != "shared":
        return None
    streams, draws = 1 if b is None else 2, noise.draws
    stream = torch.arange(streams, device=noise.seed.device).repeat_interleave(draws)[:, None]
    draw = torch.arange(noise.first_draw, noise.first_draw + draws, device=noise.seed.device).repeat(streams)
    return normals(noise.seed, draw, len(w), stream).view(streams, draws, len(w)).to(w.dtype)


def _sample(mean, rho, eps, stream):
    """Scale or shift (draws, 1, N) of every draw; the mean (N,) where no draw is shared."""
    return mean if eps is None else (mean + F.softplus(rho) * eps[stream])[:, None]


def _merged_normals(noise, xhat):
    rows = xhat.flatten(0, 2)
    row = torch.arange(noise.first_row, noise.first_row + len(rows), device=noise.seed.device)
    return normals(noise.seed, row, rows.shape[1], MERGED_STREAM).view_as(xhat)


def _merged_variance(xhat, w_rho, b_rho):
    """Variance of gamma * xhat + beta where the element has a draw of its own."""
    variance = F.softplus(w_rho) ** 2 * xhat**2
    return variance if b_rho is None else variance + F.softplus(b_rho) ** 2


def _parameter_gradients(posterior, priors, prior_std, dw, ds, db, dt, dkl):
    """(dweight, dbias, dweight_rho, dbias_rho) of a group, with the gradient of its KL divergence added."""
    w, b, w_rho, b_rho = posterior
    if w_rho is None:
        if dkl is not None:
            ratio = w / prior_std
            dw = dw + dkl * (ratio - ratio / (ratio**2 + FLOOR**2)) / prior_std
            db = db if b is None else db + dkl * (b - priors[1]) / prior_std**2
        return dw, db, None, None
    dw, dw_rho = _gaussian_gradients(w, w_rho, priors[0], prior_std, dw, ds, dkl)
    if b is None:
        return dw, None, dw_rho, None
    db, db_rho = _gaussian_gradients(b, b_rho, priors[1], prior_std, db, dt, dkl)
    return dw, db, dw_rho, db_rho


def _gaussian_gradients(mean, rho, prior, prior_std, dmean, dstd, dkl):
    """(dmean, drho) from the gradients of mean and deviation, and of the KL divergence."""
    drho = dstd * torch.sigmoid(rho)
    if dkl is not None:
        s, slope = F.softplus(rho), torch.sigmoid(rho)
        tiny = rho < TINY_RHO  # there 1/s ds/drho = 1, though s may underflow
        dmean = dmean + dkl * (mean - prior) / prior_std**2
        drho = drho + dkl * (s * slope / prior_std**2 - torch.where(tiny, 1, slope / torch.where(tiny, 1, s)))
    return dmean, drho
