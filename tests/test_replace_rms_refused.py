"""An RMSNorm that cannot be replaced, or not with these arguments, is refused, and the model left unchanged."""

import pytest
import torch
from rms_classes import N, Rms, model_of, with_own_forward
from torch import nn
from torch.nn.utils import parametrizations, prune
from unchanged import snapshot

import klnorm
from klnorm import kl_layers, replace_rms_norm


@pytest.mark.parametrize("name", ["noise", "posterior", "kl_divergence", "_evaluate"])
def test_a_class_that_uses_names_of_kl_layers_is_refused(name):
    of_class, of_instance = type("Own", (Rms,), {name: 0.0})(), Rms()
    vars(of_instance)[name] = 0.0
    for layer in of_class, of_instance:
        model = nn.Sequential(nn.RMSNorm(N), layer)
        before = snapshot(model)
        with pytest.raises(ValueError, match=rf"names of its own that KL layers use \({name}\).*filter_fn"):
            replace_rms_norm(model)
        assert snapshot(model) == before


def parametrized(layer):
    return parametrizations.weight_norm(layer, "weight", dim=0)


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 2)


@pytest.mark.parametrize("kind", [nn.RMSNorm, Rms])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pruned, "computes its weight"),
        (parametrized, r"is parametrized.*remove_parametrizations"),
        (with_own_forward, "has a forward that accelerate or another library put into it.*replace or restore first"),
    ],
)
def test_a_norm_without_plain_parameters_is_refused_unless_left_out(kind, spoil, message):
    layer = kind((2, N) if spoil is parametrized and kind is nn.RMSNorm else N)
    if spoil is parametrized and kind is Rms:
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    else:
        spoil(layer)
    model = model_of(nn.RMSNorm(N), layer)
    types = [type(module) for module in model]
    with pytest.raises(ValueError, match=rf"layer '1' {message}.*leave it out with filter_fn"):
        replace_rms_norm(model)
    assert [type(module) for module in model] == types
    assert list(kl_layers(replace_rms_norm(model, filter_fn=lambda module, name: name == "0"))) == ["0"]


@pytest.mark.parametrize("kind", [nn.RMSNorm, Rms])
def test_a_weight_of_a_dtype_that_the_operator_cannot_read_is_refused(kind):
    with pytest.raises(ValueError, match=r"holds its weight as a Tensor of torch\.float8_e4m3fn"):
        replace_rms_norm(kind(N).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_a_parameter_that_was_shared_out_is_refused(kind):
    layer = kind(N)
    layer.weight.data = torch.empty(0)  # as DeepSpeed leaves it
    with pytest.raises(ValueError, match=r"holds its weight in shape \(0,\), not \(8,\)"):
        (replace_rms_norm if kind is nn.RMSNorm else klnorm.replace_layer_norm)(layer)


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_no_weight_and_no_features_are_refused(kind):
    replace, layer = replace_rms_norm if kind is nn.RMSNorm else klnorm.replace_layer_norm, kind(N)
    layer.weight = None
    with pytest.raises(ValueError, match="computes its weight"):
        replace(layer)
    with pytest.raises(ValueError, match=r"normalized_shape is \(0,\), expected a positive int"):
        replace(kind(0))


def test_a_layer_norm_with_a_forward_of_its_own_is_refused_too():
    with pytest.raises(ValueError, match="has a forward that accelerate or another library put into it"):
        klnorm.replace_layer_norm(model_of(with_own_forward(nn.LayerNorm(N))))


def test_a_bad_eps_is_refused():
    model = model_of(nn.RMSNorm(N, eps=-1e-6))
    with pytest.raises(ValueError, match=r"eps is -1e-06, expected a finite number of 0 or more"):
        replace_rms_norm(model)
    assert type(model[0]) is nn.RMSNorm


@pytest.mark.parametrize(
    ("option", "value"), [("noise", "nope"), ("init_std", 0.0), ("prior_std", -1.0), ("prior", "x"), ("posterior", "x")]
)
def test_a_bad_argument_leaves_the_model_unchanged(option, value):
    model = model_of(nn.RMSNorm(N), Rms())
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{option} is "):
        replace_rms_norm(model, **{option: value})
    assert snapshot(model) == before
