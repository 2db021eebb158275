"""`weight_offset`: a scale of offset + weight, with a weight and a prior in units without it."""

import pytest
import torch
from rms_classes import OnePlus
from torch import nn

import klnorm
from klnorm.functional import kl_layer_norm, kl_rms_norm

N = 24
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # of fp64, in which 1 + weight is rounded once or not at all


@pytest.mark.parametrize("mode", ["batch", "sample", "token", "evaluation", "deterministic"])
@pytest.mark.parametrize("rms", [False, True])
def test_is_the_norm_with_the_sum_for_a_weight(device, path, rms, mode):
    """The sum is a weight and a prior of 1 more; the divergence is the same, but for its rounding."""
    x, weight, bias, weight_rho, bias_rho, prior = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in [(3, 4, N)] + [N] * 5
    )
    prior = prior.detach()
    deterministic = mode == "deterministic"
    rhos = (None, None) if deterministic else (weight_rho, bias_rho)
    options = {
        "noise": mode if mode in ("batch", "sample", "token") else "batch", "sample": mode != "evaluation", "eps": 1e-5,
        "seed": torch.tensor([3], device=device), "posterior": "deterministic" if deterministic else "sampled",
    }  # fmt: skip
    leaves = [t for t in (x, weight, None if rms else bias, rhos[0], None if rms else rhos[1]) if t is not None]
    results = []
    for offset, mean, prior_mean in (1, weight, prior), (0.0, 1 + weight, 1 + prior):
        more = {**options, "weight_prior": prior_mean, "weight_offset": offset}
        if rms:
            y, kl = kl_rms_norm(x, N, mean, rhos[0], **more)
        else:
            y, kl = kl_layer_norm(x, N, mean, bias, *rhos, **more)
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(device)
        # In evaluation nothing depends on the deviations but the divergence.
        results.append([y, kl, *torch.autograd.grad([y, kl], leaves, [dy, torch.full_like(kl, 0.7)])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_small_weight_beside_the_offset_keeps_its_divergence():
    """In fp32 1 + 1e-9 is 1, and the distance from the prior would be 0."""
    weight, rho = torch.full((N,), 1e-9), torch.full((N,), -30.0)
    prior = torch.zeros(N)
    _, kl = kl_rms_norm(
        torch.randn(2, N), N, weight, rho, weight_prior=prior, weight_offset=1.0, prior_std=1e-9, sample=False
    )
    s = torch.nn.functional.softplus(rho.double())
    p = 1e-9
    expected = (torch.log(p / s) + (s**2 + weight.double() ** 2) / (2 * p**2) - 0.5).sum()
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5)


def test_of_a_parameter_in_16_bits(device, path):
    """1 + 2^-10 is 1 in bf16; the kernels add in fp32."""
    weight = torch.full((N,), 2.0**-10, dtype=torch.bfloat16, device=device)
    x = torch.randn(3, N, device=device)
    y, _ = kl_rms_norm(x, N, weight, None, weight_offset=1.0, posterior="deterministic")
    torch.testing.assert_close(y, nn.functional.rms_norm(x, (N,)) * (1 + 2.0**-10), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_transformed_and_compiled():
    x, weight, rho, seed = torch.randn(3, N), torch.randn(N), torch.randn(N), torch.tensor([3])

    def norm(weight):
        return kl_rms_norm(x, N, weight, rho, seed=seed, weight_offset=1.0)[0].sum()

    leaf = weight.clone().requires_grad_()
    norm(leaf).backward()
    assert torch.equal(torch.func.grad(norm)(weight), leaf.grad)
    compiled, leaf = torch.compile(norm, backend="aot_eager", fullgraph=True), weight.clone().requires_grad_()
    value = compiled(leaf)
    assert torch.equal(value, norm(weight))
    value.backward()
    assert torch.equal(torch.func.grad(norm)(weight), leaf.grad)


@pytest.mark.parametrize(
    ("wrong", "error"), [("1", TypeError), (True, TypeError), (float("inf"), ValueError), (torch.ones(N), TypeError)]
)
def test_errors(wrong, error):
    ones = torch.ones(N)
    with pytest.raises(error, match="weight_offset is "):
        kl_rms_norm(torch.randn(2, N), N, ones, ones, weight_offset=wrong)


def test_the_deterministic_divergence_of_a_layer_is_that_of_the_whole_scale():
    layer = klnorm.replace_rms_norm(OnePlus(N), posterior="deterministic", prior_std=1.0)
    layer(torch.randn(2, N))
    assert klnorm.kl_divergence(layer).item() == pytest.approx(0.0, abs=1e-4)  # of the forward
    assert klnorm.kl_divergence(layer.eval()).item() == pytest.approx(0.0, abs=1e-4)  # computed
    part = klnorm.summary(layer).total.scale
    assert (part.kl, part.deviation) == (pytest.approx(0.0, abs=1e-4), 1.0)
