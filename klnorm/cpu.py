"""Forward and backward in explicit PyTorch formulas: what the kernels compute, for tensors on the CPU.

Same arguments and results as `klnorm.launch`. Backward regenerates the noise and saves nothing of the size of x but x.
Rows are viewed as (outer, draws, inner, N), so that every draw's sample (draws, 1, N) broadcasts over its rows.
"""

import torch
import torch.nn.functional as F

from .reference.kl_norm import TINY_RHO, accumulation_dtype, kl_normal
from .reference.noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, normals


def forward(
    x, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed,
    weight_prior_value, bias_prior_value, prior_std, eps, draws, inner,
):  # fmt: skip
    """(y, kl, mean, rstd); the arguments are those of the operator in `klnorm.ops`."""
    acc = accumulation_dtype(x)
    w, b, w_rho, b_rho = _flat(acc, weight, bias, weight_rho, bias_rho)
    w_prior, b_prior = _flat(acc, weight_prior, bias_prior)
    kl = kl_normal(w, w_rho, weight_prior_value if w_prior is None else w_prior, prior_std).sum()
    if b is not None:
        kl = kl + kl_normal(b, b_rho, bias_prior_value if b_prior is None else b_prior, prior_std).sum()

    rows = x.reshape(-1, w.numel()).to(acc).contiguous()
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    rstd = torch.rsqrt((centred**2).mean(1) + eps)
    noise = noise_mode(seed, len(rows), draws)
    xhat = _by_draw(centred * rstd[:, None], noise, draws, inner)
    eps = _shared_normals(seed, noise, draws, w, b)
    y = xhat * _sample(w, w_rho, eps, SCALE_STREAM)
    if b is not None:
        y += _sample(b, b_rho, eps, SHIFT_STREAM)
    if noise == "merged":
        y += _merged_variance(xhat, w_rho, b_rho).sqrt() * _merged_normals(seed, xhat)
    # .data is no view, which autograd would not let anyone change in place, as nn.ReLU(inplace=True) does.
    return y.reshape(x.shape).to(x.dtype).data, kl, mean, rstd


def backward(
    dy, dkl, x, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed, mean, rstd,
    weight_prior_value, bias_prior_value, prior_std, draws, inner,
):  # fmt: skip
    """(dx, dweight, dbias, dweight_rho, dbias_rho), None where there is no shift; `dy` or `dkl` may be None."""
    acc = accumulation_dtype(x)
    w, b, w_rho, b_rho = _flat(acc, weight, bias, weight_rho, bias_rho)
    w_prior, b_prior = _flat(acc, weight_prior, bias_prior)
    noise = noise_mode(seed, len(mean), draws)
    dw, ds = torch.zeros_like(w), torch.zeros_like(w)
    db, dt = torch.zeros_like(w), torch.zeros_like(w)
    dx = None
    if dy is not None:
        n = w.numel()
        xhat = _by_draw((x.reshape(-1, n).to(acc).contiguous() - mean[:, None]) * rstd[:, None], noise, draws, inner)
        g = _by_draw(dy.reshape(-1, n).to(acc).contiguous(), noise, draws, inner)
        eps = _shared_normals(seed, noise, draws, w, b)
        dxhat = g * _sample(w, w_rho, eps, SCALE_STREAM)
        dw_by_draw, db_by_draw = (g * xhat).sum((0, 2)), g.sum((0, 2))
        dw, db = dw_by_draw.sum(0), db_by_draw.sum(0)
        if noise == "shared":
            ds = (dw_by_draw * eps[SCALE_STREAM]).sum(0)
            dt = dt if b is None else (db_by_draw * eps[SHIFT_STREAM]).sum(0)
        elif noise == "merged":
            s = F.softplus(w_rho)
            variance = _merged_variance(xhat, w_rho, b_rho)
            u = g * _merged_normals(seed, xhat) * torch.where(variance > 0, variance.rsqrt(), 0)
            dxhat += u * s**2 * xhat
            ds = s * (u * xhat**2).sum((0, 1, 2))
            dt = dt if b is None else F.softplus(b_rho) * u.sum((0, 1, 2))
        xhat, dxhat = xhat.reshape(-1, n), dxhat.reshape(-1, n)
        along_one = dxhat.mean(1, keepdim=True)
        along_xhat = (dxhat * xhat).mean(1, keepdim=True)
        dx = (rstd[:, None] * (dxhat - along_one - xhat * along_xhat)).reshape(x.shape).to(x.dtype)

    prior = weight_prior_value if w_prior is None else w_prior
    dweight, dweight_rho = _parameter_gradients(weight, w, w_rho, prior, prior_std, dw, ds, dkl)
    dbias = dbias_rho = None
    if b is not None:
        prior = bias_prior_value if b_prior is None else b_prior
        dbias, dbias_rho = _parameter_gradients(bias, b, b_rho, prior, prior_std, db, dt, dkl)
    return dx, dweight, dbias, dweight_rho, dbias_rho


def noise_mode(seed, n_rows, draws):
    """ "none" (evaluation), "merged" (every row its own draw) or "shared"."""
    if seed is None:
        return "none"
    return "merged" if draws == n_rows else "shared"


def _flat(dtype, *tensors):
    return [None if t is None else t.reshape(-1).to(dtype) for t in tensors]


def _by_draw(rows, noise, draws, inner):
    """(M, N) as (outer, draws, inner, N); one draw for all where none is shared."""
    if noise != "shared" or not len(rows):
        draws, inner = 1, len(rows)
    return rows.view(-1 if len(rows) else 1, draws, inner, rows.shape[1])


def _shared_normals(seed, noise, draws, w, b):
    """Normals (1 or 2, draws, N) of scale and, if there is one, shift, from one call; None where no draw is shared."""
    if noise != "shared":
        return None
    streams = 1 if b is None else 2
    stream = torch.arange(streams).repeat_interleave(draws)[:, None]
    eps = normals(seed, torch.arange(draws).repeat(streams), len(w), stream)
    return eps.view(streams, draws, len(w)).to(w.dtype)


def _sample(mean, rho, eps, stream):
    """Scale or shift (draws, 1, N) of every draw; the mean (N,) where no draw is shared."""
    return mean if eps is None else (mean + F.softplus(rho) * eps[stream])[:, None]


def _merged_normals(seed, xhat):
    rows = xhat.flatten(0, 2)
    return normals(seed, torch.arange(len(rows)), rows.shape[1], MERGED_STREAM).view_as(xhat)


def _merged_variance(xhat, w_rho, b_rho):
    """Variance of gamma * xhat + beta where the element has a draw of its own."""
    variance = F.softplus(w_rho) ** 2 * xhat**2
    return variance if b_rho is None else variance + F.softplus(b_rho) ** 2


def _parameter_gradients(parameter, mean, rho, prior, prior_std, dmean, dstd, dkl):
    """(dmean, drho) in the dtype and shape of the parameter, with the gradient of the KL divergence added."""
    drho = dstd * torch.sigmoid(rho)
    if dkl is not None:
        s, slope = F.softplus(rho), torch.sigmoid(rho)
        tiny = rho < TINY_RHO  # there 1/s ds/drho = 1, though s may underflow
        dmean = dmean + dkl * (mean - prior) / prior_std**2
        drho = drho + dkl * (s * slope / prior_std**2 - torch.where(tiny, 1, slope / torch.where(tiny, 1, s)))
    return dmean.to(parameter.dtype).view_as(parameter), drho.to(parameter.dtype).view_as(parameter)
