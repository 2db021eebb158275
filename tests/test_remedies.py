"""What errors advise is done, and helps: those of prediction, of training and of a KL divergence that is not finite.

Those of calls and of replacing are in test_remedies_inputs.py and test_remedies_replace.py, those of the integrations
and of what needs more than a table beside the tests of their messages.
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


def trained(rho_lr):
    """The KL divergence after three steps with a rate for the deviations."""
    model = model_of(klnorm.KLLayerNorm(N))
    optimizer = torch.optim.SGD(klnorm.param_groups(model, lr=1e-3, rho_lr=rho_lr))
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(4, N)).square().mean() + klnorm.kl_divergence(model)).backward()
        optimizer.step()
    return klnorm.kl_divergence(model)


def frozen():
    return (model_of(klnorm.KLLayerNorm(N)).requires_grad_(False),)


def train_the_norm(model):
    model[0].requires_grad_(True)
    return [p for group in klnorm.param_groups(model, lr=1e-3) for p in group["params"]]


def weighted(**options):
    return klnorm.KLWeight(**options)(KL)


def resumed(state):
    kl_weight = klnorm.KLWeight(num_examples=len(TRAIN_SET), warmup_steps=2)
    kl_weight.load_state_dict(state)
    assert kl_weight.steps == 1
    return kl_weight(KL)


def a_step_on():
    kl_weight = klnorm.KLWeight(num_examples=len(TRAIN_SET), warmup_steps=2)
    kl_weight.step()
    return kl_weight


def scale_kl(model):
    """What `summary` has of the scales."""
    return torch.tensor([row.scale.kl for row in klnorm.summary(model).layers.values()])


TRAIN_SET = range(100)
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
    "not finite in a summary": (
        lambda: diverged("weight_rho", math.nan), lambda model, _: klnorm.summary(model), BAD_STEP,
        lambda model, saved: (load_a_good_checkpoint(model, saved), scale_kl(model)),
    ),
    "rate of rho": (lambda: (), lambda: trained(1e38), "a lower learning rate for rho often helps",
                    lambda: trained(1e-2)),
    "overflow of the sum": (two_far_from_their_priors, klnorm.kl_divergence,
                            "Remedy: look for a posterior far from its prior", look_for_a_posterior_far_from_its_prior),
    "summary, LayerNorm": (
        lambda: (model_of(nn.LayerNorm(N)),), klnorm.summary, "Remedy: klnorm.replace_layer_norm(model) or",
        lambda model: scale_kl(klnorm.replace_layer_norm(model)),
    ),
    "summary, RMSNorm": (
        lambda: (model_of(nn.RMSNorm(N)),), klnorm.summary, "or klnorm.replace_rms_norm(model) first.",
        lambda model: scale_kl(klnorm.replace_rms_norm(model)),
    ),
    "nothing to train": (
        frozen, lambda model: klnorm.param_groups(model, lr=1e-3),
        "Remedy: set requires_grad of what is to be trained.", train_the_norm,
    ),
    "neither, N": (lambda: (), weighted, "Remedy: num_examples=len(train_set), or",
                   lambda: weighted(num_examples=len(TRAIN_SET))),
    "neither, D": (lambda: (), weighted, "or per_parameter=model.", lambda: weighted(per_parameter=KL)),
    "both": (lambda: (), lambda: weighted(num_examples=len(TRAIN_SET), per_parameter=KL),
             "Remedy: num_examples=len(train_set), or", lambda: weighted(num_examples=len(TRAIN_SET))),
    "D of no KL layer": (
        lambda: (model_of(nn.LayerNorm(N)),), lambda model: weighted(per_parameter=model),
        "Remedy: klnorm.replace_layer_norm(model) first.",
        lambda model: weighted(per_parameter=klnorm.replace_layer_norm(model)),
    ),
    "state": (lambda: (a_step_on(),), lambda kl_weight: resumed(vars(kl_weight)),
              "Remedy: pass what state_dict() returned.", lambda kl_weight: resumed(kl_weight.state_dict())),
    "no scale": (
        lambda: (), lambda: klnorm.KLLayerNorm(N, elementwise_affine=False),
        "Remedy: nn.LayerNorm(..., elementwise_affine=False).",
        lambda: nn.LayerNorm(N, elementwise_affine=False)(torch.randn(4, N)),
    ),
    "no scale, RMSNorm": (
        lambda: (), lambda: klnorm.KLRMSNorm(N, elementwise_affine=False),
        "Remedy: nn.RMSNorm(..., elementwise_affine=False).",
        lambda: nn.RMSNorm(N, elementwise_affine=False)(torch.randn(4, N)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_what_an_error_advises_helps(case):
    make, fail, advice, remedy = TABLE[case]
    arguments = make()
    with pytest.raises((ValueError, TypeError), match=re.escape(advice)):
        fail(*arguments)
    result = remedy(*arguments)
    assert all(tensor.isfinite().all() for tensor in ([result] if isinstance(result, torch.Tensor) else result))
