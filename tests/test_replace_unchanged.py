"""Whatever raises in replacing or restoring, the model is the same object graph with the same bits as before."""

import pytest
import torch
from rms_classes import N, Rms
from torch import nn
from trained_layers import perturbed
from unchanged import assert_unchanged, graph

import klnorm
from klnorm import last_norms, replace_layer_norm, replace_rms_norm, restore_layer_norm


def with_attribute(layer, name, value="of the user"):
    setattr(layer, name, value)
    return layer


def having(name):
    """A model whose last norms have something of their own under a name that KL layers use."""
    of_class = type("Own", (nn.LayerNorm,), {name: "of the user"})
    kinds = {
        "attribute": lambda: with_attribute(nn.LayerNorm(N), name),
        "subclass": lambda: with_attribute(type("Own", (nn.LayerNorm,), {})(N), name),
        "class": lambda: of_class(N),
        "child": lambda: with_attribute(nn.LayerNorm(N), name, nn.Identity()),
        "parameter": lambda: with_attribute(nn.LayerNorm(N), name, nn.Parameter(torch.ones(N))),
    }
    return kinds


def model_of(*layers, dtype=torch.float32):
    """A model with hooks, frozen parameters and modules used twice."""
    model = nn.Sequential(nn.Linear(N, N), nn.LayerNorm(N), nn.RMSNorm(N), *layers).to(dtype)
    model[1].register_forward_hook(lambda *_: None)
    model[1].weight.requires_grad_(False)
    return perturbed(model.append(model[1]), 0.1)


def half_way(module, name):
    """A filter that chooses the first norm and fails at the next."""
    if name in ("3", "4"):
        raise LookupError(name)
    return True


HALF = torch.float16
FAILING = {
    "init_std of no fp32": ({"init_std": 1e39}, torch.float32),
    "init_std of no fp16": ({"init_std": 7e4}, HALF),
    "init_std of no float": ({"init_std": 10**400}, torch.float32),
    "init_std of no number": ({"init_std": "0.1"}, torch.float32),
    "prior_std of no float": ({"prior_std": 10**400}, torch.float32),
    "prior_std below 0": ({"prior_std": -1.0}, torch.float32),
    "noise": ({"noise": "nope"}, torch.float32),
    "posterior": ({"posterior": "nope"}, torch.float32),
    "prior": ({"prior": "nope"}, torch.float32),
    "filter that fails": ({"filter_fn": half_way}, torch.float32),
    "filter of strings": ({"filter_fn": lambda module, name: "no"}, torch.float32),
    "more than there are": ({"filter_fn": last_norms(9)}, torch.float32),
}


@pytest.mark.parametrize("replace", [replace_layer_norm, replace_rms_norm])
@pytest.mark.parametrize("case", FAILING)
def test_a_failing_call_leaves_the_model_as_it_was(replace, case):
    options, dtype = FAILING[case]
    model = model_of(nn.LayerNorm(N), Rms(), dtype=dtype)
    before, random = graph(model), torch.get_rng_state()
    with pytest.raises((TypeError, ValueError, OverflowError, RuntimeError, LookupError)):
        replace(model, **options)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(klnorm.kl_layers(replace(model))) == 2  # and it can still be replaced


SPOILED = {
    "eps": lambda: nn.LayerNorm(N, eps=-1e-5),
    "no weight": lambda: with_attribute(nn.LayerNorm(N), "weight", None),
    "no features": lambda: nn.LayerNorm(0),
    "a forward of its own": lambda: with_attribute(nn.LayerNorm(N), "forward", lambda x: x),
    "a dtype that is too small": lambda: nn.LayerNorm(N, dtype=HALF),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_layer_that_cannot_be_replaced_leaves_the_ones_before_it(spoiled):
    model = model_of()
    model.append(SPOILED[spoiled]())
    before = graph(model)
    with pytest.raises((ValueError, RuntimeError)):
        replace_layer_norm(model, init_std=7e4)
    assert_unchanged(model, before)


@pytest.mark.parametrize("of", having(""))
@pytest.mark.parametrize("name", ["prior", "noise", "weight_prior", "bias_rho", "kl_divergence", "_sampling"])
def test_names_that_kl_layers_use_are_refused_before_anything_changes(name, of):
    model = model_of()
    model.append(having(name)[of]())
    before = graph(model)
    with pytest.raises(ValueError, match=rf"layer '4' .*names of its own that KL layers use \({name}\).*filter_fn"):
        replace_layer_norm(model)
    assert_unchanged(model, before)
    replace_layer_norm(model, filter_fn=lambda module, name: name != "4")  # the remedies
    assert list(klnorm.kl_layers(model)) == ["1"]
    if of != "class":
        delattr(model[4], name)
        assert list(klnorm.kl_layers(replace_layer_norm(model))) == ["1", "4"]


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    class PassedOver(nn.LayerNorm):
        def forward(self, x):
            return -super().forward(x)

    model = model_of(PassedOver(N))
    before = graph(model)
    with pytest.raises(UserWarning, match="passed over 1 PassedOver"):
        replace_layer_norm(model)
    assert_unchanged(model, before)


def test_a_restoring_that_fails_leaves_the_model_as_it_was():
    model = replace_layer_norm(model_of(nn.LayerNorm(N)))
    model(torch.randn(3, N))
    nn.utils.parametrize.register_parametrization(model[3], "weight", nn.Identity())
    before = graph(model)
    with pytest.raises(ValueError, match="layer '3' is parametrized"):
        restore_layer_norm(model)
    assert_unchanged(model, before)


def test_restoring_does_not_stumble_over_what_a_user_has_removed():
    model = replace_layer_norm(model_of(nn.LayerNorm(N)))
    del model[3].generator, model[3].bias_prior
    restore_layer_norm(model)
    assert [type(module) for module in model[1:4:2]] == [nn.LayerNorm] * 2


def test_hooks_from_before_can_be_removed_after():
    layer, calls = nn.LayerNorm(N), []
    handles = [
        layer.register_forward_pre_hook(lambda *_: calls.append("pre")),
        layer.register_forward_hook(lambda *_: calls.append("post")),
    ]
    replace_layer_norm(layer)
    layer(torch.randn(3, N))
    assert calls == ["pre", "post"]
    for handle in handles:
        handle.remove()
    layer(torch.randn(3, N))
    assert calls == ["pre", "post"]


# filter_fn


def strings(module, name):
    return "no"


def nothing(module, name):
    pass


def generator_function(module, name):
    yield True


@pytest.mark.parametrize("replace", [replace_layer_norm, replace_rms_norm])
@pytest.mark.parametrize(
    ("filter_fn", "kind"),
    [
        (strings, "str"),
        (nothing, "NoneType"),
        (generator_function, "generator"),
        (lambda module, name: module.weight > 0, "Tensor"),
        (lambda module, name: 1, "int"),
        (last_norms(1, filter_fn=strings), "str"),
    ],
)
def test_a_filter_that_returns_no_bool_is_refused(replace, filter_fn, kind):
    model = model_of()
    before = graph(model)
    with pytest.raises(TypeError, match=rf"filter_fn returned a {kind} for layer '\d', expected a bool.*bool\("):
        replace(model, filter_fn=filter_fn)
    assert_unchanged(model, before)
    if filter_fn is strings:
        replace(model, filter_fn=lambda module, name: bool(filter_fn(module, name)))  # the remedy
        assert len(klnorm.kl_layers(model)) == 1


@pytest.mark.parametrize(
    ("filter_fn", "message"),
    [
        (last_norms, r"filter_fn is the class klnorm\.last_norms, expected .*Remedy: klnorm\.last_norms\(k\)"),
        (["1"], "filter_fn is a list, expected None, "),
        ("1", "filter_fn is a str, expected None, "),
    ],
)
def test_what_is_no_filter_is_refused(filter_fn, message):
    model = model_of()
    with pytest.raises(TypeError, match=message):
        replace_layer_norm(model, filter_fn=filter_fn)
    with pytest.raises(TypeError, match=message):
        last_norms(1, filter_fn=filter_fn)
    assert klnorm.kl_layers(model) == {}


def test_last_norms_of_those_that_another_filter_chooses():
    model = nn.Sequential(*(nn.Sequential(nn.LayerNorm(N), nn.LayerNorm(N)) for _ in range(3)))
    firsts = last_norms(2, filter_fn=lambda module, name: name.endswith(".0"))
    for _ in range(2):
        assert list(klnorm.kl_layers(replace_layer_norm(model, filter_fn=firsts))) == ["1.0", "2.0"]
    with pytest.raises(ValueError, match=r"k is 4, expected at most 3, .*that its filter_fn chooses"):
        replace_layer_norm(model, filter_fn=last_norms(4, filter_fn=firsts.filter_fn))
    with pytest.raises(TypeError, match=r"filter_fn is a last_norms, expected None or a function .*its filter_fn in"):
        last_norms(3, filter_fn=firsts)
    last_norms(2, filter_fn=firsts.filter_fn)  # the remedy
