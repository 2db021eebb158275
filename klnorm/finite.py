"""Errors for a KL divergence that is not finite: raised at once, or in a later call without waiting for the GPU."""

import math
import weakref

import torch

from . import checks
from .compat import is_sharded, whole

_REMEDY = "Remedy: look for a diverged step or a bad checkpoint; a lower learning rate for rho often helps."


def check_now(layers, total):
    """Raise unless `total` is finite; the message names the layer. Waits for a GPU."""
    if not math.isfinite(total.item()):
        raise ValueError(_explain(layers))


def check_later(model, layers, names, values):
    """Start copying `values` to the host; raise if the values of an earlier call have arrived and are not all finite.

    Does nothing while an earlier copy for `model` is under way. `values`: the KL divergences of the layers `names`,
    then the sums over groups of other layers.
    """
    sent = _sent.get(model)
    if sent is not None and not sent.arrived():
        return
    _sent[model] = _Copy(names, values)
    bad = [] if sent is None else [(i, value) for i, value in enumerate(sent.values()) if not math.isfinite(value)]
    if bad:
        del _sent[model]  # a caller that goes on has repaired the model, or a later call raises again
        first, value = bad[0]
        if first < len(sent.names):
            of = f"layer {checks.named(sent.names[first])}"
        elif any(is_sharded(p) for layer in layers.values() for p in layer.parameters()):
            of = "a sharded layer"  # finding it needs all ranks, which need not be at this call
        else:
            raise ValueError(_explain(layers, "an earlier call found a KL divergence that was not finite; now "))
        raise ValueError(f"an earlier call found that the KL divergence of {of} was {value}. {_REMEDY}")


def is_far(tensor):
    """Whether the host has to wait for a device to read the value."""
    return tensor.is_cuda


def recorded_event(device):
    """Return an event that completes after all work queued so far on the current stream of `device`."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class _Copy:
    """A copy of a tensor to the host that does not block."""

    def __init__(self, names, values):
        self.names = names
        self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._event = recorded_event(values.device)

    def arrived(self):
        return self._event.query()

    def values(self):
        return self._host.numpy().tolist()


_sent: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> _Copy


def _explain(layers, found=""):
    with torch.no_grad():
        for name, layer in layers.items():
            value = layer.kl_divergence(check_finite=False).item()
            if not math.isfinite(value):
                held = layer.posterior_and_prior()._asdict() | dict(layer.named_parameters(recurse=False))
                tensors = [(key, whole(tensor)) for key, tensor in held.items() if tensor is not None]
                return (
                    f"{found}the KL divergence of layer {checks.named(name)} is {value}: "
                    f"{checks.describe_not_finite(tensors)}. {_REMEDY}"
                )
    return (
        f"{found}the sum of the layers' finite KL divergences overflows. "
        "Remedy: look for a posterior far from its prior."
    )
