"""What the class of a norm computes, found by trying it out."""

import itertools
from typing import NamedTuple

import torch
from torch import nn

from .checks import FLOATS


class Trial(NamedTuple):
    """An input, a scale and a shift (None without), and the outputs of a class for them; None where it failed."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    outputs: list

    def gave(self, expected):
        """Whether all outputs are `expected`, to a few roundings in whatever order."""
        # Relative to the row: a shift can cancel the rest. A failed comparison with NaN is False.
        tolerance = 32 * torch.finfo(expected.dtype).eps * expected.abs().amax(-1, keepdim=True)
        return all(
            isinstance(y, torch.Tensor)
            and (y.shape, y.dtype) == (expected.shape, expected.dtype)
            and bool(((y - expected).abs() <= tolerance).all())
            for y in self.outputs
        )


@torch.no_grad()
def try_out(module, eps):
    """The `Trial` of a module with a `weight` and perhaps a `bias`, in evaluation and in training mode.

    In fp32, and with parameters of known values: those of `module` may be on the meta device, and do not tell weight
    from 1 + weight or abs(weight) where all are 0 or 1. Hooks, other parameters, buffers and child modules are left
    out, so that a class that needs them fails.
    """
    shape, device = module.weight.shape, "cpu" if module.weight.is_meta else module.weight.device
    index = torch.arange(6 * shape.numel(), dtype=torch.float32, device=device).view(2, 3, *shape)
    feature = index[0, 0]
    weight = 30 * (3 * feature).cos()  # of both signs, the first and the second feature's already
    bias = 30 * (1 + 3 * feature).cos() if isinstance(getattr(module, "bias", None), torch.Tensor) else None
    x = index.sin() + 0.5  # not centred
    x[:, 0] *= 1e4  # would be clamped
    x[:, 1:] *= abs(eps or torch.finfo(x.dtype).eps) ** 0.5  # so small that eps shows
    x.flatten(2)[:, 2, 0] *= 1e3  # one feature that outweighs the others
    parameters = {name: nn.Parameter(p) for name, p in (("weight", weight), ("bias", bias)) if p is not None}
    outputs = [_forward(module, training, parameters, x.clone()) for training in (False, True)]
    return Trial(x, weight, bias, outputs)


@torch.no_grad()
def answers(module):
    """dtype of the input -> dtype of the parameters -> dtype in which the class answers, of those that it takes."""
    shape, device = module.weight.shape, "cpu" if module.weight.is_meta else module.weight.device
    names = [name for name in ("weight", "bias") if isinstance(getattr(module, name, None), torch.Tensor)]
    found = {dtype: {} for dtype in FLOATS}
    for dtype, of_parameters in itertools.product(FLOATS, FLOATS):
        parameters = {n: nn.Parameter(torch.ones(shape, dtype=of_parameters, device=device)) for n in names}
        y = _forward(module, True, parameters, torch.ones((1, *shape), dtype=dtype, device=device))
        if isinstance(y, torch.Tensor):
            found[dtype][of_parameters] = y.dtype
    return found


def _forward(module, training, parameters, x):
    blank = object.__new__(type(module))
    vars(blank).update({key: value for key, value in vars(module).items() if key not in parameters})
    for kind in "_parameters", "_buffers", "_modules":
        vars(blank)[kind] = {key: None for key, value in vars(module)[kind].items() if value is None}
    vars(blank)["_parameters"].update(parameters)
    vars(blank)["training"] = training
    try:
        return type(module).forward(blank, x)
    except Exception:  # of whatever kind: the class is not ours
        return None
