"""Turn the nn.LayerNorms of a model into KLLayerNorms, and back."""

from torch import nn

from . import checks
from .modules import KLLayerNorm


def replace_layer_norm(model, *, noise="sample", sample_dim=0, init_std=0.05, prior_std=0.1, generator=None):
    """Turn every `nn.LayerNorm` in `model` into a `KLLayerNorm`, in place.

    Each layer stays the same object with the same `weight` and `bias` parameters, hooks, training flag, dtype and
    device, so
    what refers to it keeps working. The deviations are new parameters, with the `requires_grad` of their means; make
    the
    optimizer after this call. The prior is centred on the current values. Subclasses of nn.LayerNorm, layers that are
    KLLayerNorms already and layers without scale and shift are left alone.

    Args:
        model: any nn.Module, an nn.LayerNorm itself included.
        noise, sample_dim, init_std, prior_std, generator: as for `KLLayerNorm`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: as for `KLLayerNorm`.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.TransformerEncoderLayer(16, 2))
        >>> type(model.norm1).__name__
        'KLLayerNorm'
    """
    _check_module(model)
    layers = [m for m in model.modules() if type(m) is nn.LayerNorm and m.elementwise_affine]
    checks.check_config(prior_std, 1.0, noise)
    checks.check_positive("init_std", init_std)
    for module in layers:
        checks.check_positive("eps", module.eps)
    for module in layers:
        module.__class__ = KLLayerNorm
        module._add_posterior(noise, sample_dim, init_std, prior_std, generator)
    return model


def restore_layer_norm(model):
    """Turn every `KLLayerNorm` in `model` back into an `nn.LayerNorm` with the posterior means, in place.

    The output then equals that of evaluation mode exactly; deviations and priors are gone.

    Args:
        model: any nn.Module, a KLLayerNorm itself included.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    _check_module(model)
    for module in list(model.modules()):
        if type(module) is KLLayerNorm:
            module._remove_posterior()
            module.__class__ = nn.LayerNorm
    return model


def _check_module(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module.")
