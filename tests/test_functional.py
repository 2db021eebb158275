"""`klnorm.functional.kl_layer_norm` agrees with values worked by hand and with the reference."""

import math

import pytest
import torch
from functional_calls import DTYPES, NOISES, N, call, gradients, make, noise_error, seed_of

from klnorm.functional import kl_layer_norm
from klnorm.reference import kl_layer_norm as reference

RHO_OF_ONE = math.log(math.e - 1)  # softplus of it is 1


def double(tensors):
    return {name: None if t is None else t.detach().double().requires_grad_() for name, t in tensors.items()}


def assert_rounded_once(found, expected, terms=N):
    """`found` is the fp64 `expected` computed in fp32 and rounded once to its dtype.

    Rounding to the dtype costs half an eps; arithmetic in fp32 some eps of fp32, of the largest value, for each of the
    `terms` added.
    """
    fp32 = 8 * terms * torch.finfo(torch.float32).eps * expected.abs().max().clamp(min=1).item()
    rounding = 0.5 * torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=rounding * 1.01, atol=fp32)


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
