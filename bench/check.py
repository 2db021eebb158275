"""The gate: output and gradients of every contestant against fp64 formulas, before it may be timed.

The reference goes through the rows in chunks, so that it fits beside a large input. klnorm must have the reference's
noise for the seed that it saved. An eager KL-Norm draws noise that nobody can know afterwards; it is checked in two
steps: with deviations near 0 it must agree with the reference, and with its own deviations

    sum_r dy * y  =  weight dweight + bias dbias + s ds + t dt      feature by feature

must hold, because y is linear in (weight, bias, s, t) for given noise, and (y - weight xhat - bias)^2 must be
s^2 xhat^2 + t^2 in the mean.
"""

import math

import torch
import torch.nn.functional as F

from klnorm.reference import kl_normal, normals
from klnorm.reference.noise import MERGED_STREAM, SCALE_STREAM, SHIFT_STREAM

from .contestants import EPS, PRIOR_STD

CHUNK = 1 << 24  # elements
KL_GRADIENT = 1.0
NO_NOISE_RHO = -40.0  # a deviation of 4e-18, whose logarithm is still finite in fp32


class Wrong(Exception):
    """A contestant's result differs from the reference."""


def check(layer, case, family, x, dy):
    """Raise Wrong unless outputs and gradients of `layer` are right for x, dy (samples, rows, width)."""
    if family != "kl":
        return _compare(layer, case, x, dy, seeded=family == "klnorm")
    rhos = {name: p for name, p in layer.parameters.items() if name.endswith("_rho")}
    own = {name: p.detach().clone() for name, p in rhos.items()}
    _fill(rhos, dict.fromkeys(rhos, NO_NOISE_RHO))
    _compare(layer, case, x, dy, seeded=False)
    _fill(rhos, own)
    _check_noise(layer, case, x, dy)


def run(layer, x, dy):
    """(outputs, {name: gradient}, tensors saved for backward) of one forward and backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = layer.forward(x)
    leaves = {"x": x, **layer.parameters}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), output_gradients(outputs, dy))
    return outputs, dict(zip(leaves, gradients, strict=True)), saved


def output_gradients(outputs, dy):
    """Cotangents of (y,) or (y, kl)."""
    return (dy, *(torch.full_like(kl, KL_GRADIENT) for kl in outputs[1:]))


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


def _compare(layer, case, x, dy, seeded):
    outputs, gradients, saved = run(layer, x, dy)
    seed = _saved_seed(saved) if seeded and case.noise != "eval" else None
    leaves = {name: p.detach().double().requires_grad_() for name, p in layer.parameters.items()}
    for rows in _chunks(case.shape):
        part = x.detach().flatten(0, 1)[rows].double().requires_grad_()
        y = _reference(part, leaves, case, rows, seed)
        y.backward(dy.flatten(0, 1)[rows].double())
        require_close("y", outputs[0].flatten(0, 1)[rows], y.detach(), x.dtype)
        require_close("dx", gradients["x"].flatten(0, 1)[rows], part.grad, x.dtype)
    if len(outputs) > 1:
        kl = _divergence(leaves)
        (KL_GRADIENT * kl).backward()
        require_close("kl", outputs[1], kl.detach(), torch.float32)
    for name, leaf in leaves.items():
        require_close(f"gradient of {name}", gradients[name], leaf.grad, x.dtype)


def _saved_seed(saved):
    """klnorm saves its seed, an int64 tensor of one element, for backward."""
    seeds = [t for t in saved if t.dtype == torch.int64 and t.numel() == 1]
    if len(seeds) != 1:
        raise Wrong(f"{len(seeds)} seeds were saved for backward, expected 1")
    return seeds[0]


def _chunks(shape):
    step = max(1, CHUNK // shape.width)
    return [slice(start, min(start + step, shape.n_rows)) for start in range(0, shape.n_rows, step)]


def _normalize(rows):
    centred = rows - rows.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(1, keepdim=True) + EPS)


def _reference(part, leaves, case, rows, seed):
    """y of the rows `rows` of x, fp64."""
    xhat = _normalize(part)
    mean = leaves["weight"] * xhat + leaves["bias"]
    if seed is None:
        # Keeps the deviations in the graph, with gradient 0.
        return mean + sum(0 * leaf.sum() for name, leaf in leaves.items() if name.endswith("_rho"))
    s, t = F.softplus(leaves["weight_rho"]), F.softplus(leaves["bias_rho"])
    row = torch.arange(rows.start, rows.stop, device=part.device)
    width = case.shape.width
    if case.draws == case.shape.n_rows:
        return mean + torch.sqrt(s**2 * xhat**2 + t**2) * normals(seed, row, width, MERGED_STREAM)
    draw = row // (case.shape.n_rows // case.draws)
    draws = torch.arange(int(draw[0]), int(draw[-1]) + 1, device=part.device)
    gamma = leaves["weight"] + s * normals(seed, draws, width, SCALE_STREAM)
    beta = leaves["bias"] + t * normals(seed, draws, width, SHIFT_STREAM)
    return gamma[draw - draw[0]] * xhat + beta[draw - draw[0]]


def _divergence(leaves):
    return sum(
        kl_normal(leaves[name], leaves[f"{name}_rho"], prior, PRIOR_STD).sum()
        for name, prior in (("weight", 1.0), ("bias", 0.0))
    )


def _check_noise(layer, case, x, dy):
    y = layer.forward(x)[0]
    names = list(layer.parameters)
    gradients = dict(zip(names, torch.autograd.grad(y, list(layer.parameters.values()), dy), strict=True))
    p = {name: value.detach().double() for name, value in layer.parameters.items()}
    expected = torch.zeros_like(p["weight"])
    for name in "weight", "bias":
        expected += p[name] * gradients[name]
        expected += F.softplus(p[f"{name}_rho"]) * gradients[f"{name}_rho"] / torch.sigmoid(p[f"{name}_rho"])
    actual, squares = torch.zeros_like(expected), 0.0
    for rows in _chunks(case.shape):
        xhat, y_rows = _normalize(x.detach().flatten(0, 1)[rows].double()), y.detach().flatten(0, 1)[rows].double()
        actual += (dy.flatten(0, 1)[rows].double() * y_rows).sum(0)
        variance = F.softplus(p["weight_rho"]) ** 2 * xhat**2 + F.softplus(p["bias_rho"]) ** 2
        squares += ((y_rows - p["weight"] * xhat - p["bias"]) ** 2 / variance).sum().item()
    require_close("the gradients' identity", actual, expected, x.dtype)
    mean_square = squares / case.shape.elements
    # Six deviations of the mean square of one normal per draw and feature: rows of one draw repeat it.
    if not abs(mean_square - 1) <= 6 * math.sqrt(2 / (case.draws * case.shape.width)) + tolerance(x.dtype):
        raise Wrong(f"the noise has variance {mean_square:.4f} times what it should be")


def _fill(parameters, values):
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.as_tensor(values[name]))
