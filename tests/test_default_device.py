"""Tensors on the CPU beside another default device: what is made on the way lies on the device of x."""

import pytest
import torch

import klnorm


@pytest.mark.parametrize("noise", ["none", "batch", "sample", "token"])
def test_the_default_device_changes_no_bit(noise):
    def results():
        y = layer(x)
        gradients = torch.autograd.grad(y.sum() + klnorm.kl_divergence(layer), [x, *layer.parameters()])
        return [y, klnorm.kl_divergence(layer), *gradients]

    layer = klnorm.KLLayerNorm(24, noise="batch" if noise == "none" else noise).train(noise != "none")
    x = torch.randn(3, 5, 24, requires_grad=True)
    torch.manual_seed(0)
    expected = results()
    torch.manual_seed(0)
    with torch.device("meta"):
        got = results()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
