"""The KL divergence of a model: taken from each layer's last forward if possible, else computed."""

import functools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import checks, compat, finite
from .compat import is_sharded, whole

if TYPE_CHECKING:
    from .layers import KLNorm


class LastKL:
    """Holds the KL tensor of a layer's last forward until it is taken.

    The tensor keeps the graph of that forward alive, back to the model's input. It is therefore released as early as
    possible: by `take`, after which only the caller holds the graph; by a backward through the forward; by the layer's
    next forward; and by its `eval()`. Copies and pickles of a layer do not contain it.
    """

    def __init__(self):
        self._self = weakref.ref(self)
        self.forget()

    def forget(self):
        self._kl = self._taken = self._inputs = self._states = self._prior_std = None
        self._repeated = False

    def remember(self, kl, inputs, prior_std):
        """Hold `kl`, an output of a Function of `klnorm.ops` computed from `inputs`. Not for torch.compile."""
        node = kl.grad_fn
        if node is None or compat.transforming():
            return
        node.last_kl = self._self  # a weak reference, because `self` holds the node
        self._kl, self._prior_std, self._repeated = kl, prior_std, compat.in_backward()
        self._inputs, self._states = inputs, _states(inputs)

    def take(self, inputs, prior_std):
        """Return the KL tensor; None if its graph is gone or used up, or if the inputs have changed since.

        From now on the caller has to hold the tensor. It can be taken again as long as someone holds it.
        """
        kl = self._kl if self._taken is None else self._taken()
        if kl is None or kl.grad_fn.consumed or prior_std != self._prior_std:
            return None
        if any(a is not b for a, b in zip(inputs, self._inputs, strict=True)) or _states(inputs) != self._states:
            return None
        if torch.is_grad_enabled():
            self._kl, self._taken = None, weakref.ref(kl)
        return kl

    def release(self, node):
        """Forget the KL tensor if it is of `node`, which a backward goes through, or of a repeat by checkpointing."""
        if self._repeated or (self._kl is not None and self._kl.grad_fn is node):
            self.forget()

    def __reduce__(self):
        return LastKL, ()


def _states(tensors):
    """Return numbers that show a change of value or of requires_grad, unless made in place through `.data`."""
    return [(t._version, t.requires_grad, t.data_ptr()) for t in tensors if t is not None]


def kl_divergence(model: nn.Module, *, check_finite: bool | None = None) -> torch.Tensor:
    """Return the KL divergence of all posteriors in `model` from their priors: the sum over layers, scales and shifts.

    Each layer's divergence is taken from its last forward in training mode; that costs two small kernels for the whole
    model and one for each layer with heads. It is computed from the parameters, in about twenty kernels, without such a
    forward; after a `backward()` through it, a change of the parameters or `eval()`; and under torch.compile. Value and
    gradient are the same in both cases. Add the result to the loss and call backward once: it shares the graph of the
    outputs.

    A layer holds the divergence of its last forward, and with it the graph of that forward, until `kl_divergence` takes
    it. From then on only the result holds the graph. If nothing takes it, a backward through the forward, the layer's
    next forward or `eval()` releases it.

    The sum is over the layers of `kl_layers(model)`. A KLConditionalLayerNorm, which has one posterior per sample,
    contributes the mean over the samples of its last forward.

    If FSDP2 shards the model, every rank has to call this after the forward and gets the whole value, at the cost of
    one all-reduce. It is computed from the sharded parameters, in fp32 even under a mixed precision policy; but from
    the cast ones if those outlast the forward (the root's own; reshard_after_forward=False). A group with KL layers and
    a number for reshard_after_forward gets no gradient of it. Neither happens to KL layers in a group of their own:
    ``fully_shard(list(klnorm.kl_layers(model).values()))`` before the rest.

    Args:
        model: any nn.Module.
        check_finite: whether to raise for NaN or infinity, naming the layer. None: yes, but a value on a GPU is checked
            in a later call for the same `model`, when it has reached the host, so that no call waits. True: at once,
            which waits for the GPU. False: no. There is no check under torch.compile, the transforms of torch.func and
            CUDA graph capture.

    Returns:
        Scalar tensor in nats, differentiable; 0 for a model without KL layers.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the divergence of a layer is not finite; a KLConditionalLayerNorm has not sampled yet; a layer is
            offloaded by accelerate, or on the meta device while others are not; another library has replaced the
            forward of a layer in training mode by one that does not sample.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
        >>> x, target = torch.randn(6, 4), torch.randint(2, (6,))
        >>> loss = F.cross_entropy(model(x), target) + klnorm.kl_divergence(model) / 6
        >>> loss.backward()
    """
    layers = kl_layers(model)
    if not layers:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)
    taken, others = _take_all(layers)
    names, parts = list(taken), [*taken.values(), *closed_form(others)]
    parts = [whole(part) for part in parts]
    parts = [part.to(parts[0].device) for part in parts]
    if torch.compiler.is_compiling() or compat.transforming():
        return torch.stack(parts).sum()
    total, values = _Total.apply(*parts)
    if check_finite is not False and compat.is_readable(total):
        if check_finite is None and finite.is_far(total):
            finite.check_later(model, layers, names, values)
        else:
            finite.check_now(layers, total)
    return total


def _take_all(layers):
    """Return ({name: KL divergence} of the layers whose last forward has it, the `kl_terms` of all others)."""
    taken, others = {}, []
    for name, layer in layers.items():
        overridden = compat.overrides_forward(layer)
        if overridden:
            compat.check_not_offloaded(name, layer)
        kl = layer._take_kl()
        if kl is not None:  # its own forward ran, so it needs no further check
            taken[name] = kl
            continue
        if overridden:
            compat.check_samples(name, layer)
        others += layer.kl_terms()
    if others:
        compat.check_not_split(layers)
    return taken, others


class _Total(torch.autograd.Function):
    """Returns (the sum of scalars, the scalars in one tensor), as a single node of the graph.

    The node holds the scalars as long as its graph lives, so that they can be taken again.
    """

    @staticmethod
    def forward(ctx, *parts):
        ctx.parts, ctx.count = parts, len(parts)
        ctx.set_materialize_grads(False)
        values = torch.stack(parts)
        ctx.mark_non_differentiable(values)
        return values.sum(), values

    @staticmethod
    def backward(ctx, dtotal, _):
        ctx.parts = None
        return (dtotal,) * ctx.count


def kl_layers(model: nn.Module) -> "dict[str, KLNorm]":
    """Return the KL layers of `model` that take part in its forward, by qualified name.

    A layer that is used or registered more than once appears once, under its first name. If PEFT keeps a copy of a
    layer for every adapter (modules_to_save, LN tuning), only the active adapter's copy appears; while adapters are
    disabled, only the original.

    Args:
        model: any nn.Module; a KL layer itself has the name "".

    Returns:
        dict: qualified name -> layer, in the order of `named_modules()`.

    Raises:
        TypeError: `model` is not an nn.Module.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.TransformerEncoderLayer(16, 2))
        >>> {name: layer.prior_std for name, layer in klnorm.kl_layers(model).items()}
        {'norm1': 0.1, 'norm2': 0.1}
    """
    checks.check_module(model)
    layers, posteriors = {}, {}
    for name, module in _modules_in_use(model):
        if _is_kl_layer(module):
            posterior = module.posterior_parameters()
            key = tuple(map(id, posterior))
            if key not in posteriors:
                posteriors[key] = posterior  # keeps the id of a parametrized weight, new at each access, from reuse
                layers[name] = module
    return layers


def some_kl_layers(model, why):
    """Return `kl_layers(model)`; raise ValueError if there are none, with the consequence `why` in the message."""
    layers = kl_layers(model)
    if not layers:
        raise ValueError(
            f"model has no KL layer, expected at least one: {why}. "
            "Remedy: klnorm.replace_layer_norm(model) or klnorm.replace_rms_norm(model) first."
        )
    return layers


def _is_kl_layer(module):
    return hasattr(type(module), "posterior_parameters")  # of the type: a wrapper's instance may forward attributes


def _modules_in_use(model):
    """Yield `named_modules()` without the copies of a layer that PEFT keeps but does not use."""
    seen, ahead = set(), [("", model)]
    while ahead:
        name, module = ahead.pop()
        if module not in seen:
            seen.add(module)
            yield name, module
            prefix = f"{name}." if name else ""
            ahead += [
                (prefix + child_name, child)
                for child_name, child in reversed(compat.children_in_use(module, _is_kl_layer))
            ]


def closed_form(terms):
    """Return scalars whose sum is the sum of the `terms`: one for all terms that are computed together.

    A term is (divergence, its parameters, prior mean, prior deviation); `divergence` is a function of the others by
    element. The scalar of sharded parameters is a DTensor.
    """
    alike = {}
    for divergence, parameters, prior, prior_std in terms:
        mean = parameters[0]
        place = (mean.device_mesh, mean.placements) if is_sharded(mean) else mean.device
        alike.setdefault((divergence, prior_std, mean.dtype, place), []).append((parameters, prior))
    return [
        _sum_alike(
            divergence,
            [list(tensors) for tensors in zip(*(parameters for parameters, _ in group), strict=True)],
            [prior for _, prior in group],
            prior_std,
        )
        for (divergence, prior_std, _, _), group in alike.items()
    ]


def _sum_alike(divergence, parameters, priors, prior_std):
    """Return the sum over all elements; `parameters`: for each argument of `divergence` the tensors of all terms."""
    mean = parameters[0][0]
    if is_sharded(mean):
        total = functools.partial(_sum_alike, divergence, prior_std=prior_std)
        return compat.sum_over_shards(total, mean, parameters, priors)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    columns = [torch.cat([t.flatten() for t in tensors]).to(dtype) for tensors in (*parameters, priors)]
    return divergence(*columns, prior_std).sum()
