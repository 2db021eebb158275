"""`klnorm.replace_rms_norm` tells RMSNorms by what they compute."""

import pytest
import torch
from rms_classes import (
    NO_NORMS,
    SIMILAR,
    Absolute,
    Centred,
    Doubled,
    Gated,
    IntegerScale,
    N,
    OnePlus,
    Rms,
    Subclass,
    model_of,
)
from torch import nn
from unchanged import snapshot

import klnorm
from klnorm import kl_layers, last_norms, replace_rms_norm, restore_rms_norm


@pytest.mark.parametrize("kind", [*SIMILAR, *NO_NORMS])
def test_what_computes_something_else_is_left_alone(kind):
    model = model_of(Rms(), kind())
    before = snapshot(model)[2]
    replace_rms_norm(model)
    assert list(kl_layers(model)) == ["0"]
    assert snapshot(model)[2] == before


@pytest.mark.parametrize("kind", SIMILAR)
def test_what_only_looks_like_an_rms_norm_is_refused_where_a_filter_chooses_it(kind):
    model = model_of(Rms(), kind())
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"layer '1' is a {kind.__name__}, which computes something else.*filter_fn"):
        replace_rms_norm(model, filter_fn=lambda module, name: True)
    assert snapshot(model) == before


@pytest.mark.parametrize("n", [2, 3, 1000])
def test_every_width_is_told(n):
    model = nn.Sequential(Rms(n), OnePlus(n), Centred(n), Absolute(n), Doubled(n))
    assert list(kl_layers(replace_rms_norm(model))) == ["0", "1"]


def test_the_widest_centred_norm_is_told():
    model = nn.Sequential(Rms(), Centred(2**20))
    assert list(kl_layers(replace_rms_norm(model))) == ["0"]


def test_a_class_for_inference_that_works_in_place_is_replaced():
    class InPlace(Rms):
        def forward(self, x):
            x *= torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
            return torch.mul(x, self.weight, out=torch.empty_like(x))

    assert list(kl_layers(replace_rms_norm(nn.Sequential(InPlace())))) == ["0"]


def test_a_negative_eps_is_no_norms():
    assert list(kl_layers(replace_rms_norm(nn.Sequential(Rms(eps=-0.01), Rms())))) == ["1"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_norm_and_one_of_integers_are_left_alone():
    model = nn.Sequential(torch.jit.script(nn.RMSNorm(N)), IntegerScale(), Rms())
    assert list(kl_layers(replace_rms_norm(model))) == ["2"]


def test_filter_is_asked_for_what_is_built_like_an_rms_norm():
    kinds = [nn.RMSNorm, Subclass, nn.LayerNorm, nn.Linear]
    model = model_of(*(kind(N) if kind is not nn.Linear else kind(N, N) for kind in kinds))
    model.extend([nn.LayerNorm(N, bias=False), *(kind() for kind in (*SIMILAR, *NO_NORMS, OnePlus))])
    asked = {}
    replace_rms_norm(model, filter_fn=lambda module, name: asked.setdefault(name, type(module)) is OnePlus)
    assert list(asked.values()) == [nn.RMSNorm, Subclass, *SIMILAR, OnePlus]
    assert [type(layer).__name__ for layer in kl_layers(model).values()] == ["KLOnePlus"]


def test_last_norms_count_rms_norms_and_those_replaced_already():
    model = model_of(nn.RMSNorm(N), Rms(), Doubled(), nn.LayerNorm(N), OnePlus(), Gated())
    for _ in range(2):
        assert list(kl_layers(replace_rms_norm(model, filter_fn=last_norms(2)))) == ["1", "4"]
    with pytest.raises(ValueError, match="k is 4, expected at most 3"):
        replace_rms_norm(model, filter_fn=last_norms(4))


def test_the_two_kinds_of_norm_do_not_meet():
    model = model_of(nn.LayerNorm(N), nn.RMSNorm(N), Rms())
    before = snapshot(model)
    assert list(kl_layers(klnorm.replace_layer_norm(model))) == ["0"]
    assert list(kl_layers(replace_rms_norm(model))) == ["0", "1", "2"]
    assert list(kl_layers(restore_rms_norm(model))) == ["0"]
    assert snapshot(klnorm.restore_layer_norm(model)) == before


def test_a_model_without_rms_norms_warns():
    with pytest.warns(UserWarning, match=r"found no RMSNorm to replace.*replace_layer_norm"):
        replace_rms_norm(model_of(nn.LayerNorm(N)))
