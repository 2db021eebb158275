"""KL-Norm as one would write it in PyTorch, with torch.randn: what a user has without klnorm."""

import math

import torch
import torch.nn.functional as F
from torch import nn

FLOOR = 1e-3  # of |weight|, times prior_std, in the logarithm of the deterministic reading


class EagerKLNorm(nn.Module):
    """Parameters and noise modes of klnorm.KLLayerNorm, or with `rms` of its RMSNorm; inputs (samples, ..., width)."""

    def __init__(self, width, eps=1e-5, noise="sample", init_std=0.05, prior_std=0.1, rms=False):
        super().__init__()
        rho = math.log(math.expm1(init_std))
        self.width, self.eps, self.noise, self.prior_std = width, eps, noise, prior_std
        self.normalize = F.rms_norm if rms else F.layer_norm
        self.weight = nn.Parameter(torch.ones(width))
        self.weight_rho = nn.Parameter(torch.full((width,), rho))
        self.bias = None if rms else nn.Parameter(torch.zeros(width))
        self.bias_rho = None if rms else nn.Parameter(torch.full((width,), rho))

    def forward(self, x):
        y = self._draw(self.weight, self.weight_rho, x) * self.normalize(x, (self.width,), eps=self.eps)
        if self.bias is not None:
            y = y + self._draw(self.bias, self.bias_rho, x)
        return y.to(x.dtype)

    def _draw(self, mean, rho, x):
        if not self.training:
            return mean
        leading = {"batch": (), "sample": (x.shape[0], *[1] * (x.dim() - 2)), "token": x.shape[:-1]}[self.noise]
        return mean + F.softplus(rho) * torch.randn((*leading, self.width), device=x.device)

    def kl_divergence(self):
        kl = self._kl(self.weight, self.weight_rho, 1.0)
        return kl if self.bias is None else kl + self._kl(self.bias, self.bias_rho, 0.0)

    def _kl(self, mean, rho, prior):
        s, p = F.softplus(rho), self.prior_std
        return ((p / s).log() + (s**2 + (mean - prior) ** 2) / (2 * p**2) - 0.5).sum()


class EagerDeterministicNorm(nn.LayerNorm):
    """The deterministic reading: KL(N(bias, weight^2) || N(0, prior_std^2)) beside nn.LayerNorm."""

    def __init__(self, width, eps=1e-5, prior_std=0.1):
        super().__init__(width, eps)
        self.prior_std = prior_std

    def kl_divergence(self):
        v, p = self.weight.float() ** 2, self.prior_std
        return (-0.5 * (v / p**2 + FLOOR**2).log() + (v + self.bias.float() ** 2) / (2 * p**2) - 0.5).sum()


def replace_with_eager(model, noise):
    """Put an EagerKLNorm with the same scale and shift in place of every nn.LayerNorm of `model`."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.LayerNorm:
                layer = EagerKLNorm(child.normalized_shape[0], child.eps, noise)
                layer.weight, layer.bias = child.weight, child.bias
                setattr(parent, name, layer.to(child.weight.device))
    return model


def kl_divergence(model):
    """Sum of the divergences of all EagerKLNorm layers."""
    return sum(layer.kl_divergence() for layer in model.modules() if isinstance(layer, EagerKLNorm))
