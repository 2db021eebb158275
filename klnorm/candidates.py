"""Which layers of a model can become KL layers, and why another one cannot."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from . import checks, foreign
from .foreign import KLForeignRMSNorm, looks_like_rms_norm
from .modules import KLLayerNorm, KLRMSNorm

# Classes that are no nn.LayerNorm but compute the same from the same attributes.
_EQUIVALENTS = (("apex.normalization.fused_layer_norm", "FusedLayerNorm"),)


class Norms:
    """A kind of norm: which modules are of it, which are replaced, and how. Subclasses have

    name, kl_classes; remedy: what to do where a model has none;
    is_norm(module): whether it has a scale and is, by its class or its build, of this kind;
    is_default(module): whether such a norm is replaced where no filter says otherwise;
    check_arithmetic(name, module): raises unless the module computes this norm;
    convert(module): puts the KL layer's class in the place of its own.
    """

    def is_counted(self, module):
        """Whether `klnorm.last_norms` counts a norm; it may then be replaced."""
        return True

    def check_convertible(self, name, module):
        """Raise unless `module` is, but for its class, the norm with plain parameters."""
        if parametrize.is_parametrized(module):
            self.refuse(name, "is parametrized", "torch.nn.utils.parametrize.remove_parametrizations")
        if _is_quantized(module):
            self.refuse(name, "is quantized", "replace before quantizing")
        if "forward" in vars(module):
            self.refuse(name, "has a forward that accelerate or another library put into it", "replace before that")
        for key in "weight", "bias":
            value = getattr(module, key, None)
            if value is None and key == "bias":
                continue
            if not isinstance(module._parameters.get(key), nn.Parameter):
                computes = f"computes its {key} (pruned, weight-normed or flattened)"
                self.refuse(name, computes, "remove that first, or replace first")
            if type(value) is not nn.Parameter or not value.is_floating_point():
                kind = type(value.data).__name__
                self.refuse(name, f"holds its {key} as a {kind}", "replace before sharding or quantizing")
        self.check_arithmetic(name, module)

    def refuse(self, name, what, remedy):
        """Raise for a layer that cannot be replaced."""
        raise ValueError(
            f"layer {name or '(the model itself)'!r} {what}, expected one with plain parameters. "
            f"Remedy: {remedy}, or leave it out with filter_fn."
        )


class LayerNorms(Norms):
    """nn.LayerNorm, its subclasses and known equivalents."""

    name = "LayerNorm"
    remedy = "klnorm.replace_rms_norm for a model with RMSNorms"
    kl_classes = (KLLayerNorm,)

    def is_norm(self, module):
        norm = isinstance(module, nn.LayerNorm) or _is_equivalent(module)
        return norm and getattr(module, "elementwise_affine", True)

    def is_default(self, module):
        return plain_type(module) is nn.LayerNorm or _is_equivalent(module) or _is_quantized(module)

    def check_arithmetic(self, name, module):
        checks.check_positive("eps", module.eps)
        if _is_equivalent(module) or type(module).forward is nn.LayerNorm.forward:
            return
        weight, shape = module.weight, tuple(module.normalized_shape)
        what = f"is a {type(module).__name__} with a forward of its own"
        if weight.is_meta:
            self.refuse(name, f"{what}, which cannot be tried out on the meta device", "replace after loading")
        x = torch.arange(3 * weight.numel(), device=weight.device).sin().reshape(3, *shape).to(weight.dtype)
        tolerance = 32 * torch.finfo(weight.dtype).eps  # a few roundings, in whatever order
        with torch.no_grad():
            try:
                same = torch.allclose(
                    module.forward(x), F.layer_norm(x, shape, weight, module.bias, module.eps), tolerance, tolerance
                )
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                failed = f"{what}, which failed on an input of shape {tuple(x.shape)} ({error})"
                self.refuse(name, failed, "leave it as it is")
        if not same:
            self.refuse(name, f"{what}, which computes something else than nn.LayerNorm", "leave it as it is")

    def convert(self, module):
        module.__class__, module.normalized_shape = KLLayerNorm, tuple(module.normalized_shape)


class RMSNorms(Norms):
    """nn.RMSNorm, and every class that is built like it and computes it, with weight or 1 + weight."""

    name = "RMSNorm"
    remedy = "klnorm.replace_layer_norm for a model with LayerNorms"
    kl_classes = KLRMSNorm, KLForeignRMSNorm

    def is_norm(self, module):
        if plain_type(module) is nn.RMSNorm:
            return module.elementwise_affine
        return looks_like_rms_norm(module)

    def is_default(self, module):
        if isinstance(module, self.kl_classes):
            return False
        return plain_type(module) is nn.RMSNorm or foreign.convention(module) is not None

    def is_counted(self, module):
        return isinstance(module, self.kl_classes) or self.is_default(module)

    def check_arithmetic(self, name, module):
        if type(module) is nn.RMSNorm:
            if module.eps is not None:
                checks.check_positive("eps", module.eps)
        elif (convention := foreign.convention(module)) is None:
            what = f"is a {type(module).__name__}, which computes something else than nn.RMSNorm"
            self.refuse(name, what, "leave it as it is")
        elif (eps := getattr(module, convention.eps_name)) is not None:
            checks.check_positive(convention.eps_name, eps)

    def convert(self, module):
        if type(module) is nn.RMSNorm:
            module.__class__ = KLRMSNorm
        else:
            foreign.convert(module)


def plain_type(module):
    """The class of a module, also where parametrizations have put one of their own in its place."""
    return parametrize.type_before_parametrizations(module)


def _is_equivalent(module):
    return (type(module).__module__, type(module).__qualname__) in _EQUIVALENTS


def _is_quantized(module):
    return "quantized" in type(module).__module__
