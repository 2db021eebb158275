"""Which layers of a model can become KL layers, and why another one cannot."""

import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from . import checks, foreign
from .foreign import KLForeignRMSNorm, looks_like_rms_norm
from .modules import KLLayerNorm, KLRMSNorm
from .trial import try_out

# Classes that are no nn.LayerNorm but have its attributes.
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
        check_uncovered(name, module, self.refuse)
        if _is_quantized(module):
            self.refuse(name, "is quantized", "replace before quantizing")
        for key in "weight", "bias":
            value = getattr(module, key, None)
            if value is None and key == "bias":
                continue
            if not isinstance(module._parameters.get(key), nn.Parameter):
                computes = f"computes its {key} (pruned, weight-normed or flattened)"
                self.refuse(name, computes, "remove that first, or replace first")
            if type(value) is not nn.Parameter or value.dtype not in checks.FLOATS:
                kind = f"{type(value.data).__name__} of {value.dtype}"
                self.refuse(name, f"holds its {key} as a {kind}", "replace before sharding or quantizing")
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and value.shape != tuple(module.normalized_shape):
                shapes = f"holds its {key} in shape {tuple(value.shape)}, not {tuple(module.normalized_shape)}"
                self.refuse(name, shapes, "replace before sharding")
        checks.as_shape(tuple(module.weight.shape))
        self.check_arithmetic(name, module)

    def check_class(self, name, module, same):
        """Raise unless it is the `same` that the class of `module` computes."""
        if not same:
            what = f"is a {type(module).__name__}, which computes something else than nn.{self.name}"
            refuse(name, what, "leave it out with filter_fn")

    def refuse(self, name, what, remedy):
        """Raise for a layer that cannot be replaced."""
        refuse(name, what, f"{remedy}, or leave it out with filter_fn")


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
        checks.check_not_negative("eps", module.eps)
        trial = try_out(module, module.eps)
        expected = F.layer_norm(trial.x, trial.weight.shape, trial.weight, trial.bias, module.eps)
        self.check_class(name, module, trial.gave(expected))

    def convert(self, module):
        module.__class__, module.normalized_shape = KLLayerNorm, tuple(module.normalized_shape)


class RMSNorms(Norms):
    """nn.RMSNorm, and every class that is built like it and computes it, with weight or 1 + weight."""

    name = "RMSNorm"
    remedy = "klnorm.replace_layer_norm for a model with LayerNorms"
    kl_classes = KLRMSNorm, KLForeignRMSNorm

    def is_norm(self, module):
        if type(module) is nn.RMSNorm:
            return module.elementwise_affine
        return looks_like_rms_norm(module)

    def is_default(self, module):
        if isinstance(module, self.kl_classes):
            return False
        return type(module) is nn.RMSNorm or foreign.convention(module) is not None

    def is_counted(self, module):
        return isinstance(module, self.kl_classes) or self.is_default(module)

    def check_arithmetic(self, name, module):
        if type(module) is nn.RMSNorm:
            if module.eps is not None:
                checks.check_not_negative("eps", module.eps)
            return
        convention = foreign.convention(module)
        self.check_class(name, module, convention is not None)
        if clashes := foreign.clashes(module):
            what = f"is a {type(module).__name__} with names of its own that KL layers use ({', '.join(clashes)})"
            self.refuse(name, what, "rename them there")
        if (eps := getattr(module, convention.eps_name)) is not None:
            checks.check_not_negative(convention.eps_name, eps)

    def convert(self, module):
        if type(module) is nn.RMSNorm:
            module.__class__ = KLRMSNorm
        else:
            foreign.convert(module)


def check_uncovered(name, module, refuse):
    """`refuse` a module with something put over its class."""
    if parametrize.is_parametrized(module):
        refuse(name, "is parametrized", "torch.nn.utils.parametrize.remove_parametrizations")
    if "forward" in vars(module):
        what = "has a forward that accelerate or another library put into it"
        refuse(name, what, "replace or restore first, or undo that and `del layer.forward`")


def refuse(name, what, remedy):
    """Raise for a layer that cannot change its class."""
    raise ValueError(f"layer {name or '(the model itself)'!r} {what}, expected a plain one. Remedy: {remedy}.")


def plain_type(module):
    """The class of a module, also where parametrizations have put one of their own in its place."""
    return parametrize.type_before_parametrizations(module)


def _is_equivalent(module):
    return (type(module).__module__, type(module).__qualname__) in _EQUIVALENTS


def _is_quantized(module):
    return "quantized" in type(module).__module__
