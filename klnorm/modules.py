"""The layers."""

import torch
from torch import nn

from . import checks
from .posterior import KLNorm
from .spec import Parameters


class KLLayerNorm(KLNorm, nn.LayerNorm):
    r"""LayerNorm whose scale and shift are Gaussian posteriors, sampled in training and held to a prior by a KL term.

    In training mode every draw of scale and shift is
    :math:`\gamma = \mathrm{weight} + \mathrm{softplus}(\mathrm{weight\_rho})\,\epsilon`, likewise :math:`\beta`; in
    evaluation mode the layer is `nn.LayerNorm` with the posterior means, bit for bit where `x` and the parameters have
    one dtype. `klnorm.sampling(model)` samples in evaluation mode. Add `klnorm.kl_divergence(model)`, weighted, to the
    loss. A training forward whose divergence nobody takes may keep its graph alive until the layer's next forward. See
    `klnorm.functional.kl_layer_norm` for the formulas and their source.

    Args:
        normalized_shape: int or sequence of ints, as for nn.LayerNorm.
        eps: added to the variance, >= 0.
        elementwise_affine: must be True: the layer is about the scale and shift.
        bias: False leaves out the shift, `bias` and `bias_rho` are None then.
        device, dtype: of the parameters.
        noise: which rows share a draw: "batch" all, "sample" (default) those of one sample, "token" none.
        sample_dim: dimension of the input that counts samples.
        init_std: initial posterior deviation, > 0.
        prior_std: deviation of the prior, > 0.
        generator: torch.Generator of the input's device to draw the seed of every forward from; torch's own if None.
        posterior: "sampled", or "deterministic": no noise and no deviations, so that the layer has exactly the
            parameters of nn.LayerNorm and computes the same, and the normalized activation itself is taken for the
            noise: :math:`y_j \sim N(\mathrm{bias}_j, \mathrm{weight}_j^2)`, held by the KL term to
            :math:`N(\mathrm{bias\_prior}_j, \mathrm{prior\_std}^2)`. Use it for a regularizer without noise, arithmetic
            or parameters of its own. weight plays the deviation, so choose a `prior_std` of the size that weights
            have, about 1: the default of 0.1, meant for the sampled reading, would pull them all to 0.1. `noise`,
            `sample_dim`, `init_std` and `generator` have no effect then.
        out_dtype: floating dtype of the output; that of the input if None.
        heads: None, or how many heads have a scale and shift of their own, as in norms of queries and keys. Input is
            then (..., heads, \*normalized_shape), parameters and prior means are (heads, \*normalized_shape), and the
            KL divergence is the sum over heads, which share no noise.

    Shape:
        Input (..., \*normalized_shape) in fp16, bf16, fp32 or fp64; output the same, contiguous, in the input's dtype
        or `out_dtype`. `layer(x, residual=r)` normalizes x + r and returns that too: (y, x + r).

    Parameters:
        weight, bias: posterior means. weight_rho, bias_rho: deviations before softplus, None in the deterministic
            reading. All of `normalized_shape`, or (heads, \*normalized_shape).
    Buffers (persistent):
        weight_prior, bias_prior: prior means, initially 1 and 0. A loaded nn.LayerNorm checkpoint becomes the prior.
            weight_prior is None in the deterministic reading.

    Raises:
        TypeError, ValueError: as `klnorm.functional.kl_layer_norm`, and for elementwise_affine=False. Options are
            checked when the layer is made; an `init_std` has to be finite in the parameters' dtype.

    Example:
        >>> layer = klnorm.KLLayerNorm(8, noise="token")
        >>> y = layer(torch.randn(4, 5, 8))
        >>> loss = y.square().mean() + layer.kl_divergence() / 1000
        >>> layer = klnorm.KLLayerNorm(8, posterior="deterministic", prior_std=1.0)
        >>> [name for name, _ in layer.named_parameters()], abs(round(layer.kl_divergence().item(), 5))
        (['weight', 'bias'], 0.0)
        >>> layer = klnorm.KLLayerNorm(8, heads=4)
        >>> layer(torch.randn(2, 5, 4, 8)).shape, layer.weight.shape
        (torch.Size([2, 5, 4, 8]), torch.Size([4, 8]))
    """

    _plain_class = nn.LayerNorm

    def __init__(
        self,
        normalized_shape,
        eps=1e-5,
        elementwise_affine=True,
        bias=True,
        device=None,
        dtype=None,
        *,
        noise="sample",
        sample_dim=0,
        init_std=0.05,
        prior_std=0.1,
        generator=None,
        posterior="sampled",
        out_dtype=None,
        heads=None,
    ):
        _check_affine(elementwise_affine, "LayerNorm")
        checks.check_flag("bias", bias)
        checks.check_dtype(dtype)
        eps = checks.as_number("eps", eps, at_least=0)
        shape, heads = checks.as_shape(normalized_shape), _as_heads(heads)
        super().__init__((*heads, *shape), eps, True, bias, device, dtype)  # parameters of this shape
        self.normalized_shape, self.heads = shape, heads[0] if heads else None
        self._add_posterior(
            noise=noise, sample_dim=sample_dim, init_std=init_std, prior_std=prior_std, generator=generator,
            posterior=posterior, out_dtype=out_dtype,
        )  # fmt: skip


class KLRMSNorm(KLNorm, nn.RMSNorm):
    r"""RMSNorm whose scale is a Gaussian posterior, sampled in training and held to a prior by a KL term.

    `KLLayerNorm` without mean and, unless asked for, shift: see there, and `klnorm.functional.kl_rms_norm` for the
    formulas. In evaluation mode the layer is `nn.RMSNorm` with the posterior means, bit for bit where `x` and the
    weight have one dtype; with a shift, which nn.RMSNorm has not, :math:`\mathrm{weight}\,\hat x + \mathrm{bias}`,
    rounded once.

    Args:
        normalized_shape: int or sequence of ints, as for nn.RMSNorm.
        eps: added to the mean square, >= 0; None as in nn.RMSNorm.
        elementwise_affine: must be True: the layer is about the scale.
        device, dtype: of the parameters.
        bias: True adds a shift with a posterior of its own, as KLLayerNorm has.
        noise, sample_dim, init_std, prior_std, generator, out_dtype, heads: as for `KLLayerNorm`.
        posterior: "sampled" or "deterministic", as for `KLLayerNorm`. Without a shift the deterministic KL is that of
            :math:`N(0, \mathrm{weight}_j^2)` from :math:`N(0, \mathrm{prior\_std}^2)`.

    Shape:
        Input (..., \*normalized_shape) in fp16, bf16, fp32 or fp64; output the same, contiguous, in the input's dtype
        or `out_dtype`. `layer(x, residual=r)` normalizes x + r and returns that too: (y, x + r).

    Parameters:
        weight, bias: posterior means. weight_rho, bias_rho: deviations before softplus, None in the deterministic
            reading. All of `normalized_shape`, or (heads, \*normalized_shape); those of the shift None where there is
            none.
    Buffers (persistent):
        weight_prior, bias_prior: prior means, initially 1 and 0. A loaded nn.RMSNorm checkpoint becomes the prior; its
            shift is 0. weight_prior is None in the deterministic reading, bias_prior without a shift.

    Raises:
        TypeError, ValueError: as `klnorm.functional.kl_rms_norm`, and for elementwise_affine=False.
        `klnorm.restore_rms_norm` refuses a layer with a shift or with heads.

    Example:
        >>> layer = klnorm.KLRMSNorm(8, eps=1e-6)
        >>> y = layer(torch.randn(4, 5, 8))
        >>> loss = y.square().mean() + layer.kl_divergence() / 1000
        >>> layer
        KLRMSNorm((8,), eps=1e-06, elementwise_affine=True, noise='sample', sample_dim=0, prior_std=0.1)
        >>> norm_q, norm_k = (klnorm.KLRMSNorm(8, eps=1e-6, heads=heads) for heads in (4, 2))
        >>> q, k = norm_q(torch.randn(2, 5, 4, 8)), norm_k(torch.randn(2, 5, 2, 8))
        >>> q.shape, k.shape
        (torch.Size([2, 5, 4, 8]), torch.Size([2, 5, 2, 8]))
    """

    _plain_class = nn.RMSNorm
    _is_rms = True

    def __init__(
        self,
        normalized_shape,
        eps=None,
        elementwise_affine=True,
        device=None,
        dtype=None,
        *,
        bias=False,
        noise="sample",
        sample_dim=0,
        init_std=0.05,
        prior_std=0.1,
        generator=None,
        posterior="sampled",
        out_dtype=None,
        heads=None,
    ):
        _check_affine(elementwise_affine, "RMSNorm")
        checks.check_flag("bias", bias)
        checks.check_dtype(dtype)
        eps = None if eps is None else checks.as_number("eps", eps, at_least=0)
        shape, heads = checks.as_shape(normalized_shape), _as_heads(heads)
        super().__init__((*heads, *shape), eps, True, device, dtype)  # parameters of this shape
        self.normalized_shape, self.heads = shape, heads[0] if heads else None
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(self.weight)) if bias else None)
        self._add_posterior(
            noise=noise, sample_dim=sample_dim, init_std=init_std, prior_std=prior_std, generator=generator,
            posterior=posterior, out_dtype=out_dtype,
        )  # fmt: skip

    def _build_posterior(self, **options):
        if not hasattr(self, "bias"):  # an nn.RMSNorm that is being replaced
            self.register_parameter("bias", None)
        super()._build_posterior(**options)

    def _remove_posterior(self):
        super()._remove_posterior()
        self._parameters.pop("bias", None)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight, others = state_dict.get(f"{prefix}weight"), [f"{prefix}{name}" for name in Parameters._fields[1:]]
        is_plain = isinstance(weight, torch.Tensor) and not any(key in state_dict for key in others)
        if is_plain and self.bias is not None:
            state_dict = {**state_dict, f"{prefix}bias": torch.zeros_like(weight)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self):
        return super().extra_repr() + ("" if self.bias is None else ", bias=True")


def _as_heads(heads):
    """What comes before the normalized shape in that of the parameters."""
    return () if heads is None else (checks.as_integer("heads", heads, at_least=1),)


def _check_affine(elementwise_affine, norm):
    checks.check_flag("elementwise_affine", elementwise_affine)
    if not elementwise_affine:
        raise ValueError(
            "elementwise_affine is False, expected True: a layer without scale and shift has nothing to learn a "
            f"distribution of. Remedy: nn.{norm}(..., elementwise_affine=False)."
        )
