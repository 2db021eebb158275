"""The layer whose posterior depends on its input."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from . import checks, compat, inputs
from .compat import is_sharded
from .functional import Settings, normalize
from .layers import KLNorm
from .reference.kl_norm import accumulation_dtype, residual_sum
from .spec import Parameters

# U is 0 at first, and V is initialized like the weight of an nn.Linear.
_LOW_RANK: dict[str, Callable] = {
    "condition_down": functools.partial(nn.init.kaiming_uniform_, a=5**0.5),
    "condition_up": nn.init.zeros_,
}


class KLConditionalLayerNorm(KLNorm, nn.LayerNorm):
    r"""KLLayerNorm whose posterior differs between samples: it is a function of a vector, the sample's condition.

    .. math::
        (\mathrm{weight}, \mathrm{weight\_rho}, \mathrm{bias}, \mathrm{bias\_rho})_g =
        (\mathrm{weight}, \mathrm{weight\_rho}, \mathrm{bias}, \mathrm{bias\_rho}) + U V c_g

    where :math:`c_g` is the condition of sample g. With condition="self" it is the mean of :math:`\hat x`, the
    normalized input before scale and shift, over the sample's rows without padding. Otherwise the caller passes it. U
    is 0 in a new layer, which therefore computes the same as a KLLayerNorm, draws included.

    FiLM (Perez et al. 2018, arXiv 1709.07871) and the adaptive layer norm of DiT (Peebles and Xie 2023, arXiv
    2212.09748) also condition scale and shift on the input; here the deviations depend on it too. This is one reading
    of KL-Norm, after earlier work of its authors on adaptive normalization (arXiv 2012.07252). Their equations are
    unverified here.

    The KL divergence is summed over features and averaged over the samples of the last forward in which the layer
    sampled. Until a backward goes through that forward, `klnorm.kl_divergence` is part of its graph, has gradients for
    conditions and x, and keeps the graph alive. Later it is computed from that forward's conditions and the present
    parameters; its backward then raises a RuntimeError if the gradient of the conditions would be missing. Because the
    layer keeps the conditions, torch.compile(fullgraph=True) accepts it inside a checkpoint only with
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint.

    Args:
        normalized_shape: int or sequence of ints, N their product.
        condition: "self", or the width C of the tensor that the caller passes to every forward.
        rank: of U V, >= 1.
        eps, bias, device, dtype, noise, init_std, prior_std, generator, out_dtype: as for `KLLayerNorm`.
        sample_dim: dimension of the input that counts samples, for conditions and noise. If it is not 0, x is copied
            transposed, the output is a transposed view, and noise="token" numbers the rows sample by sample.

    Shape:
        Input (..., \*normalized_shape), fp16, bf16, fp32 or fp64, of 1 to 65535 samples with any number of rows; an
        input of shape `normalized_shape` is one sample. Output: the same shape, in the input's dtype or `out_dtype`;
        with a residual also the sum. Backward saves x and no other tensor of its size; each sample's parameters are 4 N
        more numbers.

    Parameters:
        weight, bias, weight_rho, bias_rho: as for `KLLayerNorm`.
        condition_down: V, (rank, C), with C = N for condition="self".
        condition_up: U, (4, rank, N), in the order above; (2, rank, N) with bias=False.
    Buffers (persistent):
        weight_prior, bias_prior: as for `KLLayerNorm`, the same for all samples.

    Loading the state of an nn.LayerNorm or KLLayerNorm sets U to 0: the layer then computes the same as that one.

    Raises:
        TypeError, ValueError: as for `KLLayerNorm`; if `condition`, `rank` or `mask` is invalid; from `kl_divergence`
            before a forward that samples, or after FSDP2 has sharded the parameters again.

    Example:
        >>> layer = klnorm.KLConditionalLayerNorm(8)
        >>> y = layer(torch.randn(4, 5, 8), mask=torch.tensor([[1, 1, 1, 0, 0]] * 4))
        >>> loss = y.square().mean() + layer.kl_divergence() / 1000
        >>> layer = klnorm.KLConditionalLayerNorm(8, condition=3, rank=2)
        >>> y = layer(torch.randn(4, 5, 8), torch.randn(4, 3))
        >>> layer
        KLConditionalLayerNorm(
          (8,), eps=1e-05, elementwise_affine=True, bias=True, noise='sample', sample_dim=0, prior_std=0.1
          condition=3, rank=2, parameters=102: 70 more than KLLayerNorm (+219%), 86 more than nn.LayerNorm (+538%)
        )
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        condition: Literal["self"] | int = "self",
        rank: int = 4,
        eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        noise: checks.Noise = "sample",
        sample_dim: int = 0,
        init_std: float = 0.05,
        prior_std: float = 0.1,
        generator: torch.Generator | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(condition, str):
            checks.check_name("condition", condition, ("self",), " or an int, the width of a tensor")
        else:
            condition = checks.as_integer("condition", condition, at_least=1)
        rank = checks.as_integer("rank", rank, at_least=1)
        checks.check_flag("bias", bias)
        checks.check_dtype(dtype)
        eps = checks.as_number("eps", eps, at_least=0)
        super().__init__(checks.as_shape(normalized_shape), eps, True, bias, device, dtype)
        self._add_posterior(
            noise=noise, sample_dim=sample_dim, init_std=init_std, prior_std=prior_std, generator=generator,
            posterior="sampled", out_dtype=out_dtype,
        )  # fmt: skip
        self.condition, self.rank = condition, rank
        self._last_condition = _LastCondition()
        n = self.weight.numel()
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.condition_down = nn.Parameter(torch.empty(rank, n if condition == "self" else condition, **like))
        self.condition_up = nn.Parameter(torch.empty(4 if bias else 2, rank, n, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset as a KLLayerNorm does, and the low-rank part U, V to the values of a new layer."""
        super().reset_parameters()
        if "condition_up" in self._parameters:  # nn.LayerNorm's own constructor calls this before they exist
            for name, initialize in _LOW_RANK.items():
                initialize(getattr(self, name))

    def _initializers(self):
        return {**super()._initializers(), **_LOW_RANK}

    def _guard_shortcut(self):
        compat.guard_shortcut(self, True)  # in evaluation mode too its output depends on more than weight and bias

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return y, like `x`: sampled in training mode, computed with each sample's means in evaluation mode.

        With a residual return (y, x + residual), as KLLayerNorm does; condition="self" then summarizes the sum.

        Args:
            x: (..., *normalized_shape).
            condition: for a layer with a width C, (samples, C), floating point, on the device of `x`.
            mask: for condition="self", bool or integer, in the shape of `x` without its normalized dimensions, like an
                attention_mask of transformers: True or nonzero for the rows that the summary averages; None: all. The
                summary of a sample without such rows is 0. The layer normalizes the other rows too.
            residual: None, or a tensor like `x`, of any floating dtype (fp64 beside an fp64 `x` only), added to it.
        """
        inputs.check_input(x, self.normalized_shape)
        if residual is not None:
            inputs.check_residual(residual, x)
            total = residual_sum(x, residual)
            return self._normalize(total, condition, mask, self.out_dtype or x.dtype), total
        return self._normalize(x, condition, mask, self.out_dtype)

    def _normalize(self, x, condition, mask, out_dtype):
        inputs.check_device("weight", self.weight, x)
        dim = inputs.resolve_sample_dim(x, len(self.normalized_shape), self.sample_dim)
        alone = x.dim() == len(self.normalized_shape)
        samples = (x.unsqueeze(0) if alone else x).movedim(dim, 0)
        _check_samples(samples, x)
        sampling, compiling = self.training or bool(self._sampling), torch.compiler.is_compiling()
        if sampling and not compiling:
            self._last_kl.forget()
        with _without_autocast(x.device.type):
            if self.condition == "self":
                _check_absent("condition", condition, self.condition)
                _check_mask(mask, x, len(self.normalized_shape))
                c = self._summary(samples, mask if mask is None or alone else mask.movedim(dim, 0))
            else:
                _check_absent("mask", mask, self.condition)
                _check_condition(condition, (samples.shape[0], self.condition), x)
                c = condition.to(accumulation_dtype(x))
            y, kl = self._normalize_samples(samples, c, sampling, out_dtype)
        if alone:
            y = y.squeeze(0)
        elif dim:
            y = y.movedim(0, dim)
        if sampling:
            if not compat.in_backward():
                self._last_condition.remember(c)
            if not compiling:
                self._last_kl.remember(kl, self._kl_inputs(), self.prior_std)
        return y

    def _summary(self, samples, mask):
        """Return the mean (samples, N) over each sample's normalized rows, those where `mask` is 0 left out."""
        leading = samples.dim() - len(self.normalized_shape)
        xhat = F.layer_norm(samples, self.normalized_shape, eps=self.eps)
        rows = xhat.unsqueeze(leading).flatten(1, leading).flatten(2)
        if mask is None:
            count = max(rows.shape[1], 1)
        else:
            real = mask.reshape(rows.shape[:2]) != 0
            rows, count = rows.masked_fill(~real[..., None], 0), real.sum(1, keepdim=True).clamp(min=1)
        return rows.sum(1, dtype=accumulation_dtype(samples)) / count

    def _normalize_samples(self, samples, c, sampling, out_dtype=None):
        """Return (y, kl) of `samples` (samples, ..., *normalized_shape) with the conditions c (samples, C)."""
        static = torch.stack([p.flatten() for p in super().posterior_parameters()]).to(c.dtype)
        low = F.linear(c, self.condition_down.to(c.dtype))
        each = torch.baddbmm(static[:, None], low.expand(len(static), -1, -1), self.condition_up.to(c.dtype))
        # A single sample's parameters lose their group dimension: kl is then the operator's output, as LastKL needs.
        weight, weight_rho, *shift = (p.squeeze(0) for p in each.unflatten(2, self.normalized_shape))
        bias, bias_rho = shift or (None, None)
        parameters = Parameters(weight, bias, weight_rho, bias_rho, self.weight_prior, self.bias_prior)
        settings = Settings("layer", "sampled", self.noise, 0, self.prior_std, self.eps, out_dtype)
        y, _, kl = normalize(
            samples, None, self.normalized_shape, parameters, settings, sampling, generator=self.generator
        )
        return y, kl

    def posterior_parameters(self) -> list[torch.Tensor]:
        """Return the parameters of the posteriors: those of KLLayerNorm, then V and U."""
        return [*super().posterior_parameters(), self.condition_down, self.condition_up]

    def _kl_inputs(self):
        return *super()._kl_inputs(), self.condition_down, self.condition_up

    def _take_kl(self):
        last = self._last_condition
        kl = None if last.compiled else super()._take_kl()
        if kl is not None:
            mean = kl.mean()
            mean.of = kl  # keeps kl alive as long as the mean, so that it can be taken again
            return mean
        c = last.recall()
        if is_sharded(self.weight):
            raise ValueError(
                "the parameters of a KLConditionalLayerNorm are sharded, expected whole ones: the KL divergence is "
                "that of every rank's own samples. Remedy: fully_shard(layer, reshard_after_forward=False)."
            )
        _, kl = self._normalize_samples(c.new_empty(0, *self.normalized_shape), c, sampling=False)
        return _Spent.apply(kl.mean()) if last.spent else kl.mean()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """Load the state of such a layer, or of an nn.LayerNorm or KLLayerNorm: the layer then computes the same."""
        if f"{prefix}weight" in state_dict and not any(f"{prefix}{name}" in state_dict for name in _LOW_RANK):
            assigned = state_dict[f"{prefix}weight"] if local_metadata.get("assign_to_params_buffers") else None
            device = getattr(assigned, "device", None)
            state_dict = state_dict | {
                f"{prefix}{name}": initialize(torch.empty_like(getattr(self, name), device=device))
                for name, initialize in _LOW_RANK.items()
            }
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        static = parameters - self.condition_down.numel() - self.condition_up.numel()
        more = [
            f"{parameters - n} more than {name} ({parameters / n - 1:+.0%})"
            for name, n in (("KLLayerNorm", static), ("nn.LayerNorm", static // 2))
        ]
        ours = f"condition={self.condition!r}, rank={self.rank}, parameters={parameters}: {', '.join(more)}"
        return f"{super().extra_repr()}\n{ours}"


class _LastCondition:
    """The conditions of a layer's last forward that sampled. Copies and pickles of a layer do not contain them.

    Repeats by checkpointing do not count. The conditions keep their graph, because a KL divergence in the same compiled
    region needs it and can keep nothing else of the forward.
    """

    def __init__(self):
        self._condition = None
        self.compiled = False  # whether a forward under torch.compile made them
        self.spent = False  # whether a KL divergence computed from them would lack their gradient

    def remember(self, c):
        """Keep a copy of c, (samples, C)."""
        self.compiled = torch.compiler.is_compiling()
        self.spent = not torch.is_grad_enabled() or (c.requires_grad and not self.compiled)
        self._condition = None if compat.transforming() else c.clone()  # a transform's tensors do not outlive it

    def recall(self):
        if self._condition is None:
            raise ValueError(
                "a KLConditionalLayerNorm has no KL divergence yet: it depends on the samples, and the layer has not "
                "sampled for any, transforms of torch.func apart. Remedy: call the model in training mode, or inside "
                "klnorm.sampling(model), before klnorm.kl_divergence(model)."
            )
        return self._condition.clone()  # autograd refuses a tensor of inference mode

    def __reduce__(self):
        return _LastCondition, ()


class _Spent(torch.autograd.Function):
    """Identity whose backward raises: for a KL divergence without the graph that its conditions came from."""

    @staticmethod
    def forward(ctx, kl):
        return kl.view_as(kl)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "the KL divergence of a KLConditionalLayerNorm cannot be differentiated any more: a backward has gone "
            "through the layer's last forward, eval() came after it, or it ran without gradients. Remedy: call every "
            "layer in the forward, klnorm.kl_divergence after it and backward once; checkpoint with "
            "use_reentrant=False."
        )


def _without_autocast(device_type):
    """Return a context that turns autocast off, so that arithmetic is in fp32; the meta device has no autocast."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _check_samples(samples, x):
    if samples.shape[0] == 0:  # torch.export would make len() a constant
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected one sample or more: without any there is no mean of their KL "
            "divergences. Remedy: leave out empty batches."
        )


def _check_absent(name, value, condition):
    if value is not None:
        needs = "an int, its width" if name == "condition" else "'self'"
        raise ValueError(
            f"{name} is a {type(value).__name__}, expected None: the layer was made with condition={condition!r}. "
            f"Remedy: leave it out, or make the layer with condition={needs}."
        )


def _check_mask(mask, x, n_normalized):
    """Raise unless `mask` is None or a bool or integer tensor with one value per row of `x`."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}, expected a bool or integer tensor.")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"mask has dtype {mask.dtype}, expected bool or an integer: True or 1 for real rows. "
            "Remedy: mask > 0.5; of an additive mask, mask == 0."
        )
    inputs.check_layout("mask", mask)
    expected = x.shape[: x.dim() - n_normalized]
    if mask.shape != expected:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected {tuple(expected)}, one value for every row of x, shape "
            f"{tuple(x.shape)}."
        )
    inputs.check_device("mask", mask, x)


def _check_condition(condition, shape, x):
    """Raise unless `condition` is a floating-point tensor of shape `shape` on the device of `x`."""
    if not isinstance(condition, torch.Tensor):
        raise TypeError(f"condition is a {type(condition).__name__}, expected a tensor (samples, C), here {shape}.")
    if not condition.is_floating_point():
        raise TypeError(f"condition has dtype {condition.dtype}, expected a floating dtype. Remedy: condition.float().")
    inputs.check_layout("condition", condition)
    if condition.shape != shape:
        raise ValueError(
            f"condition has shape {tuple(condition.shape)}, expected {shape}: a vector for every sample of x, shape "
            f"{tuple(x.shape)}, of the width that the layer was made with."
        )
    inputs.check_device("condition", condition, x)
