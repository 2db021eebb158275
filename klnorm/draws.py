"""Runs a model on the same inputs for several draws of scale and shift: one draw per forward, or many."""

import contextlib
import functools
import threading
from collections.abc import Mapping

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from . import checks
from .blocks import LOCK
from .inputs import resolve_sample_dim
from .layers import KLNorm
from .reference.kl_norm import draw_layout


def can_sample(module):
    """Whether `module` is a KL layer with posterior="sampled"."""
    return isinstance(module, KLNorm) and module.posterior == "sampled"


def as_call(inputs):
    """Return (positional, keyword) arguments: `inputs` is a tensor, a tuple or list of positional ones or a mapping."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def batch_of(call):
    """Return the length of dimension 0 of the first tensor that has dimensions; None without such a tensor."""
    return next((len(t) for t in tree_leaves(call) if isinstance(t, torch.Tensor) and t.dim()), None)


def outputs(model, call, samples, max_batch):
    """Yield outputs (draws, ...) in fp32 or wider: one draw at a time, or as many as fit into `max_batch` inputs."""
    if max_batch is None:
        for _ in range(samples):
            yield _output(model, call)[None]
        return
    batch = batch_of(call)
    if batch is None:
        raise ValueError(
            "max_batch is given and no input is a tensor with a dimension, expected one whose dimension 0 counts the "
            "batch. Remedy: leave out max_batch."
        )
    at_once = max(1, max_batch // max(1, batch))
    for done in range(0, samples, at_once):
        draws = min(at_once, samples - done)
        repeat = functools.partial(_repeat, batch=batch, draws=draws)
        checked = _each_its_own_draw(model, draws * batch) if draws > 1 and batch else contextlib.nullcontext()
        with checked:
            output = _output(model, tree_map_only(torch.Tensor, repeat, call))
        if output.shape[:1] != (draws * batch,):
            raise ValueError(
                f"model returned an output of shape {tuple(output.shape)} for {draws * batch} inputs, {batch} for each "
                f"of {draws} draws, expected ({draws * batch}, ...). Remedy: leave out max_batch."
            )
        yield output.unflatten(0, (draws, batch))


def _output(model, call):
    arguments, keywords = call
    output = model(*arguments, **keywords)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"model returned a {type(output).__name__}, expected a floating-point tensor of logits, or an object that "
            "holds one as .logits. Remedy: wrap the model in a module that returns its logits."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _repeat(tensor, batch, draws):
    """Repeat a tensor (batch, ...) to (draws * batch, ...), draw by draw; return other tensors as they are."""
    if draws == 1 or tensor.shape[:1] != (batch,):
        return tensor
    return tensor.repeat(draws, *[1] * (tensor.dim() - 1))


@contextlib.contextmanager
def _each_its_own_draw(model, inputs):
    """Inside the block the KL layers of `model` raise, in this thread, if some of the `inputs` would share a draw."""
    thread, hooks = threading.get_ident(), []

    def check(name, layer, arguments, keywords=None):  # None for a thread that sees the hook half registered
        if torch.compiler.is_compiling() or threading.get_ident() != thread:
            return
        x = next(iter((*arguments, *keywords.values())), None)
        if isinstance(x, torch.Tensor):
            _check_draws(name, layer, x, inputs)

    try:
        with LOCK:  # two hooks registered at the same time may get the same id
            for name, module in model.named_modules():
                if can_sample(module):
                    hook = functools.partial(check, name)
                    hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        with LOCK:
            for hook in hooks:
                hook.remove()


def _check_draws(name, layer, x, inputs):
    n_normalized = len(layer._shape_and_eps()[0]) + (layer.heads is not None)
    sample_dim = layer.sample_dim
    if layer.noise == "sample":
        sample_dim = resolve_sample_dim(x, n_normalized, sample_dim)
    draws, _ = draw_layout(x.shape, n_normalized, layer.noise, sample_dim)
    if draws % inputs:
        raise ValueError(
            f"layer {checks.named(name)} with noise={layer.noise!r}, sample_dim={layer.sample_dim} has "
            f"{draws} draw(s) for {inputs} inputs in an x of shape {tuple(x.shape)}, expected as many or a multiple: "
            "with max_batch an input is repeated, and all its copies would share a draw. Remedy: leave out max_batch."
        )
