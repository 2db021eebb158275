"""Rows without spread: their xhat is exactly 0, on every path, in every dtype and width, whatever eps is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import klnorm
from klnorm import KLLayerNorm, KLRMSNorm, reference
from klnorm.functional import kl_layer_norm, kl_rms_norm

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
WIDTHS = 1, 7, 600
NOISES = "sample", "token"
VALUES = 14.1, -0.3, 1e-3, 3333.3, 0.0
every_path = pytest.mark.parametrize("path", ["cpu_path", "kernels", "wide_kernels"], indirect=True)


def constant_rows(n, dtype, device):
    return torch.tensor(VALUES, device=device, dtype=dtype)[:, None].expand(-1, n).contiguous()


def leaves(n, device, dtype=torch.float32):
    tensors = [torch.randn(n, dtype=torch.float64) - shift for shift in (-1, 0, 2, 2)]
    return [t.to(device, dtype).requires_grad_() for t in tensors]


@every_path
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("dtype", "eps"), [*((dtype, 1e-12) for dtype in DTYPES), (torch.float32, 0.0)], ids=str)
@pytest.mark.parametrize("n", WIDTHS)
def test_output_is_the_shift_and_gradients_are_those_of_xhat_0(device, path, n, dtype, noise, eps):
    """y is the shift, here 0: its mean is, and its deviation underflows."""
    x = constant_rows(n, dtype, device).requires_grad_()
    weight, bias, weight_rho, bias_rho = leaves(n, device, torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        bias.zero_()
        bias_rho.fill_(-1000.0)
    seed = torch.tensor([3], device=device)
    y, _ = kl_layer_norm(x, n, weight, bias, weight_rho, bias_rho, noise=noise, eps=eps, seed=seed)
    assert not y.any()
    dy = torch.randn_like(y)
    dx, dweight, dweight_rho, dbias = torch.autograd.grad(y, [x, weight, weight_rho, bias], dy)
    assert not dweight.any()
    assert not dweight_rho.any()
    assert dtype == torch.float16 or dx.isfinite().all()  # 1 / sqrt(eps) takes fp16's beyond its range
    assert n > 1 or not dx.any()
    assert eps or not dx.any()
    acc = reference.kl_norm.accumulation_dtype(x)
    torch.testing.assert_close(dbias, dy.to(acc).sum(0).to(dbias.dtype))


@every_path
@pytest.mark.parametrize("n", [7, 600])
def test_of_a_sum_with_a_residual(device, path, n):
    x = torch.randint(-8, 8, (5, n), device=device).float()
    residual = 14.125 - x  # exact, so that the sum is constant
    weight, bias, weight_rho, bias_rho = (t.detach() for t in leaves(n, device))
    y, total, _ = kl_layer_norm(
        x,
        n,
        weight,
        torch.zeros_like(bias),
        weight_rho,
        torch.full_like(bias_rho, -1000.0),
        residual=residual,
        eps=1e-12,
    )
    assert (total == 14.125).all()
    assert not y.any()


@every_path
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_evaluation_in_mixed_dtypes(device, path, x_dtype, param_dtype):
    layer = KLLayerNorm(600, eps=1e-12, device=device, dtype=param_dtype).eval()
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(torch.randn(600).bfloat16())  # which every dtype holds
        y = layer(constant_rows(600, x_dtype, device))
    if x_dtype != param_dtype:  # else it is nn.LayerNorm that computes
        assert torch.equal(y, layer.bias.to(x_dtype).expand_as(y))


@pytest.mark.parametrize("n", [*range(1, 40), 600, 1000, 4097])
def test_of_the_specification(n):
    rows = torch.randn(50, 1) * torch.logspace(-6, 6, 50)[:, None]
    for dtype in DTYPES:
        x = rows.to(dtype).expand(-1, n)
        zero, rho = torch.zeros(n), torch.full((n,), -1000.0)
        y, _ = reference.kl_layer_norm(x, (n,), torch.randn(n), zero, rho, rho, eps=1e-12, sample=False)
        assert not y[x.isfinite().all(1)].any()


@every_path
@pytest.mark.parametrize("noise", NOISES)
def test_an_rms_norm_of_zeros_without_eps(device, path, noise):
    x = torch.zeros(4, 600, device=device, requires_grad=True)
    weight, rho = torch.randn(600, device=device).requires_grad_(), torch.zeros(600, device=device, requires_grad=True)
    y, _ = kl_rms_norm(x, 600, weight, rho, eps=0.0, noise=noise)
    gradients = torch.autograd.grad(y, [x, weight, rho], torch.randn_like(y))
    assert not y.any()
    assert not any(g.any() for g in gradients)


@every_path
def test_eps_of_0_elsewhere_is_the_specification(device, path):
    x = torch.randn(6, 600, device=device, requires_grad=True)
    parameters = leaves(600, device)
    seed = torch.tensor([3], device=device)
    results = []
    for function, shape in (kl_layer_norm, 600), (reference.kl_layer_norm, (600,)):
        y, kl = function(x, shape, *parameters, eps=0.0, seed=seed)
        results.append([y, kl, *torch.autograd.grad([y, kl], [x, *parameters], [torch.ones_like(y), kl * 0 + 1])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # fp32, sums of 600 terms


def test_a_replaced_norm_without_eps_trains(device):
    model = klnorm.replace_layer_norm(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, eps=0.0), nn.Linear(8, 2)))
    model.to(device)
    loss = model(torch.randn(3, 4, device=device)).square().mean() + klnorm.kl_divergence(model)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model = klnorm.replace_rms_norm(nn.Sequential(nn.RMSNorm(8, eps=0.0))).to(device)
    assert isinstance(model[0], KLRMSNorm)
    assert not model(torch.zeros(2, 8, device=device)).any()


def normalized(path, x, eps):
    """xhat by the way that is tested."""
    n = x.shape[1]
    one, zero, rho = torch.ones(n, device=x.device), torch.zeros(n, device=x.device), torch.zeros(n, device=x.device)
    return kl_layer_norm(x, n, one, zero, rho, rho, sample=False, eps=eps)[0]


ROWS = {f"mean_over_deviation_{r:g}": lambda n, r=r: torch.randn(20, n) + r for r in (0, 1, 1e2, 1e4, 1e6)}
ROWS["huge_first"] = lambda n: torch.cat([torch.full((20, 1), 1e4), torch.randn(20, n - 1)], 1)
ROWS["huge_inside"] = lambda n: torch.cat([torch.randn(20, 3), torch.full((20, 1), 1e4), torch.randn(20, n - 4)], 1)


BEYOND_FP16 = "mean_over_deviation_1e+06"


@every_path
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (dtype, rows)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for rows in ROWS
        if (dtype, rows) != (torch.float16, BEYOND_FP16)
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [96, 600])
def test_the_error_is_never_twice_that_of_torch(device, path, rows, n, dtype):
    """In fp32, of numbers as `dtype` has them, against fp64.

    Where torch is exact, as of rows that rounding has made constant, half an ulp of the largest xhat is allowed.
    """
    x = ROWS[rows](n).to(dtype).float().to(device)
    exact = x.double() - x.double().mean(1, keepdim=True)
    exact = exact / (exact.square().mean(1, keepdim=True) + 1e-12).sqrt()
    error, torchs = ((y - exact).abs().max() for y in (normalized(path, x, 1e-12), F.layer_norm(x, (n,), eps=1e-12)))
    assert error <= max(2 * torchs, exact.abs().max() * 2**-24)
