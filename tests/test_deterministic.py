"""The deterministic reading as a layer: posterior="deterministic" of `KLLayerNorm`, `KLRMSNorm` and replacement."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from trained_layers import N, assert_compiles, perturbed

import klnorm
from klnorm import KLLayerNorm, KLRMSNorm
from klnorm.reference.kl_norm import FLOOR, kl_deterministic

PRIOR_STD = 0.8
# A layer with a shift, one that could have one, one that cannot.
LAYERS = {
    "layer_norm": lambda **options: KLLayerNorm(N, **options),
    "no_bias": lambda **options: KLLayerNorm(N, bias=False, **options),
    "rms_norm": lambda **options: KLRMSNorm(N, eps=1e-5, **options),
}
PLAIN = {
    "layer_norm": lambda **options: nn.LayerNorm(N, **options),
    "no_bias": lambda **options: nn.LayerNorm(N, bias=False, **options),
    "rms_norm": lambda **options: nn.RMSNorm(N, eps=1e-5, **options),
}
every_kind = pytest.mark.parametrize("kind", LAYERS)


def deterministic(kind, device="cpu", **options):
    return perturbed(LAYERS[kind](device=device, posterior="deterministic", prior_std=PRIOR_STD, **options))


def expected_kl(layer):
    zero = torch.zeros_like(layer.weight)
    shift, prior = (zero, zero) if layer.bias is None else (layer.bias, layer.bias_prior)
    return kl_deterministic(layer.weight, shift, prior, PRIOR_STD).sum()


@every_kind
def test_has_the_parameters_of_the_plain_norm_and_no_others(kind):
    layer, plain = LAYERS[kind](posterior="deterministic"), PLAIN[kind]()
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in plain.named_parameters()]
    extra = {"bias_prior"} if kind == "layer_norm" else set()
    assert layer.state_dict().keys() - plain.state_dict().keys() == extra
    assert layer.weight_rho is layer.bias_rho is layer.weight_prior is None
    assert "posterior='deterministic', prior_std=0.1" in repr(layer)


@every_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computes_the_plain_norm_and_draws_nothing(device, kind, training, dtype):
    layer = deterministic(kind, device, dtype=dtype).train(training)
    plain = PLAIN[kind](device=device, dtype=dtype)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "prior" not in name})
    x = torch.randn(3, 4, N, device=device, dtype=dtype)
    state = torch.get_rng_state()
    y = layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer(x), y)
    # evaluation mode is torch's own; training rounds once, from fp32 values below 10
    tolerance = 2 * torch.finfo(dtype).eps if training else 0
    torch.testing.assert_close(y, plain(x), rtol=tolerance, atol=10 * torch.finfo(torch.float32).eps * training)


@every_kind
def test_divergence_is_that_of_the_reference_from_the_forward_and_in_closed_form(device, kind):
    layer = deterministic(kind, device, dtype=torch.float64)
    y = layer(torch.randn(3, N, device=device, dtype=torch.float64))
    from_forward = layer._take_kl()
    assert from_forward.grad_fn is y.grad_fn, "the KL is no by-product of the forward"
    gradients = torch.autograd.grad(from_forward, list(layer.parameters()))
    del y
    closed, expected = layer.kl_divergence(), expected_kl(layer)
    assert closed.grad_fn is not from_forward.grad_fn
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if device.type == "cpu" else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(closed, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(from_forward, closed, **tolerance)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(layer.parameters())), **tolerance)


@every_kind
def test_gradcheck(kind):
    layer = deterministic(kind, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    with torch.no_grad():
        layer.weight[0] = 3 * FLOOR * PRIOR_STD  # near the floor, where the KL bends most

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x), self.layer.kl_divergence()

    def function(x, *parameters):
        return functional_call(Both(), {f"layer.{name}": p for name, p in zip(names, parameters, strict=True)}, (x,))

    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    assert gradcheck(function, (x, *(p.detach().clone().requires_grad_() for p in parameters)), eps=1e-7)


@pytest.mark.parametrize("noise", ["sample", "token"])
@every_kind
def test_settings_of_the_noise_have_no_effect(kind, noise):
    x = torch.randn(3, 4, N)
    torch.manual_seed(0)
    layer = deterministic(kind)
    torch.manual_seed(0)
    other = deterministic(kind, noise=noise, sample_dim=7, init_std=3.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), other(x))
    assert torch.equal(klnorm.kl_divergence(layer), klnorm.kl_divergence(other))


def test_a_weight_of_0_is_held_off_by_a_finite_cost():
    layer = KLLayerNorm(N, posterior="deterministic", prior_std=1.0)
    with torch.no_grad():
        layer.weight.zero_()
    kl = klnorm.kl_divergence(layer)
    kl.backward()
    assert kl.item() == pytest.approx(N * (torch.tensor(1000.0).log().item() - 0.5), rel=1e-6)
    assert torch.equal(layer.weight.grad, torch.zeros(N))


def test_the_divergence_pulls_weights_to_the_deviation_of_the_prior_and_shifts_to_its_mean():
    layer = perturbed(KLLayerNorm(N, posterior="deterministic", prior_std=0.5))
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        klnorm.kl_divergence(layer).backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight, torch.full((N,), 0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.bias, layer.bias_prior, rtol=0, atol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@every_kind
def test_copies(kind, duplicate):
    layer, x = deterministic(kind), torch.randn(3, N)
    other = duplicate(layer)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(klnorm.kl_divergence(layer), klnorm.kl_divergence(other))


@every_kind
def test_meta_and_reset(kind):
    layer = LAYERS[kind](posterior="deterministic", device="meta")
    layer.to_empty(device="cpu").reset_parameters()
    expected = LAYERS[kind](posterior="deterministic").state_dict()
    assert layer.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())


# State


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@every_kind
def test_a_plain_checkpoint_loads_and_its_shift_becomes_the_prior(kind, assign):
    layer, checkpoint = deterministic(kind), perturbed(PLAIN[kind]()).state_dict()
    layer.load_state_dict(checkpoint, strict=True, assign=assign)
    assert torch.equal(layer.weight, checkpoint["weight"])
    if kind == "layer_norm":
        assert torch.equal(layer.bias_prior, checkpoint["bias"])
        assert layer.bias_prior.data_ptr() != layer.bias.data_ptr()


@every_kind
def test_a_saved_layer_reloads_bit_for_bit(kind):
    layer, other = deterministic(kind), LAYERS[kind](posterior="deterministic", prior_std=PRIOR_STD)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(klnorm.kl_divergence(layer), klnorm.kl_divergence(other))


def test_the_two_readings_do_not_load_each_others_state():
    sampled, fixed = KLLayerNorm(N), deterministic("layer_norm")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_rho"'):
        fixed.load_state_dict(sampled.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_rho"'):
        sampled.load_state_dict(fixed.state_dict())


# Replacement


def model_of(kind):
    return perturbed(nn.Sequential(nn.Linear(4, N), PLAIN[kind](), nn.Linear(N, 3)))


def functions(kind):
    if kind == "rms_norm":
        return klnorm.replace_rms_norm, klnorm.restore_rms_norm
    return klnorm.replace_layer_norm, klnorm.restore_layer_norm


@pytest.mark.parametrize("prior", ["current", "standard"])
@every_kind
def test_replacing_and_restoring(kind, prior):
    model, x = model_of(kind).eval(), torch.randn(5, 4)
    before, y, parameters = copy.deepcopy(model), model(x), list(model.parameters())
    replace, restore = functions(kind)
    replace(model, posterior="deterministic", prior_std=PRIOR_STD, prior=prior)
    layer = model[1]
    assert layer.posterior == "deterministic"
    assert torch.equal(model(x), y)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    if kind == "layer_norm":
        assert torch.equal(layer.bias_prior, layer.bias if prior == "current" else torch.zeros(N))
    torch.testing.assert_close(klnorm.kl_divergence(model), expected_kl(layer))
    restore(model)
    assert type(model[1]) is type(before[1])
    assert vars(model[1]).keys() == vars(before[1]).keys()
    assert model.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(model(x), y)


def test_an_unknown_reading_is_refused_and_leaves_the_model_unchanged():
    model = model_of("layer_norm")
    with pytest.raises(ValueError, match="posterior is 'fixed', expected one of 'sampled', 'deterministic'"):
        klnorm.replace_layer_norm(model, posterior="fixed")
    assert type(model[1]) is nn.LayerNorm


# What works on models


@every_kind
def test_optimizer_groups_and_weight_of_the_divergence(kind):
    replace, _ = functions(kind)
    model = replace(model_of(kind), posterior="deterministic")
    groups = {group["name"]: group["params"] for group in klnorm.param_groups(model, lr=1e-3)}
    assert groups.keys() == {"decay", "no_decay"}
    assert any(p is model[1].weight for p in groups["no_decay"])
    assert klnorm.KLWeight(per_parameter=model).value == 1 / N  # a Gaussian for every feature


@every_kind
def test_summary_has_one_posterior_a_layer(kind):
    layer = deterministic(kind)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, N + 1) * torch.tensor([1.0, -1.0]).repeat(N // 2))
    row = klnorm.summary(nn.Sequential(layer)).layers["0"]
    assert row.shift is None
    assert row.scale.kl == pytest.approx(expected_kl(layer).item(), rel=1e-5)
    assert row.scale.deviation == (N + 1) / 2
    if kind == "layer_norm":
        ratios = (layer.bias - layer.bias_prior).abs() / layer.weight.abs()
        assert row.scale.snr == pytest.approx(ratios.sort().values[2:4].mean().item(), rel=1e-5)  # the median
    else:
        assert row.scale.snr == 0


def test_a_summary_of_no_divergence_has_no_minus():
    text = repr(klnorm.summary(KLLayerNorm(N, posterior="deterministic", prior_std=1.0)))
    assert " 0.00" in text
    assert "-0.00" not in text


def test_both_readings_in_one_model():
    model = nn.Sequential(KLLayerNorm(N, init_std=0.5), deterministic("rms_norm")).eval()
    x = torch.randn(5, N)
    torch.testing.assert_close(
        klnorm.kl_divergence(model), klnorm.kl_divergence(model[0]) + klnorm.kl_divergence(model[1])
    )
    with klnorm.sampling(model):
        assert not torch.isclose(model(x), model(x)).any()
    assert torch.equal(model(x), model(x))
    assert klnorm.KLWeight(per_parameter=model).value == 1 / (3 * N)


def test_sampling_a_model_that_cannot_is_refused():
    model = nn.Sequential(deterministic("layer_norm"))
    with pytest.raises(ValueError, match='no KL layer with posterior="sampled", expected at least one'):
        klnorm.mc_predict(model, torch.randn(2, N))


def test_sharded_parameters_give_the_same_divergence(device, process_group):
    from torch.distributed.fsdp import fully_shard

    for kind in LAYERS:
        layer = deterministic(kind, device)
        expected = expected_kl(layer)
        gradient = torch.autograd.grad(expected, layer.weight)[0]
        sharded = fully_shard(layer)
        kl = klnorm.kl_divergence(sharded)
        torch.testing.assert_close(kl, expected)
        kl.backward()
        torch.testing.assert_close(klnorm.compat.whole(sharded.weight.grad), gradient)


def test_the_shortcut_of_a_transformer_layer_stays_right():
    """nn.TransformerEncoderLayer reads the norms' parameters in evaluation mode: the same values."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = layer(x)
        after = klnorm.replace_layer_norm(layer, posterior="deterministic")(x)
    assert torch.equal(before, after)


@every_kind
def test_compiles_without_a_break(device, kind, fresh_dynamo):
    layer = deterministic(kind, device)
    assert_compiles(layer, torch.randn(3, 4, N, device=device))


def test_the_normalized_activation_has_the_distribution_that_the_divergence_is_of(device):
    """y_j over many random inputs has mean bias_j and deviation |weight_j|."""
    layer = deterministic("layer_norm", device).eval()
    y = layer(torch.randn(200_000, N, device=device))
    # xhat has unit variance over features; over rows too, as they are alike. 3 / sqrt(2e5) = 0.7 % of a deviation
    torch.testing.assert_close(y.mean(0), layer.bias, rtol=0, atol=0.01)
    torch.testing.assert_close(y.std(0), layer.weight.abs(), rtol=0.01, atol=0)
