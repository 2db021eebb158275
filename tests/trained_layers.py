"""Layers in which nothing is as in a new one, what they make of a seed, and that they compile."""

import torch

from klnorm import KLLayerNorm, kl_divergence

N = 6
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
PARAMETERS = "weight", "bias", "weight_rho", "bias_rho"
STATE = {*PARAMETERS, "weight_prior", "bias_prior"}


def perturbed(module, by=0.3):
    """`module` with random numbers of this deviation added to its parameters and buffers, in place."""
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            t.add_(torch.randn_like(t) * by)
    return module


def trained(device="cpu", shape=N, kind=KLLayerNorm, **options):
    """A layer whose parameters and priors are all different from what a new one has."""
    return perturbed(kind(shape, device=device, **options))


def seeded(function, *args, seed=0, **options):
    torch.manual_seed(seed)
    return function(*args, **options)


def assert_compiles(module, x, atol=1e-5):
    """`module` has no break in its graph, and with the KL divergence in the loss the gradients that it has in eager."""
    dy, results = torch.randn_like(x), []

    def loss(x):
        return (module(x) * dy).sum() + kl_divergence(module)

    for function in loss, torch.compile(loss, backend="aot_eager", fullgraph=True):
        value = seeded(function, x)
        results.append((value, *torch.autograd.grad(value, list(module.parameters()))))
    # The KL is a by-product of the forward in eager and in closed form where it is traced.
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=atol)


def assert_same_layer(other, layer, x):
    """A copy is of the same class, prints alike, and computes the same in both modes, noise included."""
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    for mode in True, False:
        torch.manual_seed(0)
        y = layer.train(mode)(x)
        torch.manual_seed(0)
        assert torch.equal(other.train(mode)(x), y)
