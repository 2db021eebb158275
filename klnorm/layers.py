"""The layers: norms whose scale and shift have posteriors."""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import checks, compat, inputs
from .functional import Settings, normalize
from .kl import LastKL, kl_divergence
from .reference.kl_norm import kl_deterministic, kl_normal
from .spec import Parameters

SETTINGS = (
    "noise", "sample_dim", "generator", "init_std", "prior_std", "posterior", "prior", "out_dtype",
    "heads", "_last_kl", "_sampling", "_shortcut_guard",
)  # fmt: skip
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions


class KLNorm(nn.Module):
    """Base of the KL layers. It precedes the class of the norm: `class KLLayerNorm(KLNorm, nn.LayerNorm)`.

    The norm's own parameters are the means of the posterior. The layer adds deviations, `<mean>_rho`, as parameters and
    means of the prior, `<mean>_prior`, as buffers. Those that a layer without shift or with posterior="deterministic"
    does not need are None.
    """

    if TYPE_CHECKING:  # torch.jit reads annotations that are there at run time, and stumbles over these
        noise: checks.Noise
        sample_dim: int
        init_std: float
        prior_std: float
        generator: torch.Generator | None
        posterior: checks.Posterior
        out_dtype: torch.dtype | None

    _means: tuple[str, ...] = ("weight", "bias")
    _is_rms = False
    _weight_offset = 0.0  # scale = _weight_offset + weight
    heads: int | None = None  # number of heads with their own parameters

    def _add_posterior(self, **options):
        """Turn the norm into a KL layer."""
        self._build_posterior(**options)
        self._guard_shortcut()

    def _build_posterior(self, *, prior="current", **options):
        """Set options, deviations and priors; raises for invalid ones. `prior` as for `klnorm.replace_layer_norm`."""
        for name, option in checks.as_options(self.weight.dtype, **options).items():
            setattr(self, name, option)
        self.prior = prior
        self._last_kl = LastKL()
        self._sampling = False  # whether to sample in evaluation mode too, see `klnorm.sampling`
        self._shortcut_guard = None
        sampled = self.posterior == "sampled"
        for name in self._means:
            mean = getattr(self, name)
            with_rho, with_prior = mean is not None and sampled, mean is not None and (sampled or name == "bias")
            rho = nn.Parameter(torch.empty_like(mean), requires_grad=mean.requires_grad) if with_rho else None
            self.register_parameter(f"{name}_rho", rho)
            self.register_buffer(f"{name}_prior", self._prior_for(name, mean) if with_prior else None)
        self._reset_rho()

    def _remove_posterior(self):
        """Remove all that `_add_posterior` has added, if still there; the state of the norm is left. Does not raise."""
        for name in self._means:
            self._parameters.pop(f"{name}_rho", None)
            self._buffers.pop(f"{name}_prior", None)
        compat.guard_shortcut(self, False)
        for name in SETTINGS:
            vars(self).pop(name, None)

    def _shape_and_eps(self):
        return self.normalized_shape, self.eps

    def _initial_rho(self):
        """Return the inverse of softplus at `init_std`, in a form that is stable for small and large deviations."""
        init_std = checks.as_number("init_std", self.init_std, above=0, dtype=self.weight.dtype)
        return init_std + math.log(-math.expm1(-init_std))

    def _reset_rho(self):
        for name in self._means:
            rho = getattr(self, f"{name}_rho")
            if rho is not None:
                self._set_initial(rho)

    def _set_initial(self, rho):
        nn.init.constant_(rho, self._initial_rho())

    def _standard(self, name):
        """Return the value of a new layer's mean: 1 for the weight, 0 for the bias."""
        return float(name == "weight")

    def _prior_for(self, name, mean):
        """Return a prior mean for a posterior that starts at `mean`."""
        mean = mean.detach()
        return mean.clone() if self.prior == "current" else torch.full_like(mean, self._standard(name))

    def reset_parameters(self) -> None:
        """Set the scale and its prior mean to 1, the shift and its prior mean to 0, and deviations to `init_std`."""
        for name in self._means:
            for tensor in getattr(self, name, None), getattr(self, f"{name}_prior", None):
                if tensor is not None:
                    nn.init.constant_(tensor, self._standard(name))
        if "weight_rho" in self._parameters:  # the norm's own constructor calls this before they exist
            self._reset_rho()

    def _initializers(self):
        """Return {name of a tensor that the plain norm lacks: function that fills it as in a new layer}."""
        found = {}
        for name in self._means:
            found[f"{name}_rho"] = self._set_initial
            found[f"{name}_prior"] = functools.partial(self._centre, name)
        return found

    def _centre(self, name, prior):
        prior.copy_(self._prior_for(name, getattr(self, name)))

    @property
    def _is_hf_initialized(self):
        return vars(self).get("_is_hf_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value):
        vars(self)["_is_hf_initialized"] = value
        if value:
            compat.initialize_unloaded(self)

    def train(self, mode=True):
        """Set the mode, as in nn.Module; in training mode the layer samples scale and shift."""
        super().train(mode)
        if not mode:
            self._last_kl.forget()
        self._guard_shortcut()
        return self

    def _set_sampling(self, sampling):
        self._sampling = sampling
        self._guard_shortcut()

    def _guard_shortcut(self):
        compat.guard_shortcut(self, self.training or bool(self._sampling))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return y, like `x`: with sampled scale and shift in training mode, with their means in evaluation mode.

        Args:
            x: (..., *normalized_shape), with heads (..., heads, *normalized_shape).
            residual: None, or a tensor in the shape of `x`, of any floating dtype (fp64 if and only if `x` is). The
                layer normalizes the sum of both, in one pass.

        Returns:
            y, in the dtype of `x` unless the layer has an `out_dtype`; with a residual (y, x + residual), the sum in
            the dtype of the residual.
        """
        if not (self.training or self._sampling):
            return self._evaluate(x, residual)
        compiling, held = torch.compiler.is_compiling(), self.posterior_and_prior()
        if not compiling:
            self._last_kl.forget()
        shape, eps = self._shape_and_eps()
        kind = "rms" if self._is_rms else "layer"
        out_dtype = self._out_dtype(x if residual is None else residual)
        settings = Settings(
            kind, self.posterior, self.noise, self.sample_dim, self.prior_std, eps, out_dtype, self._weight_offset,
            self.heads is not None,
        )  # fmt: skip
        y, total, kl = normalize(x, residual, shape, held, settings, True, generator=self.generator)
        if not compiling:
            self._last_kl.remember(kl, held, self.prior_std)
        y = _in_format_of(x, y) if self._is_rms else y
        return y if residual is None else (y, total)

    def _evaluate(self, x, residual):
        dtype, weight = getattr(x, "dtype", None), self.weight
        alike = weight is not None and dtype is weight.dtype and self.out_dtype in (None, dtype)
        alike = alike and (dtype is torch.float32 or not torch.is_autocast_enabled(x.device.type))
        alike = alike and residual is None and self.heads is None
        if alike and (self.bias is None or not self._is_rms):
            if not x.is_nested:  # nn.TransformerEncoder passes nested tensors, which F.layer_norm takes
                inputs.check_input(x, self.normalized_shape)
            inputs.check_device("weight", weight, x)
            return super().forward(x)
        # torch's norms have no heads and no residual, refuse mixed dtypes or return fp32, and its RMSNorm has no shift.
        # The kernel of the deterministic reading computes the norm with given means, so it serves here.
        shape, eps = self._shape_and_eps()
        means = Parameters(weight, self.bias, None, None, None, None)
        kind = "rms" if self._is_rms else "layer"
        per_head = self.heads is not None
        settings = Settings(kind, "deterministic", "batch", 0, self.prior_std, eps, self.out_dtype, per_head=per_head)
        y, total, _ = normalize(x, residual, shape, means, settings, sample=False)
        y = _in_format_of(x, y) if self._is_rms else y
        return y if residual is None else (y, total)

    def _out_dtype(self, z):
        """Return the dtype of y when the layer samples, None for that of x; `z`: x, or the residual if given."""
        return self.out_dtype

    def posterior_and_prior(self) -> Parameters:
        """Return the tensors as `Parameters`; weight and weight_prior are without `_weight_offset`."""
        parameters, buffers = self._parameters, self._buffers  # getattr of nn.Module takes three times as long
        held: list = [
            parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(self, name)
            for name in Parameters._fields
        ]
        return Parameters(*held)

    def posterior_parameters(self) -> list[torch.Tensor]:
        """Return those of weight, weight_rho, bias and bias_rho that are not None."""
        held = self.posterior_and_prior()
        return [p for p in (held.weight, held.weight_rho, held.bias, held.bias_rho) if p is not None]

    def count_posteriors(self) -> int:
        """Return the number of Gaussians in the KL: one per scale and shift; if deterministic, one per feature."""
        means = self._means if self.posterior == "sampled" else ("weight",)
        return sum(getattr(self, name).numel() for name in means if getattr(self, name) is not None)

    def _kl_inputs(self):
        """Return the tensors that the KL is a function of, and None for absent ones."""
        return self.posterior_and_prior()

    def kl_divergence(self, *, check_finite: bool | None = None) -> torch.Tensor:
        """Return `klnorm.kl_divergence` of this layer, a scalar in nats; raises in the same cases."""
        return kl_divergence(self, check_finite=check_finite)

    def _take_kl(self):
        """Return the KL divergence of the last forward, a scalar; None if it cannot be taken, see `LastKL.take`."""
        kl = None if torch.compiler.is_compiling() else self._last_kl.take(self._kl_inputs(), self.prior_std)
        if kl is None or self.heads is None:
            return kl
        total = kl.sum()
        total.of = kl  # keeps kl alive as long as the sum, so that it can be taken again
        return total

    def _as_scale(self, weight):
        """Return the scale in fp32 or wider: in bf16, 1 + weight would round away the changes of training."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return self._weight_offset + weight.to(wide) if self._weight_offset else weight

    def kl_terms(self):
        """Return the terms whose sum is the KL divergence, as `klnorm.kl.closed_form` takes them."""
        weight, bias, weight_rho, bias_rho, weight_prior, bias_prior = self.posterior_and_prior()
        prior_std = checks.as_number("prior_std", self.prior_std, above=0)
        if self.posterior == "deterministic":
            if bias is None:
                bias = bias_prior = torch.zeros_like(weight)
            return [(kl_deterministic, (self._as_scale(weight), bias), bias_prior, prior_std)]
        terms = [(kl_normal, (weight, weight_rho), weight_prior, prior_std)]
        return terms if bias is None else [*terms, (kl_normal, (bias, bias_rho), bias_prior, prior_std)]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """Load the state of a KL layer or of the plain norm."""
        assigned = local_metadata.get("assign_to_params_buffers", False)
        state_dict = compat.with_posterior(self, state_dict, prefix, assigned)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        if self.posterior == "deterministic":
            ours = f"posterior='deterministic', prior_std={self.prior_std}"
        else:
            ours = f"noise={self.noise!r}, sample_dim={self.sample_dim}, prior_std={self.prior_std}"
        dtype = "" if self.out_dtype is None else f"out_dtype={self.out_dtype}"
        heads = "" if self.heads is None else f"heads={self.heads}"
        return ", ".join(part for part in (super().extra_repr(), ours, dtype, heads) if part)


class KLLayerNorm(KLNorm, nn.LayerNorm):  # type: ignore[misc]  # its forward also takes a residual
    r"""LayerNorm with Gaussian posteriors of scale and shift, sampled in training and held to a prior by a KL term.

    In training mode the layer draws :math:`\gamma = \mathrm{weight} +
    \mathrm{softplus}(\mathrm{weight\_rho})\,\epsilon` and likewise :math:`\beta`. In evaluation mode it computes
    nn.LayerNorm with the posterior means, bit for bit if `x` and the parameters have the same dtype.
    `klnorm.sampling(model)` samples in evaluation mode too. Add `klnorm.kl_divergence(model)`, weighted, to the loss.
    If nothing takes the divergence of a training forward, its graph may stay alive until the layer's next forward. See
    `klnorm.functional.kl_layer_norm` for the formulas and their source.

    Args:
        normalized_shape: int or sequence of ints, as for nn.LayerNorm.
        eps: added to the variance, >= 0.
        elementwise_affine: must be True, because the layer learns the distribution of scale and shift.
        bias: False leaves out the shift: `bias` and `bias_rho` are then None.
        device, dtype: of the parameters.
        noise: which rows share a draw: "batch" all rows, "sample" (default) the rows of one sample, "token" none.
        sample_dim: dimension of the input that counts samples.
        init_std: initial posterior deviation, > 0.
        prior_std: deviation of the prior, > 0.
        generator: torch.Generator of the input's device to draw the seed of every forward from; torch's own if None.
        posterior: "sampled", or "deterministic": without noise and deviations, so the layer has exactly the parameters
            and outputs of nn.LayerNorm. The normalized activation takes the place of the noise, :math:`y_j \sim
            N(\mathrm{bias}_j, \mathrm{weight}_j^2)`, and the KL term holds it to :math:`N(\mathrm{bias\_prior}_j,
            \mathrm{prior\_std}^2)`. Use it for a regularizer without noise or parameters of its own. weight is the
            deviation, so choose a `prior_std` of the size of weights, about 1: the default of 0.1, meant for the
            sampled reading, would pull all weights to 0.1. `noise`, `sample_dim`, `init_std` and `generator` then have
            no effect.
        out_dtype: floating dtype of the output; that of the input if None.
        heads: None, or the number of heads that have their own scale and shift, as in norms of queries and keys. The
            input is then (..., heads, \*normalized_shape), parameters and prior means are (heads, \*normalized_shape),
            and the KL divergence is the sum over heads. Heads share no noise. Evaluation then rounds once; nn.LayerNorm
            may round more often.

    Shape:
        Input (..., \*normalized_shape) in fp16, bf16, fp32 or fp64. Output in the same shape, contiguous, in the
        input's dtype or `out_dtype`. `layer(x, residual=r)` normalizes x + r and returns (y, x + r).

    Parameters:
        weight, bias: posterior means. weight_rho, bias_rho: deviations before softplus, None in the deterministic
            reading. All have the shape `normalized_shape`, or (heads, \*normalized_shape).
    Buffers (persistent):
        weight_prior, bias_prior: prior means, initially 1 and 0. A loaded nn.LayerNorm checkpoint becomes the prior.
            weight_prior is None in the deterministic reading.

    Raises:
        TypeError, ValueError: as `klnorm.functional.kl_layer_norm`, and for elementwise_affine=False. The constructor
            checks options; `init_std` has to be finite in the parameters' dtype.

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
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        noise: checks.Noise = "sample",
        sample_dim: int = 0,
        init_std: float = 0.05,
        prior_std: float = 0.1,
        generator: torch.Generator | None = None,
        posterior: checks.Posterior = "sampled",
        out_dtype: torch.dtype | None = None,
        heads: int | None = None,
    ) -> None:
        _check_affine(elementwise_affine, "LayerNorm")
        checks.check_flag("bias", bias)
        checks.check_dtype(dtype)
        eps = checks.as_number("eps", eps, at_least=0)
        shape, of_heads = checks.as_shape(normalized_shape), _as_heads(heads)
        super().__init__((*of_heads, *shape), eps, True, bias, device, dtype)  # makes parameters of this shape
        self.normalized_shape, self.heads = shape, of_heads[0] if of_heads else None
        self._add_posterior(
            noise=noise, sample_dim=sample_dim, init_std=init_std, prior_std=prior_std, generator=generator,
            posterior=posterior, out_dtype=out_dtype,
        )  # fmt: skip


class KLRMSNorm(KLNorm, nn.RMSNorm):  # type: ignore[misc]  # its forward also takes a residual
    r"""RMSNorm with a Gaussian posterior of the scale, sampled in training and held to a prior by a KL term.

    It is a `KLLayerNorm` that does not subtract the mean and has a shift only with bias=True; see there, and
    `klnorm.functional.kl_rms_norm` for the formulas. In evaluation mode it computes nn.RMSNorm with the posterior
    means, bit for bit if `x` and the weight have the same dtype; with a shift, which nn.RMSNorm lacks,
    :math:`\mathrm{weight}\,\hat x + \mathrm{bias}`, rounded once.

    Args:
        normalized_shape: int or sequence of ints, as for nn.RMSNorm.
        eps: added to the mean square, >= 0; None as in nn.RMSNorm.
        elementwise_affine: must be True, because the layer learns the distribution of the scale.
        device, dtype: of the parameters.
        bias: True adds a shift with a posterior, as in KLLayerNorm.
        noise, sample_dim, init_std, prior_std, generator, out_dtype, heads: as for `KLLayerNorm`.
        posterior: "sampled" or "deterministic", as for `KLLayerNorm`. Without a shift the deterministic KL is that of
            :math:`N(0, \mathrm{weight}_j^2)` from :math:`N(0, \mathrm{prior\_std}^2)`.

    Shape:
        Input (..., \*normalized_shape) in fp16, bf16, fp32 or fp64. Output in the same shape, channels_last if the
        input is and else contiguous, in the input's dtype or `out_dtype`. `layer(x, residual=r)` normalizes x + r and
        returns (y, x + r).

    Parameters:
        weight, bias: posterior means. weight_rho, bias_rho: deviations before softplus, None in the deterministic
            reading. All have the shape `normalized_shape`, or (heads, \*normalized_shape); without a shift bias and
            bias_rho are None.
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
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        noise: checks.Noise = "sample",
        sample_dim: int = 0,
        init_std: float = 0.05,
        prior_std: float = 0.1,
        generator: torch.Generator | None = None,
        posterior: checks.Posterior = "sampled",
        out_dtype: torch.dtype | None = None,
        heads: int | None = None,
    ) -> None:
        _check_affine(elementwise_affine, "RMSNorm")
        checks.check_flag("bias", bias)
        checks.check_dtype(dtype)
        eps = None if eps is None else checks.as_number("eps", eps, at_least=0)
        shape, of_heads = checks.as_shape(normalized_shape), _as_heads(heads)
        super().__init__((*of_heads, *shape), eps, True, device, dtype)  # makes parameters of this shape
        self.normalized_shape, self.heads = shape, of_heads[0] if of_heads else None
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(self.weight)) if bias else None)
        self._add_posterior(
            noise=noise, sample_dim=sample_dim, init_std=init_std, prior_std=prior_std, generator=generator,
            posterior=posterior, out_dtype=out_dtype,
        )  # fmt: skip

    def _build_posterior(self, **options):
        if not hasattr(self, "bias"):  # when an nn.RMSNorm is replaced
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

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.bias is None else ", bias=True")


def _as_heads(heads):
    """Return the dimensions that come before the normalized shape in the shape of the parameters."""
    if heads is None:
        return ()
    heads = checks.as_integer("heads", heads, at_least=1)
    if heads > inputs.MAX_GROUPS:
        raise ValueError(f"heads is {heads}, expected 1 to {inputs.MAX_GROUPS}.")
    return (heads,)


def _check_affine(elementwise_affine, norm):
    checks.check_flag("elementwise_affine", elementwise_affine)
    if not elementwise_affine:
        raise ValueError(
            "elementwise_affine is False, expected True: a layer without scale and shift has nothing to learn a "
            f"distribution of. Remedy: nn.{norm}(..., elementwise_affine=False)."
        )


def _in_format_of(x, y):
    """Return y, in channels_last if x is: nn.RMSNorm keeps that format, nn.LayerNorm returns contiguous tensors.

    Under the transforms of torch.func y stays as it is, because torch does not tell the format of what vmap maps over.
    """
    channels_last = _CHANNELS_LAST.get(x.dim())
    if channels_last is None or compat.transforming() or x.is_contiguous():
        return y
    return y.contiguous(memory_format=channels_last) if x.is_contiguous(memory_format=channels_last) else y
