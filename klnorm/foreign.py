"""Norm classes of other libraries: which norm a class computes, found by trying it out, and its KL layers."""

import functools
import inspect
import itertools
from inspect import Parameter
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import inputs
from .checks import FLOATS
from .layers import SETTINGS, KLNorm
from .reference.kl_norm import residual_sum

_COMPUTE = {
    "LayerNorm": F.layer_norm,
    "RMSNorm": lambda x, shape, weight, bias, eps: F.rms_norm(x, shape, weight, eps),
}
# Have a weight and, some of them or of their subclasses, an eps, and are not worth a trial.
_OTHERS = nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd, nn.Linear, nn.Embedding


class Convention(NamedTuple):
    """How a class writes the norm `kind`, "LayerNorm" or "RMSNorm": y = (offset + weight) * xhat, + bias where there is
    a shift; and the name of its attribute with eps. `answers`: see the function.
    """

    kind: str
    offset: int
    shift: bool
    eps_name: str
    answers: dict


class KLForeignNorm(KLNorm):
    """Base of the KL layers that klnorm makes of other classes than nn.LayerNorm and nn.RMSNorm.

    Evaluation mode is the forward of the layer's own class. `weight`, `weight_rho` and `weight_prior` are in the units
    of that class's weight: where it multiplies with 1 + weight, a scale of 1 is a weight and a weight_prior of 0.
    """

    kernel_layer_name = None  # by which the library `kernels` would put in a forward that does not sample

    def _remove_posterior(self):
        super()._remove_posterior()
        del self._convention

    def _shape_and_eps(self):
        weight = self._parameters.get("weight")  # the attribute is a Proxy under torch.fx
        shape = (self.weight if weight is None else weight).shape
        return tuple(shape), getattr(self, self._convention.eps_name)

    def _standard(self, name):
        return super()._standard(name) - (self._convention.offset if name == "weight" else 0)

    def _evaluate(self, x, residual):
        if residual is not None:
            inputs.check_input(x, self._shape_and_eps()[0])
            inputs.check_residual(residual, x)
        z = residual_sum(x, residual)
        y = super(KLNorm, self).forward(z)
        y = y if self.out_dtype is None else y.to(self.out_dtype)
        return y if residual is None else (y, z)

    def _out_dtype(self, z):
        """That in which the layer's own class answers, unless another one is asked for."""
        if self.out_dtype is not None:
            return self.out_dtype
        return self._convention.answers.get(getattr(z, "dtype", None), {}).get(self.weight.dtype)

    @property
    def _weight_offset(self):
        return float(self._convention.offset)

    def __reduce_ex__(self, protocol):
        """Copies and pickles name the layer's own class, which can be imported, and not the one made at run time."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (type(self)._plain_class, self._convention), *state


class KLForeignLayerNorm(KLForeignNorm):
    """Of a class that computes LayerNorm, with or without a shift."""


class KLForeignRMSNorm(KLForeignNorm):
    """Of a class that computes RMSNorm."""

    _is_rms = True


_BASES = {"LayerNorm": KLForeignLayerNorm, "RMSNorm": KLForeignRMSNorm}
_NO_SHIFT = {"_means": ("weight",), "bias": None, "bias_rho": None, "bias_prior": None}


def kl_class(plain_class, convention):
    """The class of KL layers that stands for `plain_class`; restoring puts that back."""
    return _kl_class(plain_class, convention.kind, convention.shift)


@functools.cache
def _kl_class(plain_class, kind, shift):
    """A subclass, so that what asks for the own class or its name, as transformers' initialization does, finds it."""
    attributes = {"_plain_class": plain_class} | ({} if shift else _NO_SHIFT)
    return type(f"KL{plain_class.__name__}", (_BASES[kind], plain_class), attributes)


def _blank(plain_class, convention):
    return object.__new__(kl_class(plain_class, convention))


def looks_like_norm(module):
    """Whether `module` is built as a norm is: a scale `weight`, perhaps a shift `bias`, and an eps."""
    if isinstance(module, (torch.jit.ScriptModule, *_OTHERS)):
        return False
    parameters, buffers = _present(module._parameters), _present(module._buffers)
    # weight_orig, weight_mask: of a pruned norm, which is one, if not one to replace
    more = parameters - {"weight", "bias", "weight_orig", "bias_orig"} or buffers - {"weight_mask", "bias_mask"}
    if more or _present(module._modules) - {"parametrizations"} or not _eps_names(module):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return False
    return weight.numel() >= 2 and weight.shape[0] != 1  # else broadcast over features, or over what is no feature


def takes_x_alone(module):
    """Whether the forward of the class of `module` has one argument."""
    arguments = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len(arguments) == 1 and arguments[0].kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def has_shift(module):
    return isinstance(getattr(module, "bias", None), torch.Tensor)


def _present(entries):
    return {name for name, entry in entries.items() if entry is not None}


def _eps_names(module):
    return [key for key, value in vars(module).items() if "eps" in key and _may_be_eps(value)]


def _may_be_eps(value):
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def convention(module):
    """The `Convention` of a module with a weight and a forward of x alone; None where it computes something else."""
    for eps_name in _eps_names(module):
        eps = getattr(module, eps_name)
        trial = try_out(module, eps)
        shape = trial.weight.shape
        for kind, compute in _COMPUTE.items():
            if (kind == "LayerNorm" and eps is None) or (kind == "RMSNorm" and trial.bias is not None):
                continue
            for offset in 0, 1:
                if trial.gave(compute(trial.x, shape, offset + trial.weight, trial.bias, eps)):
                    return Convention(kind, offset, trial.bias is not None, eps_name, answers(module))
    return None


def clashes(module):
    """Names that the class of `module` or the module itself uses, and that a KL layer would use for something else."""
    held = module._parameters, module._buffers, module._modules
    return sorted(_OURS & {*dir(type(module)), *vars(module), *(name for names in held for name in names)})


_OURS = {
    *dir(KLForeignLayerNorm), *SETTINGS, "_convention", "_plain_class",
    "weight_rho", "weight_prior", "bias_rho", "bias_prior",
} - {*dir(nn.Module), "reset_parameters", "kernel_layer_name", "_is_hf_initialized"}  # fmt: skip


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
