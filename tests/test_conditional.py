"""`KLConditionalLayerNorm` computes what its definition says, of every sample by itself, without its padding."""

import pytest
import torch
import torch.nn.functional as F
from conditional_layers import (
    CONDITIONS,
    NOISES,
    C,
    N,
    assert_same,
    differentiable,
    exactness,
    gradients,
    inputs,
    specified,
    trained,
)
from trained_layers import seeded

from klnorm import KLConditionalLayerNorm, KLLayerNorm, kl_divergence

# What it computes


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
@pytest.mark.parametrize(("leading", "sample_dim"), [((4, 5), 0), ((5, 4), 1), ((1, 5), 0), ((4,), 0), ((2, 3, 2), 1)])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_agrees_with_its_definition(device, condition, leading, sample_dim, noise, bias):
    """Output, KL divergence, and all gradients: of x through the summary too, of conditions, U, V and the rest."""
    options = {"noise": "batch" if noise == "none" else noise, "sample_dim": sample_dim, "bias": bias}
    layer = trained(condition, device, eps=0.1, prior_std=0.4, **options).train(noise != "none")
    x, given = inputs(condition, leading, device, sample_dim=sample_dim)
    y = seeded(layer, x, **given)
    found = [y, kl_divergence(layer)] if layer.training else [y]
    expected = specified(layer, x, **given)[: len(found)]
    tolerance = 10 * exactness(device)
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), tolerance)
    tensors = x, *differentiable(given)
    found, expected = gradients(found, layer, *tensors), gradients(expected, layer, *tensors)
    for name, gradient in found.items():
        if expected[name] is None:  # deviations have no part in evaluation
            assert not gradient.any()
            assert name.endswith("_rho")
            assert not layer.training
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_gradcheck(condition):
    layer = trained(condition, prior_std=0.5)
    x, given = inputs(condition, (2, 2))
    tensors = [x, *differentiable(given), *layer.parameters()]

    def function(x, *rest):
        options = dict(given) if condition == "self" else {"condition": rest[0]}
        return seeded(layer, x, **options), kl_divergence(layer)

    assert torch.autograd.gradcheck(function, tensors)


def test_hand_worked_values(device):
    # mean 2, variance 1, and with eps = 3 rstd = 1/2: xhat = (-1/2, 1/2), (1/2, -1/2), and (0, 0) for the last row
    x = torch.tensor([[[1.0, 3.0], [3.0, 1.0], [5.0, 5.0]]], device=device)
    layer = KLConditionalLayerNorm(2, rank=1, eps=3.0, device=device).eval()
    with torch.no_grad():
        layer.condition_down.copy_(torch.tensor([[2.0, 0.0]]))
        layer.condition_up.copy_(torch.tensor([[[1.0, 10.0]], [[0.0, 0.0]], [[3.0, -3.0]], [[0.0, 0.0]]]))
    # c of the first row is xhat: V c = -1, weight (1 - 1, 1 - 10), bias (0 - 3, 0 + 3)
    y = layer(x, mask=torch.tensor([[1, 0, 0]], device=device))
    assert y.tolist() == [[[-3.0, -1.5], [-3.0, 7.5], [-3.0, 3.0]]]
    # over the first and the last row c = (-1/4, 1/4): V c = -1/2, weight (1/2, -4), bias (-3/2, 3/2)
    y = layer(x, mask=torch.tensor([[1, 0, 1]], device=device))
    assert y.tolist() == [[[-1.75, -0.5], [-1.25, 3.5], [-1.5, 1.5]]]
    # over all three c = 0, as over none
    for mask in None, torch.zeros(1, 3, dtype=torch.bool, device=device):
        assert layer(x, mask=mask).tolist() == [[[-0.5, 0.5], [0.5, -0.5], [0.0, 0.0]]]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", [(4, 5, N), (3, N), (1, 5, N), (N,), (5, 4, N)])
def test_a_new_layer_is_the_static_one_bit_for_bit(device, shape, condition, noise, bias):
    options = {"noise": noise, "bias": bias, "sample_dim": 1 if shape[0] == 5 and noise != "token" else 0}
    static, ours = (
        KLLayerNorm(N, device=device, **options),
        KLConditionalLayerNorm(N, condition, device=device, **options),
    )
    with torch.no_grad():
        for name, t in (*ours.named_parameters(), *ours.named_buffers()):
            if not name.startswith("condition"):
                getattr(static, name).copy_(t.add_(torch.randn_like(t) * 0.3))
    x = torch.randn(shape, device=device)
    samples = 1 if len(shape) == 1 else shape[ours.sample_dim]
    given = () if condition == "self" else (torch.randn(samples, C, device=device),)
    y = seeded(static, x)
    assert torch.equal(seeded(ours, x, *given), y)
    torch.testing.assert_close(kl_divergence(ours), kl_divergence(static), rtol=1e-6, atol=0)  # a mean of equals
    ours.eval(), static.eval()
    narrow = x.bfloat16()  # beside fp32 parameters: there a KLLayerNorm runs klnorm's own arithmetic as well
    assert torch.equal(ours(narrow, *given), static(narrow))
    assert not torch.equal(ours(x, *given), y)
    # torch's LayerNorm, which evaluates a KLLayerNorm here, rounds in another order: some roundings of values below 8
    torch.testing.assert_close(ours(x, *given), static(x), rtol=0, atol=16 * torch.finfo(torch.float32).eps)


def test_the_noise_is_that_of_its_generator(device):
    one, other = (trained(device=device, generator=torch.Generator(device).manual_seed(3)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x, given = inputs("self", device=device)
    assert torch.equal(seeded(one, x, seed=1, **given), y := seeded(other, x, seed=2, **given))
    assert not torch.isclose(one(x, **given), y).any()


def test_several_normalized_dimensions(device):
    layer, flat = trained(device=device, shape=(2, 3)), trained(device=device)
    state = layer.state_dict()
    flat.load_state_dict({k: v if k.startswith("condition") else v.flatten() for k, v in state.items()})
    x, given = inputs("self", device=device, shape=(2, 3))
    assert torch.equal(seeded(layer, x, **given), seeded(flat, x.flatten(2), **given).unflatten(2, (2, 3)))
    assert torch.equal(kl_divergence(layer), kl_divergence(flat))


@pytest.mark.parametrize("training", [True, False])
def test_a_sample_does_not_see_the_others(device, training):
    layer, (x, given) = trained(device=device).train(training), inputs("self", device=device)
    y = seeded(layer, x, **given)
    other = torch.cat([x[:1], torch.randn_like(x[1:])])
    changed = seeded(layer, other, **given)
    assert torch.equal(changed[0], y[0])
    assert not torch.isclose(changed[1:], y[1:]).all()


def test_no_rows_give_empty_output_and_the_static_divergence(device):
    layer = trained(device=device)
    y = layer(torch.zeros(3, 0, N, dtype=torch.float64, device=device))
    assert y.shape == (3, 0, N)
    static = KLLayerNorm(N, device=device, dtype=torch.float64)
    static.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("condition")})
    torch.testing.assert_close(kl_divergence(layer), kl_divergence(static), rtol=1e-6, atol=0)


# Padding


@pytest.mark.parametrize("mode", ["batch", "sample", "eval"])
def test_padding_does_not_matter(device, mode):
    layer = trained(device=device, noise="batch" if mode == "eval" else mode).train(mode != "eval")
    alone = torch.randn(1, 3, N, dtype=torch.float64, device=device, requires_grad=True)
    padding = torch.full((1, 4, N), 1e3, dtype=torch.float64, device=device).add_(torch.randn_like(alone[:, :1]))
    padding.requires_grad_()
    others = torch.randn(2, 7, N, dtype=torch.float64, device=device)
    mask = torch.ones(3, 7, dtype=torch.int64, device=device)  # like an attention_mask
    mask[0, 3:] = 0
    batch = torch.cat([torch.cat([alone, padding], dim=1), others])
    y, expected = seeded(layer, batch, mask=mask)[:1, :3], seeded(layer, alone)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, [alone, padding], cotangent)
    (wanted,) = torch.autograd.grad(expected, alone, cotangent)
    torch.testing.assert_close(found[0], wanted, rtol=1e-12, atol=1e-12)
    assert not found[1].any()
    assert not torch.isclose(seeded(layer, batch)[:1, :3], expected).any()  # without the mask it does


def test_padding_that_is_not_finite_stays_in_its_rows(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    real, broken = given["mask"], x.detach().clone()
    broken[~real] = float("nan")
    y = seeded(layer, broken, mask=real)
    assert torch.equal(y[real], seeded(layer, x, mask=real)[real])
    assert y[~real].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_masks_of_any_integer_dtype_mean_the_same(device, dtype):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    assert torch.equal(seeded(layer, x, mask=given["mask"].to(dtype)), seeded(layer, x, **given))
    assert not torch.isclose(seeded(layer, x), seeded(layer, x, **given)).any()


def test_a_sample_without_real_rows_has_the_static_posterior(device):
    layer = trained(device=device).eval()
    x = torch.randn(2, 3, N, dtype=torch.float64, device=device, requires_grad=True)
    y = layer(x, mask=torch.tensor([[True] * 3, [False] * 3], device=device))
    static = F.layer_norm(x, (N,), layer.weight, layer.bias)
    torch.testing.assert_close(y[1], static[1], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(y[0], static[0]).any()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()
