"""y in another dtype than x: as asked for by `out_dtype`, or as the class answers that a layer has replaced."""

import itertools

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import klnorm
from klnorm import KLConditionalLayerNorm, KLLayerNorm, KLRMSNorm
from klnorm.checks import FLOATS
from klnorm.functional import kl_layer_norm, kl_rms_norm

N = 24
PAIRS = [(a, b) for a, b in itertools.product(FLOATS, FLOATS) if torch.float64 not in (a, b) or a == b]


def call(device, dtype, out_dtype, noise, residual=None):
    """(outputs, leaves)."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    x, parameters = leaf(3, 4, N, dtype=dtype), [leaf(N) for _ in range(4)]
    added = None if residual is None else leaf(3, 4, N, dtype=residual)
    seed = torch.tensor([3], device=device)
    outputs = kl_layer_norm(x, N, *parameters, noise=noise, seed=seed, residual=added, out_dtype=out_dtype)
    return outputs, [x, *([] if added is None else [added]), *parameters]


@pytest.mark.parametrize("noise", ["sample", "token"])
@pytest.mark.parametrize(("dtype", "out_dtype"), PAIRS, ids=str)
def test_y_is_rounded_once_and_its_cotangent_read_in_its_dtype(device, path, dtype, out_dtype, noise):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    (y, kl), leaves = call(device, dtype, out_dtype, noise)
    (exact, kl_exact), others = call(device, dtype, wide, noise)
    assert (y.dtype, exact.dtype, kl.dtype) == (out_dtype, wide, wide)
    if out_dtype != torch.bfloat16 or path == "cpu_path" or device.type == "cuda":  # the interpreter truncates to bf16
        assert torch.equal(y, exact.to(out_dtype))
    assert torch.equal(kl, kl_exact)
    dy = torch.randn(y.shape, dtype=torch.float64).to(device, out_dtype)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert [g.dtype for g in gradients] == [dtype] + [torch.float32] * 4
    for found, expected in zip(gradients, torch.autograd.grad(exact, others, dy.to(wide)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_beside_a_residual(device, path, residual):
    (y, total, _), leaves = call(device, torch.bfloat16, torch.float16, "sample", residual)
    (exact, same_total, _), others = call(device, torch.bfloat16, torch.float32, "sample", residual)
    assert (y.dtype, total.dtype) == (torch.float16, residual)
    assert torch.equal(y, exact.half())
    assert torch.equal(total, same_total)
    dy, dtotal = torch.randn_like(y), torch.randn_like(total)
    found = torch.autograd.grad([y, total], leaves, [dy, dtotal])
    assert [g.dtype for g in found[:2]] == [torch.bfloat16, residual]
    for a, b in zip(found, torch.autograd.grad([exact, same_total], others, [dy.float(), dtotal]), strict=True):
        assert torch.equal(a, b)


def test_under_transforms_and_compiled(device):
    weight, rho = torch.randn(N, device=device), torch.randn(N, device=device)
    seed, x = torch.tensor([3], device=device), torch.randn(3, N, device=device)

    def norm(x):
        return kl_rms_norm(x, N, weight, rho, seed=seed, out_dtype=torch.float16)[0]

    expected = norm(x)
    y, pull = torch.func.vjp(norm, x)
    assert torch.equal(y, expected)
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)(leaf)
    assert torch.equal(compiled, expected)
    compiled.backward(torch.ones_like(compiled))
    assert torch.equal(leaf.grad, pull(torch.ones_like(y))[0])
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("layer", [KLLayerNorm, KLRMSNorm, KLConditionalLayerNorm])
@pytest.mark.parametrize("training", [True, False])
def test_of_a_layer(device, layer, training):
    layer = layer(N, out_dtype=torch.bfloat16, device=device).train(training)
    x = torch.randn(2, 3, N, device=device)
    torch.manual_seed(3)
    y = layer(x)
    layer.out_dtype = None
    torch.manual_seed(3)
    assert layer(x).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.manual_seed(3)
    torch.testing.assert_close(y.float(), layer(x), rtol=2**-8, atol=1e-6)  # a rounding to bf16


def activations_cast(norm):
    """Tensors of the input's size that are cast where `norm` and an nn.Linear run under autocast."""
    model, x = nn.Sequential(norm, nn.Linear(N, 2)), torch.randn(3, N)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile(record_shapes=True) as profile:
        model(x)
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::to"]
    return shapes.count([3, N])


def test_under_autocast_the_next_product_has_nothing_to_cast():
    normal, asked = KLLayerNorm(N, noise="token"), KLLayerNorm(N, noise="token", out_dtype=torch.bfloat16)
    assert activations_cast(normal) == activations_cast(asked) + 1
    assert "out_dtype=torch.bfloat16" in repr(asked)


@pytest.mark.parametrize("wrong", [torch.int32, "bfloat16", float, torch.complex64, 32])
@pytest.mark.parametrize("make", [KLLayerNorm, KLRMSNorm, KLConditionalLayerNorm])
def test_errors(make, wrong):
    with pytest.raises(TypeError, match=r"out_dtype is .*expected None for the dtype of x, or one of torch.float32"):
        make(N, out_dtype=wrong)
    ones = torch.ones(N)
    with pytest.raises(TypeError, match="out_dtype is "):
        kl_rms_norm(torch.ones(2, N), N, ones, ones, out_dtype=wrong)


# Classes of other libraries


class Promoted(nn.Module):
    """Weight times the input's dtype: an fp32 weight promotes, as in Llama's."""

    def __init__(self, n, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class CastDown(Promoted):
    """Cast to a weight of 16 bits, as T5's."""

    def forward(self, x):
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.to(self.weight.dtype) if self.weight.dtype in (torch.float16, torch.bfloat16) else x)


class InFloat(nn.LayerNorm):
    """A subclass that answers in fp32."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps)


CLASSES = Promoted, CastDown, InFloat, LlamaRMSNorm, T5LayerNorm, GemmaRMSNorm, CohereLayerNorm


def replaced(norm, **options):
    layer_norms = nn.LayerNorm, CohereLayerNorm
    replace = klnorm.replace_layer_norm if isinstance(norm, layer_norms) else klnorm.replace_rms_norm
    return replace(norm, **options)


def answer(norm, x):
    try:
        return norm(x).dtype
    except RuntimeError:  # a class that takes no input of this dtype
        return None


@pytest.mark.parametrize("make", CLASSES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("posterior", ["sampled", "deterministic"])
def test_a_replaced_layer_answers_as_its_class_would(device, make, posterior):
    for dtype, of_weight in itertools.product(FLOATS, FLOATS):
        x = torch.randn(2, 3, N, device=device).to(dtype)
        expected = answer(make(N).to(device, of_weight), x)
        layer = replaced(make(N).to(device, of_weight), posterior=posterior)
        if expected is not None:
            assert layer.train()(x).dtype == expected, (dtype, of_weight)
            assert layer.eval()(x).dtype == expected


def test_a_model_that_is_cast_later_answers_as_its_class_would():
    layer = replaced(CastDown(N)).half().train()
    assert layer(torch.randn(3, N)).dtype == torch.float16


def test_sampling_and_prediction_reach_the_next_product_in_its_dtype():
    model = nn.Sequential(replaced(CastDown(N)), nn.Linear(N, 2)).half().eval()
    x = torch.randn(3, N)
    with klnorm.sampling(model):
        assert model(x).dtype == torch.float16
    assert klnorm.mc_predict(model, x).probabilities.isfinite().all()
    model.train()(x).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_out_dtype_goes_before_what_the_class_answers():
    layer = replaced(CastDown(N).half(), out_dtype=torch.bfloat16)
    x = torch.randn(3, N)
    assert layer.train()(x).dtype == layer.eval()(x).dtype == torch.bfloat16
    klnorm.restore_rms_norm(layer)
    assert layer(x).dtype == torch.float16


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_replaced_layer_compiles():
    layer = replaced(CastDown(N)).half().train()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert compiled(torch.randn(3, N)).dtype == torch.float16
