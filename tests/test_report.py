"""`klnorm.summary`: the numbers, the table and the flat dict."""

import copy
import math
import statistics

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.distributions.kl import kl_divergence as kl_of_torch
from torch.utils._python_dispatch import TorchDispatchMode

from klnorm import KLLayerNorm, kl_divergence, kl_layers, replace_layer_norm
from klnorm.report import summary

VALUES = {"kl"} | {f"{part}_{key}" for part in ("scale", "shift") for key in ("kl", "deviation", "snr", "fallen_back")}
ROUNDING = {"rel_tol": 1e-12, "abs_tol": 1e-12}  # fp64, some dozens of roundings


def posterior(layer, name, prior, distance, deviation):
    """Give a posterior of the layer, its scale ("weight") or its shift ("bias"), these values."""
    prior, distance, deviation = (torch.tensor(values, dtype=torch.float64) for values in (prior, distance, deviation))
    with torch.no_grad():
        getattr(layer, name).copy_(prior + distance)
        getattr(layer, f"{name}_rho").copy_(deviation.expm1().log())
        getattr(layer, f"{name}_prior").copy_(prior)


def worked():
    """A layer of four features, and one of three without shift. The KL is -ln s + (s^2 + d^2) / 2 - 1/2 for p = 1."""
    first = KLLayerNorm(4, prior_std=1.0, dtype=torch.float64)
    posterior(first, "weight", [2.0, -1.0, 0.5, 0.0], [0.0, 1.0, 0.0, -3.0], [1.0, 1.0, 2.0, 0.5])
    posterior(first, "bias", [0.0, 3.0, 0.0, -7.0], [0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0])
    second = KLLayerNorm(3, bias=False, prior_std=1.0, dtype=torch.float64)
    posterior(second, "weight", [1.0, 1.0, 1.0], [8.0, 0.0, 2.0], [1.0, 1.0, 0.5])
    return nn.ModuleDict({"a": nn.Sequential(first), "b": second})


def random_model(dtype=torch.float32):
    """Layers whose posteriors differ, some features at their prior; one layer twice, one without shift."""
    torch.manual_seed(0)
    shared = KLLayerNorm((3, 5), prior_std=0.3)
    model = nn.Sequential(nn.Linear(4, 8), KLLayerNorm(8), shared, shared, KLLayerNorm(6, bias=False))
    for layer in kl_layers(model).values():
        for mean, rho in (layer.weight, layer.weight_rho), (layer.bias, layer.bias_rho):
            if mean is not None:
                moved = torch.rand(mean.shape) < 0.6
                mean.data += moved * 0.2 * torch.randn(mean.shape)
                near_prior = math.log(math.expm1(layer.prior_std))
                rho.data = torch.where(moved, torch.randn(mean.shape) - 2.0, near_prior)
    return model.to(dtype)


def expected_numbers(mean, rho, prior, prior_std, threshold=0.01):
    """(kl, deviation, snr, fallen_back) from lists, feature by feature."""
    kl, deviation, snr = [], [], []
    for m, r, m0 in zip(*(t.detach().double().flatten().tolist() for t in (mean, rho, prior)), strict=True):
        s = math.log1p(math.exp(r))
        deviation.append(s)
        snr.append(abs(m - m0) / s)
        q, p = (Normal(*torch.tensor(ms, dtype=torch.float64)) for ms in ((m, s), (m0, prior_std)))
        kl.append(kl_of_torch(q, p).item())
    fallen = sum(value < threshold for value in kl) / len(kl)
    return sum(kl), statistics.fmean(deviation), statistics.median(snr), fallen


def numbers(part):
    return part.kl, part.deviation, part.snr, part.fallen_back


def assert_close(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert type(a) is float
        assert math.isclose(a, e, **ROUNDING), (actual, expected)


def test_hand_worked_values():
    table = summary(worked())
    a, b, total = table.layers["a.0"], table.layers["b"], table.total
    # d = 0, 1, 0, 3 and s = 1, 1, 2, 1/2: KL 0, 1/2, 3/2 - ln 2, 33/8 + ln 2; ratios 0, 1, 0, 6
    assert_close(numbers(a.scale), (6.125, 1.125, 0.5, 0.25))
    # d = 0, 0, 0, 2 and s = 1: KL 0, 0, 0, 2; ratios 0, 0, 0, 2
    assert_close(numbers(a.shift), (2.0, 1.0, 0.0, 0.75))
    # d = 8, 0, 2 and s = 1, 1, 1/2: KL 32, 0, 13/8 + ln 2; ratios 8, 0, 4
    assert_close(numbers(b.scale), (33.625 + math.log(2), 2.5 / 3, 4.0, 1 / 3))
    assert b.shift is None
    # all seven scales: ratios 0, 0, 0, 1, 4, 6, 8
    assert_close(numbers(total.scale), (39.75 + math.log(2), 1.0, 1.0, 2 / 7))
    assert total.shift == a.shift
    assert_close((a.kl, b.kl, total.kl), (8.125, 33.625 + math.log(2), 41.75 + math.log(2)))
    assert [row.scale.features for row in (a, b, total)] == [4, 3, 7]
    assert list(table.layers) == ["a.0", "b"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_an_fp64_calculation(dtype, training):
    model = random_model(dtype).train(training)
    table = summary(model)
    assert list(table.layers) == ["1", "2", "4"]
    for name, layer in kl_layers(model).items():
        row = table.layers[name]
        tensors = layer.weight, layer.weight_rho, layer.weight_prior, layer.prior_std
        assert_close(numbers(row.scale), expected_numbers(*tensors))
        if layer.bias is not None:
            tensors = layer.bias, layer.bias_rho, layer.bias_prior, layer.prior_std
            assert_close(numbers(row.shift), expected_numbers(*tensors))
    assert 0 < table.total.scale.fallen_back < 1
    assert 0 < table.total.shift.fallen_back < 1


@pytest.mark.parametrize("forward", [True, False])
def test_kl_is_that_of_kl_divergence(forward):
    model = random_model()
    if forward:
        kl_layers(model)["1"](torch.randn(3, 8))  # its KL is now the forward's
    table = summary(model)
    # fp32 sums of up to 15 features, against fp64
    assert math.isclose(table.total.kl, kl_divergence(model).item(), rel_tol=1e-5)
    for name, layer in kl_layers(model).items():
        assert math.isclose(table.layers[name].kl, kl_divergence(layer).item(), rel_tol=1e-5)


@pytest.mark.parametrize("part", ["scale", "shift"])
def test_a_feature_at_the_threshold_has_not_fallen_back(part):
    layer = random_model()[2]
    kl = getattr(summary(layer).total, part).kl
    single = KLLayerNorm(1, prior_std=1.0, dtype=torch.float64)
    posterior(single, "weight" if part == "scale" else "bias", [0.0], [kl / 100], [0.9])
    kl = getattr(summary(single).total, part).kl
    assert getattr(summary(single, threshold=kl).total, part).fallen_back == 0.0
    assert getattr(summary(single, threshold=math.nextafter(kl, 1.0)).total, part).fallen_back == 1.0


def test_the_default_threshold_is_a_hundredth_of_a_nat():
    # d^2 / 2 on either side of it
    layer = KLLayerNorm(2, prior_std=1.0, dtype=torch.float64)
    posterior(layer, "weight", [0.0, 0.0], [math.sqrt(0.0199), math.sqrt(0.0201)], [1.0, 1.0])
    table = summary(layer)
    assert table.threshold == 0.01
    assert table.total.scale.fallen_back == 0.5


def test_flat_dict():
    table = summary(worked())
    values = table.as_dict()
    of_b = {key for key in VALUES if not key.startswith("shift")}
    expected = {f"klnorm/a.0/{key}" for key in VALUES} | {f"klnorm/b/{key}" for key in of_b}
    assert values.keys() == expected | {f"klnorm/{key}" for key in VALUES}
    assert all(type(value) is float and math.isfinite(value) for value in values.values())
    for prefix, row in ("klnorm/a.0", table.layers["a.0"]), ("klnorm/b", table.layers["b"]), ("klnorm", table.total):
        assert values[f"{prefix}/kl"] == row.kl
        for name, part in ("scale", row.scale), ("shift", row.shift):
            if part is not None:
                flat = tuple(values[f"{prefix}/{name}_{key}"] for key in ("kl", "deviation", "snr", "fallen_back"))
                assert flat == numbers(part)


def test_a_layer_alone_has_no_name():
    table = summary(worked()["b"])
    assert list(table.layers) == [""]
    assert table.as_dict() == {
        "klnorm/kl": table.total.kl,
        "klnorm/scale_kl": table.total.kl,
        "klnorm/scale_deviation": table.total.scale.deviation,
        "klnorm/scale_snr": 4.0,
        "klnorm/scale_fallen_back": table.total.scale.fallen_back,
    }
    assert table.total.shift is None
    assert str(table).splitlines()[2].startswith("(the model)  ")


def test_table():
    assert repr(summary(worked(), threshold=0.6)) == (
        """\
                       KL, nats        deviation    signal/noise  fallen back
layer  features   both  scale  shift  scale  shift  scale  shift  scale  shift
a.0           4   8.12   6.12   2.00   1.12   1.00  0.500   0.00  50.0%  75.0%
b             3  34.32  34.32      -  0.833      -   4.00      -  33.3%      -
total         7  42.44  40.44   2.00   1.00   1.00   1.00   0.00  42.9%  75.0%
fallen back: share of features with a KL below 0.6 nats"""
    )


def test_leaves_no_trace():
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    layer = kl_layers(model)["1"]
    y = layer(torch.randn(3, 8))
    summary(model)
    assert layer._take_kl().grad_fn is y.grad_fn
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Waits(TorchDispatchMode):
    """Counts the operations, other than copies, that make the host wait for the values of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        self.count += function in waiting
        return function(*args, **(kwargs or {}))


def test_a_gpu_is_waited_for_once_and_no_graph_is_built(monkeypatch):
    reads_with_graph, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda tensor: reads_with_graph.append(tensor.requires_grad) or tolist(tensor)
    )
    with Waits() as waits:
        summary(nn.Sequential(*[KLLayerNorm(4) for _ in range(5)]))
    assert waits.count == 0
    assert reads_with_graph == [False]


def test_a_deviation_that_underflows_gives_numbers():
    layer = KLLayerNorm(2)
    with torch.no_grad():
        layer.weight_rho.fill_(-1000.0)
        layer.bias_rho.fill_(-1000.0)
        layer.weight += 5.0
    total = summary(layer).total
    assert total.scale.deviation == 0.0
    assert 1e6 < total.scale.snr < torch.finfo(torch.float32).max  # which is what TensorBoard stores
    assert total.shift.snr == 0.0
    # -ln s = 1000
    assert math.isclose(total.shift.kl, 2 * (math.log(0.1) + 1000 - 0.5), rel_tol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("part", "tensor"), [("scale", "weight_rho"), ("scale", "weight_prior"), ("shift", "bias")])
def test_values_that_are_not_finite_are_named(part, tensor, value):
    model = random_model()
    getattr(model[2], tensor).data[1, 2] = value
    with pytest.raises(ValueError, match=rf"the {part} of layer '2'.*: {tensor} has 1 such value.*index 7. Remedy"):
        summary(model)


def test_errors():
    with pytest.raises(TypeError, match="model is a list"):
        summary([])
    with pytest.raises(ValueError, match=r"model has no KL layer.*Remedy: klnorm.replace_layer_norm"):
        summary(nn.LayerNorm(4))
    for threshold, error in (0.0, ValueError), (-1, ValueError), (math.nan, ValueError), ("0.1", TypeError):
        with pytest.raises(error, match="threshold is "):
            summary(KLLayerNorm(4), threshold=threshold)
    model = replace_layer_norm(nn.Sequential(nn.LayerNorm(4, device="meta")))
    with pytest.raises(ValueError, match=r"weight of layer '0' is on the meta device.*Remedy: "):
        summary(model)
