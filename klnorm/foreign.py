"""Norm classes of other libraries: finds by trial which norm a class computes, and makes its KL layers."""

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
# Classes that are known not to be these norms although they, or subclasses, have a weight and an eps: no trial needed.
_OTHERS = nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd, nn.Linear, nn.Embedding


class Convention(NamedTuple):
    """How a class computes the norm `kind`, "LayerNorm" or "RMSNorm": y = (offset + weight) * xhat, plus bias if
    `shift`. `eps_name`: its attribute that holds eps. `answers`: what the function `answers` returns.
    """

    kind: str
    offset: int
    shift: bool
    eps_name: str
    answers: dict


class KLForeignNorm(KLNorm):
    """Base of the KL layers made from norm classes of other libraries.

    In evaluation mode the layer runs the forward of the original class. `weight`, `weight_rho` and `weight_prior` are
    in the units of that class's weight: if it multiplies by 1 + weight, a scale of 1 means weight = weight_prior = 0.
    """

    kernel_layer_name = None  # else the library `kernels` would replace the forward by one that does not sample

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
        """Return `out_dtype` if given, else the dtype that the original class returns for such an input."""
        if self.out_dtype is not None:
            return self.out_dtype
        return self._convention.answers.get(getattr(z, "dtype", None), {}).get(self.weight.dtype)

    @property
    def _weight_offset(self):
        return float(self._convention.offset)

    def __reduce_ex__(self, protocol):
        """Copy and pickle by the original class, which can be imported; the KL class is made at run time."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (type(self)._plain_class, self._convention), *state


class KLForeignLayerNorm(KLForeignNorm):
    """Base of KL layers made from a class that computes LayerNorm, with or without a shift."""


class KLForeignRMSNorm(KLForeignNorm):
    """Base of KL layers made from a class that computes RMSNorm."""

    _is_rms = True


_BASES = {"LayerNorm": KLForeignLayerNorm, "RMSNorm": KLForeignRMSNorm}
_NO_SHIFT = {"_means": ("weight",), "bias": None, "bias_rho": None, "bias_prior": None}


def kl_class(plain_class, convention):
    """Return the KL class that replaces `plain_class`; restoring a layer sets its class back to `plain_class`."""
    return _kl_class(plain_class, convention.kind, convention.shift)


@functools.cache
def _kl_class(plain_class, kind, shift):
    """Make a subclass, so that checks of the class or of its name, as in transformers, still find the layer."""
    attributes = {"_plain_class": plain_class} | ({} if shift else _NO_SHIFT)
    return type(f"KL{plain_class.__name__}", (_BASES[kind], plain_class), attributes)


def _blank(plain_class, convention):
    return object.__new__(kl_class(plain_class, convention))


def looks_like_norm(module):
    """Whether `module` holds what a norm holds: `weight`, perhaps `bias`, an eps, and no other tensors or modules."""
    if isinstance(module, (torch.jit.ScriptModule, *_OTHERS)):
        return False
    parameters, buffers = _present(module._parameters), _present(module._buffers)
    # weight_orig and weight_mask: a pruned norm counts; `check_convertible` refuses it with a message.
    more = parameters - {"weight", "bias", "weight_orig", "bias_orig"} or buffers - {"weight_mask", "bias_mask"}
    if more or _present(module._modules) - {"parametrizations"} or not _eps_names(module):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return False
    return weight.numel() >= 2 and weight.shape[0] != 1  # else the weight broadcasts


def takes_x_alone(module):
    """Whether the forward of the class of `module` takes exactly one argument."""
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
    """Return the `Convention` of a module with a weight and a forward of x alone; None if it computes no such norm."""
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
    """Return the names that `module` or its class uses and that a KL layer would use for something else."""
    held = module._parameters, module._buffers, module._modules
    return sorted(_OURS & {*dir(type(module)), *vars(module), *(name for names in held for name in names)})


_OURS = {
    *dir(KLForeignLayerNorm), *SETTINGS, "_convention", "_plain_class",
    "weight_rho", "weight_prior", "bias_rho", "bias_prior",
} - {*dir(nn.Module), "reset_parameters", "kernel_layer_name", "_is_hf_initialized"}  # fmt: skip


class Trial(NamedTuple):
    """An input, scale and shift (or None), and the outputs of a class for them: None for a forward that raised."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    outputs: list

    def gave(self, expected):
        """Whether all outputs equal `expected` up to a few roundings, in any order of operations."""
        # Relative to the row's maximum, because a shift can cancel its feature. Comparison with NaN is False.
        tolerance = 32 * torch.finfo(expected.dtype).eps * expected.abs().amax(-1, keepdim=True)
        return all(
            isinstance(y, torch.Tensor)
            and (y.shape, y.dtype) == (expected.shape, expected.dtype)
            and bool(((y - expected).abs() <= tolerance).all())
            for y in self.outputs
        )


@torch.no_grad()
def try_out(module, eps):
    """Return the `Trial` of a module with a `weight` and perhaps a `bias`, in evaluation and in training mode.

    The trial uses fp32 and parameters of its own: those of `module` may be on the meta device, and weights of 0 or 1
    cannot tell weight from 1 + weight or abs(weight). It leaves out hooks, other parameters, buffers and child modules,
    so a class that needs them fails.
    """
    shape, device = module.weight.shape, "cpu" if module.weight.is_meta else module.weight.device
    index = torch.arange(6 * shape.numel(), dtype=torch.float32, device=device).view(2, 3, *shape)
    feature = index[0, 0]
    weight = 30 * (3 * feature).cos()  # of both signs, even for two features
    bias = 30 * (1 + 3 * feature).cos() if isinstance(getattr(module, "bias", None), torch.Tensor) else None
    x = index.sin() + 0.5  # not centred
    x[:, 0] *= 1e4  # shows whether the class clamps
    x[:, 1:] *= abs(eps or torch.finfo(x.dtype).eps) ** 0.5  # so small that eps shows
    x.flatten(2)[:, 2, 0] *= 1e3  # one feature that outweighs the others
    parameters = {name: nn.Parameter(p) for name, p in (("weight", weight), ("bias", bias)) if p is not None}
    outputs = [_forward(module, training, parameters, x.clone()) for training in (False, True)]
    return Trial(x, weight, bias, outputs)


@torch.no_grad()
def answers(module):
    """Return {dtype of the input: {dtype of the parameters: dtype of the output}} of the combinations that work."""
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
    except Exception:  # the code of another library may raise anything
        return None
