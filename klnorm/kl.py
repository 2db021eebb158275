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
        """Keep `kl`, computed from `parameters`, while `output` lives; forget what was kept where it has no graph."""
        if not kl.requires_grad or checks.transforming():
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
    from the parameters otherwise (no forward yet, evaluation, after `backward()` or `optimizer.step()`, under
    torch.compile). The value and the gradient are the same. Add it to the loss and call backward once, as it shares the
    outputs' graph. It counts the layers of `kl_layers(model)`; a KLConditionalLayerNorm, in which every sample has a
    posterior, with the mean over the samples of its last forward, see there.

    Of a model sharded by FSDP2 it is the whole value on every rank, at the cost of one all-reduce: every rank has to
    call it, after the forward. It is taken of the sharded parameters, in fp32 under a mixed precision policy too; but
    of the cast ones where those outlast the forward (the root's own; reshard_after_forward=False). A group with KL
    layers and a number for reshard_after_forward gets no gradient of it. Neither happens to KL layers in a group of
    their own: ``fully_shard(list(klnorm.kl_layers(model).values()))`` before the rest.

    Args:
        model: any nn.Module.
        check_finite: raise for NaN or infinity, naming the layer. On CUDA this waits for the GPU; it is left out under
            torch.compile, the transforms of torch.func and CUDA graph capture.

    Returns:
        Scalar tensor in nats, differentiable; 0 for a model without KL layers.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the divergence of a layer is not finite, or a KLConditionalLayerNorm has not sampled yet.

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
    parts = [layer._divergence() for layer in layers.values()]
    total = _total(parts)
    if check_finite and checks.is_readable(total) and not math.isfinite(total.item()):
        raise ValueError(_explain(layers, parts))
    return total


def kl_layers(model):
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
            ahead += [(prefix + child_name, child) for child_name, child in reversed(_children_in_use(module))]


def _children_in_use(module):
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if not hasattr(type(module), "adapter_layer_names"):
        return children
    copies = _active_copies(module)
    if any(_is_kl_layer(m) for _, copy in copies for m in copy.modules()):
        return copies
    return [(name, child) for name, child in children if name not in module.adapter_layer_names]


def _active_copies(wrapper):
    """(name, module) of what PEFT puts in the place of the layer that it has wrapped."""
    if wrapper.disable_adapters or wrapper.merged_adapters:  # a merged copy has changed places with the base layer
        return []
    by_adapter = [(name, wrapper._modules.get(name)) for name in wrapper.adapter_layer_names]
    return [
        (f"{name}.{adapter}", copies[adapter])
        for name, copies in by_adapter
        if isinstance(copies, torch.nn.ModuleDict)
        for adapter in wrapper.active_adapters
        if adapter in copies
    ]


def closed_form(divergence, parameters, prior, prior_std):
    """The sum of divergence(*parameters, prior, prior_std), a scalar; of sharded parameters a DTensor, see `whole`."""
    mean = parameters[0]
    if not is_sharded(mean):
        dtype = torch.promote_types(mean.dtype, torch.float32)
        return divergence(*(tensor.to(dtype) for tensor in (*parameters, prior)), prior_std).sum()
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor

    mesh, placements = mean.device_mesh, mean.placements
    prior = distribute_tensor(prior, mesh, placements, src_data_rank=None)  # every rank has all of it: nothing is sent
    local = closed_form(divergence, [p.to_local() for p in parameters], prior.to_local(), prior_std)
    of_sum = [Partial() if placement.is_shard() else placement for placement in placements]
    return DTensor.from_local(local, mesh, of_sum, run_check=False)


def whole(tensor):
    """A plain tensor; for a DTensor the whole of it, for which all its ranks communicate."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor):
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")  # its class is there to be asked for only where torch has it


def _total(parts):
    """The sum, a plain scalar; what is sharded alike is added up first, for one all-reduce."""
    alike = {}
    for part in parts:
        alike.setdefault((part.device_mesh, part.placements) if is_sharded(part) else None, []).append(part)
    plain = alike.pop(None, [])
    plain += [whole(sum(sharded)) for sharded in alike.values()]
    return torch.stack([part.to(plain[0].device) for part in plain]).sum()


def _explain(layers, parts):
    for (name, layer), part in zip(layers.items(), parts, strict=True):
        value = whole(part).item()
        if not math.isfinite(value):
            parameters = [(key, whole(p)) for key, p in layer.named_parameters(recurse=False)]
            return (
                f"the KL divergence of layer {name or '(the model itself)'!r} is {value}: "
                f"{checks.describe_not_finite(parameters)}. "
                "Remedy: look for a diverged step or a bad checkpoint; a lower learning rate for rho often helps."
            )
    return "the sum of the layers' finite KL divergences overflows. Remedy: look for a posterior far from its prior."
