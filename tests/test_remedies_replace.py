"""What errors and warnings of replacing and restoring advise is done, and helps.

Tied parameters, sharded models and norms that are passed over stand beside the tests of those.
"""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import klnorm

N = 8


def model_of(norm):
    return nn.Sequential(nn.Linear(N, N), nn.LayerNorm(N), norm)


def flattened(norm):
    """As utilities leave a module that put all parameters into one tensor."""
    flat = torch.cat([norm.weight.detach(), norm.bias.detach()])
    norm.flat = nn.Parameter(flat)
    del norm.weight
    norm.weight = norm.flat[:N]


def unflatten(norm):
    del norm.weight
    norm.weight = nn.Parameter(norm.flat[:N].detach().clone())
    del norm.flat


class Wrapped(torch.Tensor):
    """As DTensor, or what quantizers make."""


def quantized(norm):
    """As torch.ao does: it exchanges modules of exactly this class."""
    if type(norm) is nn.LayerNorm:
        namespace = {"__module__": "torch.ao.nn.quantized.modules.normalization"}
        norm.__class__ = type("LayerNorm", (nn.LayerNorm,), namespace)


def shared_out(norm):
    """As DeepSpeed leaves a parameter."""
    norm.weight.data = torch.empty(0)


class Gated(nn.LayerNorm):
    """Has a setting under a name that KL layers use."""

    name = "noise"

    def __init__(self, n):
        super().__init__(n)
        setattr(self, self.name, 0.0)


class Renamed(Gated):
    name = "spread"


WITHOUT = "or leave it out with filter_fn"
# name -> (what spoils a norm, what the error says, what takes that away again, None where it comes after replacing)
SPOILED = {
    "parametrized": (
        lambda norm: parametrize.register_parametrization(norm, "weight", nn.Identity()),
        "Remedy: torch.nn.utils.parametrize.remove_parametrizations,",
        lambda norm: parametrize.remove_parametrizations(norm, "weight"),
    ),
    "pruned": (
        lambda norm: prune.random_unstructured(norm, "weight", 2), "Remedy: remove that first, or replace first,",
        lambda norm: prune.remove(norm, "weight"),
    ),
    "flattened": (flattened, "Remedy: remove that first, or replace first,", unflatten),
    "forward": (
        lambda norm: setattr(norm, "forward", norm.forward),
        "Remedy: replace or restore first, or undo that and `del layer.forward`,",
        lambda norm: delattr(norm, "forward"),
    ),
    "quantized": (quantized, "Remedy: replace before quantizing,", None),
    "wrapped": (
        lambda norm: setattr(norm, "bias", nn.Parameter(norm.bias.detach().as_subclass(Wrapped))),
        "Remedy: replace before sharding or quantizing,", None,
    ),
    "dtype": (lambda norm: norm.to(torch.float8_e4m3fn), "Remedy: layer.float(),", nn.Module.float),
    "shared out": (shared_out, "Remedy: replace before sharding,", None),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_advised_for_a_norm_that_is_not_plain_helps(case):
    spoil, advice, undo = SPOILED[case]
    norm = nn.LayerNorm(N)
    spoil(norm)
    model = model_of(norm)
    with pytest.raises(ValueError, match=re.escape(f"{advice} {WITHOUT}")):
        klnorm.replace_layer_norm(model)
    klnorm.replace_layer_norm(model, filter_fn=lambda module, name: name != "2")
    assert list(klnorm.kl_layers(model)) == ["1"]
    if undo is not None:
        undo(norm)
        klnorm.replace_layer_norm(model)
        assert_samples(model)


@pytest.mark.parametrize("case", [case for case, (_, advice, _) in SPOILED.items() if "replace" in advice[:40]])
def test_a_norm_can_be_replaced_first(case):
    model = klnorm.replace_layer_norm(model_of(nn.LayerNorm(N)))
    SPOILED[case][0](model[2])
    if case == "shared out":
        model[2].weight.data = torch.ones(N)  # which its owner brings for the forward
    assert_samples(model)


def assert_samples(model):
    """Both norms draw, and have a divergence that trains them."""
    assert list(klnorm.kl_layers(model)) == ["1", "2"]
    x = torch.randn(3, N)
    for norm in model[1:]:
        assert not torch.equal(norm(x), norm(x))
    (model(x).sum() + klnorm.kl_divergence(model)).backward()
    assert all(norm.weight_rho.grad.isfinite().all() for norm in model[1:])


def test_names_that_are_renamed():
    advice = rf"\(noise\), expected a plain one\. Remedy: rename them there, {WITHOUT}"
    with pytest.raises(ValueError, match=advice):
        klnorm.replace_layer_norm(model_of(Gated(N)))
    assert list(klnorm.kl_layers(klnorm.replace_layer_norm(model_of(Renamed(N))))) == ["1", "2"]


def test_what_was_parametrized_is_restored_without():
    model = klnorm.replace_layer_norm(model_of(nn.LayerNorm(N)))
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"Remedy: torch\.nn\.utils\.parametrize\.remove_parametrizations\."):
        klnorm.restore_layer_norm(model)
    parametrize.remove_parametrizations(model[2], "weight")
    assert klnorm.kl_layers(klnorm.restore_layer_norm(model)) == {}


def test_a_norm_is_restored_before_a_forward_is_put_into_it():
    model = klnorm.replace_layer_norm(model_of(nn.LayerNorm(N)))
    model[2].forward = model[2].forward
    with pytest.raises(ValueError, match=r"Remedy: replace or restore first, or undo that and `del layer\.forward`\."):
        klnorm.restore_layer_norm(model)
    del model[2].forward
    klnorm.restore_layer_norm(model)
    model[2].forward = model[2].forward
    assert torch.equal(model(torch.ones(3, N)), model(torch.ones(3, N)))


def test_a_model_that_is_wrapped_after(process_group):
    model = model_of(nn.LayerNorm(N))
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"Remedy: replace the norms first, then wrap\."):
        klnorm.replace_layer_norm(wrapped)
    del wrapped  # if it outlives its group, it can wait for gloo's thread for ever
    wrapped = nn.parallel.DistributedDataParallel(klnorm.replace_layer_norm(model))
    (wrapped(torch.randn(3, N)).sum() + klnorm.kl_divergence(wrapped)).backward()
    assert model[1].weight_rho.grad.isfinite().all()


# filter_fn


def second(module, name):
    return name == "2"


def maybe(module, name):
    return re.match("2", name)  # a match or None


# name -> (a filter, what the error says, a filter as it advises, the layers that it chooses)
FILTERS = {
    "class": (klnorm.last_norms, "Remedy: klnorm.last_norms(k).", klnorm.last_norms(1), ["2"]),
    "no bool": (
        maybe, "Remedy: return bool(...) of what is meant.", lambda module, name: bool(maybe(module, name)), ["2"],
    ),
    "k": (klnorm.last_norms(3), "Remedy: a smaller k, or", klnorm.last_norms(2), ["1", "2"]),
    "k, all": (klnorm.last_norms(3), "or no filter_fn for all.", None, ["1", "2"]),
    "k of a filter": (
        klnorm.last_norms(2, filter_fn=second), "Remedy: a smaller k, or", klnorm.last_norms(1, filter_fn=second),
        ["2"],
    ),
    "all, not those of its filter": (
        klnorm.last_norms(2, filter_fn=second), "or no filter_fn for all.", klnorm.last_norms(2), ["1", "2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILTERS)
def test_what_is_advised_for_a_filter_helps(case):
    wrong, advice, right, chosen = FILTERS[case]
    model = model_of(nn.LayerNorm(N))
    with pytest.raises((ValueError, TypeError), match=re.escape(advice)):
        klnorm.replace_layer_norm(model, filter_fn=wrong)
    assert list(klnorm.kl_layers(klnorm.replace_layer_norm(model, filter_fn=right))) == chosen


def test_the_filter_of_a_last_norms_and_the_smaller_k():
    inner = klnorm.last_norms(1, filter_fn=second)
    with pytest.raises(TypeError, match=r"Remedy: its filter_fn in its place, and the smaller k\."):
        klnorm.last_norms(2, filter_fn=inner)
    meant = klnorm.last_norms(min(2, inner.k), filter_fn=inner.filter_fn)
    assert list(klnorm.kl_layers(klnorm.replace_layer_norm(model_of(nn.LayerNorm(N)), filter_fn=meant))) == ["2"]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_model_without_norms_that_have_a_scale(norm):
    replace, other = klnorm.replace_layer_norm, klnorm.replace_rms_norm
    if norm is nn.RMSNorm:
        replace, other = other, replace
    advice = rf"Remedy: a model with norms that have a scale, or klnorm\.{other.__name__} for one"
    with pytest.warns(UserWarning, match=advice):
        replace(nn.Sequential(norm(N, elementwise_affine=False)))
    assert list(klnorm.kl_layers(replace(nn.Sequential(norm(N))))) == ["0"]
    other_norm = nn.LayerNorm if norm is nn.RMSNorm else nn.RMSNorm
    assert list(klnorm.kl_layers(other(nn.Sequential(other_norm(N))))) == ["0"]


def test_a_kl_rms_norm_in_the_place_of_a_subclass_that_is_passed_over():
    class Negative(nn.RMSNorm):
        def forward(self, x):
            return -super().forward(x)

    class KLNegative(klnorm.KLRMSNorm):
        def forward(self, x):
            return -super().forward(x)

    model = model_of(Negative(N))
    with pytest.warns(UserWarning, match=r"passed over 1 Negative.*it has 1 LayerNorm\. Remedy: klnorm\.replace_layer"):
        klnorm.replace_rms_norm(model)
    with pytest.warns(UserWarning, match=r"passed over 1 Negative.*Remedy: a klnorm\.KLRMSNorm in their place"):
        klnorm.replace_rms_norm(model[2:])
    own = KLNegative(N).eval()
    own.load_state_dict(model[2].state_dict())
    x = torch.randn(3, N)
    assert torch.equal(own(x), model[2](x))
    assert list(klnorm.kl_layers(klnorm.replace_layer_norm(model))) == ["1"]
