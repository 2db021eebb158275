"""What every KL layer has and the norm that it stands for has not: a posterior over its scale and shift."""

import math

import torch
from torch import nn

from . import checks, inputs
from .functional import Settings, normalize
from .kl import LastKL, kl_divergence
from .reference.kl_norm import kl_deterministic, kl_normal
from .spec import Parameters

SETTINGS = (
    "noise", "sample_dim", "generator", "init_std", "prior_std", "posterior", "prior", "out_dtype",
    "_last_kl", "_sampling", "_shortcut_guard",
)  # fmt: skip


class KLNorm(nn.Module):
    """Base of the KL layers, put before the class of the norm itself: `class KLLayerNorm(KLNorm, nn.LayerNorm)`.

    The means of the posterior are the norm's own parameters. Its deviations, `<mean>_rho`, are parameters and the prior
    means, `<mean>_prior`, buffers; those that a reading of KL-Norm has not are None.
    """

    _means = "weight", "bias"
    _is_rms = False
    _weight_offset = 0.0  # added to the weight, it gives the scale
    heads = None  # how many have parameters of their own

    def _add_posterior(self, **options):
        """Make a KL layer of what is the norm."""
        self._build_posterior(**options)
        self._guard_shortcut()

    def _build_posterior(self, *, prior="current", **options):
        """Settings, deviations and priors; `prior` as in `klnorm.replace_layer_norm`. What may fail does so here."""
        for name, option in checks.as_options(self.weight.dtype, **options).items():
            setattr(self, name, option)
        self.prior = prior
        self._last_kl = LastKL()
        self._sampling = False  # in evaluation mode, see `klnorm.sampling`
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
        """Undo `_add_posterior`; what is left is the state of the norm. It cannot fail, whatever has been removed."""
        for name in self._means:
            self._parameters.pop(f"{name}_rho", None)
            self._buffers.pop(f"{name}_prior", None)
        self._guard_shortcut(removed=True)
        for name in SETTINGS:
            vars(self).pop(name, None)

    def _shape_and_eps(self):
        return self.normalized_shape, self.eps

    def _initial_rho(self):
        """softplus inverted at `init_std`, in a form that holds for small and large deviations."""
        init_std = checks.as_number("init_std", self.init_std, above=0, dtype=self.weight.dtype)
        return init_std + math.log(-math.expm1(-init_std))

    def _reset_rho(self):
        for name in self._means:
            rho = getattr(self, f"{name}_rho")
            if rho is not None:
                nn.init.constant_(rho, self._initial_rho())

    def _standard(self, name):
        """The value of a new layer's mean: scale 1, shift 0."""
        return float(name == "weight")

    def _prior_for(self, name, mean):
        """A prior mean for a posterior that starts at `mean`."""
        mean = mean.detach()
        return mean.clone() if self.prior == "current" else torch.full_like(mean, self._standard(name))

    def reset_parameters(self):
        """Scale and prior of the scale 1, shift and prior of the shift 0, deviations `init_std`."""
        for name in self._means:
            for tensor in getattr(self, name, None), getattr(self, f"{name}_prior", None):
                if tensor is not None:
                    nn.init.constant_(tensor, self._standard(name))
        if "weight_rho" in self._parameters:  # the norm's own constructor calls this before they exist
            self._reset_rho()

    @property
    def _is_hf_initialized(self):
        return vars(self).get("_is_hf_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value):
        """transformers marks tensors that it has loaded, gives the others memory without values, initializes what it
        knows of a norm, weight and bias, and then marks the module: the moment to initialize what it does not know.
        """
        vars(self)["_is_hf_initialized"] = value
        for name in self._means:
            mean, rho, prior = (getattr(self, key) for key in (name, f"{name}_rho", f"{name}_prior"))
            if value and rho is not None and not getattr(rho, "_is_hf_initialized", False):
                nn.init.constant_(rho, self._initial_rho())
            if value and prior is not None and not getattr(prior, "_is_hf_initialized", False):
                prior.copy_(self._prior_for(name, mean))

    def train(self, mode=True):
        """As for every module; in training mode scale and shift are sampled."""
        super().train(mode)
        if not mode:
            self._last_kl.forget()
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

    def forward(self, x, residual=None):
        """y, like `x`: of a sampled posterior sampled in training mode, the norm of the means in evaluation mode.

        Args:
            x: (..., *normalized_shape), with heads (..., heads, *normalized_shape).
            residual: None, or a tensor like `x`, of any floating dtype (fp64 beside an fp64 `x` only), that is added to
                it first, in one pass.

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
        return y if residual is None else (y, total)

    def _evaluate(self, x, residual):
        dtype, weight = getattr(x, "dtype", None), self.weight
        alike = weight is not None and dtype is weight.dtype and self.out_dtype in (None, dtype)
        alike = alike and (dtype is torch.float32 or not torch.is_autocast_enabled(x.device.type))
        alike = alike and residual is None and self.heads is None
        if alike and (self.bias is None or not self._is_rms):
            if not x.is_nested:  # which nn.TransformerEncoder passes, and F.layer_norm takes
                inputs.check_input(x, self.normalized_shape)
            inputs.check_device("weight", weight, x)
            return super().forward(x)
        # With a residual, in one pass, of mixed dtypes, which torch refuses or answers in fp32, with heads, or with a
        # shift that nn.RMSNorm has not: the norm of the means is the deterministic reading.
        shape, eps = self._shape_and_eps()
        means = Parameters(weight, self.bias, None, None, None, None)
        kind = "rms" if self._is_rms else "layer"
        per_head = self.heads is not None
        settings = Settings(kind, "deterministic", "batch", 0, self.prior_std, eps, self.out_dtype, per_head=per_head)
        y, total, _ = normalize(x, residual, shape, means, settings, sample=False)
        return y if residual is None else (y, total)

    def _out_dtype(self, z):
        """The dtype of y where the layer samples, None for that of x; `z`: what is normalized."""
        return self.out_dtype

    def posterior_and_prior(self):
        """The `Parameters`; those of the scale less `_weight_offset`."""
        parameters, buffers = self._parameters, self._buffers  # looked at first, as nn.Module takes thrice as long
        return Parameters(
            *[
                parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(self, name)
                for name in Parameters._fields
            ]
        )

    def posterior_parameters(self):
        """The parameters of the posterior that there are: weight, weight_rho and, with a shift, bias, bias_rho."""
        held = self.posterior_and_prior()
        return [p for p in (held.weight, held.weight_rho, held.bias, held.bias_rho) if p is not None]

    def count_posteriors(self):
        """How many Gaussians the KL is a sum over: every scale and shift or, read deterministically, every feature."""
        means = self._means if self.posterior == "sampled" else ("weight",)
        return sum(getattr(self, name).numel() for name in means if getattr(self, name) is not None)

    def _kl_inputs(self):
        """The tensors held that the KL is a function of, None for what there is not."""
        return self.posterior_and_prior()

    def kl_divergence(self, *, check_finite=None):
        """`klnorm.kl_divergence` of this layer: a scalar in nats; raises as that does where it is not finite."""
        return kl_divergence(self, check_finite=check_finite)

    def _take_kl(self):
        """The KL tensor of the last forward, see `LastKL.take`; None where that is not at hand."""
        kl = None if torch.compiler.is_compiling() else self._last_kl.take(self._kl_inputs(), self.prior_std)
        if kl is None or self.heads is None:
            return kl
        total = kl.sum()
        total.of = kl  # held by who holds the sum, so that it can be taken again
        return total

    def _as_scale(self, weight):
        """The scale of a weight, in fp32 or wider: 1 + weight in bf16 would lose what training changes."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return self._weight_offset + weight.to(wide) if self._weight_offset else weight

    def kl_terms(self):
        """What the KL divergence is the sum of, as `klnorm.kl.closed_form` takes it."""
        weight, bias, weight_rho, bias_rho, weight_prior, bias_prior = self.posterior_and_prior()
        prior_std = checks.as_number("prior_std", self.prior_std, above=0)
        if self.posterior == "deterministic":
            if bias is None:
                bias = bias_prior = torch.zeros_like(weight)
            return [(kl_deterministic, (self._as_scale(weight), bias), bias_prior, prior_std)]
        terms = [(kl_normal, (weight, weight_rho), weight_prior, prior_std)]
        return terms if bias is None else [*terms, (kl_normal, (bias, bias_rho), bias_prior, prior_std)]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        """Also accept the state of the plain norm: the loaded values become means and prior means, rho stays.

        A prior that `klnorm.replace_layer_norm` centred on the standard values stays as well.
        """
        added = [f"{prefix}{name}_{kind}" for name in self._means for kind in ("rho", "prior")]
        if f"{prefix}weight" in state_dict and not any(key in state_dict for key in added):
            state_dict = dict(state_dict)
            for name in self._means:
                loaded = state_dict.get(f"{prefix}{name}")
                if loaded is None:
                    continue
                rho, prior = getattr(self, f"{name}_rho"), getattr(self, f"{name}_prior")
                is_tensor = isinstance(loaded, torch.Tensor)  # what is none torch refuses, and says so of it alone
                if rho is not None:
                    state_dict[f"{prefix}{name}_rho"] = (
                        self._rho_for(name, loaded, local_metadata) if is_tensor else rho
                    )
                if prior is not None:
                    state_dict[f"{prefix}{name}_prior"] = self._prior_for(name, loaded) if is_tensor else prior
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _rho_for(self, name, loaded, local_metadata):
        """The present rho; where tensors are assigned, like the loaded mean, and initial if it has no values."""
        rho = getattr(self, f"{name}_rho").detach()
        if not local_metadata.get("assign_to_params_buffers", False):
            return rho
        return torch.full_like(loaded, self._initial_rho()) if rho.is_meta else rho.to(loaded)

    def extra_repr(self):
        if self.posterior == "deterministic":
            ours = f"posterior='deterministic', prior_std={self.prior_std}"
        else:
            ours = f"noise={self.noise!r}, sample_dim={self.sample_dim}, prior_std={self.prior_std}"
        dtype = "" if self.out_dtype is None else f"out_dtype={self.out_dtype}"
        heads = "" if self.heads is None else f"heads={self.heads}"
        return ", ".join(part for part in (super().extra_repr(), ours, dtype, heads) if part)


def _nothing(module, args):
    """A forward hook."""
