"""Other projects' kernels, as layers with given values.

Liger, quack and flash-linear-attention take x in bf16 or fp16 beside fp32 parameters. apex does not, or leaves its fast
path: its parameters have the dtype of x, which favours it.
"""

from importlib import import_module

import torch

from .layers import EPS, Layer, dtype_of, plain, with_values


def build_apex_fused(case, values, device):
    module = import_module("apex.normalization")
    make = module.FusedRMSNorm if case.variant.rms else module.FusedLayerNorm
    return plain(make(case.shape.width, eps=EPS), values, device, dtype_of(case))


def build_apex_fast(case, values, device):
    make = import_module("apex.contrib.layer_norm").FastLayerNorm
    return plain(make(case.shape.width, eps=EPS), values, device, dtype_of(case))


def build_liger(case, values, device):
    n = case.shape.width
    if not case.variant.rms:
        make = import_module("liger_kernel.transformers.layer_norm").LigerLayerNorm
        return plain(make(n, eps=EPS, bias=True), values, device)
    # In place, the default of one of them, backward would overwrite the dy that the next call is given.
    if not case.variant.residual:
        make = import_module("liger_kernel.transformers.rms_norm").LigerRMSNorm
        return plain(make(n, eps=EPS, in_place=False), values, device)
    make = import_module("liger_kernel.transformers.fused_add_rms_norm").LigerFusedAddRMSNorm
    return Layer(*with_values(make(n, eps=EPS, in_place=False), values, device))


def build_fla(case, values, device):
    layers, n = import_module("fla.modules"), case.shape.width
    module = layers.RMSNorm(n, eps=EPS) if case.variant.rms else layers.LayerNorm(n, bias=True, eps=EPS)
    if not case.variant.residual:
        return plain(module, values, device)
    module, parameters = with_values(module, values, device)
    return Layer(lambda x, residual: module(x, residual=residual, prenorm=True), parameters)


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
