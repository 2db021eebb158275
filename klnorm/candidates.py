"""Finds the norms in a model, and tells which of them can become KL layers and why the others cannot."""

from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from . import checks, compat, foreign
from .foreign import Convention, KLForeignLayerNorm, KLForeignRMSNorm
from .layers import KLLayerNorm, KLNorm, KLRMSNorm


class Candidate(NamedTuple):
    """A module that is a norm or looks like one.

    convention: how a class of another library writes the norm; None for torch's norms and for KL layers.
    why_not: why its class cannot be replaced, a clause for messages; None if it can.
    """

    name: str
    module: nn.Module
    convention: Convention | None = None
    why_not: str | None = None


class Norms(NamedTuple):
    """A kind of norm: its name and class in torch.nn, its KL classes, and the function that replaces it."""

    name: str
    plain_class: type
    kl_classes: tuple
    replace: str

    def find(self, model):
        """Return the `Candidate`s in `model`."""
        found = [self._examine(name, module) for name, module in model.named_modules()]
        return [candidate for candidate in found if candidate is not None]

    def _examine(self, name, module):
        """Return the `Candidate` of a module; None if it is not a norm of this kind."""
        if isinstance(module, KLNorm):
            return Candidate(name, module) if isinstance(module, self.kl_classes) else None
        own, plain = isinstance(module, self.plain_class), plain_type(module)
        if not getattr(module, "elementwise_affine", True):
            return None
        if plain is self.plain_class or (own and _is_quantized(module)):
            return Candidate(name, module)
        if plain in (nn.LayerNorm, nn.RMSNorm) or getattr(module, "weight", None) is None:
            return None
        if not own and not foreign.looks_like_norm(module):
            return None
        if not foreign.takes_x_alone(module):
            return Candidate(name, module, why_not="takes more than x in its forward") if own else None
        convention = foreign.convention(module)
        if convention is not None:
            return Candidate(name, module, convention) if convention.kind == self.name else None
        other = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or (self.name == "RMSNorm" and foreign.has_shift(module))
        if other and not own:
            return None
        return Candidate(name, module, why_not=f"computes something else than nn.{self.name}")

    def kl_class(self, candidate):
        """Return the KL class that replaces the candidate's class."""
        if candidate.convention is None:
            return self.kl_classes[0]
        return foreign.kl_class(type(candidate.module), candidate.convention)


LAYER_NORMS = Norms("LayerNorm", nn.LayerNorm, (KLLayerNorm, KLForeignLayerNorm), "klnorm.replace_layer_norm")
RMS_NORMS = Norms("RMSNorm", nn.RMSNorm, (KLRMSNorm, KLForeignRMSNorm), "klnorm.replace_rms_norm")


def check_convertible(candidate):
    """Raise ValueError unless the candidate can become a KL layer: a bare norm with plain parameters."""
    name, module, convention, why_not = candidate
    check_not_overridden(name, module, _refuse_choice)
    if _is_quantized(module):
        _refuse_choice(name, "is quantized", "replace before quantizing")
    for key in "weight", "bias":
        value = getattr(module, key, None)
        if value is not None or key == "weight":
            _check_parameter(name, module, key, value)
    if plain_type(module) is nn.RMSNorm and foreign.has_shift(module):
        _refuse_choice(name, "is an nn.RMSNorm with a bias, which its forward does not read", "del layer.bias")
    checks.as_shape(tuple(module.weight.shape))
    if why_not is not None:
        refuse(name, f"is a {type(module).__name__}, which {why_not}", "leave it out with filter_fn")
    if clashes := foreign.clashes(module):
        what = f"is a {type(module).__name__} with names of its own that KL layers use ({', '.join(clashes)})"
        _refuse_choice(name, what, "rename them there")
    eps_name = "eps" if convention is None else convention.eps_name
    if (eps := getattr(module, eps_name)) is not None or isinstance(module, nn.LayerNorm):
        checks.check_not_negative(eps_name, eps)


def _check_parameter(name, module, key, value):
    if not isinstance(module._parameters.get(key), nn.Parameter):
        computes = f"computes its {key} (pruned, weight-normed or flattened)"
        _refuse_choice(name, computes, "remove that first, or replace first")
    if type(value) is not nn.Parameter or value.dtype not in checks.FLOATS:
        plain = type(value) is nn.Parameter and value.is_floating_point()
        kind, remedy = f"{type(value.data).__name__} of {value.dtype}", "replace before sharding or quantizing"
        _refuse_choice(name, f"holds its {key} as a {kind}", "layer.float()" if plain else remedy)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and value.shape != tuple(module.normalized_shape):
        shapes = f"holds its {key} in shape {tuple(value.shape)}, not {tuple(module.normalized_shape)}"
        _refuse_choice(name, shapes, "replace before sharding")


def check_not_overridden(name, module, refuse):
    """Call `refuse` for a module that is parametrized or whose forward has been overwritten."""
    if parametrize.is_parametrized(module):
        refuse(name, "is parametrized", "torch.nn.utils.parametrize.remove_parametrizations")
    if compat.overrides_forward(module):
        what = "has a forward that accelerate or another library put into it"
        refuse(name, what, "replace or restore first, or undo that and `del layer.forward`")


def refuse(name, what, remedy):
    """Raise the ValueError for a layer whose class cannot change."""
    raise ValueError(f"layer {checks.named(name)} {what}, expected a plain one. Remedy: {remedy}.")


def _refuse_choice(name, what, remedy):
    """`refuse` with a second remedy: leave the layer out."""
    refuse(name, what, f"{remedy}, or leave it out with filter_fn")


def plain_type(module):
    """Return the class that the module had before any parametrization."""
    return parametrize.type_before_parametrizations(module)


def _is_quantized(module):
    return "quantized" in type(module).__module__
