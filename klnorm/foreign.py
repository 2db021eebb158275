"""RMSNorm classes of other libraries: told by what they compute, and the KL layers that are made of them."""

import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .posterior import SETTINGS, KLNorm
from .spec import Parameters
from .trial import try_out


class Convention(NamedTuple):
    """How a class writes RMSNorm: y = (offset + weight) * xhat, and the name of its attribute with eps."""

    offset: int
    eps_name: str


class KLForeignRMSNorm(KLNorm):
    """Base of the KL layers that `klnorm.replace_rms_norm` makes of other classes than nn.RMSNorm.

    Evaluation mode is the forward of the layer's own class. `weight`, `weight_rho` and `weight_prior` are in the units
    of that class's weight: where it multiplies with 1 + weight, a scale of 1 is a weight and a weight_prior of 0.
    """

    _means = ("weight",)
    _is_rms = True
    bias = bias_rho = bias_prior = None
    kernel_layer_name = None  # by which the library `kernels` would put in a forward that does not sample

    def _remove_posterior(self):
        super()._remove_posterior()
        del self._convention

    def _shape_and_eps(self):
        return tuple(self.weight.shape), getattr(self, self._convention.eps_name)

    def _standard(self, name):
        return 1.0 - self._convention.offset

    def _evaluate(self, x):
        return super(KLNorm, self).forward(x)

    def _in_use(self, held):
        offset = self._convention.offset
        if not offset:
            return held
        # 1 + weight in bf16 would lose what training changes, and all have one dtype.
        dtype = torch.promote_types(held.weight.dtype, torch.float32)
        held = Parameters(*(None if tensor is None else tensor.to(dtype) for tensor in held))
        prior = held.weight_prior
        return held._replace(weight=offset + held.weight, weight_prior=None if prior is None else offset + prior)

    def __reduce_ex__(self, protocol):
        """Copies and pickles name the layer's own class, which can be imported, and not the one made at run time."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (type(self)._plain_class,), *state


def convert(module):
    """Make a KL layer of `module`, in place, that has no posterior yet; restoring puts back its class."""
    module._convention = convention(module)
    module.__class__ = _kl_class(type(module))


@functools.cache
def _kl_class(plain_class):
    """A subclass, so that what asks for the own class or its name, as transformers' initialization does, finds it."""
    return type(f"KL{plain_class.__name__}", (KLForeignRMSNorm, plain_class), {"_plain_class": plain_class})


def _blank(plain_class):
    return object.__new__(_kl_class(plain_class))


def looks_like_rms_norm(module):
    """Whether `module` is built as an RMSNorm is: a scale `weight`, an eps, and a forward that takes x alone."""
    if isinstance(module, (nn.LayerNorm, torch.jit.ScriptModule)):
        return False
    parameters, buffers = _present(module._parameters), _present(module._buffers)
    children = _present(module._modules) - {"parametrizations"}
    if children or parameters - {"weight", "weight_orig"} or buffers - {"weight_mask"} or not _eps_names(module):
        return False  # weight_orig and weight_mask: of a pruned norm, which is one, if not one to replace
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return False
    if weight.numel() < 2 or weight.shape[0] == 1:
        return False  # it is broadcast over features, or over what is no feature
    return len(inspect.signature(type(module).forward).parameters) == 2


def _present(entries):
    return {name for name, entry in entries.items() if entry is not None}


def _eps_names(module):
    return [key for key, value in vars(module).items() if "eps" in key and (value is None or isinstance(value, float))]


def convention(module):
    """The `Convention` of a module that looks like an RMSNorm; None where it computes something else."""
    for eps_name in _eps_names(module):
        eps = getattr(module, eps_name)
        trial = try_out(module, eps)
        for offset in 0, 1:
            if trial.gave(F.rms_norm(trial.x, trial.weight.shape, offset + trial.weight, eps)):
                return Convention(offset, eps_name)
    return None


def clashes(module):
    """Names that the class of `module` or the module itself uses, and that a KL layer would use for something else."""
    return sorted(_OURS & {*dir(type(module)), *vars(module)})


_OURS = {*dir(KLForeignRMSNorm), *SETTINGS} - {
    *dir(nn.Module), "reset_parameters", "kernel_layer_name", "bias", "_is_hf_initialized",
}  # fmt: skip
