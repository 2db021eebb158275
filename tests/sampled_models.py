"""Small replaced models to sample from, and what sampling may have left at them."""

import contextlib
import sys

import torch
from torch import nn

from klnorm import replace_layer_norm

N = 8


def classifier(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, N), nn.LayerNorm(N), nn.Dropout(0.5), nn.Linear(N, 3))
    return replace_layer_norm(model, init_std=0.5, **options)


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@contextlib.contextmanager
def many_switches():
    """Between threads."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def flags(model):
    return {name: module.training for name, module in model.named_modules()}


class Head(nn.Module):
    """A regressor or classifier (batch, 4) -> `shape`, whose first dimension is that of the batch."""

    def __init__(self, shape=(6, 3), **options):
        super().__init__()
        self.body, self.shape = classifier(**options), shape

    def forward(self, x):
        y = self.body(x)
        if self.shape == ():
            return y[0, 0]
        if len(self.shape) == 1:
            return y[:, 0]
        return y[:, : self.shape[1]]
