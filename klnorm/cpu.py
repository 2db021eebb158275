"""Forward and backward of the kernels in explicit PyTorch formulas, for tensors on the CPU.

Arguments and results are those of `klnorm.launch`. Backward regenerates the noise, so x is the only saved tensor of its
size. A loop goes through the groups of rows. The rows of a group are viewed as (outer, draws, inner, N), so that the
samples of all draws, (draws, 1, N), broadcast over their rows.
"""

import torch

from .reference.kl_norm import (
    FLOOR,
    TINY_RHO,
    accumulation_dtype,
    kl_deterministic,
    kl_normal,
    reciprocal_root,
    residual_sum,
    row_mean,
    softplus,
)
from .reference.noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM, normals
from .spec import Parameters


def forward(x, residual, parameters, seed, spec):
    """Return (y, sum or None, kl, statistics); statistics are mean and rstd (M, 2), rstd alone (M, 1) for RMSNorm."""
    acc, rows = accumulation_dtype(x), spec.rows
    z = x if residual is None else residual_sum(x, residual).contiguous()
    posteriors = _by_group(acc, parameters, spec)
    kl = [_kl(posterior, spec) for posterior in posteriors]
    kl = torch.stack(kl) if rows.kl_shape else kl[0]

    centred = z.reshape(-1, spec.n_cols).to(acc).contiguous()
    statistics = []
    if spec.kind == "layer":
        statistics = [row_mean(centred)]
        centred = centred - statistics[0]
    statistics.append(reciprocal_root((centred**2).mean(1, keepdim=True) + spec.eps))
    xhat = centred * statistics[-1]
    y = [_affine(xhat[part], posteriors[i], spec, _Noise(seed, rows, i)) for i, part in enumerate(_row_slices(rows))]
    y = y[0] if rows.groups == 1 else torch.stack(y, dim=1 if rows.per_head else 0)
    y = y.reshape(x.shape).to(spec.out_dtype)
    # .data is not a view. Autograd would forbid in-place changes of a view, as by nn.ReLU(inplace=True).
    return y.data, None if residual is None else z, kl, torch.cat(statistics, 1)


def backward(dy, dsum, dkl, z, parameters, seed, statistics, spec):
    """Return (dx, dresidual, dweight, dbias, dweight_rho, dbias_rho), None for a gradient that does not exist.

    dresidual is also None if it equals dx. `z`: the normalized tensor, x or its sum with the residual; `dy`, `dsum` and
    `dkl` may be None.
    """
    acc, rows = accumulation_dtype(z), spec.rows
    posteriors = _by_group(acc, parameters, spec)
    sums = [(torch.zeros_like(posterior.weight),) * 4 for posterior in posteriors]  # kept if dy is None
    dz = None
    if dy is not None:
        xhat, rstd = z.reshape(-1, spec.n_cols).to(acc).contiguous(), statistics[:, -1:]
        xhat = (xhat if spec.kind == "rms" else xhat - statistics[:, :1]) * rstd
        g = dy.reshape(-1, spec.n_cols).to(acc).contiguous()
        dxhat = torch.empty_like(xhat)
        for i, part in enumerate(_row_slices(rows)):
            dxhat[part], sums[i] = _affine_backward(g[part], xhat[part], posteriors[i], spec, _Noise(seed, rows, i))
        along_xhat = (dxhat * xhat).mean(1, keepdim=True)
        along_one = 0 if spec.kind == "rms" else dxhat.mean(1, keepdim=True)
        dz = (rstd * (dxhat - along_one - xhat * along_xhat)).reshape(z.shape)
        if dsum is not None:
            dz = dz + dsum.to(acc)
    gradients = [
        _parameter_gradients(posterior, spec, *group_sums, None if dkl is None else dkl.reshape(-1)[i])
        for i, (posterior, group_sums) in enumerate(zip(posteriors, sums, strict=True))
    ]
    gradients = [
        None if p is None else torch.stack(part).to(p.dtype).view_as(p)
        for p, part in zip(parameters, zip(*gradients, strict=True), strict=False)
    ]
    x_dtype = spec.dtypes[0]
    dx = None if dz is None else dz.to(x_dtype)
    dresidual = dz.to(z.dtype) if dz is not None and z.dtype != x_dtype else None
    return dx, dresidual, *gradients


class _Noise:
    """The noise of one group of rows: its draws, and the numbers of its first row and draw among all."""

    def __init__(self, seed, rows, group):
        self.seed, self.mode = seed, rows.noise
        self.draws, self.inner = rows.in_group
        self.first_draw, self.first_row, self.step = rows.first_draw(group), rows.first_row(group), rows.step


def _by_group(acc, parameters, spec):
    """Return the `Parameters` (N,) of each group, in the accumulation dtype; a prior mean may be a number."""
    groups = spec.rows.groups
    split = [[None] * groups if p is None else p.reshape(groups, -1).to(acc) for p in parameters[:4]]
    split += [
        [number] * groups if tensor is None else tensor.reshape(-1, spec.n_cols).to(acc).expand(groups, -1)
        for tensor, number in zip(parameters[4:], spec.prior, strict=False)
    ]
    return [Parameters(*each) for each in zip(*split, strict=True)]


def _row_slices(rows):
    """Return the slices of rows that belong to each group."""
    if rows.per_head:
        return [slice(i, None, rows.groups) for i in range(rows.groups)]
    return [slice(i * rows.group_rows, (i + 1) * rows.group_rows) for i in range(rows.groups)]


def _kl(posterior, spec):
    w, b, w_rho, b_rho, w_prior, b_prior = posterior
    if spec.posterior == "deterministic":
        return kl_deterministic(
            w + spec.weight_offset, torch.zeros_like(w) if b is None else b, b_prior, spec.prior.std
        ).sum()
    kl = kl_normal(w, w_rho, w_prior, spec.prior.std).sum()
    return kl if b is None else kl + kl_normal(b, b_rho, b_prior, spec.prior.std).sum()


def _affine(xhat, posterior, spec, noise):
    """Return y (M, N) of a group's rows."""
    w, b, w_rho, b_rho, *_ = posterior
    rows = _by_draw(xhat, noise)
    eps = _shared_normals(noise, w, b)
    y = rows * _sample(w + spec.weight_offset, w_rho, eps, SCALE_STREAM)
    if b is not None:
        y += _sample(b, b_rho, eps, SHIFT_STREAM)
    if noise.mode == "merged":
        y += _merged_variance(rows, w_rho, b_rho).sqrt() * _merged_normals(noise, rows)
    return y.view_as(xhat)


def _affine_backward(g, xhat, posterior, spec, noise):
    """Return dxhat (M, N) of a group's rows, and the gradients (N,) of (weight, s, bias, t): sums over these rows."""
    w, b, w_rho, b_rho, *_ = posterior
    shape = xhat.shape
    xhat, g = _by_draw(xhat, noise), _by_draw(g, noise)
    eps = _shared_normals(noise, w, b)
    dxhat = g * _sample(w + spec.weight_offset, w_rho, eps, SCALE_STREAM)
    dw_by_draw, db_by_draw = (g * xhat).sum((0, 2)), g.sum((0, 2))
    ds = dt = torch.zeros_like(w)
    if noise.mode == "shared":
        ds = (dw_by_draw * eps[SCALE_STREAM]).sum(0)
        dt = dt if b is None else (db_by_draw * eps[SHIFT_STREAM]).sum(0)
    elif noise.mode == "merged":
        s = softplus(w_rho)
        variance = _merged_variance(xhat, w_rho, b_rho)
        u = g * _merged_normals(noise, xhat) * torch.where(variance > 0, variance.rsqrt(), 0)
        dxhat += u * s**2 * xhat
        ds = s * (u * xhat**2).sum((0, 1, 2))
        dt = dt if b is None else softplus(b_rho) * u.sum((0, 1, 2))
    return dxhat.view(shape), (dw_by_draw.sum(0), ds, db_by_draw.sum(0), dt)


def _by_draw(rows, noise):
    """View rows (M, N) as (outer, draws, inner, N)."""
    if not len(rows):
        return rows.view(1, 1, 0, rows.shape[1])
    return rows.view(-1, noise.draws, noise.inner, rows.shape[1])


def _shared_normals(noise, w, b):
    """Return normals (1 or 2, draws, N) for the scale and, if there is one, the shift; None if rows share no draw."""
    if noise.mode != "shared":
        return None
    streams, draws = 1 if b is None else 2, noise.draws
    stream = torch.arange(streams, device=noise.seed.device).repeat_interleave(draws)[:, None]
    draw = (noise.first_draw + noise.step * torch.arange(draws, device=noise.seed.device)).repeat(streams)
    return normals(noise.seed, draw, len(w), stream).view(streams, draws, len(w)).to(w.dtype)


def _sample(mean, rho, eps, stream):
    """Return the scale or shift of each draw, (draws, 1, N); the mean (N,) if rows share no draw."""
    return mean if eps is None else (mean + softplus(rho) * eps[stream])[:, None]


def _merged_normals(noise, xhat):
    rows = xhat.flatten(0, 2)
    row = noise.first_row + noise.step * torch.arange(len(rows), device=noise.seed.device)
    return normals(noise.seed, row, rows.shape[1], MERGED_STREAM).view_as(xhat)


def _merged_variance(xhat, w_rho, b_rho):
    """Return the variance of gamma * xhat + beta, for rows that each have their own draw."""
    variance = softplus(w_rho) ** 2 * xhat**2
    return variance if b_rho is None else variance + softplus(b_rho) ** 2


def _parameter_gradients(posterior, spec, dw, ds, db, dt, dkl):
    """Return (dweight, dbias, dweight_rho, dbias_rho) of a group, the gradient of its KL divergence included."""
    (w, b, w_rho, b_rho, w_prior, b_prior), prior_std = posterior, spec.prior.std
    if w_rho is None:
        if dkl is not None:
            ratio = (w + spec.weight_offset) / prior_std
            dw = dw + dkl * (ratio - ratio / (ratio**2 + FLOOR**2)) / prior_std
            db = db if b is None else db + dkl * (b - b_prior) / prior_std**2
        return dw, db, None, None
    dw, dw_rho = _gaussian_gradients(w, w_rho, w_prior, prior_std, dw, ds, dkl)
    if b is None:
        return dw, None, dw_rho, None
    db, db_rho = _gaussian_gradients(b, b_rho, b_prior, prior_std, db, dt, dkl)
    return dw, db, dw_rho, db_rho


def _gaussian_gradients(mean, rho, prior, prior_std, dmean, dstd, dkl):
    """Return (dmean, drho), given the gradients of mean, deviation and KL divergence."""
    drho = dstd * torch.sigmoid(rho)
    if dkl is not None:
        s, slope = softplus(rho), torch.sigmoid(rho)
        tiny = rho < TINY_RHO  # there 1/s ds/drho = 1, though s may underflow
        dmean = dmean + dkl * (mean - prior) / prior_std**2
        drho = drho + dkl * (s * slope / prior_std**2 - torch.where(tiny, 1, slope / torch.where(tiny, 1, s)))
    return dmean, drho
