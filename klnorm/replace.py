"""Turns the norms of a model into KL layers, and back."""

from typing import Literal, TypeVar

import torch
from torch import nn

from . import checks
from .candidates import LAYER_NORMS, RMS_NORMS, check_convertible, check_not_overridden, plain_type, refuse
from .choice import Filter, choose, warn_of_others
from .compat import is_sharded
from .conversion import make_twins, swap
from .layers import KLRMSNorm

Model = TypeVar("Model", bound=nn.Module)
_PRIORS = "current", "standard"
_EVALUATED = "model.eval(), in which the layer computes the norm of its means"
_WITHOUT_SHIFT = f"layer.bias = layer.bias_rho = layer.bias_prior = None to do without it, or {_EVALUATED}"
# Names, because a build of torch may lack torch.distributed.
_FSDP = "FSDPModule", "FullyShardedDataParallel"
_WRAPPERS = "DistributedDataParallel", *_FSDP


def replace_layer_norm(
    model: Model,
    *,
    filter_fn: Filter | None = None,
    prior: Literal["current", "standard"] = "current",
    noise: checks.Noise = "sample",
    sample_dim: int = 0,
    init_std: float = 0.05,
    prior_std: float = 0.1,
    generator: torch.Generator | None = None,
    posterior: checks.Posterior = "sampled",
    out_dtype: torch.dtype | None = None,
) -> Model:
    """Turn the LayerNorms in `model`, also those of other libraries, into KL layers, in place.

    An nn.LayerNorm becomes a `KLLayerNorm`. A layer of another class, such as DebertaLayerNorm or CohereLayerNorm in
    transformers, timm's LayerNorm or apex's FusedLayerNorm, is replaced if it is a subclass of nn.LayerNorm, or has a
    parameter `weight`, perhaps a `bias`, and an eps; if its forward takes x alone; and if in both modes it computes, on
    a small fp32 input, LayerNorm of the last dimensions, scaled with weight or 1 + weight. Its new class is a subclass
    of the old one. In evaluation mode it runs the forward of the old class, bit for bit. `weight`, `weight_rho` and
    `weight_prior` stay in the units of the old weight, so that checkpoints fit. In training mode the output has the
    dtype that the old class would return.

    Each layer stays the same object with the same `weight` and `bias` parameters, hooks, training flag, dtype and
    device, so references to it stay valid, and layers that the model uses twice stay shared. The deviations are new
    parameters with the `requires_grad` of their means: make the optimizer, and wrap for distributed training, after
    this call. Layers without scale and shift and KL layers stay as they are. Different modules that share all their
    parameters share the deviations too, and their KL counts once. `klnorm.kl_layers(model)` returns the layers by name.

    Args:
        model: any nn.Module, an nn.LayerNorm itself included.
        filter_fn: None: replace all. Or a function (module, qualified name) -> bool, called for each module that is
            built like a LayerNorm; those that it chooses have to compute LayerNorm. Or
            `klnorm.last_norms(k)` for the last k.
        prior: prior means: "current": the present weight and bias, or those of a plain checkpoint loaded later;
            "standard": 1 and 0.
        noise, sample_dim, init_std, prior_std, generator, posterior: as for `KLLayerNorm`.
        out_dtype: as for `KLLayerNorm`; with None, layers of other classes return the dtype that these would return.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as for `KLLayerNorm`; `filter_fn` is of another type, or returns anything but a bool; a
            chosen layer is parametrized, pruned, quantized or sharded, does not compute LayerNorm, has an attribute
            with the name of an attribute of KL layers, such as `noise`, or shares some of its parameters with another
            layer; the model is wrapped by DistributedDataParallel or FSDP. After any error the model is unchanged.

    Warns:
        UserWarning: after the call `model` has no KL layer in place of a LayerNorm; or, without `filter_fn`, the call
            passed over modules that are subclasses of nn.LayerNorm or built like it, because they compute something
            else or take more than x. The message says which and how many.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.TransformerEncoderLayer(16, 2), filter_fn=klnorm.last_norms(1))
        >>> type(model.norm1).__name__, type(model.norm2).__name__
        ('LayerNorm', 'KLLayerNorm')
        >>> _ = klnorm.replace_layer_norm(model, filter_fn=lambda module, name: name == "norm1")
        >>> list(klnorm.kl_layers(model))
        ['norm1', 'norm2']
    """
    options = {
        "prior": prior, "noise": noise, "sample_dim": sample_dim, "init_std": init_std, "prior_std": prior_std,
        "generator": generator, "posterior": posterior, "out_dtype": out_dtype,
    }  # fmt: skip
    return _replace(model, LAYER_NORMS, filter_fn, options)


def replace_rms_norm(
    model: Model,
    *,
    filter_fn: Filter | None = None,
    prior: Literal["current", "standard"] = "current",
    noise: checks.Noise = "sample",
    sample_dim: int = 0,
    init_std: float = 0.05,
    prior_std: float = 0.1,
    generator: torch.Generator | None = None,
    posterior: checks.Posterior = "sampled",
    out_dtype: torch.dtype | None = None,
) -> Model:
    """Turn the RMSNorms in `model`, also those of other libraries, into KL layers, in place.

    It works like `replace_layer_norm`, for RMSNorms without a shift. An nn.RMSNorm becomes a `KLRMSNorm`. A class of
    another library, such as LlamaRMSNorm, T5LayerNorm or GemmaRMSNorm in transformers, is recognized if it computes
    weight * xhat or (1 + weight) * xhat.

    Args:
        model: any nn.Module, an RMSNorm itself included.
        filter_fn: None: replace all. Or a function (module, qualified name) -> bool, called for each module that is
            built like an RMSNorm; those that it chooses have to compute RMSNorm. Or
            `klnorm.last_norms(k)` for the last k.
        prior: prior mean: "current": the present weight, or that of a plain checkpoint loaded later; "standard": a
            scale of 1.
        noise, sample_dim, init_std, prior_std, generator, posterior, out_dtype: as for `replace_layer_norm`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as `replace_layer_norm`.

    Warns:
        UserWarning: as `replace_layer_norm`.

    Example:
        >>> model = klnorm.replace_rms_norm(nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8)))
        >>> klnorm.kl_layers(model)
        {'1': KLRMSNorm((8,), eps=None, elementwise_affine=True, noise='sample', sample_dim=0, prior_std=0.1)}
    """
    options = {
        "prior": prior, "noise": noise, "sample_dim": sample_dim, "init_std": init_std, "prior_std": prior_std,
        "generator": generator, "posterior": posterior, "out_dtype": out_dtype,
    }  # fmt: skip
    return _replace(model, RMS_NORMS, filter_fn, options)


def _replace(model, norms, filter_fn, options):
    checks.check_module(model)
    checks.check_positive("prior_std", options["prior_std"])
    checks.check_noise(options["noise"])
    checks.check_positive("init_std", options["init_std"])
    checks.check_posterior(options["posterior"])
    if options["prior"] not in _PRIORS:
        raise ValueError(f"prior is {options['prior']!r}, expected one of {', '.join(map(repr, _PRIORS))}.")
    if wrapper := _wrapper(model, _WRAPPERS):
        raise ValueError(
            f"model is wrapped by {wrapper}, expected a bare one: the new parameters would not be synchronized. "
            "Remedy: replace the norms first, then wrap."
        )
    found = norms.find(model)
    chosen = [c for c in choose(found, filter_fn) if not isinstance(c.module, norms.kl_classes)]
    for candidate in chosen:
        check_convertible(candidate)
    twins = make_twins(model, norms, chosen, options)
    warn_of_others(model, norms, found, chosen, filter_fn)
    for candidate, twin in zip(chosen, twins, strict=True):
        swap(candidate.module, twin)  # the first change of the model: all checks have passed
    return model


def restore_layer_norm(model: Model) -> Model:
    """Turn every KL layer of a LayerNorm back into its original class, with the posterior means, in place. A
    `KLLayerNorm` becomes an nn.LayerNorm.

    The output then equals that of evaluation mode exactly; deviations and priors are gone. Use it before torch.export,
    ONNX or quantization, which take plain models.

    Args:
        model: any nn.Module, a KL layer itself included.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: a layer is parametrized, has heads, or has a forward that accelerate has set; the model is sharded
            by FSDP. The model is then unchanged.

    Example:
        >>> model = klnorm.restore_layer_norm(klnorm.replace_layer_norm(nn.TransformerEncoderLayer(16, 2)))
        >>> type(model.norm1).__name__
        'LayerNorm'
    """
    return _restore(model, LAYER_NORMS)


def restore_rms_norm(model: Model) -> Model:
    """Turn every KL layer of an RMSNorm back into its original class, in place; see `restore_layer_norm`.

    Raises:
        TypeError, ValueError: as `restore_layer_norm`; also for a `KLRMSNorm` with a shift.

    Example:
        >>> model = klnorm.restore_rms_norm(klnorm.replace_rms_norm(nn.Sequential(nn.RMSNorm(8))))
        >>> type(model[0]).__name__
        'RMSNorm'
    """
    return _restore(model, RMS_NORMS)


def _restore(model, norms):
    checks.check_module(model)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, norms.kl_classes)]
    if layers and (_wrapper(model, _FSDP) or any(is_sharded(p) for _, m in layers for p in m.parameters())):
        raise ValueError(
            "model is sharded by FSDP, which would put the deviations back, expected a bare one. Remedy: load its full "
            "state dict (torch.distributed.checkpoint.state_dict) into a replaced model and restore that."
        )
    # `_plain_class` of its own marks a class that can be restored; a user's subclass of a KL layer has none.
    layers = [(name, m) for name, m in layers if "_plain_class" in vars(plain_type(m))]
    for name, module in layers:
        check_not_overridden(name, module, refuse)
        if module.heads is not None:
            refuse(name, f"has parameters of every head, which an nn.{norms.name} cannot hold", _EVALUATED)
        if isinstance(module, KLRMSNorm) and module.bias is not None:
            refuse(name, "has a shift, which an nn.RMSNorm cannot hold", _WITHOUT_SHIFT)
    for _, module in layers:
        module._remove_posterior()
        module.__class__ = type(module)._plain_class
    return model


def _wrapper(model, names):
    """Return the first of the class `names` that a module of `model` is an instance of, or None."""
    found = {base.__name__ for m in model.modules() for base in type(m).__mro__}
    return next((name for name in names if name in found), None)
