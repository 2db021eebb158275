"""The contestants: klnorm, its peers, and KL-Norm as a user would write it. Each is built with the same values.

klnorm, the eager KL-Norms, Liger, quack and flash-linear-attention take x in bf16 or fp16 beside fp32 parameters.
Native and apex do not, or leave their fast path: their parameters have the dtype of x, which favours them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn
from torch._functorch import config as functorch_config

import klnorm

from .cases import DTYPES
from .eager import EagerKLNorm

EPS = 1e-5
PRIOR_STD = 0.1


@dataclass
class Layer:
    """What is timed: `forward(x)` returns (y,) or (y, kl); `parameters` maps names to leaf tensors."""

    forward: Callable
    parameters: dict
    buffers: tuple = ()


@dataclass(frozen=True)
class Contestant:
    """`family`: "klnorm", "kl" (KL-Norm with noise of unknown seed) or "layer_norm"; `requires`: modules it needs."""

    label: str
    family: str
    build: Callable
    requires: tuple = ()

    def missing(self):
        """Why it cannot take part; None if it can."""
        for name in self.requires:
            module, _, attribute = name.partition(":")
            try:
                getattr(import_module(module), attribute) if attribute else import_module(module)
            except Exception as error:  # whatever a peer's import raises, it is absent
                return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def make_values(width, device, seed=0):
    """Initial parameters in fp32, all of them bf16 numbers, so that contestants with bf16 parameters get the same."""
    generator = torch.Generator().manual_seed(seed)
    spread = {"weight": (1.0, 0.1), "bias": (0.0, 0.1), "weight_rho": (-1.0, 0.3), "bias_rho": (-1.0, 0.3)}
    values = {k: mean + std * torch.randn(width, generator=generator) for k, (mean, std) in spread.items()}
    return {name: value.bfloat16().float().to(device) for name, value in values.items()}


def _with_values(module, values, device, dtype=torch.float32):
    """The module on the device with the values as its parameters of the same names."""
    module.to(device, dtype)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    return module, parameters


def _layer_norm(make, case, values, device, dtype=torch.float32):
    module, parameters = _with_values(make(case.shape.width), values, device, dtype)
    return Layer(lambda x: (module(x),), parameters)


def build_klnorm(case, values, device):
    noise = "sample" if case.noise == "eval" else case.noise
    module = klnorm.KLLayerNorm(case.shape.width, EPS, noise=noise, prior_std=PRIOR_STD)
    module, parameters = _with_values(module, values, device)
    if case.noise == "eval":
        module.eval()
        return Layer(lambda x: (module(x),), {name: parameters[name] for name in ("weight", "bias")})
    return Layer(lambda x: (module(x), module.kl_divergence()), parameters, tuple(module.buffers()))


def build_native(case, values, device):
    return _layer_norm(lambda n: nn.LayerNorm(n, EPS), case, values, device, getattr(torch, DTYPES[case.dtype]))


def build_eager(case, values, device):
    module = EagerKLNorm(case.shape.width, EPS, case.noise, prior_std=PRIOR_STD)
    module, parameters = _with_values(module, values, device)
    return Layer(lambda x: (module(x), module.kl_divergence()), parameters)


def compiled(build):
    """The same under torch.compile."""

    def build_compiled(case, values, device):
        # Past a limit of recompilations torch would fall back to eager without a word: begin afresh.
        torch._dynamo.reset()
        # Backward is timed over and over on one graph, which donated buffers do not allow.
        functorch_config.donated_buffer = False
        layer = build(case, values, device)
        return Layer(torch.compile(layer.forward, fullgraph=True, dynamic=False), layer.parameters, layer.buffers)

    return build_compiled


def build_apex_fused(case, values, device):
    make = import_module("apex.normalization").FusedLayerNorm
    return _layer_norm(lambda n: make(n, eps=EPS), case, values, device, getattr(torch, DTYPES[case.dtype]))


def build_apex_fast(case, values, device):
    make = import_module("apex.contrib.layer_norm").FastLayerNorm
    return _layer_norm(lambda n: make(n, eps=EPS), case, values, device, getattr(torch, DTYPES[case.dtype]))


def build_liger(case, values, device):
    make = import_module("liger_kernel.transformers.layer_norm").LigerLayerNorm
    return _layer_norm(lambda n: make(n, eps=EPS, bias=True), case, values, device)


def build_fla(case, values, device):
    make = import_module("fla.modules.layernorm").LayerNorm
    return _layer_norm(lambda n: make(n, bias=True, eps=EPS), case, values, device)


def build_quack(case, values, device):
    parameters = {name: values[name].clone().requires_grad_() for name in ("weight", "bias")}
    return Layer(lambda x: (_QuackLayerNorm.apply(x, *parameters.values()),), parameters)


class _QuackLayerNorm(torch.autograd.Function):
    """quack's LayerNorm comes as a forward and a backward function over matrices."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        rows = x.reshape(-1, x.shape[-1])
        quack = import_module("quack.rmsnorm")
        y, rstd, mean = quack.layernorm_fwd(rows, weight, bias, EPS, return_rstd=True, return_mean=True)
        ctx.save_for_backward(rows, weight, rstd, mean)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        rows, weight, rstd, mean = ctx.saved_tensors
        dx, dweight, dbias = import_module("quack.rmsnorm").layernorm_bwd(rows, weight, dy.view_as(rows), rstd, mean)
        return dx.view(dy.shape), dweight, dbias


CONTESTANTS = {
    "klnorm": Contestant("klnorm", "klnorm", build_klnorm),
    "native": Contestant("nn.LayerNorm", "layer_norm", build_native),
    "compiled": Contestant("torch.compile(nn.LayerNorm)", "layer_norm", compiled(build_native)),
    "eager": Contestant("KL-Norm in eager PyTorch", "kl", build_eager),
    "eager_compiled": Contestant("KL-Norm under torch.compile", "kl", compiled(build_eager)),
    "apex_fused": Contestant(
        "apex FusedLayerNorm", "layer_norm", build_apex_fused, ("apex.normalization", "fused_layer_norm_cuda")
    ),
    "apex_fast": Contestant("apex FastLayerNorm", "layer_norm", build_apex_fast, ("apex.contrib.layer_norm",)),
    "liger": Contestant("Liger", "layer_norm", build_liger, ("liger_kernel.transformers.layer_norm:LigerLayerNorm",)),
    "quack": Contestant("quack", "layer_norm", build_quack, ("quack.rmsnorm:layernorm_bwd",)),
    "fla": Contestant("flash-linear-attention", "layer_norm", build_fla, ("fla.modules.layernorm:LayerNorm",)),
}
