"""Tensors on the CPU beside another default device: what is made on the way lies on the device of x."""

import contextlib

import pytest
import torch

import klnorm
from klnorm.functional import kl_layer_norm

N = 24
LAYERS = {
    "layer_norm": klnorm.KLLayerNorm,
    "rms_norm": klnorm.KLRMSNorm,
    "conditional": klnorm.KLConditionalLayerNorm,
    "deterministic": lambda n, noise: klnorm.KLLayerNorm(n, posterior="deterministic", prior_std=1.0),
}


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


both_ways = pytest.mark.parametrize("elsewhere", [torch.device, default_device], ids=["context", "set_default_device"])
every_noise = pytest.mark.parametrize("noise", ["none", "batch", "sample", "token"])


def assert_same_bits(function, elsewhere):
    results = []
    for context in contextlib.nullcontext(), elsewhere("meta"):
        torch.manual_seed(0)
        with context:
            results.append(function())
    assert [t.device.type for t in results[1]] == ["cpu"] * len(results[1])
    assert all(map(torch.equal, *results))


@both_ways
@every_noise
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, noise, elsewhere):
    layer = LAYERS[kind](N, noise="batch" if noise == "none" else noise).train(noise != "none")
    x = torch.randn(3, 5, N, requires_grad=True)
    kl_weight = klnorm.KLWeight(num_examples=10)
    layer.train()(x.detach())  # a conditional layer has a divergence only after it
    layer.train(noise != "none")

    def results():
        y = layer(x)
        loss = y.square().sum() + kl_weight(layer)
        gradients = torch.autograd.grad(loss, [x, layer.weight, layer.bias if kind != "rms_norm" else layer.weight])
        return [y, klnorm.kl_divergence(layer), *gradients]

    if kind == "conditional" and noise == "none":  # its divergence is that of a spent forward there
        assert_same_bits(lambda: [layer(x)], elsewhere)
    else:
        assert_same_bits(results, elsewhere)


@both_ways
@every_noise
def test_groups_and_residual(noise, elsewhere):
    x, residual = (torch.randn(4, 5, N, requires_grad=True) for _ in range(2))
    parameters = [torch.randn(2, N, requires_grad=True) for _ in range(4)]
    options = {"sample": False} if noise == "none" else {"noise": noise}

    def results():
        outputs = kl_layer_norm(x, N, *parameters, residual=residual, **options)
        ones = [torch.ones_like(t) for t in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [x, residual, *parameters], ones)]

    assert_same_bits(results, elsewhere)
