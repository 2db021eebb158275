"""Bad settings, conditions and masks of a conditional layer are refused with an explanation."""

import numpy
import pytest
import torch
from conditional_layers import C, N, trained

from klnorm import KLConditionalLayerNorm


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"condition": "x"}, ValueError, "condition is 'x', expected 'self' or an int"),
        ({"condition": 0}, ValueError, "condition is 0, expected 1 or more"),
        ({"condition": 2.0}, TypeError, "condition is a float, expected an int"),
        ({"condition": None}, TypeError, "condition is a NoneType, expected an int"),
        ({"rank": 0}, ValueError, "rank is 0, expected 1 or more"),
        ({"rank": True}, TypeError, "rank is a bool, expected an int"),
        ({"rank": 2**63}, ValueError, "rank is 9223372036854775808, expected an int of 64 bits"),
        ({"condition": 10**400}, ValueError, r"condition is 1000000\d*\.\.\., expected an int of 64 bits"),
        ({"condition": numpy.array(["self", "x"])}, TypeError, "condition is a ndarray, expected an int"),
        ({"condition": torch.zeros(2)}, TypeError, "condition is a Tensor, expected an int"),
        ({"normalized_shape": ()}, ValueError, r"normalized_shape is \(\)"),
        ({"noise": "rows"}, ValueError, "noise is 'rows'"),
        ({"prior_std": 0.0}, ValueError, "prior_std is 0.0"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        KLConditionalLayerNorm(**{"normalized_shape": N, **options})


def _mask(*shape, dtype=torch.bool, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("condition", "options", "error", "message"),
    [
        ("self", {"condition": torch.zeros(4, C)}, ValueError, "condition is a Tensor, expected None.*=an int"),
        ("self", {"mask": [[True]]}, TypeError, "mask is a list, expected a bool or integer tensor"),
        ("self", {"mask": _mask(4, 5).float()}, TypeError, "mask has dtype torch.float32, expected bool.*mask == 0"),
        ("self", {"mask": _mask(4, 5, dtype=torch.complex64)}, TypeError, "mask has dtype torch.complex64"),
        ("self", {"mask": _mask(4, 5, N)}, ValueError, r"mask has shape \(4, 5, 6\), expected \(4, 5\)"),
        ("self", {"mask": _mask(4, 5).to_sparse()}, TypeError, r"mask has layout torch.sparse_coo.*mask\.to_dense\(\)"),
        ("self", {"mask": _mask(4)}, ValueError, r"mask has shape \(4,\), expected \(4, 5\)"),
        ("self", {"mask": _mask(4, 5, device="meta")}, ValueError, "mask is on meta, expected cpu"),
        ("self", {"x": torch.zeros(4, 5, N, device="meta")}, ValueError, "weight is on cpu, expected meta"),
        ("self", {"x": torch.zeros(0, 5, N)}, ValueError, r"x has shape \(0, 5, 6\), expected one sample or more"),
        ("self", {"x": torch.zeros(65536, N)}, ValueError, "65536 groups, expected 1 to 65535"),
        ("self", {"x": torch.zeros(4, 5, 7)}, ValueError, r"x has shape \(4, 5, 7\), expected \(\.\.\., 6\)"),
        (C, {}, TypeError, r"condition is a NoneType, expected a tensor \(samples, C\), here \(4, 3\)"),
        (C, {"condition": torch.zeros(4, C).long()}, TypeError, "condition has dtype torch.int64.*condition.float"),
        (C, {"condition": torch.zeros(4, C).to_mkldnn()}, TypeError, r"condition has layout torch\._mkldnn.*to_dense"),
        (C, {"condition": torch.zeros(4, C).to_sparse()}, TypeError, "condition has layout torch.sparse_coo"),
        (C, {"condition": torch.zeros(5, C)}, ValueError, r"condition has shape \(5, 3\), expected \(4, 3\)"),
        (C, {"condition": torch.zeros(4, 1, C)}, ValueError, r"condition has shape \(4, 1, 3\), expected \(4, 3\)"),
        (C, {"condition": torch.zeros(4, C, device="meta")}, ValueError, "condition is on meta, expected cpu"),
        (C, {"mask": _mask(4, 5)}, ValueError, r"mask is a Tensor, expected None.*condition='self'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(condition, options, error, message):
    layer = KLConditionalLayerNorm(N, condition)
    with pytest.raises(error, match=message):
        layer(**{"x": torch.zeros(4, 5, N), **options})


def test_the_remedies_for_layouts_work():
    x, condition, mask = torch.randn(4, 5, N), torch.randn(4, C), _mask(4, 5)
    for layer, options in (trained("self").eval(), {"mask": mask}), (trained(C).eval(), {"condition": condition}):
        dense = {name: t.to_sparse().to_dense() for name, t in options.items()}
        assert torch.equal(layer(x, **options), layer(x, **dense))


@pytest.mark.parametrize(
    ("attribute", "value", "error"),
    [
        ("normalized_shape", N, TypeError),
        ("eps", "abc", TypeError),
        ("noise", numpy.zeros(2), TypeError),
        ("prior_std", "abc", TypeError),
        ("sample_dim", 7, ValueError),
    ],
)
def test_an_attribute_set_to_nonsense_is_named(attribute, value, error):
    layer, x = KLConditionalLayerNorm(N), torch.ones(2, N)
    layer(x)
    setattr(layer, attribute, value)
    with pytest.raises(error, match=attribute):
        layer(x)
