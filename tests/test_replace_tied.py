"""Layers that share parameters without being one module: one posterior, counted once."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from rms_classes import N, Rms
from torch import nn
from trained_layers import perturbed
from unchanged import assert_unchanged, graph

import klnorm
from klnorm import KLWeight, kl_divergence, kl_layers, param_groups, replace_layer_norm, replace_rms_norm


def tied(kind=nn.LayerNorm, names=("weight", "bias"), other=None):
    """Two norms around a Linear, that share the parameters of these names."""
    model = nn.Sequential(kind(N), nn.Linear(N, N), (other or kind)(N))
    for name in names:
        setattr(model[2], name, getattr(model[0], name))
    return perturbed(model)


CASES = {
    "LayerNorm": (replace_layer_norm, nn.LayerNorm, ("weight", "bias")),
    "RMSNorm": (replace_rms_norm, nn.RMSNorm, ("weight",)),
    "foreign": (replace_rms_norm, Rms, ("weight",)),
}
every_kind = pytest.mark.parametrize("case", CASES)


@every_kind
@pytest.mark.parametrize("posterior", ["sampled", "deterministic"])
def test_deviations_and_priors_are_shared_and_the_divergence_counts_once(case, posterior):
    replace, kind, names = CASES[case]
    model = replace(tied(kind, names), posterior=posterior)
    first, second = model[0], model[2]
    for name in names:
        for key in f"{name}_rho", f"{name}_prior":
            assert getattr(first, key) is getattr(second, key)
    alone = replace(tied(kind, names)[0], posterior=posterior)
    alone.load_state_dict(first.state_dict())
    assert kl_divergence(model) == kl_divergence(alone)
    assert KLWeight(per_parameter=model).value == KLWeight(per_parameter=alone).value
    assert klnorm.summary(model).total == klnorm.summary(alone).total
    assert list(kl_layers(model)) == ["0"]


@every_kind
def test_after_a_forward_gradients_are_of_both_uses_and_of_one_divergence(case):
    replace, kind, names = CASES[case]
    model, x = replace(tied(kind, names), init_std=0.3), torch.randn(4, N)
    with torch.no_grad():
        model[0].weight.add_(0.2)  # off the prior
    parameters = list(model[0].parameters())
    in_closed_form = torch.autograd.grad(kl_divergence(model), parameters)

    def gradients(kl_weight):
        torch.manual_seed(0)
        y = model(x)
        return torch.autograd.grad(y.square().sum() + kl_weight * kl_divergence(model), parameters)

    for both, data, kl in zip(gradients(1.0), gradients(0.0), in_closed_form, strict=True):
        # one rounding of a sum of values of this size each
        scale = max(data.abs().max(), kl.abs().max()).item()
        torch.testing.assert_close(both - data, kl, rtol=0, atol=16 * 2**-23 * scale)


def test_the_optimizer_sees_one_parameter_and_the_state_has_both_names():
    model = replace_layer_norm(tied())
    names = ["weight", "bias", "weight_rho", "bias_rho"]
    assert [p is getattr(model[0], name) for p, name in zip(model[0].parameters(), names, strict=True)] == [True] * 4
    assert len(list(model.parameters())) == 2 + 4
    groups = {group["name"]: group["params"] for group in param_groups(model, lr=1e-3)}
    assert [len(groups[name]) for name in ("decay", "no_decay", "rho")] == [1, 3, 2]
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, rho_lr=0.1))
    (model(torch.randn(4, N)).square().sum() + kl_divergence(model)).backward()
    optimizer.step()
    state = model.state_dict()
    for name in [*names, "weight_prior", "bias_prior"]:
        assert torch.equal(state[f"0.{name}"], state[f"2.{name}"])
    other = replace_layer_norm(tied())
    other.load_state_dict(state)
    assert torch.equal(kl_divergence(other), kl_divergence(model))
    assert other[0].weight_rho is other[2].weight_rho


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_tied(duplicate):
    model = duplicate(replace_layer_norm(tied()).bfloat16())
    assert model[0].weight is model[2].weight
    assert model[0].weight_rho is model[2].weight_rho
    assert list(kl_layers(model)) == ["0"]


def test_a_plain_checkpoint_is_mean_and_prior_of_both():
    model, plain = replace_layer_norm(tied()), tied()
    model.load_state_dict(plain.state_dict())
    for layer in model[0], model[2]:
        assert torch.equal(layer.weight_prior, plain[0].weight)
    assert list(kl_layers(model)) == ["0"]


def test_replaced_one_after_the_other_and_restored():
    model = tied()
    before = graph(copy.deepcopy(model))
    for last in "0", "2":
        replace_layer_norm(model, filter_fn=lambda module, name, last=last: name == last, noise="token")
    assert model[0].bias_rho is model[2].bias_rho
    assert list(kl_layers(model)) == ["0"]
    klnorm.restore_layer_norm(model)
    assert model[0].weight is model[2].weight
    assert len(graph(model)[0]) == len(before[0])


def test_a_norm_that_stays_plain_shares_the_mean_alone():
    model = replace_layer_norm(tied(), filter_fn=lambda module, name: name == "2")
    assert type(model[0]) is nn.LayerNorm
    assert model[0].weight is model[2].weight


class OnePlus(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


def crossed():
    model = tied(names=())
    model[2].weight, model[2].bias = model[0].bias, model[0].weight
    return model


def within():
    model = tied(names=())
    model[2].bias = model[2].weight
    return model


def replaced_first(**options):
    model = tied()
    return replace_layer_norm(model, filter_fn=lambda module, name: name == "0", **options)


def with_conditional():
    model = tied(names=())
    model.insert(0, klnorm.KLConditionalLayerNorm(N))
    model[0].weight, model[0].bias = model[3].weight, model[3].bias
    return model


CONFLICTS = {
    "weight alone": lambda: tied(names=("weight",)),
    "bias alone": lambda: tied(names=("bias",)),
    "no bias here": lambda: tied(names=("weight",), other=lambda n: nn.LayerNorm(n, bias=False)),
    "names crossed": crossed,
    "weight and bias": within,
    "weight and 1 + weight": lambda: tied(other=OnePlus),
    "another prior_std": lambda: replaced_first(prior_std=0.7),
    "another prior": lambda: replaced_first(prior="standard"),
    "another reading": lambda: replaced_first(posterior="deterministic"),
    "conditional": with_conditional,
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_what_cannot_have_one_posterior_is_refused(case):
    model = CONFLICTS[case]()
    before = graph(model)
    with pytest.raises(ValueError, match=r"layer '[23]' shares parameters .*Remedy: layer\.weight = ") as raised:
        replace_layer_norm(model)
    assert_unchanged(model, before)
    name = str(raised.value).split("'")[1]
    untied = copy.deepcopy(model)
    layer = untied.get_submodule(name)
    for key, parameter in list(layer.named_parameters(remove_duplicate=False)):  # the remedy
        setattr(layer, key, nn.Parameter(parameter.detach().clone()))
    replace_layer_norm(untied)
    replace_layer_norm(model, filter_fn=lambda module, its: its != name)  # the other one
    assert name not in kl_layers(model)
