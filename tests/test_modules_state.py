"""The state of a KLLayerNorm goes where that of an nn.LayerNorm goes, and a plain one makes it mean and prior."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trained_layers import DTYPES, STATE, N, seeded, trained

import klnorm
from klnorm import KLLayerNorm


def same_state(layer, other):
    state, expected = layer.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("layer", [KLLayerNorm, klnorm.KLConditionalLayerNorm])
def test_a_plain_state_that_is_no_tensor_is_refused_as_by_torch(layer, name, assign):
    def error_of(module):
        with pytest.raises(RuntimeError) as raised:
            module.load_state_dict({"weight": torch.ones(N), "bias": torch.zeros(N), name: "abc"}, assign=assign)
        return str(raised.value).partition("\n")[2]

    assert error_of(layer(N)) == error_of(nn.LayerNorm(N))


def test_reset_parameters_restores_a_new_layer(device):
    options = {"init_std": 0.2, "bias": True}
    layer = trained(device, **options)
    parameters = list(layer.parameters())
    assert not same_state(layer, KLLayerNorm(N, device=device, **options))
    layer.reset_parameters()
    assert same_state(layer, KLLayerNorm(N, device=device, **options))
    assert all(p is q for p, q in zip(parameters, layer.parameters(), strict=True))


# Copies and moves


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("own_generator", [False, True])
def test_copies_are_equal_and_independent_even_while_a_graph_is_alive(device, duplicate, own_generator):
    generator = torch.Generator(device).manual_seed(5) if own_generator else None
    layer = trained(device, noise="token", prior_std=0.4, generator=generator)
    x = torch.randn(3, 4, N, device=device)
    y = layer(x)
    kl = klnorm.kl_divergence(layer)
    other = duplicate(layer)
    assert type(other) is KLLayerNorm
    assert same_state(layer, other)
    assert repr(other) == repr(layer)
    assert torch.equal(seeded(layer, x), seeded(other, x))
    assert torch.equal(seeded(layer, x), seeded(other, x))  # the copies' generators move on separately
    torch.testing.assert_close(klnorm.kl_divergence(other), kl)
    (kl.detach() + y.sum() + klnorm.kl_divergence(other)).backward()  # the copy's KL has a graph of its own
    torch.testing.assert_close(klnorm.kl_divergence(layer), kl)
    with torch.no_grad():
        other.weight.add_(1)
    assert klnorm.kl_divergence(other) > kl + 1
    torch.testing.assert_close(klnorm.kl_divergence(layer), kl)


def test_whole_module_survives_torch_save(device, tmp_path):
    layer, x = trained(device), torch.randn(3, N, device=device)
    y = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert y.requires_grad
    assert same_state(layer, loaded)
    assert torch.equal(seeded(layer, x), seeded(loaded, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_to_dtype_casts_parameters_and_priors(device, dtype):
    layer = trained(device)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.to(dtype)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key].to(dtype)), key
    assert layer(torch.randn(3, N, device=device, dtype=dtype)).dtype == dtype


def test_meta_construction_to_empty_and_reset(device):
    with torch.device("meta"):
        implicit = KLLayerNorm(N, init_std=0.3)
    for layer in implicit, KLLayerNorm(N, init_std=0.3, device="meta"), KLLayerNorm(N, init_std=0.3).to("meta"):
        assert all(t.is_meta for t in layer.state_dict().values())
        assert layer(torch.zeros(3, N, device="meta")).shape == (3, N)
        layer.to_empty(device=device)
        layer.reset_parameters()
        assert same_state(layer, KLLayerNorm(N, init_std=0.3, device=device))


# State


def plain_checkpoint(device="cpu", **options):
    plain = nn.LayerNorm(N, device=device, **options)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p))
    return plain.state_dict()


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_a_plain_checkpoint_becomes_means_and_prior(device, bias, assign):
    layer, checkpoint = trained(device, bias=bias), plain_checkpoint(device, bias=bias)
    rho = layer.weight_rho.detach().clone()
    given = dict(checkpoint)
    result = layer.load_state_dict(checkpoint, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert checkpoint.keys() == given.keys()
    assert all(checkpoint[key] is given[key] for key in given)
    assert torch.equal(layer.weight, checkpoint["weight"])
    assert torch.equal(layer.weight_prior, checkpoint["weight"])
    assert torch.equal(layer.weight_rho, rho)
    assert layer.bias is None or torch.equal(layer.bias_prior, checkpoint["bias"])
    loaded = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(layer.weight_prior, loaded), "the prior is an alias of the mean"
    with torch.no_grad():
        checkpoint["weight"].add_(1)
    assert torch.equal(layer.weight_prior, loaded), "the prior is an alias of the checkpoint"
    assert layer.weight_rho.requires_grad


def test_a_plain_checkpoint_loads_into_a_nested_model(device):
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, device=device), 2, enable_nested_tensor=False)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p))
    model = klnorm.replace_layer_norm(copy.deepcopy(plain))
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.fill_(0.5)
    checkpoint = plain.state_dict()
    keys = list(checkpoint)
    model.load_state_dict(checkpoint, strict=True)
    assert list(checkpoint) == keys
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, KLLayerNorm)}
    assert len(layers) == 4
    for name, layer in layers.items():
        assert torch.equal(layer.weight, checkpoint[f"{name}.weight"])
        assert torch.equal(layer.bias_prior, checkpoint[f"{name}.bias"])
        assert (layer.bias_rho == 0.5).all()
    x = torch.randn(5, 3, 8, device=device)
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_a_plain_checkpoint_assigned_to_a_meta_layer_gives_a_layer_that_works(device):
    layer = KLLayerNorm(N, device="meta", init_std=0.2)
    layer.load_state_dict(plain_checkpoint(device), assign=True)
    y = layer(torch.randn(3, N, device=device))
    assert y.isfinite().all()
    torch.testing.assert_close(F.softplus(layer.weight_rho), torch.full_like(layer.weight, 0.2))


def test_a_plain_checkpoint_of_another_dtype_gives_a_layer_that_works_when_assigned(device):
    layer = KLLayerNorm(N, device=device, dtype=torch.bfloat16)
    layer.load_state_dict(plain_checkpoint(device), assign=True)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer(torch.randn(3, N, device=device)).isfinite().all()


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saved_layer_reloads_bit_for_bit(device, dtype, assign, tmp_path):
    layer = trained(device, dtype=dtype)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = KLLayerNorm(N, device=device, dtype=dtype)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True, assign=assign)
    assert same_state(layer, other)
    assert other.state_dict().keys() == STATE


@pytest.mark.parametrize("missing", sorted(STATE))
def test_a_partly_missing_state_is_reported(device, missing):
    layer = trained(device)
    state = layer.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == [missing]


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        (["weight"], {"bias", "bias_rho", "bias_prior"}),
        (["bias"], {"weight", "weight_rho", "bias_rho", "weight_prior", "bias_prior"}),
        (["weight", "bias", "weight_rho", "bias_rho"], {"weight_prior", "bias_prior"}),
        (["weight", "bias", "weight_prior", "bias_prior"], {"weight_rho", "bias_rho"}),
        (["weight", "bias", "bias_rho", "bias_prior"], {"weight_rho", "weight_prior"}),
    ],
)
def test_only_the_state_of_a_plain_layer_is_filled_in(device, kept, missing):
    layer = trained(device)
    state = {key: value for key, value in layer.state_dict().items() if key in kept}
    assert set(layer.load_state_dict(state, strict=False).missing_keys) == missing


def test_an_unexpected_key_is_reported(device):
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        trained(device, bias=False).load_state_dict(plain_checkpoint(device))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"gamma"'):
        trained(device).load_state_dict({**plain_checkpoint(device), "gamma": torch.zeros(N)})


def test_a_checkpoint_of_another_shape_is_reported(device):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        KLLayerNorm(N + 1, device=device).load_state_dict(plain_checkpoint(device))


def test_rho_stays_when_a_bf16_checkpoint_is_copied_in(device):
    layer = KLLayerNorm(8).to(device)
    before = layer.weight_rho.detach().clone()
    layer.load_state_dict(nn.LayerNorm(8, dtype=torch.bfloat16, device=device).state_dict())
    assert torch.equal(layer.weight_rho, before)
