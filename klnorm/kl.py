"""The KL divergence of a model: once per layer, from its last forward where that is still there."""

import math
import weakref

import torch

from . import checks


class LastKL:
    """The KL tensor of a layer's last forward, kept for as long as that forward's output lives and its graph is
    unspent.

    Holding the tensor itself would keep the whole graph behind it alive. Tied to the output, which the next operation
    usually saves for its own backward, it goes when the graph goes.
    """

    def __init__(self):
        self._forget()

    def remember(self, kl, output, parameters, prior_std):
        """Keep `kl`, computed together with `output` from `parameters`; forget what was kept where it has no graph."""
        if not kl.requires_grad:
            return self._forget()
        self._kl = kl
        self._prior_std = prior_std
        self._parameters = parameters
        self._states = [_state(p) for p in parameters]
        self._output = weakref.ref(output, self._forget)

    def recall(self, parameters, prior_std):
        """The KL tensor, or None where its graph is gone or spent, or the parameters have changed since."""
        if self._kl is None or getattr(self._kl.grad_fn, "consumed", False):
            return None
        unchanged = all(
            p is q and _state(p) == state
            for p, q, state in zip(parameters, self._parameters, self._states, strict=True)
        )
        return self._kl if unchanged and prior_std == self._prior_std else None

    def _forget(self, _=None):
        self._kl = self._prior_std = self._parameters = self._states = self._output = None

    def __reduce__(self):  # copies and pickles of a layer start without
        return LastKL, ()


def _state(tensor):
    """What changes with a tensor's values or its part in autograd; an in-place change through `.data` does not show."""
    return tensor._version, tensor.requires_grad, tensor.data_ptr()


def kl_divergence(model, *, check_finite=True):
    """KL divergence of all posteriors in `model` from their priors: the sum over layers, scales and shifts.

    Taken from a layer's last forward where that is still part of a graph, which costs nothing extra; in closed form
    from
    the parameters otherwise (no forward yet, evaluation, after `backward()` or `optimizer.step()`, under
    torch.compile).
    The value and the gradient are the same. Add it to the loss and call backward once, as it shares the outputs' graph.
    Each layer counts once, however often it is used or registered.

    Args:
        model: any nn.Module.
        check_finite: raise for NaN or infinity, naming the layer. On CUDA this waits for the GPU; it is left out under
            torch.compile and CUDA graph capture.

    Returns:
        Scalar tensor in nats, differentiable; 0 for a model without KL layers.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the divergence of a layer is not finite.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
        >>> x, target = torch.randn(6, 4), torch.randint(2, (6,))
        >>> loss = F.cross_entropy(model(x), target) + klnorm.kl_divergence(model) / 6
        >>> loss.backward()
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module.")
    layers = kl_layers(model)
    if not layers:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)
    parts = [layer._divergence() for layer in layers.values()]
    total = torch.stack([part.to(parts[0].device) for part in parts]).sum()
    if check_finite and not _unreadable(total) and not math.isfinite(total.item()):
        raise ValueError(_explain(layers, parts))
    return total


def kl_layers(model):
    """Qualified name -> layer, for every layer with posterior parameters of its own."""
    layers, posteriors = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "posterior_parameters"):
            posterior = module.posterior_parameters()
            key = tuple(map(id, posterior))
            if key not in posteriors:
                posteriors[key] = posterior  # held, as a parametrized one is made anew and its id would be free again
                layers[name] = module
    return layers


def _unreadable(tensor):
    """Whether the value cannot be looked at now: traced, captured into a CUDA graph, or not there."""
    return (
        torch.compiler.is_compiling()
        or tensor.device.type == "meta"
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _explain(layers, parts):
    for (name, layer), part in zip(layers.items(), parts, strict=True):
        if not math.isfinite(part.item()):
            what = checks.describe_not_finite(layer.named_parameters(recurse=False))
            return (
                f"the KL divergence of layer {name or '(the model itself)'!r} is {part.item()}: {what}. "
                "Remedy: look for a diverged step or a bad checkpoint; a lower learning rate for rho often helps."
            )
    return "the sum of the layers' finite KL divergences overflows. Remedy: look for a posterior far from its prior."
