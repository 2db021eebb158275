"""A seed or a generator makes the noise, and rows share it as the noise mode says."""

import math

import pytest
import torch
from functional_calls import NOISES, N, call, make, noise_error, seed_of

from klnorm.reference import kl_layer_norm as reference


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
