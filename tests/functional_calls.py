"""Calls of `klnorm.functional.kl_layer_norm` with random tensors, and how exact they must be."""

import torch

from klnorm.functional import kl_layer_norm

N = 6
NOISES = "batch", "sample", "token"
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


def make(
    device="cpu", leading=(3, 4), shape=(N,), dtype=torch.float64, parameter_dtype=None, bias=True, requires_grad=False
):
    """x and the parameters by name, random."""

    def random(size, dtype, centre=0.0):
        return (torch.randn(size, dtype=dtype, device=device) + centre).requires_grad_(requires_grad)

    parameter_dtype = parameter_dtype or dtype
    return {
        "x": random((*leading, *shape), dtype),
        "weight": random(shape, parameter_dtype, 1.0),
        "bias": random(shape, parameter_dtype) if bias else None,
        "weight_rho": random(shape, parameter_dtype, -1.0),
        "bias_rho": random(shape, parameter_dtype, -1.0) if bias else None,
    }


def seed_of(value, device="cpu"):
    return torch.tensor([value], device=device)


def call(tensors, function=kl_layer_norm, **options):
    """(y, kl) of `function`; the normalized shape is that of the weight."""
    return function(tensors["x"], tensors["weight"].shape, *list(tensors.values())[1:], **options)


def gradients(tensors, dy, dkl, function=kl_layer_norm, **options):
    """(y, kl, gradient by name) for the cotangents dy and dkl."""
    present = {name: t for name, t in tensors.items() if t is not None}
    y, kl = call(tensors, function, **options)
    found = torch.autograd.grad((y, kl), list(present.values()), (dy, dkl))
    return y, kl, dict(zip(present, found, strict=True))


def noise_error(device):
    """Tolerance in fp64: rounding alone on the CPU, where op and reference share the normals; the kernels' are fp32."""
    return 1e-12 if device.type == "cpu" else 2e-5
