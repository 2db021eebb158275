"""What errors advise is done, and helps: those of prediction and of a KL divergence that is not finite.

The remedies of other messages stand beside the tests of those messages.
"""

import math
import re

import pytest
import torch
from torch import nn

import klnorm

N = 8


def model_of(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.Linear(N, 3))


class Listing(nn.Module):
    """Returns its logits in a list."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return [self.model(x)]


class First(nn.Module):
    """The logits of `Listing`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[0]


def predict(model, **options):
    return klnorm.mc_predict(model, torch.randn(4, N), samples=2, **options)


def diverged(parameter, value):
    """(a model with a layer that is not as it was saved, what was saved)."""
    model = model_of(klnorm.KLLayerNorm(N), klnorm.KLLayerNorm(N))
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        getattr(model[1], parameter).fill_(value)
    return model, saved


def load_a_good_checkpoint(model, saved):
    model.load_state_dict(saved)
    return klnorm.kl_divergence(model)


def two_far_from_their_priors():
    """Their divergences are finite in fp32, 2.5e38, and the sum is not."""
    model = model_of(klnorm.KLLayerNorm(N, bias=False), klnorm.KLLayerNorm(N, bias=False))
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight.fill_(8e17)
    return (model,)


def look_for_a_posterior_far_from_its_prior(model):
    for name, row in klnorm.summary(model).layers.items():
        assert row.kl > 1e38
        layer = model.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(layer.weight_prior)
    return klnorm.kl_divergence(model)


PLAIN = model_of(nn.LayerNorm(N), nn.RMSNorm(N))
KL = klnorm.replace_layer_norm(model_of(nn.LayerNorm(N)))
BAD_STEP = "look for a diverged step or a bad checkpoint"
# name -> (what makes the arguments, what fails with them, what the error says, what it advises)
TABLE = {
    "sampling, LayerNorm": (
        lambda: (PLAIN,), predict, "Remedy: klnorm.replace_layer_norm(model) or",
        lambda model: predict(klnorm.replace_layer_norm(model)),
    ),
    "sampling, RMSNorm": (
        lambda: (model_of(nn.RMSNorm(N)),), predict, "or klnorm.replace_rms_norm(model) first",
        lambda model: predict(klnorm.replace_rms_norm(model)),
    ),
    "a list": (
        lambda: (Listing(KL),), predict, "Remedy: wrap the model in a module that returns its logits",
        lambda model: predict(First(model)),
    ),
    "nan": (lambda: diverged("bias", math.nan), lambda model, _: klnorm.kl_divergence(model), BAD_STEP,
            load_a_good_checkpoint),
    "nan of a layer": (lambda: diverged("bias", math.nan), lambda model, _: model[1].kl_divergence(), BAD_STEP,
                       load_a_good_checkpoint),
    "prior": (lambda: diverged("weight_prior", math.inf), lambda model, _: klnorm.kl_divergence(model), BAD_STEP,
              load_a_good_checkpoint),
    "overflow": (lambda: diverged("weight_rho", 1e30), lambda model, _: klnorm.kl_divergence(model), BAD_STEP,
                 load_a_good_checkpoint),
    "overflow of the sum": (two_far_from_their_priors, klnorm.kl_divergence,
                            "Remedy: look for a posterior far from its prior", look_for_a_posterior_far_from_its_prior),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_what_an_error_advises_helps(case):
    make, fail, advice, remedy = TABLE[case]
    arguments = make()
    with pytest.raises((ValueError, TypeError), match=re.escape(advice)):
        fail(*arguments)
    result = remedy(*arguments)
    assert all(tensor.isfinite().all() for tensor in (result if isinstance(result, tuple) else [result]))
