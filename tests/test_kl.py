"""`klnorm.kl_divergence` has the value and gradient of its formula, summed over the layers of a model, each once."""

import copy
import math

import pytest
import torch
from kl_models import (
    N,
    Twice,
    assert_same,
    batch,
    by_distributions,
    closed_form,
    gradients_of,
    is_attached,
    small_model,
)
from torch import nn

import klnorm
from klnorm import KLLayerNorm, kl_divergence, kl_layers

RHO_OF_ONE = math.log(math.e - 1)  # softplus of it is 1

# Value


def test_hand_worked_value(device):
    layer = KLLayerNorm(2, prior_std=2.0, device=device)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 4.0]))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
        layer.weight_rho.fill_(RHO_OF_ONE)
        layer.bias_rho.fill_(RHO_OF_ONE)
    # deviation 1, prior deviation 2; distances from the prior means 1, 3 and 1, -1
    by_hand = 4 * math.log(2) + (4 + 1 + 9 + 1 + 1) / 8 - 4 / 2
    assert kl_divergence(layer).item() == pytest.approx(by_hand, rel=1e-6)
    assert layer.kl_divergence().item() == pytest.approx(by_hand, rel=1e-6)
    y = layer(torch.randn(3, 2, device=device))
    assert is_attached(kl_divergence(layer))
    assert kl_divergence(layer).item() == pytest.approx(by_hand, rel=1e-6)
    assert y.requires_grad


def test_posterior_equal_to_the_prior_is_at_divergence_zero(device):
    layer = KLLayerNorm(N, init_std=0.3, prior_std=0.3, device=device, dtype=torch.float64)
    assert abs(kl_divergence(layer).item()) < 1e-14
    for grad in torch.autograd.grad(kl_divergence(layer), list(layer.parameters())):
        assert grad.abs().max() < 1e-14


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_agrees_with_torch_distributions(device, attached, bias):
    model = small_model(device, bias=bias)
    y = model(batch(device)) if attached else None
    kl = kl_divergence(model)
    assert is_attached(kl) == attached
    assert kl.shape == ()
    expected = by_distributions(model[1])
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    assert_same(gradients_of(1.7 * kl, model), gradients_of(1.7 * expected, model))
    assert y is None or y.requires_grad


def test_sums_over_layers_of_any_depth_and_dtype(device):
    model = nn.ModuleDict(
        {
            "a": KLLayerNorm(N, init_std=0.2, device=device),
            "b": nn.Sequential(nn.ReLU(), KLLayerNorm(3, dtype=torch.float64, bias=False, device=device)),
            "c": nn.ModuleList([KLLayerNorm(2, dtype=torch.bfloat16, prior_std=0.7, device=device)]),
        }
    )
    expected = by_distributions(model["a"], model["b"][1], model["c"][0])
    torch.testing.assert_close(kl_divergence(model).double(), expected, rtol=1e-6, atol=0)
    assert all(grad.any() for name, grad in gradients_of(kl_divergence(model), model).items() if "rho" in name)


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(), nn.LayerNorm(3), nn.ReLU()], ids=repr)
def test_a_model_without_kl_layers_has_a_kl_of_zero(device, model):
    model.to(device)
    kl = kl_divergence(model)
    assert kl.shape == ()
    assert kl.item() == 0
    loss = torch.full((), 2.5, device=device, requires_grad=True) * 1
    (loss + kl / 10).backward()
    assert (loss + 0 * kl).item() == 2.5
    if next(model.parameters(), None) is not None:
        assert kl.device == next(model.parameters()).device


@pytest.mark.parametrize("model", [None, 3, [nn.LayerNorm(3)], torch.zeros(3)], ids=["None", "int", "list", "tensor"])
def test_a_model_that_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}, expected an nn\.Module"):
        kl_divergence(model)


@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_bfloat16_parameters_are_taken_as_they_are_and_summed_in_fp32(device, attached):
    model = small_model(device, torch.bfloat16)
    y = model(batch(device, torch.bfloat16)) if attached else None
    kl = kl_divergence(model)
    assert is_attached(kl) == attached
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), by_distributions(model[1]), rtol=1e-5, atol=0)
    expected = gradients_of(by_distributions(copied := copy.deepcopy(model)[1].double()), copied)
    for name, grad in gradients_of(kl, model[1]).items():
        assert grad.dtype == torch.bfloat16
        # rounded once to 8 bits
        torch.testing.assert_close(grad.double(), expected[name], rtol=2**-8, atol=1e-5)
    assert y is None or y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_a_vanishing_deviation_has_an_exact_finite_kl_and_gradient(device, attached, dtype):
    layer = KLLayerNorm(N, device=device, dtype=dtype, prior_std=0.5)
    with torch.no_grad():
        layer.weight_rho.fill_(-200.0)  # softplus underflows in fp32; its logarithm is -200
        layer.bias_rho.fill_(-200.0)
        layer.weight.fill_(1.5)
    y = layer(torch.randn(3, N, device=device, dtype=dtype)) if attached else None
    kl = kl_divergence(layer)
    assert is_attached(kl) == attached
    # log(1/2) + 200 - 1/2 for each, and 0.5^2 / (2 * 0.5^2) for every scale
    assert kl.item() == pytest.approx(N * (2 * (math.log(0.5) + 200 - 0.5) + 0.5), rel=1e-6)
    weight, bias, weight_rho, bias_rho = torch.autograd.grad(
        kl, [layer.weight, layer.bias, layer.weight_rho, layer.bias_rho]
    )
    assert weight.tolist() == [2.0] * N
    assert bias.tolist() == [0.0] * N
    assert weight_rho.tolist() == bias_rho.tolist() == [-1.0] * N
    assert y is None or y.isfinite().all()


@pytest.mark.parametrize("rho", [-60.0, -40.0, -39.99, -20.0, 0.0, 15.0, 60.0])
@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_deviations_of_every_size(device, attached, rho):
    layer = KLLayerNorm(N, device=device, dtype=torch.float32, prior_std=0.5)
    with torch.no_grad():
        layer.weight_rho.fill_(rho)
    y = layer(torch.randn(3, N, device=device)) if attached else None
    exact = copy.deepcopy(layer).double()
    kl, expected = kl_divergence(layer), by_distributions(exact)
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(kl, layer.weight_rho)
    (expected,) = torch.autograd.grad(expected, exact.weight_rho)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=0)
    assert y is None or y.requires_grad


def test_replaced_layers_of_a_real_model_take_part(device):
    model = klnorm.replace_layer_norm(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, device=device).double())
    y = model(torch.randn(2, 5, 8, device=device, dtype=torch.float64))
    value, grads = closed_form(model)
    kl = kl_divergence(model)
    torch.testing.assert_close(kl.detach(), value, rtol=1e-12, atol=0)
    assert_same(gradients_of(kl, model), grads)
    assert y.requires_grad


def test_parametrized_layers_count_each(device):
    """Their parameters are made anew at every look, so nothing may be told apart by the id of one that is gone."""

    class Same(nn.Module):
        def forward(self, parameter):
            return parameter * 1.0

    for count in range(2, 12):
        model = nn.Sequential(*(klnorm.KLLayerNorm(8, bias=False) for _ in range(count))).to(device)
        one = kl_divergence(model[0]).item()
        for layer in model:
            nn.utils.parametrize.register_parametrization(layer, "weight", Same())
            nn.utils.parametrize.register_parametrization(layer, "weight_rho", Same())
        assert kl_divergence(model).item() == pytest.approx(count * one, rel=1e-6)


def test_the_returned_kl_may_be_changed_in_place(device):
    layer = klnorm.KLLayerNorm(8).to(device)
    y = layer(torch.randn(3, 4, 8, device=device))
    expected = kl_divergence(layer).item()
    for _ in range(2):
        kl = layer.kl_divergence()
        kl /= 1000
        kl = kl_divergence(layer)
        kl /= 1000
    assert kl_divergence(layer).item() == expected
    assert y.requires_grad


# Shared layers


@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_a_shared_layer_counts_once(device, attached):
    model = Twice(device)
    y = model(torch.randn(4, N, device=device, dtype=torch.float64)) if attached else None
    kl, expected = kl_divergence(model), by_distributions(model.first)
    assert is_attached(kl) == attached
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    assert_same(gradients_of(kl, model), gradients_of(expected, model))
    data, both = gradients_of(y.sum(), model) if attached else None, None
    if attached:
        both = gradients_of(y.sum() + kl_divergence(model), model)
        expected = gradients_of(expected, model)
        assert_same(
            both, {name: grad if expected[name] is None else grad + expected[name] for name, grad in data.items()}
        )


def test_layers_with_the_same_parameters_count_once(device):
    model = nn.Sequential(KLLayerNorm(N, device=device), KLLayerNorm(N, device=device))
    apart = kl_divergence(model)
    for name in "weight", "bias", "weight_rho", "bias_rho":
        setattr(model[1], name, getattr(model[0], name))
    torch.testing.assert_close(kl_divergence(model), apart / 2)


# Which layers


def test_kl_layers_in_order_and_once(device):
    model = nn.ModuleDict({"a": Twice(device), "b": nn.Sequential(nn.LayerNorm(N), KLLayerNorm(N, device=device))})
    model["c"] = model["b"]
    found = kl_layers(model)
    assert list(found) == ["a.first", "b.1"]
    assert found["a.first"] is model["a"].second
    assert found["b.1"] is model["b"][1]
    layer = KLLayerNorm(N)
    assert kl_layers(layer) == {"": layer}
    assert kl_layers(nn.LayerNorm(N)) == {}


def test_kl_layers_survive_a_module_that_holds_its_owner(device):
    model = small_model(device)
    model[0].register_module("owner", model)
    assert list(kl_layers(model)) == ["1"]


def test_kl_layers_of_a_compiled_model_are_the_layers_themselves(device):
    """torch.compile's module passes attributes through, and is no layer for that."""
    layer = KLLayerNorm(N, device=device)
    assert kl_layers(torch.compile(layer, backend="eager")) == {"_orig_mod": layer}


@pytest.mark.parametrize("model", [None, [nn.LayerNorm(3)]], ids=["None", "list"])
def test_kl_layers_of_what_is_no_module_are_refused(model):
    with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}, expected an nn\.Module"):
        kl_layers(model)
