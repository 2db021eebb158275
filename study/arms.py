"""The arms: what each changes in the model, adds to the loss, and does after a step. Four settings each, no more.

An arm is a class: its constructor changes the classifier, `penalty` is added to the mean loss, `after_step` follows the
optimizer, `stochastic` makes evaluation draw the arm's own noise (where it has none, dropout's). `GRID` holds the
settings that are tried out, beside the learning rate `lr`, in multiples of the task's.
"""

import contextlib
import itertools
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import klnorm

ARMS = {}
WARMUP = 0.1  # of the steps: learning rate, and weight of the KL
RHO_LR = 1e-2
WEIGHT_DECAY = 0.01
VIB_SAMPLES = 5


def _arm(name):
    def register(cls):
        ARMS[name] = cls
        return cls

    return register


def _grid(lrs=(1, 2), **values):
    """Every learning rate with every value of the settings: four in all."""
    return [dict(zip(("lr", *values), chosen, strict=True)) for chosen in itertools.product(lrs, *values.values())]


@_arm("layer_norm")
class LayerNorm:
    """The model as it is, dropout 0.1 included; all four trials go to the learning rate."""

    GRID = _grid(lrs=(0.5, 1, 2, 4))
    NEEDS_PRETRAINED = False

    def __init__(self, model, settings, examples, steps):
        self.model, self.settings = model, settings

    def param_groups(self, lr):
        """Of the optimizer; where `affine_lr` is a setting, means of scales and shifts of norms learn at that rate."""
        groups = klnorm.param_groups(self.model, lr=lr, rho_lr=RHO_LR, weight_decay=WEIGHT_DECAY)
        if "affine_lr" not in self.settings:
            return groups
        norms = [m for m in self.model.encoder.modules() if isinstance(m, (nn.LayerNorm, klnorm.KLLayerNorm))]
        affine = [p for norm in norms for p in (norm.weight, norm.bias)]
        special = set(affine)
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in special]
        return [*groups, {"name": "affine", "params": affine, "lr": self.settings["affine_lr"], "weight_decay": 0.0}]

    def training_mode(self):
        self.model.train()

    def penalty(self):
        return 0.0

    def after_step(self, lr):
        pass

    def loss(self, batch, labels):
        """Mean negative log-likelihood of a batch."""
        return F.cross_entropy(self.model(**batch), labels)

    @contextlib.contextmanager
    def stochastic(self):
        """Inside, the model in evaluation mode draws what it drew in training: here dropout."""
        self.training_mode()
        try:
            yield
        finally:
            self.model.eval()


@_arm("dropout")
class Dropout(LayerNorm):
    """Another rate in every nn.Dropout, those of the attention included."""

    GRID = _grid(p=(0.0, 0.25))

    def __init__(self, model, settings, examples, steps):
        super().__init__(model, settings, examples, steps)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings["p"]


@_arm("l2_sp")
class L2SP(LayerNorm):
    """The encoder decays towards its pretrained weights: after every step w += lr * decay * (w_pretrained - w).

    L2-SP (Li et al. 2018, arXiv 1802.01483) decoupled from the gradient, as AdamW decouples weight decay: as a penalty
    it would be divided by Adam's denominators. Beside it the slight decay towards 0 of every arm.
    """

    GRID = _grid(decay=(10.0, 100.0))
    NEEDS_PRETRAINED = True

    def __init__(self, model, settings, examples, steps):
        super().__init__(model, settings, examples, steps)
        self.weights = [p for p in model.encoder.parameters() if p.requires_grad]
        self.pretrained = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def after_step(self, lr):
        torch._foreach_lerp_(self.weights, self.pretrained, min(1.0, lr * self.settings["decay"]))


class _Mixout(nn.Module):
    """Pretrained weight + dropout(weight - pretrained weight): Lee et al. 2020 (arXiv 1909.11299), equation 6."""

    def __init__(self, pretrained, p):
        super().__init__()
        self.p = p
        self.register_buffer("pretrained", pretrained.detach().clone())

    def forward(self, weight):
        return self.pretrained + F.dropout(weight - self.pretrained, self.p, self.training)


@_arm("mixout")
class Mixout(LayerNorm):
    """Every weight of the encoder's linear layers is the pretrained one with probability p, drawn in every step."""

    GRID = _grid(p=(0.5, 0.9))
    NEEDS_PRETRAINED = True

    def __init__(self, model, settings, examples, steps):
        super().__init__(model, settings, examples, steps)
        for module in model.encoder.modules():
            if type(module) is nn.Linear:
                parametrize.register_parametrization(module, "weight", _Mixout(module.weight, settings["p"]))


class _Bottleneck(nn.Module):
    """VIBERT's head (Mahabadi et al. 2021, arXiv 2106.05469): z ~ N(mu(h), sigma(h)^2), a learned prior."""

    def __init__(self, width, classes):
        super().__init__()
        inner = width // 2
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU())
        self.mean, self.rho = nn.Linear(inner, inner), nn.Linear(inner, inner)
        self.prior_mean, self.prior_rho = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        self.out = nn.Linear(inner, classes)
        self.sampling, self.kl = False, None

    def forward(self, features):
        h = self.mlp(features)
        mean, std = self.mean(h), F.softplus(self.rho(h))
        prior = torch.distributions.Normal(self.prior_mean, F.softplus(self.prior_rho))
        posterior = torch.distributions.Normal(mean, std)
        self.kl = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
        return self.out(posterior.rsample() if self.training or self.sampling else mean)


@_arm("vib")
class VIB(LayerNorm):
    """An information bottleneck between encoder and head; loss and KL averaged over five samples."""

    GRID = _grid(beta=(1e-5, 1e-4))

    def __init__(self, model, settings, examples, steps):
        super().__init__(model, settings, examples, steps)
        device = model.head.weight.device
        model.head = _Bottleneck(model.head.in_features, model.head.out_features).to(device)
        self.steps, self.examples = 0, examples

    def loss(self, batch, labels):
        self.batch_size = len(labels)
        features = self.model.dropout(self.model.features(**batch))
        return torch.stack([F.cross_entropy(self.model.head(features), labels) for _ in range(VIB_SAMPLES)]).mean()

    def penalty(self):
        """min(1, epoch * beta) * KL, summed over dimensions and averaged over the batch."""
        epoch = 1 + self.steps * self.batch_size // self.examples
        return min(1.0, epoch * self.settings["beta"]) * self.model.head.kl

    def after_step(self, lr):
        self.steps += 1

    @contextlib.contextmanager
    def stochastic(self):
        self.model.head.sampling = True
        try:
            yield
        finally:
            self.model.head.sampling = False


class _Sampled(LayerNorm):
    """KL-Norm: posteriors around the pretrained scales and shifts; KL / examples or KL / parameters, warmed up."""

    GRID = _grid(per=("example", "parameter"))
    OPTIONS: ClassVar = {"init_std": 0.05, "prior_std": 0.1}
    FIXED_STDS = False

    def __init__(self, model, settings, examples, steps):
        super().__init__(model, settings, examples, steps)
        self._replace({**self.OPTIONS, **{k: v for k, v in settings.items() if k == "init_std"}})
        for layer in klnorm.kl_layers(model).values() if self.FIXED_STDS else ():
            layer.weight_rho.requires_grad_(False)
            layer.bias_rho.requires_grad_(False)
        per = {"per_parameter": model} if settings.get("per") == "parameter" else {"num_examples": examples}
        self.kl_weight = klnorm.KLWeight(
            **per, warmup_steps=round(WARMUP * steps), max_weight=float(settings.get("factor", 1))
        )

    def _replace(self, options):
        klnorm.replace_layer_norm(self.model.encoder, **options)

    def penalty(self):
        return self.kl_weight(self.model, check_finite=False)

    def after_step(self, lr):
        self.kl_weight.step()

    @contextlib.contextmanager
    def stochastic(self):
        with klnorm.sampling(self.model):
            yield


@_arm("kl_sample")
class KLSample(_Sampled):
    """KL-Norm in all norms, one draw an example. The primary arm."""


@_arm("kl_token")
class KLToken(_Sampled):
    """KL-Norm in all norms, one draw a token."""

    OPTIONS: ClassVar = {**_Sampled.OPTIONS, "noise": "token"}


@_arm("kl_batch")
class KLBatch(_Sampled):
    """KL-Norm in all norms, one draw a step."""

    OPTIONS: ClassVar = {**_Sampled.OPTIONS, "noise": "batch"}


@_arm("kl_last")
class KLLast(_Sampled):
    """KL-Norm in the last norm only, which bears more noise: three times that of kl_sample."""

    OPTIONS: ClassVar = {"init_std": 0.15, "prior_std": 0.3, "filter_fn": klnorm.last_norms(1)}


@_arm("affine_lr")
class AffineLR(LayerNorm):
    """LayerNorm whose scales and shifts learn 10 or 100 times as fast as the rest: the baseline of kl_affine."""

    GRID = _grid(affine_lr=(5e-4, 5e-3))


@_arm("kl_affine")
class KLAffine(_Sampled):
    """kl_sample whose means learn 10 or 100 times as fast as the rest, so that the KL has something to hold."""

    GRID = _grid(lrs=(1,), affine_lr=(5e-4, 5e-3), per=("example", "parameter"))


@_arm("noise_only")
class NoiseOnly(_Sampled):
    """Ablation: the noise of kl_sample with its deviation fixed, and no KL."""

    GRID = _grid(init_std=(0.05, 0.1))
    FIXED_STDS = True

    def penalty(self):
        return 0.0


@_arm("kl_only")
class KLOnly(_Sampled):
    """Ablation: the KL of kl_sample without its noise. Only the means are left to learn.

    The layers stay in evaluation mode, in which they are LayerNorms; what the deviations cost is a constant.
    """

    FIXED_STDS = True
    stochastic = LayerNorm.stochastic

    def training_mode(self):
        super().training_mode()
        for layer in klnorm.kl_layers(self.model).values():
            layer.eval()


@_arm("deterministic")
class Deterministic(_Sampled):
    """The deterministic reading: no noise, KL(N(bias, weight^2) || N(pretrained bias, 1)), weighted by `factor`."""

    GRID = _grid(factor=(0.1, 1.0))
    OPTIONS: ClassVar = {"posterior": "deterministic", "prior_std": 1.0}
    stochastic = LayerNorm.stochastic


@_arm("conditional")
class Conditional(_Sampled):
    """The input-conditioned reading: every example's posterior depends on a summary of it, padding left out."""

    def _replace(self, options):
        encoder = self.model.encoder
        for name, norm in [n for n in encoder.named_modules() if type(n[1]) is nn.LayerNorm]:
            layer = klnorm.KLConditionalLayerNorm(norm.normalized_shape, eps=norm.eps, **options)
            layer.load_state_dict(norm.state_dict())
            layer.register_forward_pre_hook(self._tell_mask, with_kwargs=True)
            encoder.set_submodule(name, layer.to(norm.weight.device))

    def _tell_mask(self, layer, args, kwargs):
        return args, {**kwargs, "mask": self.model.mask}
