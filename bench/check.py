"""The gate: output and gradients of every contestant against fp64 formulas, before it may be timed.

The reference goes through the rows in chunks, so that it fits beside a large input. klnorm must have the reference's
noise for the seed that it saved. An eager KL-Norm draws noise that nobody can know afterwards; it is checked in two
steps: with deviations near 0 it must agree with the reference, and with its own deviations

    sum_r dy * y  =  weight dweight + bias dbias + s ds + t dt      feature by feature

must hold, because y is linear in (weight, bias, s, t) for given noise, and (y - weight xhat - bias)^2 must be
s^2 xhat^2 + t^2 in the mean.

Comparisons are made twice, for x and for x of a size at which eps matters as much as its variance.
"""

import math

import torch
import torch.nn.functional as F

from klnorm.reference import kl_normal, normals
from klnorm.reference.kl_norm import kl_deterministic
from klnorm.reference.noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM

from .layers import EPS, PRIOR_STD

CHUNK = 1 << 24  # elements
KL_GRADIENT = 1.0
SMALL = 2.0**-8  # its square is about EPS
TINY = 1e-300  # keeps roots and quotients finite where x is exactly 0
NO_NOISE_RHO = -40.0  # a deviation of 4e-18, whose logarithm is still finite in fp32


class Wrong(Exception):
    """A contestant's result differs from the reference."""


def check(layer, case, family, inputs, cotangents):
    """Raise Wrong unless outputs and gradients of `layer` are right.

    `inputs`: (x,) or (x, residual) of (samples, rows, width); `cotangents`: those of (y,) or (y, sum).
    """
    if family != "kl":
        return _compare(layer, case, inputs, cotangents, seeded=family == "klnorm")
    rhos = [p for name, p in layer.parameters.items() if name.endswith("_rho")]
    own = [p.detach().clone() for p in rhos]
    _fill(rhos, [torch.full_like(p, NO_NOISE_RHO) for p in own])
    _compare(layer, case, inputs, cotangents, seeded=False)
    _fill(rhos, own)
    _check_noise(layer, case, *inputs, *cotangents)


def _fill(parameters, values):
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def run(layer, inputs, cotangents):
    """(outputs, {name: gradient}, tensors saved for backward) of one forward and backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = layer.forward(*inputs)
    if len(outputs) < len(cotangents):
        raise Wrong("the sum is missing")
    leaves = {**dict(zip(("x", "residual"), inputs, strict=False)), **layer.parameters}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), output_gradients(outputs, cotangents))
    return outputs, dict(zip(leaves, gradients, strict=True)), saved


def output_gradients(outputs, cotangents):
    """Cotangents of all outputs: those of y and the sum as given, and of the KL, where there is one."""
    return (*cotangents, *map(_kl_gradient, outputs[len(cotangents) :]))


def _kl_gradient(kl):
    """The same for a scalar, different ones for groups."""
    if kl.dim() == 0:
        return torch.full_like(kl, KL_GRADIENT)
    return torch.linspace(KL_GRADIENT, 2 * KL_GRADIENT, len(kl), dtype=kl.dtype, device=kl.device)


def tolerance(dtype):
    """A few roundings of `dtype`; in fp32, of its sums and of the hardware's sine and logarithm."""
    return max(4 * torch.finfo(dtype).eps, 1e-4)


def require_close(name, actual, expected, dtype):
    """Raise Wrong unless every element is within the tolerance of its own size plus the tensor's typical size."""
    if actual is None:
        raise Wrong(f"{name} is missing")
    actual = actual.detach().double()
    limit = tolerance(dtype) * (expected.abs() + expected.square().mean().sqrt())
    excess = ((actual - expected).abs() / limit.clamp(min=1e-30)).max().item()
    if not excess <= 1:  # NaN as well
        raise Wrong(f"{name} is off by {excess:.3g} times the tolerance")


def _compare(layer, case, inputs, cotangents, seeded):
    _compare_at(layer, case, inputs, cotangents, seeded)
    small = [(SMALL * t.detach()).requires_grad_() for t in inputs]
    _compare_at(layer, case, small, cotangents, seeded)


def _compare_at(layer, case, inputs, cotangents, seeded):
    outputs, gradients, saved = run(layer, inputs, cotangents)
    seed = _saved_seed(saved) if seeded and case.noise != "eval" else None
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.parameters.items()}
    dtype = inputs[0].dtype
    for rows in _chunks(case.shape):
        parts = [t.detach().flatten(0, 1)[rows].double().requires_grad_() for t in inputs]
        total = _sum(parts, dtype)
        expected = [_reference(total, leaves, case, rows, seed), total][: len(cotangents)]
        torch.autograd.backward(expected, [g.flatten(0, 1)[rows].double() for g in cotangents])
        for name, actual, value in zip(("y", "sum"), outputs, expected, strict=False):
            require_close(name, actual.flatten(0, 1)[rows], value.detach(), dtype)
        for name, part in zip(("x", "residual"), parts, strict=False):
            require_close(f"d{name}", gradients[name].flatten(0, 1)[rows], part.grad, dtype)
    for actual in outputs[len(cotangents) :]:
        kl = _divergence(leaves, case)
        kl.backward(_kl_gradient(kl))
        require_close("kl", actual, kl.detach(), torch.float32)
    for name, leaf in leaves.items():
        require_close(f"gradient of {name}", gradients[name], leaf.grad, dtype)


def _sum(parts, dtype):
    """x, or x plus the residual: rounded to `dtype`, that of the residual, with the derivative of an exact sum."""
    if len(parts) == 1:
        return parts[0]
    exact = sum(parts)
    return exact + (exact.to(dtype).double() - exact).detach()


def _saved_seed(saved):
    """klnorm saves its seed, an int64 tensor of one element, for backward."""
    seeds = [t for t in saved if t.dtype == torch.int64 and t.numel() == 1]
    if len(seeds) != 1:
        raise Wrong(f"{len(seeds)} seeds were saved for backward, expected 1")
    return seeds[0]


def _chunks(shape):
    step = max(1, CHUNK // shape.width)
    return [slice(start, min(start + step, shape.n_rows)) for start in range(0, shape.n_rows, step)]


def _normalize(rows, case):
    centred = rows if case.variant.rms else rows - rows.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(1, keepdim=True) + EPS)


def _reference(part, leaves, case, rows, seed):
    """y of the rows `rows` of x, fp64."""
    row = torch.arange(rows.start, rows.stop, device=part.device)
    sample = row // case.shape.rows

    def of_rows(name):
        """The parameter, or with groups each row's own; deviations after softplus; 0 for those that there are not."""
        if name not in leaves:
            return part.new_zeros(())
        value = F.softplus(leaves[name]) if name.endswith("_rho") else leaves[name]
        return value[sample] if case.variant.groups else value

    xhat, s, t = _normalize(part, case), of_rows("weight_rho"), of_rows("bias_rho")
    mean = of_rows("weight") * xhat + of_rows("bias")
    if seed is None:
        # Keeps the deviations in the graph, with gradient 0.
        return mean + 0 * (s.sum() + t.sum())
    width = case.shape.width
    if case.draws == case.shape.n_rows:
        std = torch.sqrt((s**2 * xhat**2 + t**2).clamp(min=TINY))
        return mean + std * normals(seed, row, width, MERGED_STREAM)
    draw = row // (case.shape.n_rows // case.draws)
    draws = torch.arange(int(draw[0]), int(draw[-1]) + 1, device=part.device)
    scale, shift = (normals(seed, draws, width, stream)[draw - draw[0]] for stream in (SCALE_STREAM, SHIFT_STREAM))
    return mean + s * scale * xhat + t * shift


def _divergence(leaves, case):
    """The KL divergence, a scalar, or (groups,)."""
    if case.variant.deterministic:
        return kl_deterministic(leaves["weight"], leaves["bias"], 0.0, PRIOR_STD).sum(-1)
    return sum(
        kl_normal(leaves[name], leaves[f"{name}_rho"], prior, PRIOR_STD).sum(-1)
        for name, prior in (("weight", 1.0), ("bias", 0.0))
        if name in leaves
    )


def _check_noise(layer, case, x, dy):
    y = layer.forward(x)[0]
    gradients = dict(zip(layer.parameters, torch.autograd.grad(y, list(layer.parameters.values()), dy), strict=True))
    p = {name: value.detach().double() for name, value in layer.parameters.items()}
    zero = torch.zeros_like(p["weight"])
    weight, bias = p["weight"], p.get("bias", zero)
    s, t = (F.softplus(p[name]) if name in p else zero for name in ("weight_rho", "bias_rho"))
    expected = zero.clone()
    for name, std in (("weight", s), ("bias", t)):
        if name in p:
            expected += p[name] * gradients[name] + std * gradients[f"{name}_rho"] / torch.sigmoid(p[f"{name}_rho"])
    actual, squares = torch.zeros_like(expected), 0.0
    for rows in _chunks(case.shape):
        x_rows, y_rows, dy_rows = (t.detach().flatten(0, 1)[rows].double() for t in (x, y, dy))
        xhat = _normalize(x_rows, case)
        actual += (dy_rows * y_rows).sum(0)
        variance = (s**2 * xhat**2 + t**2).clamp(min=TINY)
        squares += ((y_rows - weight * xhat - bias) ** 2 / variance).sum().item()
    require_close("the gradients' identity", actual, expected, x.dtype)
    mean_square = squares / case.shape.elements
    # Six deviations of the mean square of one normal per draw and feature: rows of one draw repeat it.
    if not abs(mean_square - 1) <= 6 * math.sqrt(2 / (case.draws * case.shape.width)) + tolerance(x.dtype):
        raise Wrong(f"the noise has variance {mean_square:.4f} times what it should be")
