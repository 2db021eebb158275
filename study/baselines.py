"""What KL-Norm is compared with: LayerNorm, and other regularizers of it. What an arm is: see arms.py."""

import contextlib
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import klnorm

RHO_LR = 1e-2
WEIGHT_DECAY = 0.01
VIB_SAMPLES = 5


def grid(lrs=(1, 2), **values):
    """Every learning rate with every value of the settings: four in all."""
    return [dict(zip(("lr", *values), chosen, strict=True)) for chosen in itertools.product(lrs, *values.values())]


class LayerNorm:
    """The model as it is, dropout 0.1 included; all four trials go to the learning rate."""

    GRID = grid(lrs=(0.5, 1, 2, 4))
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


class Dropout(LayerNorm):
    """Another rate in every nn.Dropout, those of the attention included."""

    GRID = grid(p=(0.0, 0.25))

    def __init__(self, model, settings, examples, steps):
        super().__init__(model, settings, examples, steps)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings["p"]


class MoreDropout(Dropout):
    """Dropout at the higher rate in every setting: noise of another kind, to set beside that of KL-Norm."""

    GRID = grid(lrs=(0.5, 1, 2, 4), p=(0.25,))


class L2SP(LayerNorm):
    """The encoder decays towards its pretrained weights: after every step w += lr * decay * (w_pretrained - w).

    L2-SP (Li et al. 2018, arXiv 1802.01483) decoupled from the gradient, as AdamW decouples weight decay: as a penalty
    it would be divided by Adam's denominators. Beside it the slight decay towards 0 of every arm.
    """

    GRID = grid(decay=(10.0, 100.0))
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


class Mixout(LayerNorm):
    """Every weight of the encoder's linear layers is the pretrained one with probability p, drawn in every step."""

    GRID = grid(p=(0.5, 0.9))
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


class VIB(LayerNorm):
    """An information bottleneck between encoder and head; loss and KL averaged over five samples."""

    GRID = grid(beta=(1e-5, 1e-4))

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


class AffineLR(LayerNorm):
    """LayerNorm whose scales and shifts learn 10 or 100 times as fast as the rest: the baseline of kl_affine."""

    GRID = grid(affine_lr=(5e-4, 5e-3))
