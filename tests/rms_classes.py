"""Classes that compute an RMSNorm, nearly do, or only look so, as libraries write them, and models of them."""

import torch
import torch.nn.functional as F
from torch import nn
from trained_layers import perturbed

N = 8


class Rms(nn.Module):
    """As in LlamaRMSNorm, but for its names."""

    offset = 0.0

    def __init__(self, n=N, eps=0.01, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.full((n,), 1.0 - self.offset, **options))
        self.epsilon = eps

    def forward(self, x):
        x32 = x.float()
        xhat = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.scaled(xhat).to(x.dtype)

    def scaled(self, xhat):
        return (self.offset + self.weight.float()) * xhat


class OnePlus(Rms):
    """As in GemmaRMSNorm."""

    offset = 1.0
    kernel_layer_name = "RMSNorm"


class Subclass(nn.RMSNorm):
    pass


class TwoEps(Rms):
    """The eps that counts is the second number, the third attribute with these letters."""

    def __init__(self):
        super().__init__()
        self.steps, self.eps_of_another_use, self.epsilon = "many", 0.5, self.__dict__.pop("epsilon")


class Doubled(Rms):
    def scaled(self, xhat):
        return 2 * super().scaled(xhat)


class Centred(Rms):
    """LayerNorm without shift, as in CohereLayerNorm."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Halves(Rms):
    def forward(self, x):
        return self.scaled(F.rms_norm(x.unflatten(-1, (2, -1)), (N // 2,), None, self.epsilon).flatten(-2))


class EpsOutside(Rms):
    def forward(self, x):
        return self.scaled(x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.epsilon))


class Clipped(Rms):
    def scaled(self, xhat):
        return super().scaled(xhat.clamp(-1, 1))


class ClippedFarOut(Rms):
    def scaled(self, xhat):
        return super().scaled(xhat.clamp(-2.7, 2.7))  # of at most 8 ** 0.5


class ClippedOutput(Rms):
    def scaled(self, xhat):
        return super().scaled(xhat).clamp(-40, 40)


class ClippedInput(Rms):
    def forward(self, x):
        return super().forward(x.clamp(-1e3, 1e3))


class Absolute(Rms):
    def scaled(self, xhat):
        return self.weight.abs() * xhat


class Dropping(Rms):
    """Another function in training mode."""

    def scaled(self, xhat):
        return super().scaled(F.dropout(xhat, 0.5, self.training))


class OnlyInTraining(Rms):
    def forward(self, x):
        return super().forward(x) if self.training else x


class OtherEps(Rms):
    def __init__(self):
        super().__init__(eps=1.001 * 0.01)
        self.epsilon, self.used = 0.01, self.epsilon

    def forward(self, x):
        return self.scaled(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.used))


class OtherEpsThanNone(Rms):
    """Where nn.RMSNorm takes that of fp32."""

    def __init__(self):
        super().__init__(eps=None)

    def forward(self, x):
        return self.scaled(F.rms_norm(x, (N,), None, 1e-6))


class OneMoreDimension(Rms):
    def forward(self, x):
        return super().forward(x)[None]


class Failing(Rms):
    def forward(self, x):
        raise KeyError("this class wants something else")


class OtherDtype(Rms):
    def forward(self, x):
        return super().forward(x).double()


class Gated(Rms):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate))


class NoEps(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))

    def forward(self, x):
        return F.rms_norm(x, (N,), self.weight, 1e-6)


class WithChild(Rms):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)


class WithBuffer(Rms):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


class WithBias(Rms):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(N))


class OneScale(Rms):
    """One number for all features."""

    def __init__(self):
        super().__init__(1)


class NoDimension(Rms):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))


class Unweighted(Rms):
    def __init__(self):
        super().__init__()
        self.weight = None


class Broadcast(Rms):
    """Features are the last dimension alone, and the one before has any size."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, N))


class Empty(Rms):
    def __init__(self):
        super().__init__(0)


class IntegerScale(Rms):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N, dtype=torch.int64), requires_grad=False)


class Inner(Rms):
    """Its methods have names that come to mind, and what else it could use is None."""

    def __init__(self):
        super().__init__()
        self.bias = None
        self.register_parameter("gain", None)
        self.register_buffer("shift", None)
        self.register_module("gate", None)

    def _normalize(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)

    _rms = _normalize

    def forward(self, x):
        y = self.scaled(self._rms(x.float())).to(x.dtype)
        return y if self.bias is self.gain is self.shift is self.gate is None else y + 1


SIMILAR = (
    Doubled, Halves, EpsOutside, Clipped, ClippedFarOut, ClippedInput, ClippedOutput, Absolute, Dropping,
    OnlyInTraining, OtherEps, OtherEpsThanNone, OtherDtype, OneMoreDimension, Failing,
)  # fmt: skip
NO_NORMS = Centred, Gated, NoEps, WithChild, WithBuffer, WithBias, OneScale, NoDimension, Unweighted, Broadcast, Empty
FOREIGN = Rms, OnePlus, Subclass, TwoEps, Inner


def model_of(*layers):
    return perturbed(nn.Sequential(*layers))


def new(kind, device="cpu"):
    return model_of(kind(N) if issubclass(kind, nn.RMSNorm) else kind()).to(device)[0]


def with_own_forward(layer):
    """As accelerate's hooks leave a module."""
    layer.forward = lambda x: type(layer).forward(layer, x)
    return layer
