"""KL-Norm as one would write it in PyTorch, with torch.randn: what a user has without klnorm."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class EagerKLNorm(nn.Module):
    """Parameters and noise modes of klnorm.KLLayerNorm, for inputs (samples, ..., width)."""

    def __init__(self, width, eps=1e-5, noise="sample", init_std=0.05, prior_std=0.1):
        super().__init__()
        rho = math.log(math.expm1(init_std))
        self.width, self.eps, self.noise, self.prior_std = width, eps, noise, prior_std
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight_rho = nn.Parameter(torch.full((width,), rho))
        self.bias_rho = nn.Parameter(torch.full((width,), rho))

    def forward(self, x):
        xhat = F.layer_norm(x, (self.width,), eps=self.eps)
        if not self.training:
            return (self.weight * xhat + self.bias).to(x.dtype)
        leading = {"batch": (), "sample": (x.shape[0], *[1] * (x.dim() - 2)), "token": x.shape[:-1]}[self.noise]
        shape = (*leading, self.width)
        gamma = self.weight + F.softplus(self.weight_rho) * torch.randn(shape, device=x.device)
        beta = self.bias + F.softplus(self.bias_rho) * torch.randn(shape, device=x.device)
        return (gamma * xhat + beta).to(x.dtype)

    def kl_divergence(self):
        return self._kl(self.weight, self.weight_rho, 1.0) + self._kl(self.bias, self.bias_rho, 0.0)

    def _kl(self, mean, rho, prior):
        s, p = F.softplus(rho), self.prior_std
        return ((p / s).log() + (s**2 + (mean - prior) ** 2) / (2 * p**2) - 0.5).sum()


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
