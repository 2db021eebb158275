"""`kl_rms_norm`, the deterministic reading and residual addition, as functions: specification, gradients, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from klnorm import reference
from klnorm.functional import kl_layer_norm, kl_rms_norm
from klnorm.reference.kl_norm import FLOOR, kl_deterministic

N = 6
LEADING = 3, 4
NOISES = "batch", "sample", "token"


def randn(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


def seed(device):
    return torch.tensor([11], device=device)


def gradients(outputs, inputs):
    """Of the outputs with cotangents that depend on their order alone."""
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    return torch.autograd.grad(outputs, inputs, cotangents)


def assert_all_close(results, expected, device):
    tolerance = 1e-12 if device.type == "cpu" else 2e-5  # rounding alone; on a GPU the noise is made in fp32
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance)


# RMSNorm


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_agrees_with_the_reference(device, noise, with_residual):
    x, residual = randn(*LEADING, N, device=device), randn(*LEADING, N, device=device)
    weight, rho, prior = randn(N, device=device), randn(N, device=device), randn(N, device=device)
    inputs = [x, weight, rho, *([residual] if with_residual else [])]
    options = {"noise": noise, "seed": seed(device), "residual": residual if with_residual else None, "eps": 1e-3}
    outputs = kl_rms_norm(x, N, weight, rho, weight_prior=prior, **options)
    expected = reference.kl_rms_norm(x, N, weight, rho, weight_prior=prior.detach(), **options)
    assert len(outputs) == (3 if with_residual else 2)
    assert_all_close(outputs, expected, device)
    assert_all_close(gradients(outputs, inputs), gradients(expected, inputs), device)


@pytest.mark.parametrize("noise", NOISES)
def test_gradcheck_of_rms_with_residual(noise):
    def function(x, residual, weight, rho):
        return kl_rms_norm(x, N, weight, rho, residual=residual, noise=noise, seed=seed("cpu"), prior_std=0.7)

    assert gradcheck(function, (randn(*LEADING, N), randn(*LEADING, N), randn(N), randn(N)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_means_of_rms_are_torchs_with_its_default_eps(device, dtype):
    scale = 1e-3 if dtype != torch.float64 else 1e-8  # small, so that eps shows
    x = scale * torch.randn(*LEADING, N, device=device, dtype=dtype)
    weight = torch.rand(N, device=device, dtype=dtype)
    y, _ = kl_rms_norm(x, N, weight, torch.zeros_like(weight), sample=False)
    # one rounding to the dtype each, and the arithmetic's in fp32 or fp64
    torch.testing.assert_close(y, F.rms_norm(x, (N,), weight), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert not torch.allclose(y, F.rms_norm(x, (N,), weight, 1e-30), rtol=0.01, atol=0)


def test_a_divergence_of_rms_that_is_not_finite_is_explained():
    rho = torch.tensor([0.0] * 3 + [math.nan] * 3)
    with pytest.raises(ValueError, match=r"divergence is nan: weight_rho has 3 such value\(s\), the first at index 3"):
        kl_rms_norm(torch.randn(*LEADING, N), N, torch.ones(N), rho)


def test_rms_saves_four_bytes_a_row(device):
    saved = []
    x, weight, rho = (randn(*shape, dtype=torch.float32, device=device) for shape in ((64, N), (N,), (N,)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kl_rms_norm(x, N, weight, rho, seed=seed(device))
    own = {t.data_ptr() for t in (x, weight, rho)}
    extra = [t for t in saved if t.data_ptr() not in own and t.dtype == torch.float32]
    assert sum(t.numel() * t.element_size() for t in extra) == 4 * 64


# The deterministic reading


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_deterministic_divergence_agrees_with_torch_distributions(device, bias):
    weight, mean = randn(N, device=device), randn(N, device=device)
    x, prior = randn(*LEADING, N, device=device), randn(N, device=device)
    y, kl = kl_layer_norm(
        x, N, weight, mean if bias else None, None, None, posterior="deterministic", bias_prior=prior, prior_std=0.8
    )
    posterior = torch.distributions.Normal(mean if bias else torch.zeros_like(mean), weight.abs())
    exact = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(prior.detach(), 0.8)).sum()
    # the floor takes log(1 + (FLOOR p / weight)^2) / 2 nats from an element
    floor = (1 + (FLOOR * 0.8 / weight) ** 2).log().sum() / 2
    torch.testing.assert_close(kl, (exact - floor), rtol=1e-6 if device.type == "cuda" else 1e-12, atol=0)
    torch.testing.assert_close(y, F.layer_norm(x, (N,), weight, mean if bias else None))


def test_gradcheck_of_the_deterministic_reading():
    def function(x, weight, bias):
        return kl_layer_norm(x, N, weight, bias, None, None, posterior="deterministic", prior_std=1.0)

    weight = randn(N)
    with torch.no_grad():
        weight[0] = 3e-3  # near the floor
    assert gradcheck(function, (randn(*LEADING, N), weight, randn(N)), eps=1e-7)


def test_the_floor_is_what_the_documentation_says():
    zero = torch.zeros(1, dtype=torch.float64)
    for prior_std in 0.1, 2.0:
        at_zero = kl_deterministic(zero, zero, 0.0, prior_std).item()
        assert at_zero == pytest.approx(math.log(1000) - 0.5)
        weights = torch.linspace(0, 0.1 * prior_std, 20001, dtype=torch.float64, requires_grad=True)
        slope = torch.autograd.grad(kl_deterministic(weights, zero, 0.0, prior_std).sum(), weights)[0]
        assert 499 / prior_std < slope.abs().max().item() <= 500 / prior_std
        without = math.log(10) + 0.01 / 2 - 0.5
        at_tenth = kl_deterministic(torch.full_like(zero, 0.1 * prior_std), zero, 0.0, prior_std).item()
        assert without - at_tenth == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize("prior_std", [1e-30, 1e-10, 1.0, 1e10])
def test_weights_near_zero_have_finite_gradients_under_any_prior(device, prior_std):
    x, bias = torch.randn(*LEADING, N, device=device), torch.zeros(N, device=device)
    weight = (torch.tensor([0.0, 1e-4, -1e-4, 1e-3, 1e-2, 1.0], device=device) * prior_std).requires_grad_()
    _, kl = kl_layer_norm(x, N, weight, bias, None, None, posterior="deterministic", prior_std=prior_std)
    exact = weight.detach().double().requires_grad_()
    expected = kl_deterministic(exact, bias.double(), 0.0, prior_std).sum()
    gradient, wanted = (torch.autograd.grad(d, w)[0].double() for d, w in ((kl, weight), (expected, exact)))
    assert gradient[0] == 0
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)
    # at weight = prior_std two terms cancel that are 1 / prior_std each
    torch.testing.assert_close(gradient * prior_std, wanted * prior_std, rtol=1e-5, atol=1e-6)


def test_the_deterministic_reading_draws_no_seed(device):
    x, weight, bias = randn(*LEADING, N, device=device), randn(N, device=device), randn(N, device=device)
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    kl_layer_norm(x, N, weight, bias, None, None, posterior="deterministic")
    after = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(state, after)


def test_rho_and_reading_must_fit():
    x, weight, rho = randn(*LEADING, N), randn(N), randn(N)
    with pytest.raises(ValueError, match=r"weight_rho is a Tensor, expected None: the deterministic reading"):
        kl_layer_norm(x, N, weight, None, rho, None, posterior="deterministic")
    with pytest.raises(TypeError, match=r"weight_rho is a NoneType, expected a tensor"):
        kl_rms_norm(x, N, weight, None)
    with pytest.raises(ValueError, match=r"posterior is 'fixed', expected one of 'sampled', 'deterministic'"):
        kl_rms_norm(x, N, weight, rho, posterior="fixed")


# Residual addition


@pytest.mark.parametrize("noise", NOISES)
def test_residual_is_what_adding_first_would_be(device, noise):
    x, residual = randn(*LEADING, N, device=device), randn(*LEADING, N, device=device)
    parameters = [randn(N, device=device) for _ in range(4)]
    options = {"noise": noise, "seed": seed(device)}
    y, total, kl = kl_layer_norm(x, N, *parameters, residual=residual, **options)
    inputs = [x, residual, *parameters]
    sum_ = x + residual
    y_apart, kl_apart = kl_layer_norm(sum_, N, *parameters, **options)
    assert_all_close((y, total, kl), (y_apart, sum_, kl_apart), device)
    assert_all_close(gradients((y, total, kl), inputs), gradients((y_apart, sum_, kl_apart), inputs), device)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
def test_the_sum_is_rounded_to_the_residuals_dtype_and_normalized_as_rounded(device, dtype, residual_dtype):
    x = randn(*LEADING, N, dtype=dtype, device=device)
    residual = randn(*LEADING, N, dtype=residual_dtype, device=device)
    parameters = [randn(N, dtype=torch.float32, device=device) for _ in range(4)]
    y, total, _ = kl_layer_norm(x, N, *parameters, residual=residual, seed=seed(device))
    assert torch.equal(total, (x.float() + residual.float()).to(residual_dtype))
    assert y.dtype == dtype
    apart, _ = kl_layer_norm(total.detach().float(), N, *parameters, seed=seed(device))
    assert torch.equal(y, apart.to(dtype))
    (y.float().sum() + total.float().square().sum()).backward()
    assert (x.grad.dtype, residual.grad.dtype) == (dtype, residual_dtype)
    narrow, wide = sorted([x.grad, residual.grad], key=torch.Tensor.element_size)
    assert torch.equal(wide.to(narrow.dtype), narrow)
    assert dtype == residual_dtype or not torch.equal(narrow.to(wide.dtype), wide)  # each is rounded to its own dtype


@pytest.mark.parametrize("used", ["y", "sum", "kl", "y sum", "y kl", "sum kl"])
def test_gradients_when_not_all_outputs_are_used(device, used):
    x, residual = randn(*LEADING, N, device=device), randn(*LEADING, N, device=device)
    parameters = [randn(N, device=device) for _ in range(4)]
    y, total, kl = kl_layer_norm(x, N, *parameters, residual=residual, seed=seed(device))
    sum_ = x + residual
    y_apart, kl_apart = kl_layer_norm(sum_, N, *parameters, seed=seed(device))
    cotangents = {"y": torch.randn_like(y), "sum": torch.randn_like(y), "kl": torch.randn_like(kl)}

    def gradients_of(*outputs):
        total = sum((cotangents[name] * o).sum() for name, o in zip(cotangents, outputs, strict=True) if name in used)
        return torch.autograd.grad(total, [x, residual, *parameters], allow_unused=True)

    grads, expected = gradients_of(y, total, kl), gradients_of(y_apart, sum_, kl_apart)
    for got, want in zip(grads, expected, strict=True):
        want = torch.zeros_like(x if got is None else got) if want is None else want
        got = torch.zeros_like(want) if got is None else got
        assert_all_close([got], [want], device)


def test_the_residual_may_be_frozen_or_x(device):
    x = randn(*LEADING, N, device=device)
    parameters = [randn(N, device=device) for _ in range(4)]
    frozen = torch.randn(*LEADING, N, device=device, dtype=torch.float64)
    y, _, _ = kl_layer_norm(x, N, *parameters, residual=frozen, seed=seed(device))
    y.sum().backward()
    assert frozen.grad is None
    twice, total, kl = kl_layer_norm(x, N, *parameters, residual=x, seed=seed(device))
    apart, kl_apart = kl_layer_norm(2 * x, N, *parameters, seed=seed(device))
    assert_all_close(gradients((twice, total, kl), [x]), gradients((apart, 2 * x, kl_apart), [x]), device)


def test_the_sum_is_contiguous_whatever_it_is_of(device):
    """As compiled code takes it to be."""
    x, residual = (torch.randn(LEADING[1], LEADING[0], N, device=device).transpose(0, 1) for _ in range(2))
    _, total, _ = kl_layer_norm(x, N, *(torch.randn(N, device=device) for _ in range(4)), residual=residual)
    assert total.is_contiguous()
    assert torch.equal(total, x + residual)


def test_backward_saves_the_sum_alone(device):
    """The sum is an output and stays anyway; neither x nor the residual is kept beside it."""
    saved = []
    x, residual = (torch.randn(64, N, device=device, requires_grad=True) for _ in range(2))
    parameters = [torch.randn(N, device=device, requires_grad=True) for _ in range(4)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        _, total, _ = kl_layer_norm(x, N, *parameters, residual=residual, seed=seed(device))
    assert total.data_ptr() in saved
    assert not {x.data_ptr(), residual.data_ptr()} & set(saved)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (3.0, TypeError, "residual is a float, expected a tensor"),
        (torch.zeros(*LEADING, N, dtype=torch.int64), TypeError, "residual has dtype torch.int64"),
        (torch.zeros(*LEADING, N), TypeError, "residual has dtype torch.float32 and x torch.float64"),
        (torch.zeros(LEADING[1], N, dtype=torch.float64), ValueError, r"residual has shape \(4, 6\), expected"),
        (torch.zeros(*LEADING, N, dtype=torch.float64, device="meta"), ValueError, "residual is on meta"),
    ],
)
def test_bad_residuals_are_refused(residual, error, message):
    with pytest.raises(error, match=message):
        kl_layer_norm(randn(*LEADING, N), N, *(randn(N) for _ in range(4)), residual=residual)


@pytest.mark.parametrize("rms", [False, True])
def test_compiles_without_a_break(device, rms, fresh_dynamo):
    x, residual = (torch.randn(*LEADING, N, device=device, requires_grad=True) for _ in range(2))
    parameters = [torch.randn(N, device=device, requires_grad=True) for _ in range(4)]

    def function(x, residual, *parameters):
        options = {"residual": residual, "seed": seed(device)}
        if rms:
            return kl_rms_norm(x, N, parameters[0], parameters[2], **options)
        return kl_layer_norm(x, N, *parameters, **options)

    inputs = [x, residual, *(parameters[::2] if rms else parameters)]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    eager, traced = function(x, residual, *parameters), compiled(x, residual, *parameters)
    for a, b in zip([*eager, *gradients(eager, inputs)], [*traced, *gradients(traced, inputs)], strict=True):
        assert torch.equal(a, b)
