"""Which layers `klnorm.replace_layer_norm` takes, which it refuses, and where it centres their prior."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import klnorm
from klnorm import KLLayerNorm, last_norms, replace_layer_norm, restore_layer_norm

N = 8


def model_of(*layers):
    return nn.Sequential(*layers)


def replaced(model):
    return list(klnorm.kl_layers(model))


class Upcast(nn.LayerNorm):
    """As in many models: LayerNorm in fp32, whatever the input."""

    def forward(self, x):
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OnePlusWeight(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class TwiceTheShift(nn.LayerNorm):
    """With a shift of 0 it cannot be told from LayerNorm."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, 2 * self.bias, self.eps)


class AbsoluteScale(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.abs(), self.bias, self.eps)


class OtherEps(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 2 * self.eps)


class Gained(nn.LayerNorm):
    def __init__(self, n):
        super().__init__(n)
        self.gain = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return super().forward(x) * self.gain


class GainedByBuffer(nn.LayerNorm):
    def __init__(self, n):
        super().__init__(n)
        self.register_buffer("gain", torch.ones(n))

    def forward(self, x):
        return super().forward(x) * self.gain


class GainedByChild(nn.LayerNorm):
    def __init__(self, n):
        super().__init__(n)
        self.gain = nn.Identity()

    def forward(self, x):
        return self.gain(super().forward(x))


class Dropping(nn.LayerNorm):
    """Another function in training mode."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Renamed(nn.LayerNorm):
    pass


# filter_fn


def test_filter_is_asked_for_every_norm_with_its_name():
    asked = {}
    model = nn.ModuleDict(
        {
            "first": nn.LayerNorm(N),
            "inner": model_of(Renamed(N), nn.Linear(N, N), nn.GroupNorm(2, N)),
            "fixed": nn.LayerNorm(N, elementwise_affine=False),
        }
    )
    modules = dict(model.named_modules())
    replace_layer_norm(
        model, filter_fn=lambda module, name: asked.setdefault(name, module) is None or name == "inner.0"
    )
    assert asked == {"first": modules["first"], "inner.0": modules["inner.0"]}
    assert replaced(model) == ["inner.0"]


@pytest.mark.parametrize("filter_fn", [None, lambda module, name: True])
def test_subclasses_that_compute_layer_norm_are_taken_and_given_back(filter_fn):
    model, x = model_of(nn.LayerNorm(N), Upcast(N), Renamed(N), OnePlusWeight(N)), torch.randn(4, N)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.5, 2)
    types_before, expected = [type(module) for module in model], model(x)
    assert replaced(replace_layer_norm(model, filter_fn=filter_fn)) == ["0", "1", "2", "3"]
    assert [type(module).__name__ for module in model[:3]] == ["KLLayerNorm", "KLUpcast", "KLRenamed"]
    assert not torch.isclose(model(x), expected).any()
    assert torch.equal(model.eval()(x), expected)
    assert [type(module) for module in restore_layer_norm(model)] == types_before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "own",
    [
        ChannelsFirst, TwiceTheShift, AbsoluteScale, OtherEps, Gained, GainedByBuffer, GainedByChild,
        Dropping,
    ],
)  # fmt: skip
def test_a_subclass_of_other_arithmetic_is_refused(own, dtype):
    model = model_of(nn.LayerNorm(N), own(N)).to(dtype).eval()
    with pytest.warns(UserWarning, match=f"passed over 1 {own.__name__}"):
        assert replaced(replace_layer_norm(copy.deepcopy(model))) == ["0"]
    with pytest.raises(ValueError, match=rf"layer '1' is a {own.__name__}, which computes something else.*filter_fn"):
        replace_layer_norm(model, filter_fn=lambda module, name: True)
    assert replaced(model) == []


@pytest.mark.parametrize("options", [{}, {"bias": False}])
def test_a_subclass_on_the_meta_device_is_tried_out(options):
    class Own(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    class Twice(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    with torch.device("meta"):
        model = model_of(Renamed(N), Own(N, **options), Twice(N, **options))
    replace_layer_norm(model, filter_fn=lambda module, name: name != "2")
    assert replaced(model) == ["0", "1"]
    assert model[1].weight_rho.is_meta
    with pytest.raises(ValueError, match="is a Twice, which computes something else"):
        replace_layer_norm(model, filter_fn=lambda module, name: True)


@pytest.mark.parametrize("n", [2, 100, 10_000])
def test_a_subclass_that_computes_it_in_another_order_is_taken(n):
    class WrittenOut(nn.LayerNorm):
        def forward(self, x):
            mean = x.mean(-1, keepdim=True)
            variance = x.square().mean(-1, keepdim=True) - mean.square()
            return self.weight * torch.rsqrt(variance + self.eps) * (x - mean) + self.bias

    assert replaced(replace_layer_norm(model_of(WrittenOut(n)), filter_fn=lambda module, name: True)) == ["0"]


def test_trying_out_a_subclass_leaves_no_trace():
    model, calls = model_of(Upcast(N)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    replace_layer_norm(model, filter_fn=lambda module, name: True)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.randn(2, N))
    assert calls == [1]


def test_last_norms_are_those_defined_last_and_stay_so():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(N, 2, 16), 2, nn.LayerNorm(N), enable_nested_tensor=False
    )
    assert replaced(replace_layer_norm(encoder, filter_fn=last_norms(2))) == ["layers.1.norm2", "norm"]
    assert replaced(replace_layer_norm(encoder, filter_fn=last_norms(2))) == ["layers.1.norm2", "norm"]
    assert replaced(replace_layer_norm(encoder, filter_fn=last_norms(3))) == [
        "layers.1.norm1",
        "layers.1.norm2",
        "norm",
    ]


def test_last_norms_does_not_count_norms_without_scale_and_shift():
    model = model_of(nn.LayerNorm(N), nn.LayerNorm(N, elementwise_affine=False))
    assert replaced(replace_layer_norm(model, filter_fn=last_norms(1))) == ["0"]


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_bad_number_of_last_norms_is_refused(k, error):
    with pytest.raises(error, match="k is "):
        last_norms(k)


def test_more_last_norms_than_there_are_is_refused():
    model = model_of(nn.LayerNorm(N), nn.LayerNorm(N))
    with pytest.raises(ValueError, match="k is 3, expected at most 2"):
        replace_layer_norm(model, filter_fn=last_norms(3))
    assert replaced(model) == []


def test_a_filter_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="filter_fn is a list, expected"):
        replace_layer_norm(model_of(nn.LayerNorm(N)), filter_fn=["0"])


# apex


@pytest.fixture
def apex(monkeypatch):
    """A stand-in for apex, whose FusedLayerNorm is no nn.LayerNorm but has its attributes."""
    module = types.ModuleType("apex.normalization.fused_layer_norm")

    class FusedLayerNorm(nn.Module):
        def __init__(self, normalized_shape, eps=1e-5):
            super().__init__()
            self.normalized_shape = torch.Size((normalized_shape,))
            self.eps, self.elementwise_affine, self.memory_efficient = eps, True, False
            self.weight = nn.Parameter(torch.rand(normalized_shape))
            self.bias = nn.Parameter(torch.rand(normalized_shape))

        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    FusedLayerNorm.__module__, FusedLayerNorm.__qualname__ = module.__name__, "FusedLayerNorm"
    module.FusedLayerNorm = FusedLayerNorm
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_fused_layer_norm_of_apex_is_replaced_and_given_back(apex):
    model, x = model_of(apex.FusedLayerNorm(N)), torch.randn(3, N)
    expected = model(x)
    assert replaced(replace_layer_norm(model)) == ["0"]
    assert not torch.isclose(model(x), expected).all()
    assert torch.equal(model.eval()(x), expected)
    assert type(restore_layer_norm(model)[0]) is apex.FusedLayerNorm
    assert torch.equal(model(x), expected)


# Refusals


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 2)


def parametrized(layer):
    return parametrizations.weight_norm(layer, "weight", dim=0)


def quantized(layer):
    """Named like the classes under torch.ao.nn.quantized."""
    layer.__class__ = type("LayerNorm", (nn.LayerNorm,), {"__module__": "torch.ao.nn.quantized.modules.normalization"})
    return layer


class Wrapped(torch.Tensor):
    pass


def wrapped(layer):
    layer.bias = nn.Parameter(layer.bias.detach().as_subclass(Wrapped))
    return layer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (parametrized, "is parametrized.*remove_parametrizations"),
        (pruned, "computes its weight"),
        (quantized, "is quantized"),
        (wrapped, "holds its bias as a Wrapped"),
    ],
)
def test_a_layer_without_plain_parameters_is_refused_unless_left_out(spoil, message):
    model = model_of(nn.LayerNorm(N), spoil(nn.LayerNorm((2, N))))
    types_before = [type(module) for module in model]
    with pytest.raises(ValueError, match=rf"layer '1' {message}.*leave it out with filter_fn"):
        replace_layer_norm(model)
    assert [type(module) for module in model] == types_before
    assert replaced(replace_layer_norm(model, filter_fn=lambda module, name: name == "0")) == ["0"]


def test_a_parametrized_kl_layer_is_not_restored():
    model = replace_layer_norm(model_of(nn.LayerNorm(N), nn.LayerNorm(N)))
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(ValueError, match="layer '1' is parametrized"):
        restore_layer_norm(model)
    assert type(model[0]) is KLLayerNorm
    parametrize.remove_parametrizations(model[1], "weight")
    assert replaced(restore_layer_norm(model)) == []


def test_a_model_wrapped_for_ddp_is_refused(process_group):
    model = nn.parallel.DistributedDataParallel(model_of(nn.LayerNorm(N)))
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*replace the norms first"):
        replace_layer_norm(model)
    assert replaced(model) == []


# Where the prior is centred


def test_the_standard_prior_is_around_one_and_zero_and_stays_there(tmp_path):
    plain = model_of(nn.LayerNorm(N))
    with torch.no_grad():
        plain[0].weight.uniform_(0.5, 2)
        plain[0].bias.uniform_(0.5, 2)
    current, standard = (replace_layer_norm(copy.deepcopy(plain), prior=prior)[0] for prior in ("current", "standard"))
    assert torch.equal(current.weight_prior, plain[0].weight)
    assert torch.equal(current.bias_prior, plain[0].bias)
    assert torch.equal(standard.weight, plain[0].weight)
    assert torch.equal(standard.weight_prior, torch.ones(N))
    assert torch.equal(standard.bias_prior, torch.zeros(N))
    # its KL has the distance of the means from 1 and 0 on top, over twice the variance of the prior
    distance = ((plain[0].weight - 1) ** 2 + plain[0].bias ** 2).sum() / (2 * 0.1**2)
    torch.testing.assert_close(standard.kl_divergence() - current.kl_divergence(), distance)
    other = {"weight": torch.full((N,), 3.0), "bias": torch.full((N,), 4.0)}
    for assign in False, True:
        current.load_state_dict(other, assign=assign)
        standard.load_state_dict(other, assign=assign)
        assert torch.equal(current.bias_prior, other["bias"])
        assert torch.equal(standard.weight_prior, torch.ones(N))
        assert torch.equal(standard.bias_prior, torch.zeros(N))


def test_an_unknown_prior_is_refused():
    model = model_of(nn.LayerNorm(N))
    with pytest.raises(ValueError, match="prior is 'zero', expected one of 'current', 'standard'"):
        replace_layer_norm(model, prior="zero")
    assert replaced(model) == []


def test_without_shift_both_priors_work():
    for prior in "current", "standard":
        layer = replace_layer_norm(nn.LayerNorm(N, bias=False), prior=prior)
        assert layer.bias_prior is None
        assert torch.equal(layer.weight_prior, torch.ones(N))
        assert klnorm.kl_divergence(layer) > 0
