"""`klnorm.reference`: the functional forms' arguments, any number of derivatives, exact deviations."""

import inspect

import pytest
import torch
from torch.autograd import gradgradcheck

import klnorm
from klnorm import functional, reference
from klnorm.reference.kl_norm import softplus

N = 8
# torch's own warning
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def softplus_by_hand(rho):
    """Without a threshold, so exact to rounding wherever rho is."""
    return rho.clamp(min=0) + torch.log1p(torch.exp(-rho.abs()))


def tensors(names, dtype=torch.float64, rho=-1.0):
    """Arguments of a functional form by name, as leaves."""
    torch.manual_seed(0)
    sizes = {"x": (3, 4, N)}
    made = {name: torch.randn(sizes.get(name, (N,)), dtype=dtype) for name in names}
    for name, tensor in made.items():
        tensor.add_(rho if name.endswith("rho") else 0).requires_grad_()
    return made


WITH_SHIFT = "x", "weight", "bias", "weight_rho", "bias_rho"
FORMS = {
    "layer": ("kl_layer_norm", WITH_SHIFT),
    "rms": ("kl_rms_norm", ("x", "weight", "weight_rho")),
    "rms with a shift": ("kl_rms_norm", WITH_SHIFT),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request):
    """(name, its tensors)."""
    return request.param


def call(module, form, given, **options):
    """(y, kl) or (y, sum, kl) of a form, with the shape as an int and a seed that is torch's own."""
    name, arguments = form
    torch.manual_seed(4)
    return getattr(module, name)(normalized_shape=N, **{argument: given[argument] for argument in arguments}, **options)


# The arguments of the functional forms


def test_the_signatures_are_those_of_the_functional_forms(form):
    found, expected = (inspect.signature(getattr(module, form[0])) for module in (reference, functional))
    assert found == expected


OPTIONS = {
    "none": {},
    "token": {"noise": "token", "prior_std": 0.7, "weight_prior": torch.randn(N, dtype=torch.float64)},
    "second dimension": {"sample_dim": 1, "residual": torch.randn(3, 4, N, dtype=torch.float64), "eps": 0.1},
    "batch": {"noise": "batch", "generator": 5, "bias_prior": -0.3},
    "means": {"sample": False},
    "deterministic": {"posterior": "deterministic", "prior_std": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_results_are_those_of_the_functional_forms(form, options):
    options = dict(OPTIONS[options])
    given = tensors(form[1])
    if "posterior" in options:
        given |= {name: None for name in given if name.endswith("rho")}
    results = []
    for module in reference, functional:
        if "generator" in options:
            options["generator"] = torch.Generator().manual_seed(5)
        results.append(call(module, form, given, **options))
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# More derivatives than the functional forms have: what their errors advise


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_the_remedy_for_second_derivatives(form, noise):
    given = tensors(form[1])
    (dx,) = torch.autograd.grad(call(functional, form, given, noise=noise)[0].sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"no second derivatives.*Remedy: .*klnorm\.reference\.{form[0]}"):
        dx.square().sum().backward()

    def function(*inputs):
        return call(reference, form, dict(zip(form[1], inputs, strict=True)), noise=noise)

    assert gradgradcheck(function, tuple(given.values()))


def test_the_remedies_for_forward_mode_derivatives(form):
    given = {name: tensor.detach() for name, tensor in tensors(form[1]).items()}
    x, tangent = given["x"], torch.randn_like(given["x"])

    def of_x(module):
        return lambda x: call(module, form, {**given, "x": x})[0]

    with pytest.raises(RuntimeError, match=rf"forward-mode derivatives.*Remedy: .*klnorm\.reference\.{form[0]}"):
        torch.func.jvp(of_x(functional), (x,), (tangent,))
    y, dy = torch.func.jvp(of_x(reference), (x,), (tangent,))
    _, pull = torch.func.vjp(of_x(functional), x)
    v = torch.randn_like(y)
    torch.testing.assert_close((v * dy).sum(), (pull(v)[0] * tangent).sum(), rtol=1e-10, atol=0)
    jacobian = torch.func.jacrev(of_x(functional), chunk_size=1)(x)
    torch.testing.assert_close(torch.einsum("abcdef,def->abc", jacobian, tangent), dy, rtol=1e-10, atol=1e-12)

    seed = torch.tensor([7])
    hessian = torch.func.hessian(lambda x: call(reference, form, {**given, "x": x}, seed=seed)[0].square().sum())(x)
    torch.testing.assert_close(hessian, hessian.permute(3, 4, 5, 0, 1, 2), rtol=1e-10, atol=1e-10)
    assert hessian.abs().max() > 0.1


# Deviations above softplus' threshold of 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softplus_is_exact_in_its_dtype(dtype):
    rho = torch.linspace(-60, 60, 481, dtype=dtype)
    expected = softplus_by_hand(rho.double()).to(dtype)
    # two roundings of numbers of this size; the threshold of 20 was off by 2e-9, a million times that of fp64
    torch.testing.assert_close(softplus(rho), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_large_deviations_are_exact_in_fp64(module, noise):
    """Around means of 0, y is proportional to a deviation that all features share."""
    x, zero = torch.randn(3, 4, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)

    def call(rho):
        return module.kl_layer_norm(
            x, (N,), zero, zero, rho, rho, noise=noise, seed=torch.tensor([3]), weight_prior=0.0, prior_std=20.0
        )

    small, large = zero + 1, zero + 22  # softplus(22) is 22 + 2.8e-10, a million roundings away
    large.requires_grad_()
    (y, kl), unit = call(large), call(small)[0] / softplus_by_hand(small)
    s = softplus_by_hand(large)
    torch.testing.assert_close(y, unit * s, rtol=1e-13, atol=1e-13)
    expected_kl = 2 * ((20 / s).log() + s**2 / 800 - 0.5).sum()
    torch.testing.assert_close(kl, expected_kl, rtol=1e-13, atol=0)
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad((y, kl), large, (dy, kl.new_ones(())))
    (right,) = torch.autograd.grad((unit * s * dy).sum() + expected_kl, large)
    torch.testing.assert_close(found.sum(), right.sum(), rtol=1e-12, atol=0)


def test_large_deviations_are_exact_in_what_a_layer_says_of_itself():
    layer = klnorm.KLLayerNorm(N, prior_std=20.0, dtype=torch.float64)
    with torch.no_grad():
        for rho in layer.weight_rho, layer.bias_rho:
            rho.fill_(22.0)
    s = softplus_by_hand(layer.weight_rho.detach())
    assert klnorm.summary(layer).total.scale.deviation == pytest.approx(s[0].item(), rel=1e-15)
    expected = 2 * ((20 / s).log() + s**2 / 800 - 0.5).sum()
    torch.testing.assert_close(layer.kl_divergence().detach(), expected, rtol=1e-13, atol=0)
