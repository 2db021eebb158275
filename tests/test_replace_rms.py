"""`klnorm.replace_rms_norm` makes KL layers of nn.RMSNorm and of foreign classes, and nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from rms_classes import FOREIGN, Doubled, N, OnePlus, Rms, Subclass, model_of, new
from torch import nn
from unchanged import snapshot

import klnorm
from klnorm import KLRMSNorm, kl_layers, replace_rms_norm
from klnorm.functional import kl_rms_norm


def test_an_nn_rms_norm_becomes_a_kl_rms_norm(device):
    generator = torch.Generator(device)
    options = {"noise": "token", "sample_dim": 1, "init_std": 0.3, "prior_std": 0.7, "generator": generator}
    model = model_of(nn.RMSNorm(N, eps=0.25), nn.RMSNorm((2, 4)), nn.RMSNorm(N, elementwise_affine=False)).to(device)
    before, parameters = copy.deepcopy(model), list(model.parameters())
    assert replace_rms_norm(model, **options) is model
    assert [type(module) for module in model] == [KLRMSNorm, KLRMSNorm, nn.RMSNorm]
    for layer, plain, parameter in zip(model, before, parameters, strict=False):
        assert layer.weight is parameter
        assert torch.equal(layer.weight_prior, plain.weight)
        assert (layer.eps, layer.normalized_shape) == (plain.eps, plain.normalized_shape)
        assert {key: getattr(layer, key) for key in options} == options
        torch.testing.assert_close(F.softplus(layer.weight_rho), torch.full_like(layer.weight, 0.3))
        x = torch.randn(3, *layer.normalized_shape, device=device)
        assert torch.equal(layer.eval()(x), plain(x))


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_foreign_class_keeps_its_evaluation_bit_for_bit(device, kind, dtype):
    model = model_of(new(kind, device)).to(dtype)
    x = torch.randn(3, N, device=device, dtype=dtype)
    y = model(x)
    replace_rms_norm(model)
    layer = model[0]
    assert type(layer).__name__ == f"KL{kind.__name__}"
    assert isinstance(layer, kind)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    assert torch.equal(model.eval()(x), y)
    assert not torch.isclose(model.train()(x), y).all()
    assert list(kl_layers(model)) == ["0"]


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_training_is_the_functional_with_the_scale_that_the_class_means(device, kind, noise):
    layer = replace_rms_norm(new(kind, device), noise=noise, sample_dim=1, prior_std=0.7, init_std=0.2)
    with torch.no_grad():
        layer.weight_prior.add_(torch.randn(N, device=device))
    x, dy = torch.randn(3, 4, N, device=device, requires_grad=True), torch.randn(3, 4, N, device=device)
    offset, eps = (1, 0.01) if kind is OnePlus else (0, None if kind is Subclass else 0.01)
    results = []
    for function in (
        lambda: (layer(x), klnorm.kl_divergence(layer)),
        lambda: kl_rms_norm(
            x, N, layer.weight, layer.weight_rho, weight_prior=layer.weight_prior, weight_offset=offset, prior_std=0.7,
            eps=eps, noise=noise, sample_dim=1,
        ),
    ):  # fmt: skip
        torch.manual_seed(0)
        y, kl = function()
        gradients = torch.autograd.grad([y, kl], [x, layer.weight, layer.weight_rho], [dy, kl.new_tensor(0.3)])
        results.append((y, kl, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_plus_weight_is_not_rounded_to_the_dtype_of_the_weight(device):
    layer = replace_rms_norm(OnePlus().to(device, torch.bfloat16), prior_std=0.1)
    with torch.no_grad():
        layer.weight.fill_(2**-10)  # 1 + 2**-10 is 1 in bf16
        layer.weight_rho.fill_(-200.0)
    x = torch.randn(3, N, device=device)
    y = layer(x)
    # fp32 arithmetic on values below 4
    torch.testing.assert_close(y, (1 + 2**-10) * F.rms_norm(x, (N,), None, 0.01), rtol=1e-6, atol=1e-6)
    with_prior_at_0, layer.weight_prior[:] = layer.kl_divergence(), layer.weight.detach()
    distance = N * 2**-20 / (2 * 0.1**2)
    # a difference of two sums of about 1600 nats
    torch.testing.assert_close(with_prior_at_0 - layer.kl_divergence(), torch.tensor(distance).to(y), rtol=0, atol=5e-4)


def test_a_scale_that_is_the_weight_is_not_copied():
    layer = replace_rms_norm(new(Rms).bfloat16())
    posterior = layer.posterior_and_prior()
    assert posterior.weight is layer.weight
    assert posterior.weight_prior is layer.weight_prior


def test_divergence_of_one_plus_weight_is_the_same_from_the_forward_and_in_closed_form(device):
    for posterior in "sampled", "deterministic":
        layer = replace_rms_norm(new(OnePlus, device), posterior=posterior, prior_std=0.5)
        y = layer(torch.randn(3, N, device=device))
        from_forward = layer._take_kl()
        assert from_forward.grad_fn is y.grad_fn
        parameters = list(layer.parameters())
        assert len(parameters) == (2 if posterior == "sampled" else 1)
        gradients = torch.autograd.grad(from_forward, parameters)
        del y
        closed = layer.kl_divergence()
        torch.testing.assert_close(from_forward, closed)
        torch.testing.assert_close(gradients, torch.autograd.grad(closed, parameters))
        if posterior == "deterministic":
            expected = torch.distributions.Normal(torch.zeros_like(layer.weight), 1 + layer.weight)
            prior = torch.distributions.Normal(torch.zeros_like(layer.weight), 0.5)
            # the floor, 5e-4 in a deviation of about 1, takes 1e-7 nats
            torch.testing.assert_close(closed, torch.distributions.kl_divergence(expected, prior).sum())


@pytest.mark.filterwarnings("error")
def test_replacing_twice_changes_nothing_more():
    model = replace_rms_norm(model_of(nn.RMSNorm(N), OnePlus()))
    before = snapshot(model)
    assert snapshot(replace_rms_norm(model, noise="batch")) == before


@pytest.mark.parametrize("kind", [nn.RMSNorm, Rms])
def test_replacing_again_does_not_disturb_a_forward(kind):
    layer = replace_rms_norm(new(kind), posterior="deterministic")
    y = layer(torch.randn(3, N))
    replace_rms_norm(layer)
    assert layer._take_kl().grad_fn is y.grad_fn


def test_trying_out_leaves_no_trace(device):
    model, calls = model_of(new(OnePlus, device)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    state, weight, training = torch.get_rng_state(), model[0].weight.clone(), model[0].training
    replace_rms_norm(model)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight, weight)
    assert model[0].weight.grad is None
    assert model[0].training == training
    model(torch.randn(2, N, device=device))
    assert calls == [1]


def test_on_the_meta_device(device):
    plain = model_of(new(OnePlus, device))
    with torch.device("meta"):
        model = replace_rms_norm(nn.Sequential(OnePlus(), Doubled(), nn.RMSNorm(N)))
        assert list(kl_layers(model)) == ["0", "2"]
    assert model[0].weight_rho.is_meta
    model[:1].load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(3, N, device=device)
    assert torch.equal(model[0].eval()(x), plain(x))
    assert torch.equal(model[0].weight_prior, plain[0].weight)
    torch.testing.assert_close(F.softplus(model[0].weight_rho), torch.full_like(plain[0].weight, 0.05))


@pytest.mark.parametrize("kind", [nn.RMSNorm, Rms])
def test_an_eps_of_0_is_replaced_and_zeros_stay_zeros(kind):
    model = replace_rms_norm(model_of(kind(N, eps=0.0)))
    x = torch.zeros(3, N, requires_grad=True)
    y = model[0](x)
    y.sum().backward()
    assert list(kl_layers(model).values()) == [model[0]]
    assert not y.any()
    assert not x.grad.any()
