"""What errors about the tensors of a call advise is done, and helps; layouts stand in test_functional_refused.py."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import klnorm
from klnorm.functional import kl_layer_norm

N = 8
ROWS = torch.arange(float(4 * N)).reshape(4, N).sin()
HALF, DOUBLE = ROWS.half(), ROWS.double()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch calls them a prototype
    RAGGED = torch.nested.nested_tensor([ROWS, ROWS[:2]])
WITHOUT_SHIFT = {"bias": None, "bias_rho": None}
DETERMINISTIC = {**WITHOUT_SHIFT, "posterior": "deterministic"}
MANY = 2**32 + 1
SEED = torch.tensor([3])


def given(device="cpu", groups=()):
    """The arguments of a call that is right."""
    parameters = {name: torch.zeros(*groups, N, device=device) for name in ("weight", "bias", "weight_rho", "bias_rho")}
    return {"x": ROWS.to(device), "normalized_shape": N, **parameters}


def grouped(groups):
    return {**given(groups=(groups,)), "x": ROWS.expand(6, 4, N)}


ON_META = given("meta")
# name -> (what is wrong in a call, what the error says, what is changed as it advises)
CALLS = {
    "no tensor": ({"x": ROWS.tolist()}, "Remedy: torch.as_tensor(x).", {"x": torch.as_tensor(ROWS.tolist())}),
    "an array": ({"x": ROWS.numpy()}, "Remedy: torch.as_tensor(x).", {"x": torch.as_tensor(ROWS.numpy())}),
    "nested": ({"x": RAGGED}, "Remedy: x.to_padded_tensor(0.0), or", {"x": RAGGED.to_padded_tensor(0.0)}),
    "dtype of x": ({"x": ROWS.long()}, "Remedy: x.float().", {"x": ROWS.long().float()}),
    "order": ({"x": ROWS.T}, "Remedy: permute x, or", {"x": ROWS.T.permute(1, 0)}),
    "shape": (
        {"x": ROWS.reshape(4, 2, 4)}, "or change normalized_shape.",
        {"normalized_shape": (2, 4), **{name: p.reshape(2, 4) for name, p in given().items() if name[:1] in "wb"}},
    ),
    **{
        f"device of {name}": ({**ON_META, name: tensor}, f"Remedy: {name}.to(x.device).", {name: tensor.to("meta")})
        for name, tensor in {**given(), "residual": ROWS, "weight_prior": torch.ones(N), "seed": SEED}.items()
        if name not in ("x", "normalized_shape")
    },
    "weight_rho": ({**DETERMINISTIC, "weight_rho": torch.zeros(N)}, "Remedy: leave it out.", {"weight_rho": None}),
    "bias_rho": (
        {"posterior": "deterministic", "weight_rho": None}, "Remedy: leave it out.", {"bias_rho": None},
    ),
    "no bias": ({"bias": None}, "Remedy: pass bias as well.", {"bias": torch.zeros(N)}),
    "no bias_rho": ({"bias_rho": None}, "Remedy: pass bias_rho as well.", {"bias_rho": torch.zeros(N)}),
    **{
        f"dtype of {name}": (
            {name: torch.zeros(N).half()}, f"Remedy: {name}.to(torch.float32).",
            {name: torch.zeros(N).half().to(torch.float32)},
        )
        for name in ("bias", "weight_rho", "bias_rho")
    },
    "integer weight": ({"weight": torch.ones(N).long()}, "Remedy: weight.float().", {"weight": torch.ones(N)}),
    "integer prior": (
        {"bias_prior": torch.ones(N).long()}, "Remedy: bias_prior.float().", {"bias_prior": torch.ones(N)},
    ),
    "groups": (grouped(5), "Remedy: pad x, or", {"x": F.pad(ROWS.expand(6, 4, N), (0, 0, 0, 0, 0, 4))}),
    "groups of samples": (grouped(5), "or pass one row of parameters per sample.", grouped(6)),
    "cut, batch": (grouped(8), 'Remedy: noise="batch" or', {"noise": "batch"}),
    "cut, token": (grouped(8), '"batch" or "token".', {"noise": "token"}),
    "fp64 residual": ({"residual": DOUBLE}, "Remedy: x.double() or", {"x": DOUBLE}),
    "fp64 x": ({"x": DOUBLE, "residual": HALF}, "or residual.double().", {"residual": HALF.double()}),
    "sample_dim": (
        {"x": ROWS.reshape(2, 2, N), "sample_dim": 2}, "Remedy: name the dimension that counts samples.",
        {"sample_dim": 1},
    ),
    "seed": ({"seed": 3}, "Remedy: torch.tensor([seed], device=x.device).", {"seed": torch.tensor([3], device="cpu")}),
    "dtype of seed": ({"seed": SEED.int()}, "Remedy: seed.long().", {"seed": SEED.int().long()}),
    "rows": (
        {**ON_META, "x": torch.zeros(1, N, device="meta").expand(MANY, N)}, "Remedy: split x.",
        {"x": torch.zeros(1, N, device="meta").expand(MANY, N).split(MANY // 2)[0]},
    ),
    "not finite": (
        {"bias": torch.full((N,), torch.nan)}, "Remedy: look for a diverged step or a bad checkpoint",
        {"bias": torch.zeros(N)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_what_a_call_is_advised_helps(case):
    wrong, advice, right = CALLS[case]
    arguments = {**given(), **wrong}
    with pytest.raises((ValueError, TypeError), match=re.escape(advice)):
        kl_layer_norm(**arguments)
    kl = kl_layer_norm(**{**arguments, **right})[-1]
    assert kl.is_meta or kl.isfinite().all()


def test_a_generator_of_the_device_of_x(device):
    if device.type == "cpu":
        pytest.skip("a generator of another device needs a GPU: --device cuda")
    arguments = given(device)
    with pytest.raises(ValueError, match=r"generator is for cpu.*Remedy: torch\.Generator\(device=x\.device\)"):
        kl_layer_norm(**arguments, generator=torch.Generator())
    kl_layer_norm(**arguments, generator=torch.Generator(device=arguments["x"].device))


def test_an_x_of_another_kind_of_device():
    """No machine of the tests has one, but a fake tensor may say that it is there."""
    with FakeTensorMode():
        arguments, x = given(), torch.zeros(4, N, device="xpu")
        with pytest.raises(ValueError, match=r"x is on xpu.*expected a CPU or CUDA tensor\. Remedy: x\.cpu\(\)"):
            kl_layer_norm(**{**arguments, "x": x})
        assert kl_layer_norm(**{**arguments, "x": x.cpu()})[0].shape == x.shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_passes_nested_tensors():
    block = nn.TransformerEncoderLayer(N, 2, 16, batch_first=True)
    model = klnorm.replace_layer_norm(nn.TransformerEncoder(block, 2)).eval()
    for layer in model.layers:
        layer.norm1.train()
    x, padding = ROWS.expand(3, 4, N), torch.tensor([[False] * 4, [False] * 4, [False, False, True, True]])
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"x is a nested tensor.*`with klnorm\.sampling\(model\)`"):
            model(x, src_key_padding_mask=padding)
        with klnorm.sampling(model):
            assert model(x, src_key_padding_mask=padding).isfinite().all()


# What the errors of a KLConditionalLayerNorm advise


def conditional(condition="self"):
    return klnorm.KLConditionalLayerNorm(N, condition=condition)


X, C = ROWS.expand(3, 4, N), torch.ones(3, 2)
REAL = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(3, 4)
ADDED = (1 - REAL) * -1e9
# name -> (layer, wrong arguments, what the error says, layer and arguments as it advises)
CONDITIONAL = {
    "no samples": ("self", {"x": X[:0]}, "Remedy: leave out empty batches.", "self", {"x": X}),
    "condition": ("self", {"x": X, "condition": C}, "Remedy: leave it out, or", "self", {"x": X}),
    "width": (
        "self", {"x": X, "condition": C}, "or make the layer with condition=an int, its width.",
        C.shape[1], {"x": X, "condition": C},
    ),
    "mask": (2, {"x": X, "condition": C, "mask": REAL > 0}, "Remedy: leave it out, or", 2, {"x": X, "condition": C}),
    "self": (
        2, {"x": X, "mask": REAL > 0}, "or make the layer with condition='self'.", "self", {"x": X, "mask": REAL > 0},
    ),
    "float mask": ("self", {"x": X, "mask": REAL}, "Remedy: mask > 0.5;", "self", {"x": X, "mask": REAL > 0.5}),
    "additive mask": (
        "self", {"x": X, "mask": ADDED}, "of an additive mask, mask == 0.", "self", {"x": X, "mask": ADDED == 0},
    ),
    "integers": (
        2, {"x": X, "condition": C.long()}, "Remedy: condition.float().", 2, {"x": X, "condition": C.long().float()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONDITIONAL)
def test_what_a_call_of_a_conditional_layer_is_advised_helps(case):
    condition, wrong, advice, its_condition, right = CONDITIONAL[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(advice)):
        conditional(condition)(**wrong)
    layer = conditional(its_condition)
    assert layer(**right).isfinite().all()
    klnorm.kl_divergence(layer).backward()


def test_a_conditional_layer_that_has_been_called_in_training_mode():
    layer = conditional().eval()
    layer(X)
    with pytest.raises(ValueError, match=r"no KL divergence yet.*Remedy: call the model in training mode, or inside"):
        klnorm.kl_divergence(layer)
    layer.train()(X)
    klnorm.kl_divergence(layer).backward()


def test_a_forward_then_the_kl_then_one_backward():
    layer, x = conditional(), X.clone().requires_grad_()
    for _ in range(2):
        y = layer(x)
        (y.sum() + klnorm.kl_divergence(layer)).backward()
        with pytest.raises(RuntimeError, match=r"Remedy: call every layer in the forward, klnorm\.kl_divergence after"):
            klnorm.kl_divergence(layer).backward()
