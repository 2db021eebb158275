"""`klnorm.KLLayerNorm` samples in training what the functional does, and evaluates as nn.LayerNorm with the means."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trained_layers import DTYPES, PARAMETERS, N, seeded, trained

import klnorm
from klnorm import KLLayerNorm
from klnorm.functional import kl_layer_norm


def test_without_shift(device):
    layer = trained(device, bias=False, noise="batch")
    assert layer.bias is layer.bias_rho is layer.bias_prior is None
    assert layer.state_dict().keys() == {"weight", "weight_rho", "weight_prior"}
    x = torch.randn(4, N, device=device)
    y = seeded(layer, x)
    xhat = F.layer_norm(x, (N,))
    gamma = (y * xhat).sum(0) / xhat.square().sum(0)  # of the line through 0 nearest to all rows
    # A few roundings of numbers of size 1, where a shift would be seen.
    torch.testing.assert_close(y, gamma * xhat, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.eval()(x), F.layer_norm(x, (N,), layer.weight))


def test_several_normalized_dimensions(device):
    layer, flat = trained(device, (2, 3)), KLLayerNorm(6, device=device)
    flat.load_state_dict({key: value.flatten() for key, value in layer.state_dict().items()})
    assert layer.weight_rho.shape == layer.bias_prior.shape == (2, 3)
    x = torch.randn(4, 5, 2, 3, device=device)
    assert torch.equal(seeded(layer, x), seeded(flat, x.flatten(2)).unflatten(2, (2, 3)))
    assert torch.equal(klnorm.kl_divergence(layer), klnorm.kl_divergence(flat))


# Training


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_training_passes_every_setting_to_the_functional(device, noise):
    layer = trained(device, (2, 3), eps=0.3, noise=noise, sample_dim=1, prior_std=0.7)
    x = torch.randn(3, 4, 2, 3, device=device)
    y = seeded(layer, x)
    torch.manual_seed(0)
    expected, kl = kl_layer_norm(
        x, (2, 3), layer.weight, layer.bias, layer.weight_rho, layer.bias_rho, weight_prior=layer.weight_prior,
        bias_prior=layer.bias_prior, prior_std=0.7, eps=0.3, noise=noise, sample_dim=1,
    )  # fmt: skip
    assert torch.equal(y, expected)
    assert torch.equal(klnorm.kl_divergence(layer), kl)  # y is alive, so this is the KL of that forward


def test_training_noise_is_fresh_and_reproducible(device):
    layer, x = trained(device), torch.randn(3, 4, N, device=device)
    first = seeded(layer, x, seed=1)
    assert not torch.isclose(first, layer(x)).all()
    assert torch.equal(first, seeded(layer, x, seed=1))
    assert not torch.isclose(first, seeded(layer, x, seed=2)).all()


def test_own_generator_makes_the_noise_and_leaves_torchs_alone(device):
    layer, x = trained(device, generator=torch.Generator(device)), torch.randn(3, 4, N, device=device)

    def sampled(own_seed, global_seed):
        layer.generator.manual_seed(own_seed)
        torch.manual_seed(global_seed)
        y = layer(x)
        return y, torch.randn(3, device=device)

    torch.manual_seed(7)
    other = torch.randn(3, device=device)
    first, untouched = sampled(1, 7)
    assert torch.equal(untouched, other)
    assert torch.equal(first, sampled(1, 8)[0])
    assert not torch.equal(first, sampled(2, 7)[0])
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_all_four_parameters_and_the_input_receive_gradients(device, noise):
    layer, x = trained(device, noise=noise), torch.randn(3, 4, N, device=device, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    for name, tensor in (*layer.named_parameters(), ("x", x)):
        assert tensor.grad.isfinite().all(), name
        assert (tensor.grad != 0).all(), name
    assert all(not buffer.requires_grad for buffer in layer.buffers())


@pytest.mark.parametrize(
    "frozen", [("x",), ("weight",), ("weight_rho", "bias_rho"), PARAMETERS, ("x", "bias", "weight")]
)
def test_frozen_parts_get_no_gradient_and_the_others_the_same_one(device, frozen):
    layer, dy = trained(device), torch.randn(3, 4, N, device=device)
    x = torch.randn(3, 4, N, device=device, requires_grad=True)
    tensors = {**dict(layer.named_parameters()), "x": x}

    def gradients():
        for t in tensors.values():
            t.grad = None
        seeded(layer, x).backward(dy)
        return {name: t.grad for name, t in tensors.items()}

    expected = gradients()
    for name in frozen:
        tensors[name].requires_grad_(False)
    for name, grad in gradients().items():
        assert grad is None if name in frozen else torch.equal(grad, expected[name])


def test_nothing_to_train_makes_no_graph(device):
    layer = trained(device).requires_grad_(False)
    y = layer(torch.randn(3, N, device=device))
    assert not y.requires_grad
    assert not klnorm.kl_divergence(layer).requires_grad


def test_bad_input_in_training_is_explained(device):
    layer = KLLayerNorm(N, device=device, sample_dim=1)
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\), expected \(\.\.\., 6\)"):
        layer(torch.zeros(3, 7, device=device))
    with pytest.raises(ValueError, match="sample_dim is 1, expected 0 to 0"):
        layer(torch.zeros(3, N, device=device))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 7), [0.0] * 8, torch.zeros(3, 8, dtype=torch.long)], ids=["shape", "list", "int"]
)
def test_evaluation_checks_its_input(wrong):
    with pytest.raises((TypeError, ValueError), match=r"^x "):
        KLLayerNorm(8).eval()(wrong)


def test_evaluation_does_not_look_at_sample_dim():
    layer = KLLayerNorm(8, sample_dim=1).eval()
    for dtype in torch.float32, torch.bfloat16:
        assert layer(torch.ones(3, 8, dtype=dtype)).dtype == dtype


# Evaluation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(N,), (2, 3)])
def test_evaluation_is_layer_norm_with_the_means_bit_for_bit(device, dtype, shape):
    layer = trained(device, shape, dtype=dtype, eps=0.01).eval()
    x = torch.randn(5, 4, *shape, device=device, dtype=dtype)
    torch.manual_seed(3)
    expected_random = torch.rand(2, device=device)
    torch.manual_seed(3)
    y = layer(x)
    assert torch.equal(torch.rand(2, device=device), expected_random)  # evaluation draws nothing
    assert y.dtype == dtype
    assert torch.equal(y, F.layer_norm(x, shape, layer.weight, layer.bias, 0.01))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_has_the_dtype_of_the_input(device, dtype, parameter_dtype, autocast):
    layer = trained(device, dtype=parameter_dtype)
    x = torch.randn(5, 4, N, device=device, dtype=dtype)
    expected = F.layer_norm(x.double(), (N,), layer.weight.double(), layer.bias.double())
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    with torch.no_grad():
        layer.weight_rho.fill_(-200)  # no noise to speak of
        layer.bias_rho.fill_(-200)
    for training in False, True:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = layer.train(training)(x)
        assert y.dtype == dtype
        # rounded once, from arithmetic in fp32 or fp64 on values below 10
        torch.testing.assert_close(
            y.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=100 * arithmetic, check_dtype=False
        )


def test_evaluation_gives_gradients_to_the_means(device):
    layer, x = trained(device).eval(), torch.randn(5, N, device=device)
    dy = torch.randn_like(x)
    layer(x).backward(dy)
    plain = nn.LayerNorm(N, device=device)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    plain(x).backward(dy)
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert torch.equal(layer.bias.grad, plain.bias.grad)
