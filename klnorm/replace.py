"""Turn the LayerNorms of a model into KLLayerNorms, and back."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from . import checks
from .modules import KLLayerNorm

# Classes that are no nn.LayerNorm but compute the same from the same attributes.
_EQUIVALENTS = (("apex.normalization.fused_layer_norm", "FusedLayerNorm"),)
_PRIORS = "current", "standard"


def replace_layer_norm(
    model,
    *,
    filter_fn=None,
    prior="current",
    noise="sample",
    sample_dim=0,
    init_std=0.05,
    prior_std=0.1,
    generator=None,
):
    """Turn the LayerNorms in `model` into `KLLayerNorm`s, in place.

    Each layer stays the same object with the same `weight` and `bias` parameters, hooks, training flag, dtype and
    device, so what refers to it keeps working, and layers that the model uses twice stay shared. The deviations are new
    parameters, with the `requires_grad` of their means: make the optimizer, and wrap for distributed training, after
    this call. Layers without scale and shift, and those that are KLLayerNorms already, are left alone.
    `klnorm.kl_layers(model)` gives the layers by name.

    Args:
        model: any nn.Module, an nn.LayerNorm itself included.
        filter_fn: None: every nn.LayerNorm and apex FusedLayerNorm, but no subclass of them. Or a function (module,
            qualified name) -> bool, asked for each of them and each subclass of nn.LayerNorm; a subclass with a forward
            of its own must compute what nn.LayerNorm does, which is tried out. Or `klnorm.last_norms(k)`.
        prior: where the prior is centred: "current" on the present weight and bias, and on those of a plain checkpoint
            loaded later, "standard" on 1 and 0.
        noise, sample_dim, init_std, prior_std, generator: as for `KLLayerNorm`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as for `KLLayerNorm`; for a chosen layer that is parametrized, pruned, quantized, sharded
            or not a LayerNorm in what it computes; for a model wrapped by DistributedDataParallel. The model is then
            unchanged.

    Warns:
        UserWarning: `model` has no KL layer after the call.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.TransformerEncoderLayer(16, 2), filter_fn=klnorm.last_norms(1))
        >>> type(model.norm1).__name__, type(model.norm2).__name__
        ('LayerNorm', 'KLLayerNorm')
        >>> _ = klnorm.replace_layer_norm(model, filter_fn=lambda module, name: name == "norm1")
        >>> list(klnorm.kl_layers(model))
        ['norm1', 'norm2']
    """
    checks.check_module(model)
    checks.check_config(prior_std, 1.0, noise)
    checks.check_positive("init_std", init_std)
    if prior not in _PRIORS:
        raise ValueError(f"prior is {prior!r}, expected one of {', '.join(map(repr, _PRIORS))}.")
    chosen = _choose(model, filter_fn)
    for name, module in chosen:
        _check_convertible(name, module)
    for _, module in chosen:
        module.__class__, module.normalized_shape = KLLayerNorm, tuple(module.normalized_shape)
        module._add_posterior(noise, sample_dim, init_std, prior_std, generator, prior)
    if not any(isinstance(module, KLLayerNorm) for module in model.modules()):
        warnings.warn("klnorm.replace_layer_norm found no LayerNorm to replace in the model.", stacklevel=2)
    return model


def restore_layer_norm(model):
    """Turn every `KLLayerNorm` in `model` into an `nn.LayerNorm` with the posterior means, in place.

    The output then equals that of evaluation mode exactly; deviations and priors are gone. What reads plain models,
    torch.export, ONNX or quantization, reads this one.

    Args:
        model: any nn.Module, a KLLayerNorm itself included.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: a layer is parametrized.

    Example:
        >>> model = klnorm.restore_layer_norm(klnorm.replace_layer_norm(nn.TransformerEncoderLayer(16, 2)))
        >>> type(model.norm1).__name__
        'LayerNorm'
    """
    checks.check_module(model)
    layers = [(name, m) for name, m in model.named_modules() if _plain_type(m) is KLLayerNorm]
    for name, module in layers:
        if parametrize.is_parametrized(module):
            _refuse(name, "is parametrized", "torch.nn.utils.parametrize.remove_parametrizations")
    for _, module in layers:
        module._remove_posterior()
        module.__class__ = nn.LayerNorm
    return model


class last_norms:
    """A `filter_fn` for `replace_layer_norm`: the last `k` LayerNorms of the model, in the order of `named_modules()`.

    The order is that of definition, in most models that of execution. KLLayerNorms count, so that replacing twice gives
    the same as once.

    Args:
        k: how many, >= 1.

    Raises:
        TypeError, ValueError: `k` is not an int of 1 or more, or the model has fewer.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8))
        >>> list(klnorm.kl_layers(klnorm.replace_layer_norm(model, filter_fn=klnorm.last_norms(2))))
        ['1', '2']
    """

    def __init__(self, k):
        checks.check_count("k", k)
        self.k = k

    def select(self, norms):
        """Those of `norms`, (name, module) in order, to replace."""
        if len(norms) < self.k:
            raise ValueError(
                f"k is {self.k}, expected at most {len(norms)}, the number of LayerNorms with scale and shift in the "
                "model. Remedy: a smaller k, or no filter_fn for all."
            )
        return norms[-self.k :]


def _choose(model, filter_fn):
    """(name, module) of the layers to convert."""
    norms = [(name, m) for name, m in model.named_modules() if _is_norm(m) and getattr(m, "elementwise_affine", True)]
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "model is wrapped by DistributedDataParallel, expected a bare one: the new parameters would not be "
            "synchronized. Remedy: replace the norms first, then wrap."
        )
    if filter_fn is None:
        norms = [
            (name, m) for name, m in norms if _plain_type(m) is nn.LayerNorm or _is_equivalent(m) or _is_quantized(m)
        ]
    elif isinstance(filter_fn, last_norms):
        norms = filter_fn.select(norms)
    elif callable(filter_fn):
        norms = [(name, m) for name, m in norms if filter_fn(m, name)]
    else:
        raise TypeError(
            f"filter_fn is a {type(filter_fn).__name__}, expected None, klnorm.last_norms(k) or a function (module, "
            "qualified name) -> bool."
        )
    return [(name, m) for name, m in norms if not isinstance(m, KLLayerNorm)]


def _is_norm(module):
    return isinstance(module, nn.LayerNorm) or _is_equivalent(module)


def _is_equivalent(module):
    return (type(module).__module__, type(module).__qualname__) in _EQUIVALENTS


def _is_quantized(module):
    return "quantized" in type(module).__module__


def _plain_type(module):
    """The class of a module, also where parametrizations have put one of their own in its place."""
    return parametrize.type_before_parametrizations(module)


def _check_convertible(name, module):
    """Raise unless `module` is, but for its class, an nn.LayerNorm with plain parameters."""
    checks.check_positive("eps", module.eps)
    if parametrize.is_parametrized(module):
        _refuse(name, "is parametrized", "torch.nn.utils.parametrize.remove_parametrizations")
    if _is_quantized(module):
        _refuse(name, "is quantized", "replace before quantizing")
    for key in "weight", "bias":
        value = getattr(module, key, None)
        if value is None and key == "bias":
            continue
        if not isinstance(module._parameters.get(key), nn.Parameter):
            _refuse(
                name, f"computes its {key} (pruned, weight-normed or flattened)", "remove that first, or replace first"
            )
        if type(value) is not nn.Parameter or not value.is_floating_point():
            kind = type(value.data).__name__
            _refuse(name, f"holds its {key} as a {kind}", "replace before sharding or quantizing")
    _check_arithmetic(name, module)


def _check_arithmetic(name, module):
    """Raise unless a subclass with a forward of its own computes what nn.LayerNorm does, on a small input."""
    if _is_equivalent(module) or type(module).forward is nn.LayerNorm.forward:
        return
    weight, shape = module.weight, tuple(module.normalized_shape)
    what = f"is a {type(module).__name__} with a forward of its own"
    if weight.is_meta:
        _refuse(name, f"{what}, which cannot be tried out on the meta device", "replace after loading")
    x = torch.arange(3 * weight.numel(), device=weight.device).sin().reshape(3, *shape).to(weight.dtype)
    tolerance = 32 * torch.finfo(weight.dtype).eps  # a few roundings, in whatever order
    with torch.no_grad():
        try:
            same = torch.allclose(
                module.forward(x), F.layer_norm(x, shape, weight, module.bias, module.eps), tolerance, tolerance
            )
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            _refuse(name, f"{what}, which failed on an input of shape {tuple(x.shape)} ({error})", "leave it as it is")
    if not same:
        _refuse(name, f"{what}, which computes something else than nn.LayerNorm", "leave it as it is")


def _refuse(name, what, remedy):
    raise ValueError(
        f"layer {name or '(the model itself)'!r} {what}, expected a LayerNorm with plain parameters. Remedy: {remedy}, "
        "or leave it out with filter_fn."
    )
