"""KL layers in which nothing is as in a new one, and what they make of a seed."""

import torch

from klnorm import KLLayerNorm

N = 6
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
PARAMETERS = "weight", "bias", "weight_rho", "bias_rho"
STATE = {*PARAMETERS, "weight_prior", "bias_prior"}


def trained(device="cpu", shape=N, **options):
    """A layer whose parameters and priors are all different from what a new one has."""
    layer = KLLayerNorm(shape, device=device, **options)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.add_(torch.randn_like(t) * 0.3)
    return layer


def noise_of(layer, x, seed=0):
    torch.manual_seed(seed)
    return layer(x)
