"""Bad arguments of `klnorm.functional.kl_layer_norm` are refused with an explanation, whose advice helps."""

import fractions
import math
import re
import warnings

import numpy
import pytest
import torch
from functional_calls import N, call, make, seed_of

from klnorm import functional
from klnorm.functional import kl_layer_norm


def _meta(*size):
    return torch.zeros(size, device="meta")


def _nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def _not_finite(value, at):
    rho = torch.zeros(N)
    rho[at] = value
    return rho


FIRST = "such value(s), the first at index"
BAD = [
    # argument, value, exception, and the argument, what came and what was expected, as the message must say them
    ("x", [1.0] * N, TypeError, "x is a list", "torch.Tensor"),
    ("x", torch.zeros(3, N, dtype=torch.int64), TypeError, "x has dtype torch.int64", "torch.float32"),
    ("x", torch.zeros(3, N, dtype=torch.bool), TypeError, "x has dtype torch.bool", "torch.float32"),
    ("x", torch.zeros(3, N, dtype=torch.complex64), TypeError, "x has dtype torch.complex64", "torch.float32"),
    ("x", torch.eye(N).to_sparse(), TypeError, "x has layout torch.sparse_coo", "torch.strided"),
    ("x", torch.zeros(3, N + 1), ValueError, "x has shape (3, 7)", "(..., 6)"),
    ("x", torch.zeros(N, 3), ValueError, "x has shape (6, 3)", "(..., 6)"),
    ("x", torch.zeros(()), ValueError, "x has shape ()", "(..., 6)"),
    ("x", torch.zeros(1, N).expand(2**32 + 1, N), ValueError, f"x has {2**32 + 1} rows", "at most 2^32"),
    ("normalized_shape", 0, ValueError, "normalized_shape is 0", "positive int"),
    ("normalized_shape", (), ValueError, "normalized_shape is ()", "positive int"),
    ("normalized_shape", (3, -2), ValueError, "normalized_shape is (3, -2)", "positive int"),
    ("normalized_shape", "6", TypeError, "normalized_shape is '6'", "positive int"),
    ("normalized_shape", b"6", TypeError, "normalized_shape is b'6'", "positive int"),
    ("normalized_shape", {6}, TypeError, "normalized_shape is {6}", "positive int"),
    ("normalized_shape", {6: 6}, TypeError, "normalized_shape is {6: 6}", "positive int"),
    ("normalized_shape", (3, 2.0), TypeError, "normalized_shape is (3, 2.0)", "positive int"),
    ("normalized_shape", numpy.array(6), TypeError, "normalized_shape is array(6)", "positive int"),
    ("normalized_shape", torch.tensor(6), TypeError, "normalized_shape is tensor(6)", "positive int"),
    ("normalized_shape", 10**400, ValueError, "normalized_shape is 1000000000", "an int of 64 bits"),
    ("normalized_shape", 6.0, TypeError, "normalized_shape is 6.0", "positive int"),
    ("normalized_shape", None, TypeError, "normalized_shape is None", "positive int"),
    ("weight", None, TypeError, "weight is a NoneType", "tensor of shape (6,)"),
    ("weight", 1.0, TypeError, "weight is a float", "tensor of shape (6,)"),
    ("weight", torch.zeros(1), ValueError, "weight has shape (1,)", "(6,)"),
    ("weight", torch.zeros(N, dtype=torch.int32), TypeError, "weight has dtype torch.int32", "torch.float32"),
    ("weight", _meta(N), ValueError, "weight is on meta", "cpu"),
    ("weight", torch.zeros(N).to_sparse(), TypeError, "weight has layout torch.sparse_coo", "torch.strided"),
    ("weight", torch.zeros(N).to_mkldnn(), TypeError, "weight has layout torch._mkldnn", "torch.strided"),
    ("weight", _nested(), TypeError, "weight is a nested tensor", "dense"),
    ("bias", torch.zeros(N).to_sparse(), TypeError, "bias has layout torch.sparse_coo", "torch.strided"),
    ("bias", _nested(), TypeError, "bias is a nested tensor", "dense"),
    ("bias", None, ValueError, "bias is None but bias_rho is not", "both or neither"),
    ("bias", torch.zeros(1, N), ValueError, "bias has shape (1, 6)", "(6,)"),
    ("bias", torch.zeros(N).double(), TypeError, "bias has dtype torch.float64", "weight's torch.float32"),
    ("bias", _meta(N), ValueError, "bias is on meta", "cpu"),
    ("weight_rho", None, TypeError, "weight_rho is a NoneType", "tensor of shape (6,)"),
    ("weight_rho", torch.zeros(N).to_mkldnn(), TypeError, "weight_rho has layout torch._mkldnn", "torch.strided"),
    ("weight_rho", torch.zeros(()), ValueError, "weight_rho has shape ()", "(6,)"),
    ("weight_rho", torch.zeros(N).half(), TypeError, "weight_rho has dtype torch.float16", "weight's torch.float32"),
    ("weight_rho", _meta(N), ValueError, "weight_rho is on meta", "cpu"),
    ("weight_rho", _not_finite(math.nan, 4), ValueError, "divergence is nan", f"weight_rho has 1 {FIRST} 4"),
    ("weight_rho", _not_finite(math.inf, 2), ValueError, "divergence is nan", f"weight_rho has 1 {FIRST} 2"),
    ("weight_rho", _not_finite(-math.inf, 0), ValueError, "divergence is inf", f"weight_rho has 1 {FIRST} 0"),
    ("bias_rho", None, ValueError, "bias_rho is None but bias is not", "both or neither"),
    ("bias_rho", torch.zeros(5), ValueError, "bias_rho has shape (5,)", "(6,)"),
    ("bias_rho", torch.zeros(N).bfloat16(), TypeError, "bias_rho has dtype torch.bfloat16", "weight's torch.float32"),
    ("bias_rho", _meta(N), ValueError, "bias_rho is on meta", "cpu"),
    ("bias_rho", torch.full((N,), math.nan), ValueError, "divergence is nan", f"bias_rho has 6 {FIRST} 0"),
    ("weight_prior", None, TypeError, "weight_prior is a NoneType", "float or a tensor of shape (6,)"),
    ("weight_prior", "1", TypeError, "weight_prior is a str", "float or a tensor of shape (6,)"),
    ("weight_prior", torch.zeros(N).to_mkldnn(), TypeError, "weight_prior has layout torch._mkldnn", "torch.strided"),
    ("weight_prior", _nested(), TypeError, "weight_prior is a nested tensor", "dense"),
    ("weight_prior", torch.full((N,), math.nan), ValueError, "divergence is nan", f"weight_prior has 6 {FIRST} 0"),
    ("weight_prior", 10**400, ValueError, "weight_prior is 1000000000", "finite"),
    ("weight_prior", -1e39, ValueError, "weight_prior is -1e+39", "number, -3.4e+38 to 3.4e+38 in torch.float32"),
    ("weight_prior", math.nan, ValueError, "weight_prior is nan", "finite"),
    ("weight_prior", torch.zeros(5), ValueError, "weight_prior has shape (5,)", "(6,)"),
    ("weight_prior", torch.zeros(N).long(), TypeError, "weight_prior has dtype torch.int64", "torch.float32"),
    ("weight_prior", _meta(N), ValueError, "weight_prior is on meta", "cpu"),
    ("bias_prior", None, TypeError, "bias_prior is a NoneType", "float or a tensor of shape (6,)"),
    ("bias_prior", -math.inf, ValueError, "bias_prior is -inf", "finite"),
    ("bias_prior", torch.zeros(N, 1), ValueError, "bias_prior has shape (6, 1)", "(6,)"),
    ("prior_std", 0.0, ValueError, "prior_std is 0.0", "above 0"),
    ("prior_std", -0.1, ValueError, "prior_std is -0.1", "above 0"),
    ("prior_std", math.nan, ValueError, "prior_std is nan", "finite number above 0"),
    ("prior_std", math.inf, ValueError, "prior_std is inf", "finite number above 0"),
    ("prior_std", 1e308, ValueError, "prior_std is 1e+308", "above 0, 1.18e-38 to 3.4e+38 in torch.float32"),
    ("prior_std", 1e-320, ValueError, "prior_std is 1e-320", "above 0, 1.18e-38 to 3.4e+38 in torch.float32"),
    ("prior_std", 10**5000, ValueError, "prior_std is a int of thousands of digits", "finite number above 0"),
    ("prior_std", fractions.Fraction(10**400), ValueError, "prior_std is Fraction(1000", "finite number above 0"),
    ("prior_std", numpy.array([0.1, 0.2]), TypeError, "prior_std is a ndarray", "float"),
    ("prior_std", torch.tensor(0.1), TypeError, "prior_std is a Tensor", "float"),
    ("prior_std", "0.1", TypeError, "prior_std is a str", "float"),
    ("prior_std", None, TypeError, "prior_std is a NoneType", "float"),
    ("eps", -1e-5, ValueError, "eps is -1e-05", "0 or more"),
    ("eps", 10**39, ValueError, "eps is 1000000000", "finite number of 0 or more"),
    ("eps", math.nan, ValueError, "eps is nan", "finite number of 0 or more"),
    ("eps", True, TypeError, "eps is a bool", "float"),
    ("noise", "rows", ValueError, "noise is 'rows'", "'batch', 'sample', 'token'"),
    ("noise", None, TypeError, "noise is a NoneType", "'batch', 'sample', 'token'"),
    ("noise", numpy.array(["batch"]), TypeError, "noise is a ndarray", "'batch', 'sample', 'token'"),
    ("noise", torch.zeros(2), TypeError, "noise is a Tensor", "'batch', 'sample', 'token'"),
    ("posterior", numpy.zeros(2), TypeError, "posterior is a ndarray", "'sampled', 'deterministic'"),
    ("posterior", "mean", ValueError, "posterior is 'mean'", "'sampled', 'deterministic'"),
    ("sample", "no", TypeError, "sample is 'no', a str", "True or False"),
    ("sample", 1, TypeError, "sample is 1, a int", "True or False"),
    ("sample", numpy.zeros(2), TypeError, "sample is array([0., 0.]), a ndarray", "True or False"),
    ("sample", torch.zeros(2), TypeError, "sample is tensor([0., 0.]), a Tensor", "True or False"),
    ("residual", torch.zeros(3, N).to_sparse(), TypeError, "residual has layout torch.sparse_coo", "torch.strided"),
    ("residual", torch.zeros(3, N).to_mkldnn(), TypeError, "residual has layout torch._mkldnn", "torch.strided"),
    ("residual", _meta(3, N), ValueError, "residual is on meta", "cpu"),
    ("sample_dim", 1, ValueError, "sample_dim is 1", "0 to 0"),
    ("sample_dim", -1, ValueError, "sample_dim is -1", "0 to 0"),
    ("sample_dim", -3, ValueError, "sample_dim is -3", "0 to 0"),
    ("sample_dim", 0.0, TypeError, "sample_dim is a float", "int"),
    ("sample_dim", True, TypeError, "sample_dim is a bool", "int"),
    ("seed", torch.tensor([7]).to_sparse(), TypeError, "seed has layout torch.sparse_coo", "torch.strided"),
    ("seed", 7, TypeError, "seed is a int", "int64 tensor"),
    ("seed", torch.tensor([7], dtype=torch.int32), TypeError, "seed has dtype torch.int32", "torch.int64"),
    ("seed", torch.tensor([7, 8]), ValueError, "seed has 2 elements", "1"),
    ("seed", torch.zeros(0, dtype=torch.int64), ValueError, "seed has 0 elements", "1"),
    ("seed", torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "seed is on meta", "cpu"),
    ("generator", 7, TypeError, "generator is a int", "torch.Generator"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value", "error", "came", "expected"), BAD, ids=[f"{bad[0]}-{i}" for i, bad in enumerate(BAD)]
)
def test_bad_input_is_refused_with_an_explanation(argument, value, error, came, expected):
    arguments = {**make(leading=(3,), dtype=torch.float32), "normalized_shape": N, argument: value}
    with pytest.raises(error) as raised:
        kl_layer_norm(**arguments)
    message = str(raised.value)
    assert argument in message
    assert came in message
    assert expected in message[message.index(came) + len(came) :]
    if argument != "x":  # nor after a call of the same shapes, dtypes and devices, which is known to be good
        good = make(leading=(3,), dtype=torch.float32)
        kl_layer_norm(**good, normalized_shape=N, residual=torch.zeros(3, N))
        kl_layer_norm(**good, normalized_shape=N, weight_prior=torch.zeros(N))
        with pytest.raises(error, match=re.escape(came)):
            kl_layer_norm(**arguments)


UNUSED = [
    ({"sample": False}, "seed", "abc", TypeError),
    ({"sample": False}, "seed", torch.zeros(1), TypeError),
    ({"sample": False}, "generator", "abc", TypeError),
    ({"seed": torch.tensor([7])}, "generator", "abc", TypeError),
    ({"noise": "token"}, "sample_dim", "abc", TypeError),
    ({"noise": "batch"}, "sample_dim", True, TypeError),
    ({"sample": False}, "sample_dim", 2**63, ValueError),
    ({"sample": False}, "noise", "rows", ValueError),
    ({"weight_prior": torch.zeros(N)}, "bias_prior", "abc", TypeError),
    ({"posterior": "deterministic", "weight_rho": None, "bias_rho": None}, "weight_prior", "abc", TypeError),
    ({"posterior": "deterministic", "weight_rho": None, "bias_rho": None}, "sample", "abc", TypeError),
]


@pytest.mark.parametrize(("mode", "argument", "value", "error"), UNUSED)
def test_an_argument_that_the_mode_does_not_use_is_checked(mode, argument, value, error):
    arguments = {**make(leading=(3,), dtype=torch.float32), "normalized_shape": N, **mode}
    kl_layer_norm(**arguments)
    with pytest.raises(error, match=f"{argument} (is|has)"):
        kl_layer_norm(**{**arguments, argument: value})


NUMBERS = [
    ("prior_std", 0.5, [fractions.Fraction(1, 2), numpy.float32(0.5), numpy.float64(0.5)]),
    ("prior_std", 2.0, [2, numpy.int64(2), numpy.uint8(2)]),
    ("eps", 0.5, [fractions.Fraction(1, 2), numpy.float16(0.5)]),
    ("eps", 1e30, [10**30]),
    ("weight_prior", 0.5, [fractions.Fraction(1, 2), numpy.float32(0.5)]),
    ("bias_prior", -2.0, [-2, fractions.Fraction(-2), numpy.int8(-2)]),
    ("sample_dim", 1, [numpy.int64(1), numpy.uint8(1)]),
    (
        "normalized_shape",
        (N,),
        [N, [N], numpy.int32(N), numpy.array([N]), (numpy.int64(N),), torch.Size([N]), range(N, 7)],
    ),
]


@pytest.mark.parametrize(("argument", "value", "same"), NUMBERS)
@pytest.mark.parametrize("known", [True, False])
def test_numbers_of_any_type_mean_the_same(argument, value, same, known, monkeypatch):
    arguments = {**make(dtype=torch.float32), "normalized_shape": N, "seed": seed_of(5)}
    expected = kl_layer_norm(**{**arguments, argument: value})
    for other in same:
        if not known:
            monkeypatch.setattr(functional, "_known", {})
        found = kl_layer_norm(**{**arguments, argument: other})
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), other


def test_fp64_input_has_the_range_of_fp64():
    tensors = make()
    assert call(tensors, prior_std=1e100)[1] > call(tensors, prior_std=1e39)[1] > 0
    with pytest.raises(ValueError, match=r"eps is 1000.*expected .* to 1.8e\+308 in torch.float64"):
        call(tensors, eps=10**400)


def test_the_remedies_for_other_layouts_work():
    good = {**make(leading=(3,), shape=(2, 3), dtype=torch.float32), "normalized_shape": (2, 3), "seed": seed_of(5)}
    expected = kl_layer_norm(**{**good, "bias": torch.zeros(2, 3)})
    mkldnn = torch.zeros(2, 3).to_mkldnn()
    for other, remedy in (mkldnn, mkldnn.to_dense()), (_nested(), _nested().to_padded_tensor(0.0)):
        with pytest.raises(TypeError, match=r"bias (has layout|is a nested).*Remedy: bias\.to_(dense|padded_tensor)"):
            kl_layer_norm(**{**good, "bias": other})
        found = kl_layer_norm(**{**good, "bias": remedy})
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["weight", "bias", "weight_prior", "residual", "x", "seed"])
def test_the_remedy_for_a_layout_works(name):
    good = {
        **make(leading=(3,), dtype=torch.float32), "normalized_shape": N, "weight_prior": torch.ones(N),
        "residual": torch.ones(3, N), "seed": seed_of(5),
    }  # fmt: skip
    sparse = good[name].to_sparse()
    with pytest.raises(TypeError, match=rf"{name} has layout torch.sparse_coo, .*Remedy: {name}.to_dense\(\)"):
        kl_layer_norm(**{**good, name: sparse})
    found = kl_layer_norm(**{**good, name: sparse.to_dense()})
    assert all(torch.equal(a, b) for a, b in zip(found, kl_layer_norm(**good), strict=True))


def test_a_generator_of_another_device_is_refused():
    tensors = {name: t.to("meta") for name, t in make().items()}
    with pytest.raises(ValueError, match="generator is for cpu, expected meta"):
        call(tensors, generator=torch.Generator())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_mean_that_is_not_finite_is_named(name):
    tensors = make()
    tensors[name][3] = math.inf
    with pytest.raises(ValueError, match=rf"{name} has 1 such value\(s\), the first at index 3"):
        call(tensors)
