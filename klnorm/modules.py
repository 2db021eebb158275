"""The layer."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import checks
from .functional import normalize
from .kl import LastKL, closed_form, whole


class KLLayerNorm(nn.LayerNorm):
    r"""LayerNorm whose scale and shift are Gaussian posteriors, sampled in training and held to a prior by a KL term.

    In training mode every draw of scale and shift is
    :math:`\gamma = \mathrm{weight} + \mathrm{softplus}(\mathrm{weight\_rho})\,\epsilon`, likewise :math:`\beta`; in
    evaluation mode the layer is `nn.LayerNorm` with the posterior means, bit for bit where `x` and the parameters have
    one dtype. `klnorm.sampling(model)` samples in evaluation mode. Add `klnorm.kl_divergence(model)`, weighted, to the
    loss. See `klnorm.functional.kl_layer_norm` for the formulas and their source.

    Args:
        normalized_shape: int or sequence of ints, as for nn.LayerNorm.
        eps: added to the variance, > 0.
        elementwise_affine: must be True: the layer is about the scale and shift.
        bias: False leaves out the shift, `bias` and `bias_rho` are None then.
        device, dtype: of the parameters.
        noise: which rows share a draw: "batch" all, "sample" (default) those of one sample, "token" none.
        sample_dim: dimension of the input that counts samples.
        init_std: initial posterior deviation, > 0.
        prior_std: deviation of the prior, > 0.
        generator: torch.Generator of the input's device to draw the seed of every forward from; torch's own if None.

    Shape:
        Input (..., \*normalized_shape) in fp16, bf16, fp32 or fp64; output the same, contiguous, in the input's dtype.

    Parameters:
        weight, bias: posterior means. weight_rho, bias_rho: deviations before softplus. All of `normalized_shape`.
    Buffers (persistent):
        weight_prior, bias_prior: prior means, initially 1 and 0. A loaded nn.LayerNorm checkpoint becomes the prior.

    Raises:
        TypeError, ValueError: as `klnorm.functional.kl_layer_norm`, and for elementwise_affine=False.

    Example:
        >>> layer = klnorm.KLLayerNorm(8, noise="token")
        >>> y = layer(torch.randn(4, 5, 8))
        >>> loss = y.square().mean() + layer.kl_divergence() / 1000
    """

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
    ):
        if not elementwise_affine:
            raise ValueError(
                "elementwise_affine is False, expected True: a layer without scale and shift has nothing to learn a "
                "distribution of. Remedy: nn.LayerNorm(..., elementwise_affine=False)."
            )
        super().__init__(checks.as_shape(normalized_shape), eps, True, bias, device, dtype)
        self._add_posterior(noise, sample_dim, init_std, prior_std, generator)

    def _add_posterior(self, noise, sample_dim, init_std, prior_std, generator, prior="current"):
        """Everything that a KLLayerNorm has and an nn.LayerNorm has not; `prior` as in `klnorm.replace_layer_norm`."""
        checks.check_config(prior_std, self.eps, noise)
        checks.check_positive("init_std", init_std)
        self.noise, self.sample_dim, self.generator = noise, sample_dim, generator
        self.init_std, self.prior_std, self.prior = float(init_std), float(prior_std), prior
        self._last_kl = LastKL()
        self._sampling = False  # in evaluation mode, see `klnorm.sampling`
        self._shortcut_guard = None
        self._guard_shortcut()
        for name in "weight", "bias":
            mean = getattr(self, name)
            rho = None if mean is None else nn.Parameter(torch.empty_like(mean), requires_grad=mean.requires_grad)
            self.register_parameter(f"{name}_rho", rho)
            self.register_buffer(f"{name}_prior", None if mean is None else self._prior_for(name, mean))
        self._reset_rho()

    def _remove_posterior(self):
        """Undo `_add_posterior`; what is left is the state of an nn.LayerNorm."""
        for name in "weight", "bias":
            delattr(self, f"{name}_rho")
            delattr(self, f"{name}_prior")
        self._guard_shortcut(removed=True)
        for name in (
            "noise", "sample_dim", "generator", "init_std", "prior_std", "prior",
            "_last_kl", "_sampling", "_shortcut_guard",
        ):  # fmt: skip
            delattr(self, name)

    def _initial_rho(self):
        """softplus inverted at `init_std`, in a form that holds for small and large deviations."""
        return self.init_std + math.log(-math.expm1(-self.init_std))

    def _reset_rho(self):
        for rho in self.weight_rho, self.bias_rho:
            if rho is not None:
                nn.init.constant_(rho, self._initial_rho())

    def _prior_for(self, name, mean):
        """A prior mean for a posterior that starts at `mean`."""
        mean = mean.detach()
        return mean.clone() if self.prior == "current" else torch.full_like(mean, float(name == "weight"))

    def reset_parameters(self):
        """Scale and prior of the scale 1, shift and prior of the shift 0, deviations `init_std`."""
        super().reset_parameters()
        if "weight_rho" in self._parameters:  # nn.LayerNorm's own constructor calls this before they exist
            self._reset_rho()
            nn.init.ones_(self.weight_prior)
            if self.bias_prior is not None:
                nn.init.zeros_(self.bias_prior)

    @property
    def _is_hf_initialized(self):
        return vars(self).get("_is_hf_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value):
        """transformers marks tensors that it has loaded, gives the others memory without values, initializes what it
        knows of a norm, weight and bias, and then marks the module: the moment to initialize what it does not know.
        """
        vars(self)["_is_hf_initialized"] = value
        for name in "weight", "bias":
            mean, rho, prior = (getattr(self, key) for key in (name, f"{name}_rho", f"{name}_prior"))
            if value and rho is not None and not getattr(rho, "_is_hf_initialized", False):
                nn.init.constant_(rho, self._initial_rho())
            if value and prior is not None and not getattr(prior, "_is_hf_initialized", False):
                prior.copy_(self._prior_for(name, mean))

    def train(self, mode=True):
        """As for every module; in training mode scale and shift are sampled."""
        super().train(mode)
        self._guard_shortcut()
        return self

    def _set_sampling(self, sampling):
        self._sampling = sampling
        self._guard_shortcut()

    def _guard_shortcut(self, removed=False):
        """Attach a hook that does nothing while this layer samples.

        nn.TransformerEncoderLayer in evaluation mode reads the norms' weight and bias without calling them, unless one
        of its modules has a hook.
        """
        guarded = (self.training or self._sampling) and not removed
        if guarded and self._shortcut_guard is None:
            self._shortcut_guard = self.register_forward_pre_hook(_nothing)
        elif not guarded and self._shortcut_guard is not None:
            self._shortcut_guard.remove()
            self._shortcut_guard = None

    def forward(self, x):
        """y, like `x`: sampled in training mode, LayerNorm with the posterior means in evaluation mode."""
        if not (self.training or self._sampling):
            return self._evaluate(x)
        y, _, kl = self._normalize(x, sample=True)
        if not torch.compiler.is_compiling():
            self._last_kl.remember(kl, y, self._kl_inputs(), self.prior_std)
        return y

    def _evaluate(self, x):
        if not getattr(x, "is_nested", False):  # which nn.TransformerEncoder passes, and F.layer_norm takes
            checks.check_input(x, self.normalized_shape)
        native = x.dtype == self.weight.dtype and (
            x.dtype == torch.float32 or not torch.is_autocast_enabled(x.device.type)
        )
        if native:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return self._normalize(x, sample=False)[0]  # nn.LayerNorm would refuse the mixed dtypes, or return fp32

    def _normalize(self, x, sample):
        return normalize(
            x, None, self.normalized_shape, self.weight, self.bias, self.weight_rho, self.bias_rho,
            self.weight_prior, 0.0 if self.bias_prior is None else self.bias_prior, self.prior_std, self.eps,
            self.noise, self.sample_dim, sample, None, self.generator, "sampled",
        )  # fmt: skip

    def posterior_parameters(self):
        """The parameters of the posterior that there are: weight, weight_rho and, with a shift, bias, bias_rho."""
        parameters = self.weight, self.weight_rho, self.bias, self.bias_rho
        return [p for p in parameters if p is not None]

    def _kl_inputs(self):
        return [*self.posterior_parameters(), *(t for t in (self.weight_prior, self.bias_prior) if t is not None)]

    def kl_divergence(self):
        """KL divergence of this layer's posterior from its prior, a scalar in nats; see `klnorm.kl_divergence`."""
        return whole(self._divergence()).clone()  # the caller's own, to change in place as well

    def _divergence(self):
        """The KL divergence, possibly the very tensor of the last forward, or of sharded parameters a DTensor."""
        kl = None if torch.compiler.is_compiling() else self._last_kl.recall(self._kl_inputs(), self.prior_std)
        if kl is not None:
            return kl
        parts = [(self.weight, self.weight_rho, self.weight_prior), (self.bias, self.bias_rho, self.bias_prior)]
        return sum(closed_form(*part, self.prior_std) for part in parts if part[0] is not None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """Also accept the state of an nn.LayerNorm: the loaded values become means and prior means, rho stays.

        A prior that `klnorm.replace_layer_norm` centred on the standard values stays as well.
        """
        if f"{prefix}weight" in state_dict and not any(
            f"{prefix}{key}" in state_dict for key in ("weight_rho", "weight_prior", "bias_rho", "bias_prior")
        ):
            state_dict = dict(state_dict)
            for name in "weight", "bias":
                if f"{prefix}{name}" in state_dict and getattr(self, f"{name}_rho") is not None:
                    state_dict[f"{prefix}{name}_rho"] = self._rho_for(
                        name, state_dict[f"{prefix}{name}"], local_metadata
                    )
                    state_dict[f"{prefix}{name}_prior"] = self._prior_for(name, state_dict[f"{prefix}{name}"])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _rho_for(self, name, loaded, local_metadata):
        """The present rho; where tensors are assigned, like the loaded mean, and initial if it has no values."""
        rho = getattr(self, f"{name}_rho").detach()
        if not local_metadata.get("assign_to_params_buffers", False):
            return rho
        return torch.full_like(loaded, self._initial_rho()) if rho.is_meta else rho.to(loaded)

    def extra_repr(self):
        shape, affine = tuple(self.normalized_shape), self.elementwise_affine
        return (
            f"{shape}, eps={self.eps}, elementwise_affine={affine}, bias={self.bias is not None}, "
            f"noise={self.noise!r}, sample_dim={self.sample_dim}, prior_std={self.prior_std}"
        )


def _nothing(module, args):
    """A forward hook."""
