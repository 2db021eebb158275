"""What docs/limits.md says."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import klnorm
from klnorm import KLLayerNorm, KLRMSNorm, replace_layer_norm, restore_layer_norm

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

N = 8
KINDS = pytest.mark.parametrize("kind", [KLLayerNorm, KLRMSNorm])
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
SHAPE = 2, 3, 4, N


def second_derivative(f, x):
    (gradient,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.sum(), x)[0]


def by_reference(layer, x):
    parameters = layer.weight, layer.bias, layer.weight_rho, layer.bias_rho
    return klnorm.reference.kl_layer_norm(x, (N,), *parameters, seed=torch.tensor([3], device=x.device))[0]


TWICE = {
    "create_graph": lambda layer, x: second_derivative(layer, x),
    "grad_of_grad": lambda layer, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: layer(x).square().sum())(x).sum()
    )(x),
}
FORWARD_MODE = {
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[1],
    "jacfwd": lambda layer, x: torch.func.jacfwd(layer, randomness="different")(x),
}
BOTH = TWICE | FORWARD_MODE


@KINDS
@pytest.mark.parametrize("how", BOTH)
def test_a_second_or_a_forward_mode_derivative_raises_in_training(device, kind, how):
    layer, x = kind(N, device=device), torch.randn(3, N, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"klnorm has no .* derivatives.*Remedy: .*klnorm\.reference"):
        BOTH[how](layer, x)


@pytest.mark.parametrize("how", BOTH)
def test_evaluation_and_the_reference_have_these_derivatives(device, how):
    layer, x = KLLayerNorm(N, device=device), torch.randn(3, N, device=device, requires_grad=True)
    plain = restore_layer_norm(copy.deepcopy(layer))
    assert torch.equal(BOTH[how](layer.eval(), x), BOTH[how](plain, x))
    assert BOTH[how](lambda x: by_reference(layer, x), x).isfinite().all()


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("lacked_by_torch", ["heads", "residual", "shift"])
def test_evaluation_of_what_torch_lacks_has_first_derivatives_alone(device, lacked_by_torch, how):
    options = {"heads": {"heads": 3}, "shift": {"bias": True}}.get(lacked_by_torch, {})
    layer, x = KLRMSNorm(N, device=device, **options).eval(), torch.randn(3, N, device=device, requires_grad=True)
    function = (lambda x: layer(x, residual=x)[0]) if lacked_by_torch == "residual" else layer
    assert torch.autograd.grad(function(x).square().sum(), x)[0].isfinite().all()
    with pytest.raises(RuntimeError, match=r"klnorm has no .* derivatives"):
        BOTH[how](function, x)


@KINDS
def test_a_first_derivative_may_be_recorded(device, kind):
    layer, x = kind(N, device=device), torch.randn(3, N, device=device)
    torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)


@KINDS
def test_functionalize_is_refused_by_torch_in_training_and_done_by_what_needs_it(device, kind):
    layer, x = kind(N, device=device), torch.randn(3, N, device=device)
    with pytest.raises(RuntimeError, match="Functionalize rule for custom_function_call"):
        torch.func.functionalize(layer)(x)
    exported, traced = torch.export.export(layer, (x,)).graph_module, make_fx(layer)(x)
    for graph in exported.graph, traced.graph:
        assert "klnorm.norm_forward.default" in [str(node.target) for node in graph.nodes]
    assert torch.compile(layer, backend="aot_eager")(x).shape == x.shape
    layer.eval()
    assert torch.equal(torch.func.functionalize(layer)(x), layer(x))


@MODES
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("x", "error"), [(torch.randn(3, N + 1), ValueError), (torch.zeros(3, N, dtype=torch.int64), TypeError)]
)
def test_a_wrong_argument_is_no_runtime_error(x, error, compiled, training):
    assert not issubclass(error, RuntimeError)
    layer = KLLayerNorm(N).train(training)
    with pytest.raises(RuntimeError):
        nn.LayerNorm(N)(x)
    with pytest.raises(error, match="Remedy: "):
        (torch.compile(layer, backend="eager") if compiled else layer)(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_jit_takes_a_restored_model():
    model, x = replace_layer_norm(nn.Sequential(nn.Linear(4, N), nn.LayerNorm(N))), torch.randn(3, 4)
    expected = model.eval()(x)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)
    with pytest.raises(RuntimeError):
        torch.jit.script(model)
    with pytest.raises(RuntimeError):
        torch.jit.trace(model.train(), x)
    restore_layer_norm(model).eval()
    assert torch.equal(torch.jit.script(model)(x), expected)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)


@MODES
@pytest.mark.parametrize("shape", [SHAPE[3:], SHAPE[2:], SHAPE[1:]])
def test_channels_last_comes_out_contiguous_as_from_nn_layer_norm(device, shape, training):
    x = torch.randn(SHAPE, device=device).to(memory_format=torch.channels_last)
    assert F.layer_norm(x, shape).is_contiguous()
    assert KLLayerNorm(shape, device=device).train(training)(x).is_contiguous()


@MODES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [SHAPE[3:], SHAPE[2:], SHAPE[1:]])
def test_channels_last_stays_from_a_kl_rms_norm_as_from_nn_rms_norm(device, shape, bias, training):
    x = torch.randn(SHAPE, device=device).to(memory_format=torch.channels_last).requires_grad_()
    layer, r = KLRMSNorm(shape, bias=bias, device=device).train(training), torch.randn(SHAPE, device=device)
    for y in layer(x), layer(x, residual=r)[0]:
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    expected = layer(x.contiguous())
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    dy = torch.randn_like(expected)
    for dx, wanted in zip(*(torch.autograd.grad(out, x, dy) for out in (y, expected)), strict=True):
        torch.testing.assert_close(dx, wanted, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 3, 4, 5, 6, device=device).to(memory_format=torch.channels_last_3d)
    assert KLRMSNorm(6, device=device).train(training)(x).is_contiguous(memory_format=torch.channels_last_3d)


@MODES
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_vmap_takes_a_kl_rms_norm_of_any_format(device, training):
    """Inside of vmap torch does not tell whether a tensor is channels_last; what comes out is contiguous then."""
    x = torch.randn(2, *SHAPE, device=device)
    layer = KLRMSNorm(SHAPE[3:], bias=True, noise="batch", device=device).train(training)
    torch.manual_seed(3)
    expected = layer(x[1])
    for of_one in x.mT.contiguous().mT, x.movedim(2, -1).contiguous().movedim(-1, 2):
        torch.manual_seed(3)
        y = torch.func.vmap(layer, randomness="same")(of_one)
        torch.testing.assert_close(y[1], expected, rtol=1e-6, atol=1e-6)


@MODES
@KINDS
def test_a_norm_of_the_channels_keeps_channels_last(device, kind, training):
    """As ConvNeXt's LayerNorm2d calls it: the permuted input is contiguous."""
    x = torch.randn(2, N, 3, 4, device=device).to(memory_format=torch.channels_last).requires_grad_()
    y = kind(N, device=device).train(training)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    for tensor in y, dx:
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@KINDS
def test_a_norm_without_scale_and_shift_is_refused_with_the_reason(kind):
    with pytest.raises(
        ValueError, match=r"elementwise_affine is False.*nothing to learn a distribution of.*Remedy: nn"
    ):
        kind(N, elementwise_affine=False)
