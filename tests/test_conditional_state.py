"""The state of a conditional layer goes around, and that of a static layer makes it that layer."""

import pytest
import torch
import torch.nn.functional as F
from conditional_layers import CONDITIONS, C, N, inputs, trained
from torch import nn
from trained_layers import perturbed, seeded

from klnorm import KLConditionalLayerNorm, KLLayerNorm


@pytest.mark.parametrize("condition", CONDITIONS)
def test_state_goes_around(device, condition):
    layer, other = trained(condition, device), trained(condition, device)
    x, given = inputs(condition, device=device)
    assert not other.load_state_dict(layer.state_dict()).missing_keys
    assert torch.equal(seeded(layer, x, **given), seeded(other, x, **given))
    assert layer.state_dict().keys() == {
        "weight", "bias", "weight_rho", "bias_rho", "weight_prior", "bias_prior", "condition_down", "condition_up",
    }  # fmt: skip
    other.load_state_dict({}, strict=False)
    assert torch.equal(other.condition_up, layer.condition_up)
    broken = layer.state_dict()
    del broken["condition_up"]
    with pytest.raises(RuntimeError, match="condition_up"):
        other.load_state_dict(broken)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("static", [nn.LayerNorm, KLLayerNorm])
@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
def test_a_static_layers_state_makes_it_that_layer(device, static, assign, meta):
    plain = perturbed(static(N, device=device, dtype=torch.float64))
    layer = trained(device=device)
    if meta:
        layer.to("meta") if assign else layer.to("meta").to_empty(device=device)
        if not assign:
            layer.reset_parameters()
    layer.load_state_dict(plain.state_dict(), assign=assign)
    assert not layer.condition_up.any()
    assert layer.condition_down.std() > 0.1
    assert layer.condition_up.requires_grad
    x = torch.randn(4, 5, N, dtype=torch.float64, device=device)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x), rtol=1e-14, atol=1e-14)
    assert torch.equal(layer.weight_prior, plain.weight if static is nn.LayerNorm else plain.weight_prior)


def test_reset_and_to_empty(device):
    meta = KLConditionalLayerNorm(N, C, rank=5, device="meta")
    assert meta(torch.zeros(2, 3, N, device="meta"), torch.zeros(2, C, device="meta")).shape == (2, 3, N)
    for layer in trained(C, device), meta.to_empty(device=device):
        layer.reset_parameters()
        assert not layer.condition_up.any()
        assert 0 < layer.condition_down.abs().max() <= C**-0.5  # uniform, as the weight of an nn.Linear
        assert layer.weight.tolist() == layer.weight_prior.tolist() == [1.0] * N
        torch.testing.assert_close(F.softplus(layer.bias_rho), torch.full_like(layer.bias_rho, 0.05))


def test_transformers_initializes_what_a_checkpoint_lacks(device):
    layer, state = trained(device=device), trained(device=device).state_dict()
    with torch.no_grad():
        for name, t in layer.state_dict(keep_vars=True).items():
            loaded = not name.endswith(("_rho", "_up"))
            t.copy_(state[name]) if loaded else t.fill_(float("nan"))
            t._is_hf_initialized = loaded
        layer._is_hf_initialized = True
    assert not layer.condition_up.any()
    assert layer.weight_rho.isfinite().all()
    assert torch.equal(layer.condition_down, state["condition_down"])


def test_representation_names_the_overhead():
    text = repr(KLConditionalLayerNorm(8, condition=3, rank=2))
    assert "condition=3, rank=2, parameters=102: 70 more than KLLayerNorm (+219%), 86 more than nn.LayerNorm" in text
    layer = KLConditionalLayerNorm(768, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 768 + 4 * 768 + 2 * 4 * 768
    assert "condition='self', rank=4, parameters=10752: 9216 more than KLLayerNorm (+600%), 9984 more than" in repr(
        layer
    )
