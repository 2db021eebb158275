"""Turn the norms of a model into KL layers, and back."""

import warnings

from . import checks
from .candidates import LayerNorms, RMSNorms, check_uncovered, plain_type, refuse
from .sharded import is_sharded

_PRIORS = "current", "standard"
# By name, as torch need not have torch.distributed.
_FSDP = "FSDPModule", "FullyShardedDataParallel"
_WRAPPERS = "DistributedDataParallel", *_FSDP


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
    posterior="sampled",
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
        noise, sample_dim, init_std, prior_std, generator, posterior: as for `KLLayerNorm`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as for `KLLayerNorm`; for a chosen layer that is parametrized, pruned, quantized, sharded
            or not a LayerNorm in what it computes; for a model wrapped by DistributedDataParallel or FSDP. The model is
            then unchanged.

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
    options = {
        "prior": prior, "noise": noise, "sample_dim": sample_dim, "init_std": init_std, "prior_std": prior_std,
        "generator": generator, "posterior": posterior,
    }  # fmt: skip
    return _replace(model, LayerNorms(), filter_fn, options)


def replace_rms_norm(
    model,
    *,
    filter_fn=None,
    prior="current",
    noise="sample",
    sample_dim=0,
    init_std=0.05,
    prior_std=0.1,
    generator=None,
    posterior="sampled",
):
    """Turn the RMSNorms in `model` into KL layers, in place, whatever library they come from.

    `replace_layer_norm` for RMSNorm: what is said there holds here too. An nn.RMSNorm becomes a `KLRMSNorm`. A class of
    another library, such as LlamaRMSNorm, T5LayerNorm or GemmaRMSNorm in transformers, is told by its build (one
    parameter `weight`, an eps, a forward that takes x alone) and by what it computes on a small fp32 input in both
    modes: weight * xhat or (1 + weight) * xhat. Its layers get a class of their own, a subclass of the one that they
    had: evaluation mode is the forward of that class, bit for bit. `weight`, `weight_rho` and `weight_prior` stay in
    the units of its weight, so that checkpoints fit; in training mode the output has the dtype of the input.

    Args:
        model: any nn.Module, an RMSNorm itself included.
        filter_fn: None: all of them. Or a function (module, qualified name) -> bool, asked for each module that is
            built like an RMSNorm; what it chooses has to compute one. Or `klnorm.last_norms(k)`.
        prior: where the prior is centred: "current" on the present weight, and on that of a plain checkpoint loaded
            later, "standard" on a scale of 1.
        noise, sample_dim, init_std, prior_std, generator, posterior: as for `KLRMSNorm`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as `replace_layer_norm`; and for a class that uses the name of an attribute of KL layers,
            such as `noise`, for something of its own. The model is then unchanged.

    Warns:
        UserWarning: `model` has no KL layer in the place of an RMSNorm after the call.

    Example:
        >>> model = klnorm.replace_rms_norm(nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8)))
        >>> klnorm.kl_layers(model)
        {'1': KLRMSNorm((8,), eps=None, elementwise_affine=True, noise='sample', sample_dim=0, prior_std=0.1)}
    """
    options = {
        "prior": prior, "noise": noise, "sample_dim": sample_dim, "init_std": init_std, "prior_std": prior_std,
        "generator": generator, "posterior": posterior,
    }  # fmt: skip
    return _replace(model, RMSNorms(), filter_fn, options)


def _replace(model, norms, filter_fn, options):
    checks.check_module(model)
    checks.check_config(options["prior_std"], 1.0, options["noise"])
    checks.check_positive("init_std", options["init_std"])
    checks.check_posterior(options["posterior"])
    if options["prior"] not in _PRIORS:
        raise ValueError(f"prior is {options['prior']!r}, expected one of {', '.join(map(repr, _PRIORS))}.")
    chosen = _choose(model, norms, filter_fn)
    for name, module in chosen:
        norms.check_convertible(name, module)
    for _, module in chosen:
        norms.convert(module)
        module._add_posterior(**options)
    if not any(isinstance(module, norms.kl_classes) for module in model.modules()):
        warnings.warn(f"klnorm found no {norms.name} to replace in the model. Remedy: {norms.remedy}.", stacklevel=3)
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
        ValueError: a layer is parametrized, or has a forward that accelerate put into it; the model is sharded by FSDP.
            The model is then unchanged.

    Example:
        >>> model = klnorm.restore_layer_norm(klnorm.replace_layer_norm(nn.TransformerEncoderLayer(16, 2)))
        >>> type(model.norm1).__name__
        'LayerNorm'
    """
    return _restore(model, LayerNorms())


def restore_rms_norm(model):
    """Turn every KL layer that stands for an RMSNorm back into the class that it had, in place; see
    `restore_layer_norm`.

    Example:
        >>> model = klnorm.restore_rms_norm(klnorm.replace_rms_norm(nn.Sequential(nn.RMSNorm(8))))
        >>> type(model[0]).__name__
        'RMSNorm'
    """
    return _restore(model, RMSNorms())


def _restore(model, norms):
    checks.check_module(model)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, norms.kl_classes)]
    if layers and (_wrapper(model, _FSDP) or any(is_sharded(p) for _, m in layers for p in m.parameters())):
        raise ValueError(
            "model is sharded by FSDP, which would put the deviations back, expected a bare one. Remedy: load its full "
            "state dict (torch.distributed.checkpoint.state_dict) into a replaced model and restore that."
        )
    # A subclass of somebody else's is no layer that replacing made.
    layers = [(name, m) for name, m in layers if "_plain_class" in vars(plain_type(m))]
    for name, module in layers:
        check_uncovered(name, module, refuse)
    for _, module in layers:
        module._remove_posterior()
        module.__class__ = type(module)._plain_class
    return model


def _wrapper(model, names):
    """The first of these class names that a module of `model` is an instance of, or None."""
    found = {base.__name__ for m in model.modules() for base in type(m).__mro__}
    return next((name for name in names if name in found), None)


class last_norms:
    """A `filter_fn` for `replace_layer_norm` and `replace_rms_norm`: the last `k` norms of their kind in the model.

    The order is that of `named_modules()`, of definition, in most models that of execution. Those replaced already
    count, so that replacing twice gives the same as once.

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
                f"k is {self.k}, expected at most {len(norms)}, the number of norms of the kind in the model that "
                "have a scale. Remedy: a smaller k, or no filter_fn for all."
            )
        return norms[-self.k :]


def _choose(model, norms, filter_fn):
    """(name, module) of the layers to convert."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, norms.kl_classes) or norms.is_norm(m)]
    if wrapper := _wrapper(model, _WRAPPERS):
        raise ValueError(
            f"model is wrapped by {wrapper}, expected a bare one: the new parameters would not be synchronized. "
            "Remedy: replace the norms first, then wrap."
        )
    if filter_fn is None:
        found = [(name, m) for name, m in found if norms.is_default(m)]
    elif isinstance(filter_fn, last_norms):
        found = filter_fn.select([(name, m) for name, m in found if norms.is_counted(m)])
    elif callable(filter_fn):
        found = [(name, m) for name, m in found if filter_fn(m, name)]
    else:
        raise TypeError(
            f"filter_fn is a {type(filter_fn).__name__}, expected None, klnorm.last_norms(k) or a function (module, "
            "qualified name) -> bool."
        )
    return [(name, m) for name, m in found if not isinstance(m, norms.kl_classes)]
