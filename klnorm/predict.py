"""Monte Carlo prediction: averages a model's outputs over draws of scale and shift."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Literal, NamedTuple, TypeVar, overload

import torch
from torch import nn

from . import checks
from .blocks import Switch, Temporary
from .draws import as_call, batch_of, can_sample, outputs
from .layers import KLNorm

Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def sampling(model: Model) -> Iterator[Model]:
    """Inside the `with` block the KL layers of `model` sample scale and shift in evaluation mode too.

    Dropout and other modules stay in evaluation mode, so only the draws of the posteriors vary between calls. The block
    turns off the shortcuts of nn.TransformerEncoder and nn.TransformerEncoderLayer, which would not call the layers.

    Sampling is a state of the model: while a block is open, every call samples, also in other threads. Blocks for one
    model, or for parts of it, may overlap in threads, generators and coroutines; a layer is as before when the last
    block for it ends. Copies and pickles made inside a block do not sample.

    Args:
        model: any nn.Module.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: `model` has no KL layer that samples.

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
    if not any(map(can_sample, model.modules())):
        raise ValueError(
            'model has no KL layer with posterior="sampled", expected at least one: nothing would be sampled. '
            "Remedy: klnorm.replace_layer_norm(model) or klnorm.replace_rms_norm(model) first."
        )
    with _DENSE.on(model), _SAMPLING.on(model):
        yield model


def _end_sampling(module):
    if isinstance(module, KLNorm):  # else the layer was restored to a plain norm inside the block
        module._set_sampling(False)


def _train(module):
    if isinstance(module, KLNorm):
        module.train()
    else:
        module.training = True  # not train(), which would also change children that were in evaluation mode


_SAMPLING = Switch(can_sample, lambda layer: layer._set_sampling(Temporary(True)), _end_sampling)
# nn.TransformerEncoder passes nested tensors for its shortcut, which KL layers that sample do not take.
_DENSE = Switch(
    lambda module: getattr(module, "use_nested_tensor", False),
    lambda encoder: setattr(encoder, "use_nested_tensor", Temporary(False)),
    lambda encoder: setattr(encoder, "use_nested_tensor", True),
)
_EVALUATION = Switch(lambda module: module.training, lambda module: module.training and module.eval(), _train)


_LIKELIHOODS = "categorical", "bernoulli", "gaussian"


class Prediction(NamedTuple):
    """The result of `mc_predict` for classes, in fp32 (fp64 for fp64 logits); `mc_predict` describes the fields."""

    probabilities: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor


class Regression(NamedTuple):
    """The result of `mc_predict` for numbers, in fp32 (fp64 for fp64 outputs); `mc_predict` describes the fields."""

    mean: torch.Tensor
    variance: torch.Tensor


@overload
def mc_predict(
    model: nn.Module,
    inputs: torch.Tensor | Sequence | Mapping,
    samples: int = 8,
    *,
    likelihood: Literal["categorical", "bernoulli"] = "categorical",
    class_dim: int = -1,
    max_batch: int | None = None,
) -> Prediction: ...


@overload
def mc_predict(
    model: nn.Module,
    inputs: torch.Tensor | Sequence | Mapping,
    samples: int = 8,
    *,
    likelihood: Literal["gaussian"],
    class_dim: int = -1,
    max_batch: int | None = None,
) -> Regression: ...


@torch.no_grad()
def mc_predict(
    model: nn.Module,
    inputs: torch.Tensor | Sequence | Mapping,
    samples: int = 8,
    *,
    likelihood: Literal["categorical", "bernoulli", "gaussian"] = "categorical",
    class_dim: int = -1,
    max_batch: int | None = None,
) -> Prediction | Regression:
    """Return the model's prediction averaged over draws of scale and shift, and its uncertainty.

    The model runs in evaluation mode inside `klnorm.sampling`; afterwards its training flags are restored. Calls may
    overlap in threads: until the last call for a model ends, the model is in evaluation mode and samples in every
    thread.

    Args:
        model: an nn.Module that returns logits or numbers as one tensor, or as the attribute `.logits` of an object, as
            models of transformers do.
        inputs: a tensor, or a tuple or list of positional arguments, or a mapping of keyword arguments.
        samples: number of draws, >= 1.
        likelihood: meaning of the output: "categorical": logits (..., classes) of mutually exclusive classes;
            "bernoulli": logits (...) of independent yes-or-no decisions; "gaussian": numbers (...).
        class_dim: the dimension of categorical logits that counts the classes, two or more.
        max_batch: None: one forward per draw. Or the largest number of inputs in a forward, >= 1: as many draws as fit
            run in one forward, which repeats the inputs along dimension 0. This saves host time for small batches.
            Dimension 0 of the first tensor counts the batch; every tensor with this length there is repeated, all
            others are passed unchanged. A batch is never split. The draws are still independent, but their values
            differ from those with None, except for the first draw. Layers need noise="sample" or "token" with a
            `sample_dim` that counts the inputs: a layer whose copies of an input would share a draw raises, but not
            under torch.compile.

    Returns:
        A named tuple of tensors without gradient. For classes:
        probabilities, the mean over draws of softmax(logits), in the shape of the logits; for a decision the
        probability of yes, the mean of sigmoid(logits);
        entropy of these mean probabilities, in nats, without the dimension of the classes: the total uncertainty;
        mutual_information between class and draw, like entropy, >= 0: entropy less the mean entropy of single draws,
        the part that comes from not knowing scale and shift (Houlsby et al. 2011, "BALD").
        For numbers, in their shape:
        mean and variance over draws, the latter with divisor `samples`: the part of the predictive variance that comes
        from not knowing scale and shift. The variance of the observations around the mean comes on top.

    Raises:
        TypeError: an argument has the wrong type, or the model does not return a floating-point tensor.
        ValueError: `samples` or `max_batch` < 1; unknown `likelihood`; no KL layer that samples; categorical logits
            with fewer than two classes in `class_dim`, or of shape (batch,) without a `class_dim`; with `max_batch`, a
            layer whose draws or an output whose length does not match the inputs.

    Example:
        >>> model = klnorm.replace_layer_norm(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)))
        >>> prediction = klnorm.mc_predict(model, torch.randn(5, 8), samples=4, max_batch=64)
        >>> prediction.probabilities.shape, prediction.entropy.shape
        (torch.Size([5, 3]), torch.Size([5]))
        >>> bool((prediction.mutual_information <= prediction.entropy).all())
        True
        >>> mean, variance = klnorm.mc_predict(model, torch.randn(5, 8), likelihood="gaussian")
        >>> mean.shape, bool((variance > 0).all())
        (torch.Size([5, 3]), True)
    """
    checks.check_module(model)
    checks.check_count("samples", samples)
    _check_likelihood(likelihood, class_dim)
    if max_batch is not None:
        checks.check_count("max_batch", max_batch)
    call = as_call(inputs)
    with _EVALUATION.on(model), sampling(model):
        found = outputs(model, call, samples, max_batch)
        if likelihood == "gaussian":
            return _moments(found)
        if likelihood == "bernoulli":  # two classes: "no" has the logit 0
            yes_or_no = ((torch.stack([torch.zeros_like(z), z], 1), 0) for z in found)
            probabilities, *uncertainty = _classify(yes_or_no, samples)
            return Prediction(probabilities[1], *uncertainty)
        batch = batch_of(call)
        return _classify(((z, _resolve(class_dim, z.shape[1:], batch, max_batch)) for z in found), samples)


def _check_likelihood(likelihood, class_dim):
    if not isinstance(likelihood, str):
        raise TypeError(f"likelihood is a {type(likelihood).__name__}, expected a str.")
    if likelihood not in _LIKELIHOODS:
        raise ValueError(f"likelihood is {likelihood!r}, expected one of {', '.join(map(repr, _LIKELIHOODS))}.")
    if isinstance(class_dim, bool) or not isinstance(class_dim, Integral):
        raise TypeError(f"class_dim is a {type(class_dim).__name__}, expected an int.")


def _resolve(class_dim, shape, batch, max_batch):
    """Return `class_dim` as a non-negative dimension of one draw's logits; raise if it cannot count classes."""
    dim = class_dim + len(shape) if class_dim < 0 else class_dim
    if not 0 <= dim < len(shape):
        found = f"have no dimension {class_dim}"
    elif shape[dim] < 2:
        found = f"have {shape[dim]} there"
    elif dim == 0 and (max_batch is not None or (class_dim < 0 and shape[0] == batch)):
        found = "have the batch there"
    else:
        return dim
    raise ValueError(
        f"model returned logits of shape {tuple(shape)}, which {found}, expected two or more classes in dimension "
        f"class_dim={class_dim}. Remedy: likelihood='bernoulli' where a logit is a decision of its own, "
        "likelihood='gaussian' for regression, or the class_dim that counts classes."
    )


def _classify(logits_and_dims, samples):
    """Return the `Prediction` of pairs, one per forward: logits (draws, ...), dimension of classes in one draw's."""
    mean = entropy_of_draws = 0
    for logits, dim in logits_and_dims:
        p = logits.softmax(dim + 1)
        mean = mean + p.sum(0) / samples
        entropy_of_draws = entropy_of_draws + torch.special.entr(p).sum(dim + 1).sum(0) / samples
    entropy = torch.special.entr(mean).sum(dim)
    return Prediction(mean, entropy, (entropy - entropy_of_draws).clamp_min(0.0))


def _moments(found):
    """Return the `Regression` of outputs (draws, ...), merged by the formulas of Chan, Golub and LeVeque (1983)."""
    count = mean = squares = 0
    for output in found:
        draws, their_mean = len(output), output.mean(0)
        distance, total = their_mean - mean, count + draws
        squares = squares + (output - their_mean).square().sum(0) + distance.square() * (count * draws / total)
        mean, count = mean + distance * (draws / total), total
    return Regression(mean, squares / count)
