"""`layer(x, residual=r)` is (the norm of x + r, x + r), in training as in evaluation, in one pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

import klnorm
from klnorm import KLLayerNorm, KLRMSNorm, ops
from klnorm.functional import kl_layer_norm, kl_rms_norm

N = 24
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]


def made(layer, device):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer.to(device)


def inputs(device, dtype=torch.float32, residual_dtype=torch.float32):
    return torch.randn(3, 4, N, device=device).to(dtype), 2 * torch.randn(3, 4, N, device=device).to(residual_dtype)


@pytest.mark.parametrize(("dtype", "residual_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("noise", ["sample", "token"])
@pytest.mark.parametrize("make", [KLLayerNorm, KLRMSNorm])
def test_training_is_the_functional_form(device, make, noise, dtype, residual_dtype):
    layer, (x, r) = made(make(N, noise=noise, eps=1e-5), device), inputs(device, dtype, residual_dtype)
    torch.manual_seed(5)
    y, total = layer(x, residual=r)
    torch.manual_seed(5)
    names = ["weight", "bias", "weight_rho", "bias_rho"][:: 1 if make is KLLayerNorm else 2]
    function = kl_layer_norm if make is KLLayerNorm else kl_rms_norm
    parameters = [getattr(layer, name) for name in names]
    expected, expected_total, kl = function(x, N, *parameters, noise=noise, residual=r, eps=1e-5)
    assert torch.equal(y, expected)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(layer.kl_divergence(), kl)
    gradients = torch.autograd.grad(y.float().sum() + layer.kl_divergence(), parameters)
    assert all(g.any() for g in gradients)


@pytest.mark.parametrize(("dtype", "residual_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("make", [KLLayerNorm, KLRMSNorm])
def test_evaluation_is_the_norm_of_the_sum(device, make, dtype, residual_dtype):
    layer, (x, r) = made(make(N), device).eval(), inputs(device, dtype, residual_dtype)
    y, total = layer(x, residual=r)
    assert (y.dtype, total.dtype) == (dtype, residual_dtype)
    assert torch.equal(total, (x.float() + r.float()).to(residual_dtype))
    expected = layer(total.float())
    # A few roundings of fp32, and that of the result, which the interpreter and a GPU do differently.
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [GemmaRMSNorm, CohereLayerNorm])
def test_of_a_class_of_another_library(device, make, training):
    replace = klnorm.replace_rms_norm if make is GemmaRMSNorm else klnorm.replace_layer_norm
    norm = make(N)
    layer, (x, r) = made(replace(norm), device).train(training), inputs(device)
    torch.manual_seed(5)
    y, total = layer(x, residual=r)
    torch.manual_seed(5)
    assert torch.equal(total, x + r)
    assert torch.equal(y, layer(total))


@pytest.mark.parametrize("training", [True, False])
def test_in_one_pass(monkeypatch, training):
    """One computation, and no addition before it."""
    calls, compute = [], ops._compute_forward
    monkeypatch.setattr(ops, "_compute_forward", lambda *args: calls.append(args) or compute(*args))
    layer, (x, r) = KLLayerNorm(N).train(training), inputs("cpu")
    layer(x, residual=r)
    assert len(calls) == 1
    assert calls[0][0] is x
    assert calls[0][1] is r


@pytest.mark.parametrize(("dtype", "residual_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("condition", ["self", 5])
@pytest.mark.parametrize("sample_dim", [0, 1])
def test_of_a_conditional_layer(device, condition, training, sample_dim, dtype, residual_dtype):
    """It normalizes the sum, which its conditions are of, in the dtype of x, and answers the sum in that of r."""
    layer = made(klnorm.KLConditionalLayerNorm(N, condition, sample_dim=sample_dim), device).train(training)
    x, r = inputs(device, dtype, residual_dtype)
    given = () if condition == "self" else (torch.randn(x.shape[sample_dim], 5, device=device),)
    leaves = [t.requires_grad_() for t in (x, r)]
    results = []
    for fused in True, False:
        torch.manual_seed(5)
        y, total = layer(x, *given, residual=r) if fused else (None, (x.float() + r.float()).to(r.dtype))
        y = y if fused else layer(total, *given).to(dtype)
        kl = layer.kl_divergence() if training else 0.0
        results.append((y, total, *torch.autograd.grad((y.float() ** 2).sum() + total.float().sum() + kl, leaves)))
    assert results[0][0].dtype == dtype
    assert torch.equal(results[0][1], results[1][1])
    for one, other in zip(*results, strict=True):
        eps = max(torch.finfo(one.dtype).eps, torch.finfo(residual_dtype).eps)
        torch.testing.assert_close(one, other, rtol=8 * eps, atol=16 * eps)


def test_a_block_with_pre_norm_learns():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = KLLayerNorm(N), nn.Linear(N, N)

        def forward(self, x, residual):
            y, residual = self.norm(x, residual=residual)
            return self.linear(y), residual

    block, (x, r) = Block(), inputs("cpu")
    x, r = x.requires_grad_(), r.requires_grad_()
    torch.manual_seed(5)
    y, total = block(x, r)
    (y.sum() + total.square().sum() + klnorm.kl_divergence(block)).backward()
    assert torch.equal(x.grad, r.grad)
    x2, r2 = (t.detach().clone().requires_grad_() for t in (x, r))
    torch.manual_seed(5)
    total = x2 + r2
    (block.linear(block.norm(total)).sum() + total.square().sum()).backward()
    torch.testing.assert_close(x.grad, x2.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: KLLayerNorm(N),
        lambda: klnorm.KLConditionalLayerNorm(N),
        lambda: klnorm.replace_rms_norm(GemmaRMSNorm(N)),
    ],
)
def test_errors(layer, training):
    layer, (x, r) = layer().train(training), inputs("cpu")
    with pytest.raises(ValueError, match=r"residual has shape \(4, 24\), expected that of x"):
        layer(x, residual=r[0])
    with pytest.raises(TypeError, match=r"residual has dtype torch.float64 and x torch.float32"):
        layer(x, residual=r.double())
    with pytest.raises(TypeError, match="residual is a str"):
        layer(x, residual="r")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    layer, (x, r) = made(KLLayerNorm(N), "cpu").train(training), inputs("cpu")
    torch.manual_seed(5)
    expected = layer(x, residual=r)
    torch.manual_seed(5)
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, residual=r)
    assert all(map(torch.equal, found, expected))


def test_without_a_residual_evaluation_stays_that_of_torch():
    layer, (x, _) = made(KLLayerNorm(N), "cpu").eval(), inputs("cpu")
    assert torch.equal(layer(x), F.layer_norm(x, (N,), layer.weight, layer.bias, layer.eps))
