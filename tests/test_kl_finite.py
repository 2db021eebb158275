"""A KL divergence that is not finite is an error that names its layer and tensor, on a GPU a call later."""

import gc
import math
import weakref

import pytest
import torch
from kl_models import N, batch, small_model
from torch import nn

import klnorm
from klnorm import KLLayerNorm, functional, kl_divergence

# Not finite


@pytest.mark.parametrize("parameter", ["weight", "bias", "weight_rho", "bias_rho", "weight_prior", "bias_prior"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("forward", [False, True])
def test_a_tensor_that_is_not_finite_is_named_with_its_layer(device, forward, value, parameter):
    model = nn.Sequential(KLLayerNorm(N), nn.ModuleDict({"norm": KLLayerNorm(N)})).to(device)
    layer = model[1]["norm"]
    with torch.no_grad():
        getattr(layer, parameter)[3] = value
    y = layer(torch.randn(2, N, device=device)) if forward else None
    with pytest.raises(ValueError, match=rf"layer '1\.norm' is (nan|inf): {parameter} has 1 .* index 3.*Remedy"):
        kl_divergence(model)
    for kl_of_layer in layer.kl_divergence, lambda **options: kl_divergence(layer, **options):
        with pytest.raises(ValueError, match=rf"layer '\(the model itself\)' is (nan|inf): {parameter} has 1"):
            kl_of_layer()
        assert not kl_of_layer(check_finite=False).isfinite()
    assert not kl_divergence(model, check_finite=False).isfinite()
    assert math.isfinite(kl_divergence(model[0]).item())
    assert y is None or y.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prior_that_is_not_finite_is_named_by_the_functional_forms(value):
    x, scale, prior = torch.randn(2, N), torch.ones(N), torch.zeros(N)
    prior[3] = value
    explained = r"divergence is (nan|inf): {} has 1 such value\(s\), the first at index 3"
    for name in "weight_prior", "bias_prior":
        with pytest.raises(ValueError, match=explained.format(name)):
            functional.kl_layer_norm(x, N, scale, scale, scale, scale, **{name: prior})
    with pytest.raises(ValueError, match=explained.format("weight_prior")):
        functional.kl_rms_norm(x, N, scale, scale, weight_prior=prior)


def test_overflow_of_finite_parameters_is_explained(device):
    layer = KLLayerNorm(N, device=device)
    with torch.no_grad():
        layer.weight_rho.fill_(1e30)
    with pytest.raises(
        ValueError, match="every parameter and prior mean is finite, so a squared deviation or distance overflowed"
    ):
        kl_divergence(layer)


# What a later call finds


def broken(model, name="weight_rho"):
    with torch.no_grad():
        getattr(model[1], name)[2] = math.nan
    return model


def test_on_a_gpu_a_kl_that_is_not_finite_raises_a_call_later(device, like_cuda):
    model = small_model(device)
    assert kl_divergence(model).isfinite()
    model(batch(device))
    kl_divergence(broken(model))  # sends it
    with pytest.raises(
        ValueError, match=r"an earlier call found a KL divergence .* layer '1' is nan: weight_rho has 1"
    ):
        kl_divergence(model)


def test_the_layer_of_an_earlier_forward_is_named(device, like_cuda):
    model = broken(nn.Sequential(KLLayerNorm(4), KLLayerNorm(4)).to(device))
    model(torch.randn(3, 4, device=device))
    kl_divergence(model)
    with torch.no_grad():
        model[1].weight_rho.fill_(0.0)  # mended meanwhile
    model(torch.randn(3, 4, device=device))
    with pytest.raises(ValueError, match=r"the KL divergence of layer '1' was nan\. Remedy: look for a diverged step"):
        kl_divergence(model)
    for _ in range(3):  # it is said once
        model(torch.randn(3, 4, device=device))
        kl_divergence(model)


def test_what_has_not_arrived_is_waited_for_by_nobody(device, like_cuda):
    model = broken(nn.Sequential(nn.Identity(), KLLayerNorm(4)).to(device))
    like_cuda.event.late = True
    for _ in range(3):
        kl_divergence(model)
    like_cuda.event.late = False
    with pytest.raises(ValueError, match="an earlier call found"):
        kl_divergence(model)


def test_whoever_asks_for_it_waits(device, like_cuda):
    model = broken(nn.Sequential(nn.Identity(), KLLayerNorm(4)).to(device))
    with pytest.raises(ValueError, match=r"^the KL divergence of layer '1' is nan: weight_rho has 1 .* index 2"):
        kl_divergence(model, check_finite=True)
    for _ in range(3):
        assert not kl_divergence(model, check_finite=False).isfinite()


def test_models_are_told_apart_and_not_kept(device, like_cuda):
    bad, good = broken(nn.Sequential(nn.Identity(), KLLayerNorm(4)).to(device)), KLLayerNorm(4).to(device)
    kl_divergence(bad)
    for _ in range(2):
        kl_divergence(good)
    with pytest.raises(ValueError, match="an earlier call found"):
        kl_divergence(bad)
    kl_divergence(good)
    reference = weakref.ref(good)
    del good
    gc.collect()
    assert reference() is None


def test_a_rank_that_finds_it_later_communicates_with_nobody(device, like_cuda, monkeypatch):
    """Ranks see their copies arrive at different calls: one that explained sharded layers alone would wait for all."""
    model = broken(small_model(device))
    kl_divergence(model)
    monkeypatch.setattr(klnorm.finite, "is_sharded", lambda tensor: True)
    monkeypatch.setattr(KLLayerNorm, "kl_divergence", None)
    with pytest.raises(ValueError, match="KL divergence of a sharded layer was nan"):
        kl_divergence(model)
