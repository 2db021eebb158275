"""The functional form: checks its arguments, lays out the draws, draws the seed."""

import math

import torch

from . import checks, ops
from .reference.kl_norm import draw_layout


def kl_layer_norm(
    x,
    normalized_shape,
    weight,
    bias,
    weight_rho,
    bias_rho,
    *,
    weight_prior=1.0,
    bias_prior=0.0,
    prior_std=0.1,
    eps=1e-5,
    noise="sample",
    sample_dim=0,
    sample=True,
    seed=None,
    generator=None,
):
    r"""Layer normalization whose scale and shift are Gaussian, and their KL divergence from the prior.

    .. math::
        y = \gamma \hat x + \beta, \quad
        \gamma_j \sim N(\mathrm{weight}_j, \mathrm{softplus}(\mathrm{weight\_rho}_j)^2), \quad
        \beta_j \sim N(\mathrm{bias}_j, \mathrm{softplus}(\mathrm{bias\_rho}_j)^2)

    with the biased variance in :math:`\hat x`, and
    :math:`\mathrm{kl} = \sum_j \mathrm{KL}(\gamma_j \| N(\mathrm{weight\_prior}_j, \mathrm{prior\_std}^2))`,
    the same for :math:`\beta` added. One reading of Kumar, Narang and Lall, "KL Regularized Normalization Framework for
    Low Resource Tasks" (2022, arXiv 2212.11275), whose own equations are unverified here. Arithmetic in fp32 (fp64 for
    fp64 `x`).

    Args:
        x: (..., \*normalized_shape), floating point; read in place where rows of adjacent features have one stride,
            through one copy otherwise.
        normalized_shape: int or sequence of ints; N is their product.
        weight: posterior mean of the scale, `normalized_shape`, any floating dtype.
        bias: posterior mean of the shift, or None together with `bias_rho` for no shift.
        weight_rho: deviation of the scale before softplus, like `weight`.
        bias_rho: deviation of the shift before softplus, like `weight`.
        weight_prior: prior mean of the scale, a float or a tensor of `normalized_shape`; no gradient.
        bias_prior: prior mean of the shift, likewise.
        prior_std: deviation of the prior, > 0.
        eps: added to the variance, > 0.
        noise: which rows share a draw of scale and shift: "batch" all of them, "sample" those of one index of
            `sample_dim`, "token" none.
        sample_dim: the dimension of `x` that counts samples; not a normalized one. Only for noise="sample".
        sample: False uses the means: LayerNorm.
        seed: int64 tensor of one element on the device of `x`, all 64 bits used; drawn from torch's generator if None.
        generator: torch.Generator of the device of `x` to draw the seed from; torch's own if None.

    Returns:
        y, like `x` in shape and dtype, contiguous; and kl, a scalar in nats, fp32 (fp64 for fp64 `x`). Both
        differentiable once in reverse mode, by torch.func too; torch.vmap runs one call for every index.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; the message says which,
            what came, what was expected and what to do. Also for a `generator` where activation checkpointing repeats
            the call, and on the CPU for a KL divergence that is not finite.

    Example:
        >>> x, weight, bias = torch.randn(4, 5, 8), torch.ones(8), torch.zeros(8)
        >>> rho = torch.full((8,), -3.0)
        >>> y, kl = klnorm.functional.kl_layer_norm(x, 8, weight, bias, rho, rho, noise="token")
        >>> y.shape, kl.shape
        (torch.Size([4, 5, 8]), torch.Size([]))
    """
    y, kl = normalize(
        x, normalized_shape, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, prior_std, eps,
        noise, sample_dim, sample, seed, generator,
    )  # fmt: skip
    if kl.device.type == "cpu" and checks.is_readable(kl):
        _check_finite(kl, weight=weight, bias=bias, weight_rho=weight_rho, bias_rho=bias_rho)
    return y, kl


def normalize(
    x, normalized_shape, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, prior_std, eps,
    noise, sample_dim, sample, seed, generator,
):  # fmt: skip
    """`kl_layer_norm` without its check that the KL is finite, which a layer leaves to `klnorm.kl_divergence`."""
    shape = checks.as_shape(normalized_shape)
    checks.check_config(prior_std, eps, noise)
    checks.check_input(x, shape)
    checks.check_parameters(x, shape, weight, bias, weight_rho, bias_rho)
    checks.check_prior("weight_prior", weight_prior, x, shape)
    checks.check_prior("bias_prior", bias_prior, x, shape)
    if noise == "sample" and sample:
        sample_dim = checks.resolve_sample_dim(x, len(shape), sample_dim)
    draws, inner = draw_layout(x.shape, len(shape), noise if sample else "batch", sample_dim)
    checks.check_rows(draws * inner)
    if not sample:
        seed = None
    elif seed is not None:
        checks.check_seed(seed, x)
        seed = seed.reshape(1)
    else:
        checks.check_generator(generator, x)
        # With generator=, though it be None, this is the overload that inductor leaves to torch: eager's seeds.
        seed = torch.randint(2**63 - 1, (1,), device=x.device, generator=generator)
    function = ops.TransformableFunction if checks.transforming() else ops.KLLayerNormFunction
    y, kl, *_ = function.apply(
        x, weight, bias, weight_rho, bias_rho,
        *_prior_tensors(weight_prior, bias_prior), seed,
        *_prior_numbers(weight_prior, bias_prior), prior_std, eps, draws, inner,
    )  # fmt: skip
    return y, kl


def _prior_tensors(*priors):
    return [prior.detach() if isinstance(prior, torch.Tensor) else None for prior in priors]


def _prior_numbers(*priors):
    return [0.0 if isinstance(prior, torch.Tensor) else float(prior) for prior in priors]


def _check_finite(kl, **parameters):
    if not math.isfinite(kl.item()):
        raise ValueError(
            f"the KL divergence is {kl.item()}: {checks.describe_not_finite(parameters.items())}. "
            "Remedy: look for a diverged step or a bad checkpoint; a lower learning rate for rho often helps."
        )
