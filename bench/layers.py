"""klnorm, its peers and KL-Norm as a user would write it, as layers with given values.

klnorm, the eager KL-Norms, Liger, quack and flash-linear-attention take x in bf16 or fp16 beside fp32 parameters.
PyTorch's own and apex leave their fast path then, or refuse: their parameters have the dtype of x, which favours them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch_config

import klnorm
from klnorm.functional import kl_layer_norm, kl_rms_norm

from .cases import DTYPES
from .eager import EagerDeterministicNorm, EagerKLNorm

EPS = 1e-5
PRIOR_STD = 0.1


@dataclass
class Layer:
    """What is timed: `forward(x)`, or `forward(x, residual)`, returns (y,) or (y, sum), and the KL after it if it has
    one; `parameters` maps names to leaf tensors.
    """

    forward: Callable
    parameters: dict
    buffers: tuple = ()


def make_values(shape, device, seed=0):
    """Initial parameters in fp32, all of them bf16 numbers, so that contestants with bf16 parameters get the same."""
    generator = torch.Generator().manual_seed(seed)
    spread = {"weight": (1.0, 0.1), "bias": (0.0, 0.1), "weight_rho": (-1.0, 0.3), "bias_rho": (-1.0, 0.3)}
    values = {k: mean + std * torch.randn(shape, generator=generator) for k, (mean, std) in spread.items()}
    return {name: value.bfloat16().float().to(device) for name, value in values.items()}


def dtype_of(case):
    """The torch dtype of x."""
    return DTYPES[case.dtype]


def layer_of(module, values, device, dtype=torch.float32, forward=None):
    """The layer of a module that returns y, or as `forward` says, with the values of its parameters' names."""
    module.to(device, dtype)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    return Layer(forward or (lambda x: (module(x),)), parameters, tuple(module.buffers()))


def unfused(build):
    """The same after an addition of its own, where the case has a residual."""

    def build_unfused(case, values, device):
        layer = build(case, values, device)

        def forward(x, residual):
            total = x + residual
            y, *kl = layer.forward(total)
            return y, total, *kl

        return Layer(forward, layer.parameters, layer.buffers) if case.variant.residual else layer

    return build_unfused


def compiled(build):
    """The same under torch.compile."""

    def build_compiled(case, values, device):
        # Past a limit of recompilations of the same code torch refuses: begin afresh.
        torch._dynamo.reset()
        # Backward is timed over and over on one graph, which donated buffers do not allow.
        functorch_config.donated_buffer = False
        layer = build(case, values, device)
        return Layer(torch.compile(layer.forward, fullgraph=True, dynamic=False), layer.parameters, layer.buffers)

    return build_compiled


def build_klnorm(case, values, device):
    """The layer a user has, klnorm.KLLayerNorm."""
    noise = "sample" if case.noise == "eval" else case.noise
    module = klnorm.KLLayerNorm(case.shape.width, EPS, noise=noise, prior_std=PRIOR_STD)
    if case.noise != "eval":
        return layer_of(module, values, device, forward=lambda x: (module(x), module.kl_divergence()))
    layer = layer_of(module.eval(), values, device)
    return Layer(layer.forward, {name: layer.parameters[name] for name in ("weight", "bias")})


def build_klnorm_functional(case, values, device):
    """The functional form, which has every operation."""
    variant, sampled = case.variant, case.noise in ("batch", "sample", "token")
    function = kl_rms_norm if variant.rms else kl_layer_norm
    means = ("weight",) if variant.rms else ("weight", "bias")
    rhos = [f"{name}_rho" for name in means]
    learned = [*means, *rhos] if sampled else means
    parameters = {name: values[name].clone().requires_grad_() for name in (*means, *rhos)}
    options = {"prior_std": PRIOR_STD, "eps": EPS, "sample": sampled, "noise": case.noise if sampled else "batch"}
    if variant.deterministic:
        parameters |= dict.fromkeys(rhos)
        options["posterior"] = "deterministic"

    def forward(x, residual=None):
        outputs = function(x, case.shape.width, **parameters, **options, residual=residual)
        return outputs[:-1] if case.noise == "eval" else outputs

    return Layer(forward, {name: parameters[name] for name in learned})


@unfused
def build_native(case, values, device):
    """nn.LayerNorm, nn.RMSNorm, or with groups what adaptive layer norms do."""
    if case.variant.groups:
        weight, bias = (values[name].to(dtype_of(case), copy=True).requires_grad_() for name in ("weight", "bias"))
        shape = (case.shape.width,)

        def forward(x):
            return (F.layer_norm(x, shape, eps=EPS) * weight[:, None] + bias[:, None],)

        return Layer(forward, {"weight": weight, "bias": bias})
    make = nn.RMSNorm if case.variant.rms else nn.LayerNorm
    return layer_of(make(case.shape.width, EPS), values, device, dtype_of(case))


def build_eager(case, values, device):
    if case.variant.deterministic:
        module, dtype = EagerDeterministicNorm(case.shape.width, EPS, prior_std=PRIOR_STD), dtype_of(case)
    else:
        module = EagerKLNorm(case.shape.width, EPS, case.noise, prior_std=PRIOR_STD, rms=case.variant.rms)
        dtype = torch.float32
    return layer_of(module, values, device, dtype, lambda x: (module(x), module.kl_divergence()))


def imported(place):
    """The module of that name, or what module:attribute names."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute) if attribute else import_module(module)


def build_peer(place, takes_fp32=True, with_residual=None, **options):
    """A build of the module of another project at `place`. `with_residual`: what its calls with a residual take."""

    def build(case, values, device):
        module = imported(place)(case.shape.width, eps=EPS, **options)
        forward = partial(module, **(with_residual or {})) if case.variant.residual else None
        return layer_of(module, values, device, torch.float32 if takes_fp32 else dtype_of(case), forward)

    return build


def build_quack(case, values, device):
    names = ("weight",) if case.variant.rms else ("weight", "bias")
    parameters = {name: values[name].clone().requires_grad_() for name in names}
    if not case.variant.rms:
        return Layer(lambda x: (_QuackLayerNorm.apply(x, *parameters.values()),), parameters)
    rmsnorm, weight = import_module("quack.rmsnorm").rmsnorm, parameters["weight"]
    if not case.variant.residual:
        return Layer(lambda x: (rmsnorm(x, weight, eps=EPS),), parameters)
    return Layer(lambda x, residual: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True), parameters)


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
