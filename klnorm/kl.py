"""The KL divergence of a model: once per layer, from its last forward where that is still there."""

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
    """The KL tensor of a layer's last forward, held until somebody takes it.

    Holding it keeps the graph of that forward alive, back to the model's input. So it is let go of as early as can be:
    by `take`, after which whoever took it holds the graph, by a backward through the forward, by the layer's next
    forward and its `eval()`. Copies and pickles of a layer start without.
    """

    def __init__(self):
        self._self = weakref.ref(self)
        self.forget()

    def forget(self):
        self._kl = self._taken = self._inputs = self._states = self._prior_std = None
        self._repeated = False

    def remember(self, kl, inputs, prior_std):
        """Hold `kl`, an output of a Function of `klnorm.ops`, computed from `inputs`, outside of torch.compile."""
        node = kl.grad_fn
        if node is None or compat.transforming():
            return
        node.last_kl = self._self  # weakly, as this holds the node
        self._kl, self._prior_std, self._repeated = kl, prior_std, compat.in_backward()
        self._inputs, self._states = inputs, _states(inputs)

    def take(self, inputs, prior_std):
        """The KL tensor, or None where its graph is gone or spent, or the inputs have changed since.

        The caller has to hold it from now on. It can be taken again for as long as somebody does.
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
        """A backward goes through `node`: its graph is spent, and of what a checkpoint has repeated for it no use."""
        if self._repeated or (self._kl is not None and self._kl.grad_fn is node):
            self.forget()

    def __reduce__(self):
        return LastKL, ()


def _states(tensors):
    """What changes with tensors, their values or their part in autograd; not a change in place through `.data`."""
    return [(t._version, t.requires_grad, t.data_ptr()) for t in tensors if t is not None]


def kl_divergence(model: nn.Module, *, check_finite: bool | None = None) -> torch.Tensor:
    """KL divergence of all posteriors in `model` from their priors: the sum over layers, scales and shifts.

    Taken from each layer's last forward in training mode where that is still at hand, at the cost of two small kernels
    for the whole model and one for each layer with heads; computed from the parameters, in some twenty, of the layers
    where it is not: without such a forward, or after a `backward()` through it, a change of the parameters, or
    `eval()`; and under torch.compile. The value and the gradient are the same. Add it to the loss and call backward
    once, as it shares the outputs' graph.

    A layer holds its last forward's divergence, and with it the graph of that forward, until `kl_divergence` takes it;
    from then on the result alone holds the graph. Where nobody asks for it a backward through the forward, the layer's
    next forward or `eval()` lets go of it.

    It counts the layers of `kl_layers(model)`; a KLConditionalLayerNorm, in which every sample has a posterior, with
    the mean over the samples of its last forward, see there.

    Of a model sharded by FSDP2 it is the whole value on every rank, at the cost of one all-reduce: every rank has to
    call it, after the forward. It is taken of the sharded parameters, in fp32 under a mixed precision policy too; but
    of the cast ones where those outlast the forward (the root's own; reshard_after_forward=False). A group with KL
    layers and a number for reshard_after_forward gets no gradient of it. Neither happens to KL layers in a group of
    their own: ``fully_shard(list(klnorm.kl_layers(model).values()))`` before the rest.

    Args:
        model: any nn.Module.
        check_finite: whether to raise for NaN or infinity, naming the layer. None: yes, but without waiting for a GPU:
            what a call finds there is looked at in a later call for the same `model`, when it has arrived. True: at
            once, which waits for the GPU. False: no. Left out under torch.compile, the transforms of torch.func and
            CUDA graph capture.

    Returns:
        Scalar tensor in nats, differentiable; 0 for a model without KL layers.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the divergence of a layer is not finite; a KLConditionalLayerNorm has not sampled yet; a layer is
            offloaded by accelerate, or on the meta device while others are not; a layer in training mode does not
            sample, for a forward that another library put into it.

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
    """({name: KL divergence} of the layers whose last forward is at hand, the terms of all others)."""
    taken, others = {}, []
    for name, layer in layers.items():
        covered = compat.has_forward_of_its_own(layer)
        if covered:
            compat.check_not_offloaded(name, layer)
        kl = layer._take_kl()
        if kl is not None:  # so its own forward ran
            taken[name] = kl
            continue
        if covered:
            compat.check_samples(name, layer)
        others += layer.kl_terms()
    if others:
        compat.check_not_split(layers)
    return taken, others


class _Total(torch.autograd.Function):
    """(the sum of scalars, the scalars in one tensor), one node, whose backward hands each the same cotangent.

    While its graph lives it holds the scalars, so that they can be taken again.
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
    """The KL layers of `model` that take part in its forward, by qualified name.

    A layer that is used or registered more than once is there once, under its first name. Where PEFT keeps a copy of a
    layer for every adapter (modules_to_save, LN tuning), the active adapter's is there alone, and the original while
    adapters are disabled.

    Args:
        model: any nn.Module, a KL layer itself included, whose name is then "".

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
                posteriors[key] = posterior  # held, as a parametrized one is made anew and its id would be free again
                layers[name] = module
    return layers


def some_kl_layers(model, why):
    """`kl_layers(model)`; raise where there are none, `why` saying what that would mean."""
    layers = kl_layers(model)
    if not layers:
        raise ValueError(
            f"model has no KL layer, expected at least one: {why}. "
            "Remedy: klnorm.replace_layer_norm(model) or klnorm.replace_rms_norm(model) first."
        )
    return layers


def _is_kl_layer(module):
    return hasattr(type(module), "posterior_parameters")  # an instance may be a wrapper that passes attributes through


def _modules_in_use(model):
    """`named_modules()`, less the copies that PEFT keeps of a layer and does not use."""
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
    """The sum of KL divergences, in few scalars: one of all that are computed alike; of sharded ones a DTensor.

    A term is (divergence, its parameters, prior mean, prior deviation), a divergence a function of these by element.
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
    """The sum over all elements; `parameters`: for every argument of `divergence` the tensors of all terms."""
    mean = parameters[0][0]
    if is_sharded(mean):
        total = functools.partial(_sum_alike, divergence, prior_std=prior_std)
        return compat.sum_over_shards(total, mean, parameters, priors)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    columns = [torch.cat([t.flatten() for t in tensors]).to(dtype) for tensors in (*parameters, priors)]
    return divergence(*columns, prior_std).sum()
