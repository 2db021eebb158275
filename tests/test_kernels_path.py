"""Public calls on the way that CUDA tensors take: tensors and cotangents of any strides and bits are read right.

Right is, bit for bit, what the same kernels make of contiguous tensors with the same values.
"""

import pytest
import torch

from klnorm.functional import kl_layer_norm

N, GROUPS = 24, 3
NOISES = "batch", "sample", "token"
NAMES = "x", "residual", "weight", "bias", "weight_rho", "bias_rho"

pytestmark = pytest.mark.usefixtures("kernels_path")


def inputs(device, groups=None, n=N):
    shape = (n,) if groups is None else (groups, n)
    tensors = [torch.randn(3, 2, n, dtype=torch.float64) for _ in range(2)]
    tensors += [torch.randn(shape, dtype=torch.float64) - 1 for _ in range(4)]
    return dict(zip(NAMES, (t.to(device) for t in tensors), strict=True))


def outputs(tensors, noise="sample", **options):
    """(y, sum, kl)."""
    x, residual, *parameters = tensors.values()
    options = {"seed": torch.tensor([11], device=x.device), "eps": 0.1, **options}
    return kl_layer_norm(x, x.shape[-1], *parameters, residual=residual, noise=noise, **options)


def gradients(tensors, noise, cotangents):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    found = torch.autograd.grad(outputs(leaves, noise), list(leaves.values()), cotangents)
    return dict(zip(NAMES, found, strict=True))


def assert_same(found, expected):
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize(
    ("expanded", "dims"),
    [(0, "all"), (0, "rows"), (0, "features"), (1, "all"), (1, "rows"), (1, "features"), (2, "all")],
    ids=["y-all", "y-rows", "y-features", "sum-all", "sum-rows", "sum-features", "kl"],
)
def test_expanded_cotangents(device, expanded, groups, noise, dims):
    """As of `kl.sum()` or `y.mean()`: one element, or one row, that stands for all."""
    tensors = inputs(device, groups)
    cotangents = [torch.randn_like(t) for t in outputs(tensors, noise)]
    own = cotangents[expanded]
    small = own.flatten()[0] if dims == "all" else own[:1, :1] if dims == "rows" else own[..., :1]
    cotangents[expanded] = small.expand(own.shape)
    expected = gradients(tensors, noise, [t.contiguous() for t in cotangents])
    assert_same(gradients(tensors, noise, cotangents), expected)


def negative_view(t):
    """-t with the values of t in memory, as the imaginary part of a conjugated tensor has."""
    return torch._neg_view(t)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", NAMES)
def test_inputs_with_the_negative_bit(device, name, noise):
    tensors = inputs(device)
    plain = {**tensors, name: -tensors[name]}
    given = {**tensors, name: negative_view(tensors[name])}
    assert given[name].is_neg()
    assert all(map(torch.equal, outputs(given, noise), outputs(plain, noise)))
    cotangents = [torch.randn_like(t) for t in outputs(plain, noise)]
    assert_same(gradients(given, noise, cotangents), gradients(plain, noise, cotangents))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["y", "sum", "kl"])
def test_cotangents_with_the_negative_bit(device, which):
    tensors = inputs(device)
    plain = [torch.randn_like(t) for t in outputs(tensors)]
    given = [negative_view(-t) if i == which else t for i, t in enumerate(plain)]
    assert_same(gradients(tensors, "sample", given), gradients(tensors, "sample", plain))


def test_the_imaginary_part_of_a_conjugate_is_read_with_its_sign(device):
    complex_ = torch.randn(6, 1, dtype=torch.complex128, device=device)
    x = complex_.conj().imag
    assert x.is_neg()
    ones, seed = torch.ones(1, dtype=torch.float64, device=device), torch.tensor([11], device=device)
    residual = torch.zeros(6, 1, dtype=torch.float64, device=device)
    _, total, _ = kl_layer_norm(x, 1, ones, ones, ones, ones, residual=residual, seed=seed)
    assert torch.equal(total, -complex_.imag)


@pytest.mark.parametrize("name", ["weight_prior", "bias_prior"])
def test_priors_with_the_negative_bit(device, name):
    tensors, prior = inputs(device), torch.randn(N, dtype=torch.float64, device=device)
    found, expected = (outputs(tensors, **{name: given})[2] for given in (negative_view(prior), -prior))
    assert torch.equal(found, expected)


def test_a_seed_with_the_negative_bit(device):
    """Noise of the seed's value, -11, not of the bits in memory."""
    tensors, seed = inputs(device), torch.tensor([11], device=device)
    found, expected = (outputs(tensors, seed=given)[0] for given in (negative_view(seed), -seed))
    assert torch.equal(found, expected)
