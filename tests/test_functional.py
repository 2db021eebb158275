"""`klnorm.functional.kl_layer_norm`: what it refuses, what it must accept, and agreement with the reference."""

import fractions
import math
import re
import warnings

import numpy
import pytest
import torch

from klnorm import functional
from klnorm.functional import kl_layer_norm
from klnorm.reference import kl_layer_norm as reference

N = 6
NOISES = "batch", "sample", "token"
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
RHO_OF_ONE = math.log(math.e - 1)  # softplus of it is 1


def make(
    device="cpu", leading=(3, 4), shape=(N,), dtype=torch.float64, parameter_dtype=None, bias=True, requires_grad=False
):
    """x and the parameters by name, random."""

    def random(size, dtype, centre=0.0):
        return (torch.randn(size, dtype=dtype, device=device) + centre).requires_grad_(requires_grad)

    parameter_dtype = parameter_dtype or dtype
    return {
        "x": random((*leading, *shape), dtype),
        "weight": random(shape, parameter_dtype, 1.0),
        "bias": random(shape, parameter_dtype) if bias else None,
        "weight_rho": random(shape, parameter_dtype, -1.0),
        "bias_rho": random(shape, parameter_dtype, -1.0) if bias else None,
    }


def seed_of(value, device="cpu"):
    return torch.tensor([value], device=device)


def call(tensors, function=kl_layer_norm, **options):
    """(y, kl) of `function`; the normalized shape is that of the weight."""
    return function(tensors["x"], tensors["weight"].shape, *list(tensors.values())[1:], **options)


def gradients(tensors, dy, dkl, function=kl_layer_norm, **options):
    """(y, kl, gradient by name) for the cotangents dy and dkl."""
    present = {name: t for name, t in tensors.items() if t is not None}
    y, kl = call(tensors, function, **options)
    found = torch.autograd.grad((y, kl), list(present.values()), (dy, dkl))
    return y, kl, dict(zip(present, found, strict=True))


def double(tensors):
    return {name: None if t is None else t.detach().double().requires_grad_() for name, t in tensors.items()}


def noise_error(device):
    """Tolerance in fp64: rounding alone on the CPU, where op and reference share the normals; the kernels' are fp32."""
    return 1e-12 if device.type == "cpu" else 2e-5


def assert_rounded_once(found, expected, terms=N):
    """`found` is the fp64 `expected` computed in fp32 and rounded once to its dtype.

    Rounding to the dtype costs half an eps; arithmetic in fp32 some eps of fp32, of the largest value, for each of the
    `terms` added.
    """
    fp32 = 8 * terms * torch.finfo(torch.float32).eps * expected.abs().max().clamp(min=1).item()
    rounding = 0.5 * torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=rounding * 1.01, atol=fp32)


# Bad input: what is passed in place of a good argument, what is raised, and what the message must name.


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


# Hand-worked values


def test_hand_worked_evaluation_and_kl(device):
    # mean 2, variance 1, and with eps = 3 rstd = 1/2: xhat = -1/2, 1/2; deviations 1, prior deviation 2
    x = torch.tensor([[1.0, 3.0]], device=device)
    weight, bias = torch.tensor([2.0, 4.0], device=device), torch.tensor([1.0, -1.0], device=device)
    rho = torch.full((2,), RHO_OF_ONE, device=device)
    y, kl = kl_layer_norm(x, 2, weight, bias, rho, rho, prior_std=2.0, eps=3.0, sample=False)
    assert y.tolist() == [[0.0, 1.0]]
    # distances from the prior means (1 and 0): 1, 3 and 1, -1; log(2/1) + (1 + d^2) / 8 - 1/2 each
    by_hand = 4 * math.log(2) + (4 + 1 + 9 + 1 + 1) / 8 - 2
    assert kl.item() == pytest.approx(by_hand, rel=1e-6)
    _, without_shift = kl_layer_norm(x, 2, weight, None, rho, None, prior_std=2.0)
    assert without_shift.item() == pytest.approx(2 * math.log(2) + (2 + 1 + 9) / 8 - 1, rel=1e-6)
    _, nearer = kl_layer_norm(x, 2, weight, bias, rho, rho, prior_std=2.0, weight_prior=2.0, bias_prior=-1.0)
    assert nearer.item() == pytest.approx(4 * math.log(2) + (4 + 0 + 4 + 4 + 0) / 8 - 2, rel=1e-6)


def test_hand_worked_gradients_without_noise(device):
    # three features of mean 0 and variance 2 with eps = 2: rstd = 1/2, xhat = -s, 0, s for s = sqrt(3)/2
    s = math.sqrt(3) / 2
    x = torch.tensor([[-2 * s, 0.0, 2 * s]], dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, device=device, requires_grad=True)
    rho = torch.full_like(weight, RHO_OF_ONE)
    y, _ = kl_layer_norm(x, 3, weight, bias, rho, rho, eps=2.0, sample=False)
    y.backward(torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64, device=device))
    # dxhat = 1, 2, 0: mean 1, mean(dxhat * xhat) = -s/3, so dx = (0 - s^2/3, 1, -1 + s^2/3) / 2 with s^2/3 = 1/4
    expected = torch.tensor([[-0.125, 0.5, -0.375]], dtype=torch.float64, device=device)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)
    assert weight.grad.tolist() == pytest.approx([-s, 0, 0], abs=1e-12)
    assert bias.grad.tolist() == [1, 1, 0]


# Agreement with the reference


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
@pytest.mark.parametrize(("leading", "shape"), [((3, 4), (N,)), ((2, 3, 2), (2, 3)), ((5,), (7,)), ((), (N,))])
def test_agrees_with_the_reference(device, leading, shape, noise, bias):
    tensors = make(device, leading, shape, bias=bias, requires_grad=True)
    options = {
        "noise": noise if noise != "none" else "batch", "sample": noise != "none", "seed": seed_of(2**40 + 3, device),
        "sample_dim": 1 if len(leading) > 1 else 0, "eps": 0.1, "prior_std": 0.3,
        "weight_prior": torch.randn(shape, dtype=torch.float64, device=device), "bias_prior": -0.7,
    }  # fmt: skip
    dy, dkl = torch.randn_like(tensors["x"]), torch.randn((), dtype=torch.float64, device=device)
    y, kl, grads = gradients(tensors, dy, dkl, **options)
    y_expected, kl_expected, grads_expected = gradients(tensors, dy, dkl, reference, **options)
    close = {"rtol": noise_error(device), "atol": noise_error(device)}
    torch.testing.assert_close(y, y_expected, **close)
    torch.testing.assert_close(kl, kl_expected, **close)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_expected[name], **close, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_every_dtype_computes_in_fp32_and_rounds_once(device, noise, dtype, parameter_dtype):
    tensors = make(device, dtype=dtype, parameter_dtype=parameter_dtype, requires_grad=True)
    kl_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"seed": seed_of(5, device), "prior_std": 1.0, "sample": noise != "none"}
    options["noise"] = noise if noise != "none" else "batch"
    dy, dkl = torch.randn_like(tensors["x"]), torch.randn((), dtype=kl_dtype, device=device)
    y, kl, grads = gradients(tensors, dy, dkl, **options)
    y_expected, kl_expected, grads_expected = gradients(
        double(tensors), dy.double(), dkl.double(), reference, **options
    )
    assert y.dtype == dtype
    assert kl.dtype == kl_dtype
    assert_rounded_once(y, y_expected)
    assert_rounded_once(kl, kl_expected, terms=2 * N)
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype
        assert_rounded_once(grad, grads_expected[name], terms=12 * N)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_gradcheck(device, noise, bias):
    tensors = make(device, (2, 2), (3,), bias=bias, requires_grad=True)
    present = [t for t in tensors.values() if t is not None]

    def function(*values):
        values = iter(values)
        filled = {name: None if t is None else next(values) for name, t in tensors.items()}
        mode = {"noise": "batch", "sample": False} if noise == "none" else {"noise": noise}
        return call(filled, seed=seed_of(11, device), eps=0.1, prior_std=0.5, **mode)

    assert torch.autograd.gradcheck(function, present)


@pytest.mark.parametrize("noise", NOISES)
def test_no_deviation_at_all_keeps_gradients_finite(device, noise):
    # softplus(-200) is 0 in fp32: the square root of the merged variance is at 0, where its own derivative is infinite
    tensors = make(device, dtype=torch.float32)
    tensors["weight_rho"].fill_(-200.0)
    tensors["bias_rho"].fill_(-200.0)
    for t in tensors.values():
        t.requires_grad_()
    dy = torch.randn_like(tensors["x"])
    zero = torch.zeros((), device=device)
    y, _, grads = gradients(tensors, dy, zero, noise=noise, seed=seed_of(1, device))
    quiet, _, expected = gradients(tensors, dy, zero, sample=False)
    torch.testing.assert_close(y, quiet, rtol=0, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-6)


# What must work


def _transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _row_strided(x):
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan)
    wide[..., 2 : 2 + x.shape[-1]] = x
    return wide[..., 2 : 2 + x.shape[-1]]


def _every_other_row(x):
    twice = x.new_full((2 * x.shape[0], *x.shape[1:]), math.nan)
    twice[1::2] = x
    return twice[1::2]


@pytest.mark.parametrize("layout", [_transposed, _row_strided, _every_other_row])
@pytest.mark.parametrize("leading", [(4,), (3, 4)])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_strided_input_and_gradient(device, layout, leading, noise):
    tensors = make(device, leading, requires_grad=True)
    mode = {"noise": "batch", "sample": False} if noise == "none" else {"noise": noise, "seed": seed_of(3, device)}
    dy = torch.randn_like(tensors["x"])
    one = torch.ones((), dtype=torch.float64, device=device)
    y_expected, _, expected = gradients(tensors, dy, one, **mode)
    strided = layout(tensors["x"].detach())
    assert not strided.is_contiguous()
    tensors["x"] = strided.requires_grad_()
    y, _, grads = gradients(tensors, layout(dy), one, **mode)
    torch.testing.assert_close(y, y_expected, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)
    assert y.is_contiguous()


@pytest.mark.parametrize("noise", NOISES)
def test_expanded_input(device, noise):
    tensors = make(device, leading=(1, 4), requires_grad=True)
    row = tensors["x"]
    tensors["x"] = row.expand(3, 4, N)
    copied = {**tensors, "x": row.detach().repeat(3, 1, 1).requires_grad_()}
    y, kl = call(tensors, noise=noise, seed=seed_of(3, device))
    y_expected, kl_expected = call(copied, noise=noise, seed=seed_of(3, device))
    assert y.is_contiguous()
    torch.testing.assert_close(y, y_expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(kl, kl_expected)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, row, dy.expand_as(y))
    (expected,) = torch.autograd.grad(y_expected, copied["x"], dy)
    torch.testing.assert_close(dx, expected.sum(0, keepdim=True), rtol=1e-12, atol=1e-12)


def test_expanded_parameters_and_cotangent(device):
    # a scalar scale shared by all features, and the stride-0 gradient that y.sum() sends back
    tensors = make(device)
    for name in "weight", "bias", "weight_rho", "bias_rho":
        tensors[name] = tensors[name][:1].clone().requires_grad_()
    wide = {name: t if name == "x" else t.expand(N) for name, t in tensors.items()}
    y, kl = call(wide, seed=seed_of(9, device))
    y_expected, kl_expected = call(wide, reference, seed=seed_of(9, device))
    scalars = list(tensors.values())[1:]
    close = {"rtol": noise_error(device), "atol": noise_error(device)}
    torch.testing.assert_close(
        torch.autograd.grad(y.sum() + kl, scalars),
        torch.autograd.grad(y_expected.sum() + kl_expected, scalars),
        **close,
    )


@pytest.mark.parametrize("leading", [(4,), (3, 4)])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_the_output_may_be_changed_in_place(device, noise, leading):
    """As by nn.ReLU(inplace=True) or `hidden += residual`."""
    tensors = make(device, leading, requires_grad=True)
    dy = torch.randn_like(tensors["x"])

    def gradients(change):
        y, kl = call(
            tensors, seed=seed_of(5, device), noise="batch" if noise == "none" else noise, sample=noise != "none"
        )
        return torch.autograd.grad((change(y), kl), list(tensors.values()), (dy, kl.new_tensor(1.3)))

    expected = gradients(lambda y: torch.relu(y * 2))
    assert all(torch.equal(a, b) for a, b in zip(gradients(lambda y: y.mul_(2).relu_()), expected, strict=True))


@pytest.mark.parametrize("leading", [(0,), (0, 5), (4, 0)])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_no_rows_give_empty_output_and_the_exact_kl(device, noise, leading):
    tensors = make(device, leading, requires_grad=True)
    mode = {"noise": "batch", "sample": False} if noise == "none" else {"noise": noise}
    dkl = torch.tensor(-1.7, dtype=torch.float64, device=device)
    y, kl, grads = gradients(tensors, torch.randn_like(tensors["x"]), dkl, **mode)
    assert y.shape == (*leading, N)
    assert y.dtype == torch.float64
    assert grads["x"].shape == (*leading, N)
    some = {**tensors, "x": torch.randn(3, 4, N, dtype=torch.float64, device=device)}
    expected_kl = call(some, reference, seed=seed_of(0, device))[1]
    torch.testing.assert_close(kl, expected_kl, rtol=1e-13, atol=0)
    for name in "weight", "bias", "weight_rho", "bias_rho":
        (expected,) = torch.autograd.grad(expected_kl, tensors[name], dkl, retain_graph=True)
        torch.testing.assert_close(grads[name], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("noise", NOISES)
def test_input_of_exactly_the_normalized_shape_is_one_row(device, noise):
    tensors = make(device, leading=())
    y, _ = call(tensors, noise=noise, seed=seed_of(4, device))
    one_row, _ = call({**tensors, "x": tensors["x"][None]}, noise="token", seed=seed_of(4, device))
    assert y.shape == (N,)
    assert torch.equal(y, one_row[0])
    assert not torch.equal(y, call(tensors, sample=False)[0])


@pytest.mark.parametrize(("negative", "positive"), [(-2, 2), (-3, 1), (-4, 0)])
def test_negative_sample_dim_counts_from_the_end(device, negative, positive):
    tensors = make(device, leading=(2, 3, 4))
    y, _ = call(tensors, sample_dim=negative, seed=seed_of(4, device))
    assert torch.equal(y, call(tensors, sample_dim=positive, seed=seed_of(4, device))[0])
    assert not torch.equal(y, call(tensors, sample_dim=(positive + 1) % 3, seed=seed_of(4, device))[0])


def test_priors_as_tensors_and_as_floats(device):
    tensors = make(device)
    as_float = call(tensors, weight_prior=0.3, bias_prior=-2, sample=False)[1]
    weight_prior, bias_prior = torch.full_like(tensors["weight"], 0.3), torch.full_like(tensors["bias"], -2.0)
    as_tensor = call(tensors, weight_prior=weight_prior, bias_prior=bias_prior, sample=False)[1]
    mixed = call(tensors, weight_prior=weight_prior, bias_prior=-2, sample=False)[1]
    torch.testing.assert_close(as_float, as_tensor, rtol=1e-14, atol=0)
    torch.testing.assert_close(as_float, mixed, rtol=1e-14, atol=0)
    swapped = call(tensors, weight_prior=-2, bias_prior=0.3, sample=False)[1]
    assert abs(as_float - swapped) > 1


def test_every_bit_of_the_seed_matters(device):
    tensors = make(device, leading=(2, 2), dtype=torch.float32)
    base = 0x0123456789ABCDEF
    seeds = [base, *(base ^ 1 << bit for bit in range(63)), base - 2**63]  # the last one flips the sign bit
    outputs = {tuple(call(tensors, seed=seed_of(seed, device))[0].flatten().tolist()) for seed in seeds}
    assert len(outputs) == len(seeds) == 65


@pytest.mark.parametrize("seed", [0, -1, 1, 2**63 - 1, -(2**63), 1 << 32, -(1 << 32), 0xFFFFFFFF])
@pytest.mark.parametrize("noise", NOISES)
def test_any_64_bit_seed_agrees_with_the_reference(device, noise, seed):
    tensors = make(device)
    y, _ = call(tensors, noise=noise, seed=seed_of(seed, device))
    expected, _ = call(tensors, reference, noise=noise, seed=seed_of(seed, device))
    torch.testing.assert_close(y, expected, rtol=noise_error(device), atol=noise_error(device))


@pytest.mark.parametrize("noise", NOISES)
def test_the_shape_of_a_seed_does_not_matter(device, noise):
    tensors = make(device)
    expected, _ = call(tensors, noise=noise, seed=seed_of(5, device))
    for shape in (), (1, 1), (1, 1, 1):
        y, _ = call(tensors, noise=noise, seed=torch.full(shape, 5, device=device))
        assert torch.equal(y, expected), shape


def test_noise_comes_from_torchs_generator_or_the_one_given(device):
    tensors = make(device)

    def sampled(seed, **options):
        torch.manual_seed(seed)
        return call(tensors, **options)[0]

    def own(seed):
        return torch.Generator(device).manual_seed(seed)

    first = sampled(3)
    assert not torch.equal(first, call(tensors)[0])  # fresh noise each time
    assert torch.equal(first, sampled(3))
    assert not torch.equal(first, sampled(4))
    assert torch.equal(first, sampled(99, generator=own(3)))
    generator = own(3)
    assert torch.equal(sampled(0, generator=generator), first)
    assert not torch.equal(sampled(0, generator=generator), first)  # the generator moved on


@pytest.mark.parametrize("options", [{"seed": 3}, {"generator": True}, {"sample": False}])
def test_torchs_generator_is_left_alone_where_it_is_not_asked(device, options):
    tensors = make(device)
    if "seed" in options:
        options = {"seed": seed_of(3, device)}
    elif "generator" in options:
        options = {"generator": torch.Generator(device)}
    torch.manual_seed(1)
    expected = torch.rand(3, device=device)
    torch.manual_seed(1)
    call(tensors, **options)
    assert torch.equal(torch.rand(3, device=device), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(device, dtype):
    tensors = make(device, dtype=dtype, parameter_dtype=torch.float32)
    y, kl = call(tensors, seed=seed_of(5, device))
    with torch.autocast(device.type, torch.bfloat16):
        y_autocast, kl_autocast = call(tensors, seed=seed_of(5, device))
    assert y_autocast.dtype == dtype
    assert torch.equal(y, y_autocast)
    assert torch.equal(kl, kl_autocast)


# What the noise modes mean


def draws_of(y, xhat):
    """(gamma, beta), each (N,), of rows (R, N) that share a draw; that one pair explains all R rows is checked."""
    unknowns = torch.stack([xhat.T, torch.ones_like(xhat.T)], dim=2)  # (N, R, 2)
    solution = torch.linalg.lstsq(unknowns, y.T[:, :, None]).solution
    torch.testing.assert_close((unknowns @ solution)[:, :, 0].T, y, rtol=1e-9, atol=1e-9)
    return solution[:, :, 0].T


@pytest.mark.parametrize(("noise", "sample_dim"), [("batch", 0), ("sample", 0), ("sample", 1), ("sample", 2)])
def test_rows_of_one_draw_share_scale_and_shift_and_others_do_not(device, noise, sample_dim):
    tensors = make(device, leading=(3, 4, 2))
    y, _ = call(tensors, noise=noise, sample_dim=sample_dim, seed=seed_of(7, device))
    x = tensors["x"]
    xhat = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
    if noise == "batch":
        groups = [(y.reshape(-1, N), xhat.reshape(-1, N))]
    else:
        groups = [
            (y.select(sample_dim, i).reshape(-1, N), xhat.select(sample_dim, i).reshape(-1, N))
            for i in range(x.shape[sample_dim])
        ]
    found = torch.stack([draws_of(*group) for group in groups])
    assert len(found) == (1 if noise == "batch" else x.shape[sample_dim])
    means = torch.stack([tensors["weight"], tensors["bias"]])
    for i, draw in enumerate(found):
        assert ((draw - means).abs() > 1e-6).all()  # sampled, scale and shift of every feature
        assert not any(torch.isclose(draw, other).any() for other in found[:i])


def test_token_noise_gives_every_row_its_own_draw(device):
    tensors = make(device, leading=())
    tensors["x"] = tensors["x"].expand(4, 5, N)
    rows = call(tensors, noise="token", seed=seed_of(7, device))[0].reshape(-1, N)
    assert all(not torch.isclose(rows[i], rows[j]).any() for i in range(20) for j in range(i))
    shared = call(tensors, noise="sample", seed=seed_of(7, device))[0]
    assert torch.equal(shared, shared[:, :1].expand_as(shared))


@pytest.mark.parametrize("noise", ["sample", "token"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_shared_and_merged_noise_have_the_law_of_the_model(device, noise, bias):
    """gamma * xhat + beta ~ N(weight * xhat + bias, s^2 xhat^2 + t^2), whether the draws are merged or not."""
    draws = 20_000
    tensors = make(device, leading=(2,), bias=bias)
    x = tensors["x"]
    tensors["x"] = x.expand(draws, 2, N)
    y, _ = call(tensors, noise=noise, seed=seed_of(2**50 + 1, device))
    xhat = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)
    s, t = (
        torch.nn.functional.softplus(rho) if rho is not None else 0
        for rho in (tensors["weight_rho"], tensors["bias_rho"])
    )
    mean = tensors["weight"] * xhat + (tensors["bias"] if bias else 0)
    z = (y - mean) / torch.sqrt(s**2 * xhat**2 + t**2)
    # five standard errors of a mean and of a variance of that many standard normals
    assert z.mean(0).abs().max() < 5 / math.sqrt(draws)
    assert (z.var(0) - 1).abs().max() < 5 * math.sqrt(2 / draws)
    between_rows = (z[:, 0] * z[:, 1]).mean(0)
    if noise == "token":
        assert between_rows.abs().max() < 5 / math.sqrt(draws)
    else:
        a, b = xhat
        expected = (s**2 * a * b + t**2) / torch.sqrt((s**2 * a**2 + t**2) * (s**2 * b**2 + t**2))
        # a product of correlated standard normals has a variance of at most 2
        assert (between_rows - expected).abs().max() < 5 * math.sqrt(2 / draws)


# Memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [*NOISES, "none"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, _transposed, _row_strided])
def test_backward_saves_the_inputs_and_eight_bytes_per_row(device, layout, noise, dtype):
    """The mean and rstd of a row in fp32; twice the bytes for fp64, whose mean and rstd are fp64."""
    tensors = make(device, dtype=dtype)
    tensors["x"] = layout(tensors["x"])
    for t in tensors.values():
        t.requires_grad_()
    prior, seed = torch.ones_like(tensors["weight"]), seed_of(3, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = call(
            tensors, noise="batch" if noise == "none" else noise, sample=noise != "none", seed=seed, weight_prior=prior
        )
    inputs = {t.untyped_storage().data_ptr() for t in (*tensors.values(), prior, seed)}
    extra = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert set(extra) & inputs  # the hooks saw what the Function saves
    n_rows, bytes_per_row = tensors["x"].numel() // N, 16 if dtype == torch.float64 else 8
    assert sum(size for pointer, size in extra.items() if pointer not in inputs) <= n_rows * bytes_per_row
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert not held, "a tensor in ctx escapes the hooks"
