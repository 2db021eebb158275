"""Monte Carlo prediction: average over draws of scale and shift."""

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

import torch

from . import checks
from .blocks import Meanwhile, Switch
from .posterior import KLNorm


@contextlib.contextmanager
def sampling(model):
    """Inside the `with` block the KL layers of `model` sample scale and shift in evaluation mode too.

    Dropout and the like stay in evaluation mode, so what varies from call to call is the posteriors alone. The
    shortcuts of nn.TransformerEncoder and nn.TransformerEncoderLayer, which would not call the layers, are off
    meanwhile.

    It is the model that samples, not the block: while one is open every call samples, those of other threads too.
    Blocks for one model, or for parts of it, may overlap in threads, generators and coroutines; a layer is as before
    when the last block for it ends. Copies and pickles made inside of a block do not sample.

    Args:
        model: any nn.Module.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: `model` has no KL layer that samples, so that every call would give the same.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2))).eval()
        >>> x = torch.randn(3, 8)
        >>> torch.equal(model(x), model(x))
        True
        >>> with klnorm.sampling(model):
        ...     torch.equal(model(x), model(x))
        False
    """
    checks.check_module(model)
    if not any(map(_can_sample, model.modules())):
        raise ValueError(
            'model has no KL layer with posterior="sampled", expected at least one: nothing would be sampled. '
            "Remedy: klnorm.replace_layer_norm(model) or klnorm.replace_rms_norm(model) first."
        )
    with _DENSE.on(model), _SAMPLING.on(model):
        yield model


def _can_sample(module):
    return isinstance(module, KLNorm) and module.posterior == "sampled"


def _end_sampling(module):
    if isinstance(module, KLNorm):  # not restored meanwhile
        module._set_sampling(False)


def _train(module):
    if isinstance(module, KLNorm):
        module.train()
    else:
        module.training = True  # alone: train() would reach modules that were left in evaluation mode


_SAMPLING = Switch(_can_sample, lambda layer: layer._set_sampling(Meanwhile(True)), _end_sampling)
# Nested tensors go with nn.TransformerEncoder's shortcut.
_DENSE = Switch(
    lambda module: getattr(module, "use_nested_tensor", False),
    lambda encoder: setattr(encoder, "use_nested_tensor", Meanwhile(False)),
    lambda encoder: setattr(encoder, "use_nested_tensor", True),
)
_EVALUATION = Switch(lambda module: module.training, lambda module: module.training and module.eval(), _train)


class Prediction(NamedTuple):
    """What `mc_predict` returns, in fp32 (fp64 for fp64 logits): see there."""

    probabilities: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor


@torch.no_grad()
def mc_predict(model, inputs, samples=8):
    """Class probabilities averaged over draws of scale and shift, and how uncertain they are.

    The model runs `samples` times in evaluation mode inside `klnorm.sampling`; its training flags are put back after.

    Args:
        model: an nn.Module that returns logits (..., classes), or an object with them as `.logits`, as the models of
            transformers do.
        inputs: a tensor, or a tuple or list of positional arguments, or a mapping of keyword arguments.
        samples: number of draws, >= 1.

    Returns:
        A named tuple of tensors without gradient:
        probabilities (..., classes), the mean over draws of softmax(logits);
        entropy (...), of these mean probabilities in nats: the whole uncertainty of the prediction;
        mutual_information (...), between class and draw, in nats, >= 0: the part of the entropy that comes from not
        knowing scale and shift, which the mean of the draws' own entropies leaves (Houlsby et al. 2011, "BALD").

    Raises:
        TypeError: `model` is not an nn.Module, `samples` is not an int, or the model returns no logits.
        ValueError: `samples` < 1, or `model` has no KL layer that samples.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)))
        >>> prediction = klnorm.mc_predict(model, torch.randn(5, 8), samples=4)
        >>> prediction.probabilities.sum(-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
        >>> bool((prediction.mutual_information <= prediction.entropy).all())
        True
    """
    checks.check_module(model)
    checks.check_count("samples", samples)
    mean = entropy_of_draws = 0
    with _EVALUATION.on(model), sampling(model):
        for _ in range(samples):
            p = _probabilities(model, inputs)
            mean = mean + p / samples
            entropy_of_draws = entropy_of_draws + torch.special.entr(p).sum(-1) / samples
    entropy = torch.special.entr(mean).sum(-1)
    return Prediction(mean, entropy, (entropy - entropy_of_draws).clamp_min(0.0))


def _probabilities(model, inputs):
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"model returned a {type(output).__name__}, expected a floating-point tensor of logits (..., classes), or "
            "an object that holds one as .logits. Remedy: wrap the model in a module that returns its logits."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
