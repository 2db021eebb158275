"""The gate: right contestants pass it, whatever is wrong with one is told; peers are called as their sources say."""

import itertools
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from bench_cases import CPU, GATE, RIGHT, TINY, case_of, gate
from torch import nn

from bench import eager, layers, measure
from bench.cases import KL_NOISES, KLNORM_NOISES, OPERATIONS, Shape, noises_of
from bench.check import Wrong, check
from bench.contestants import OF_OPERATION, Contestant, at_hand, contestant_of
from bench.layers import EPS, Layer, dtype_of, layer_of, make_values

pytestmark = pytest.mark.usefixtures("no_gpu")
everyone = pytest.mark.parametrize(("operation", "name", "noise"), RIGHT)


def outputs_changed(change):
    """For `gate`: outputs put through `change`."""
    return lambda layer: Layer(lambda *inputs: change(*layer.forward(*inputs)), layer.parameters)


def backwards(change):
    """The identity, whose gradient is put through `change`."""

    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return change(gradient)

    return Backwards.apply


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@everyone
def test_right_contestants_pass(operation, name, noise, dtype):
    gate(case_of(operation, name, noise, dtype))


COMPILED = [
    (operation, name) for operation in OPERATIONS for name in OF_OPERATION[operation] if name.endswith("compiled")
]


@pytest.fixture
def light_compiler(monkeypatch, fresh_dynamo):
    """torch.compile by a backend that needs no compiler: inductor takes 20 seconds for each. Its options."""
    options, original = [], torch.compile

    def compile_lightly(forward, **given):
        options.append(given)
        return original(forward, **given, backend="aot_eager")

    monkeypatch.setattr(layers.torch, "compile", compile_lightly)
    return options


@pytest.mark.parametrize(("operation", "name"), COMPILED)
def test_compiled_contestants_pass(operation, name, light_compiler):
    gate(case_of(operation, name, noises_of(contestant_of(case_of(operation, name)).family)[-1]))
    assert light_compiler == [{"fullgraph": True, "dynamic": False}]


def test_compiled_contestants_of_any_number_of_shapes(light_compiler):
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in 8, 16:
            gate(case_of("layer_norm", "compiled", dtype="fp32", shape=Shape(2, 3, width)))


def test_compiled_contestants_go_backward_over_and_over(light_compiler):
    call = measure.calls(*measure.build(case_of("layer_norm", "eager_compiled", "token"), CPU))["backward"]()
    call(0)
    call(0)


def test_gate_goes_through_chunks(monkeypatch):
    monkeypatch.setattr("bench.check.CHUNK", 48 * GATE.width)  # a chunk and a half of a sample, and a shorter last one
    for noise in KLNORM_NOISES:
        gate(case_of("layer_norm", "klnorm", noise, "fp32"))
    for operation, noise in itertools.product(("residual", "groups"), ("sample", "token")):
        gate(case_of(operation, "klnorm", noise, "fp32"))


def test_gate_handles_samples_of_one_row():
    gate(case_of("layer_norm", "klnorm", "sample", "fp32", Shape(16, 1, 64)))


def test_gate_stays_finite_where_the_sum_is_zero():
    case = case_of("rms_residual", "klnorm", "token")
    layer, buffers = measure.build(case, CPU)
    x, residual = buffers.inputs[0]
    with torch.no_grad():
        residual[:, ::3, ::2] = -x[:, ::3, ::2]
    check(layer, case, "klnorm", (x, residual), buffers.cotangents[0])


@everyone
def test_gate_refuses_wrong_output(operation, name, noise):
    def one_element_off(y, *others):
        bump = torch.zeros_like(y)
        bump[-1, -1, -1] = 0.5
        return y + bump, *others

    with pytest.raises(Wrong, match=r"^y is off"):
        gate(case_of(operation, name, noise), outputs_changed(one_element_off))
    with pytest.raises(Wrong, match=r"^y is off"):
        gate(case_of(operation, name, noise), outputs_changed(lambda y, *others: (y * float("nan"), *others)))


@everyone
def test_gate_refuses_wrong_gradients(operation, name, noise):
    def scaled(parameter):
        def change(layer):
            layer.parameters[parameter].register_hook(lambda gradient: 1.1 * gradient)
            return layer

        return change

    case = case_of(operation, name, noise)
    for parameter in measure.build(case, CPU)[0].parameters:
        with pytest.raises(Wrong, match=f"gradient of {parameter}"):
            gate(case, scaled(parameter))


def test_gate_refuses_wrong_dx():
    twice = backwards(lambda gradient: 2 * gradient)
    with pytest.raises(Wrong, match=r"^dx is off"):
        gate(case_of("layer_norm", "native", dtype="fp32"), outputs_changed(lambda y: (twice(y),)))


def test_gate_refuses_wrong_kl():
    with pytest.raises(Wrong, match=r"^kl is off"):
        gate(case_of("layer_norm", "klnorm", "batch", "fp32"), outputs_changed(lambda y, kl: (y, kl / 2)))


def test_gate_refuses_klnorm_without_its_noise():
    case = case_of("layer_norm", "klnorm", "token", "fp32")
    with pytest.raises(Wrong, match="0 seeds"):
        gate(case, lambda layer: layers.build_eager(case, make_values(GATE.width, CPU), CPU))


@pytest.mark.parametrize("operation", ["residual", "rms_residual"])
@pytest.mark.parametrize("name", ["klnorm", "unfused", "native"])
def test_gate_refuses_wrong_residuals(operation, name):
    case = case_of(operation, name, noises_of(OF_OPERATION[operation][name].family)[-1])
    lost = backwards(torch.zeros_like)
    with pytest.raises(Wrong, match=r"^dx is off"):  # by dsum
        gate(case, outputs_changed(lambda y, total, *kl: (y, lost(total), *kl)))
    with pytest.raises(Wrong, match=r"^sum is off"):
        gate(case, outputs_changed(lambda y, total, *kl: (y, total + 0.5, *kl)))
    twice = backwards(lambda gradient: 2 * gradient)
    for place, message in (0, "dx"), (1, "dresidual"):

        def doubled(layer, place=place):
            def forward(*inputs):
                return layer.forward(*(twice(t) if i == place else t for i, t in enumerate(inputs)))

            return Layer(forward, layer.parameters)

        with pytest.raises(Wrong, match=f"^{message} is off"):
            gate(case, doubled)


def test_gate_refuses_a_missing_sum():
    with pytest.raises(Wrong, match="the sum is missing"):
        gate(case_of("residual", "native"), outputs_changed(lambda y, total: (y,)))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("operation", "make"),
    [
        ("layer_norm", lambda: nn.LayerNorm(GATE.width, 1e-6)),
        ("layer_norm", lambda: nn.LayerNorm(GATE.width, 2 * EPS)),
        ("rms_norm", lambda: nn.RMSNorm(GATE.width)),  # its default is the epsilon of the dtype
        ("rms_norm", lambda: nn.RMSNorm(GATE.width, 2 * EPS)),
        ("rms_norm", lambda: nn.LayerNorm(GATE.width, EPS, bias=False)),  # subtracts the mean
    ],
)
def test_gate_refuses_another_normalization(operation, make, dtype):
    case = case_of(operation, "native", dtype=dtype)

    def other(layer):
        values = {name: p.detach() for name, p in layer.parameters.items()}
        return layer_of(make(), values, CPU, dtype_of(case))

    with pytest.raises(Wrong, match=r"^y is off"):
        gate(case, other)


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_gate_refuses_mixed_up_groups(noise):
    case = case_of("groups", "klnorm", noise, "fp32")
    other = backwards(lambda gradient: gradient.roll(1, 0))
    with pytest.raises(Wrong, match=r"^kl is off"):
        gate(case, outputs_changed(lambda y, kl: (y, kl.roll(1))))
    with pytest.raises(Wrong, match=r"^gradient of weight is off"):
        gate(case, outputs_changed(lambda y, kl: (y, other(kl))))
    with pytest.raises(Wrong, match=r"^y is off"):
        gate(case, outputs_changed(lambda y, kl: (y.roll(1, 0), kl)))

    def rolled(layer):
        layer.parameters["bias_rho"].register_hook(lambda gradient: gradient.roll(1, 0))
        return layer

    with pytest.raises(Wrong, match=r"^gradient of bias_rho is off"):
        gate(case, rolled)


@pytest.mark.parametrize("name", ["klnorm", "eager"])
def test_gate_refuses_a_wrong_deterministic_kl(name):
    with pytest.raises(Wrong, match=r"^kl is off"):
        gate(case_of("deterministic", name), outputs_changed(lambda y, kl: (y, 1.01 * kl)))


@pytest.mark.parametrize("operation", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("noise", KL_NOISES)
def test_gate_refuses_eager_noise_of_wrong_size(operation, noise, monkeypatch):
    randn = torch.randn
    case = case_of(operation, "eager", noise, "fp32")
    layer, buffers = measure.build(case, CPU)
    monkeypatch.setattr(eager.torch, "randn", lambda *args, **kwargs: 2.5 * randn(*args, **kwargs))
    with pytest.raises(Wrong, match="the noise has variance"):
        check(layer, case, "kl", buffers.inputs[0], buffers.cotangents[0])


def test_gate_refuses_eager_noise_without_gradient(monkeypatch):
    softplus = F.softplus

    def detached(layer):
        def forward(x):
            with monkeypatch.context() as patch:
                patch.setattr(eager.F, "softplus", lambda rho: softplus(rho).detach() + 0 * rho)
                return layer.forward(x)

        return Layer(forward, layer.parameters)

    with pytest.raises(Wrong, match=r"gradient of weight_rho|identity"):
        gate(case_of("layer_norm", "eager", "batch", "fp32"), detached)


def test_eager_rows_that_share_a_draw():
    x = torch.randn(TINY.width).expand(4, 6, -1)
    rows = {noise: eager.EagerKLNorm(TINY.width, noise=noise)(x).detach().flatten(0, 1) for noise in KL_NOISES}
    assert {noise: len(torch.unique(y, dim=0)) for noise, y in rows.items()} == {"batch": 1, "sample": 4, "token": 24}


def test_replace_with_eager_keeps_function_and_counts_all():
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    x = torch.randn(2, 3, 8)
    expected = model(x)
    assert eager.replace_with_eager(model, "sample") is model
    torch.testing.assert_close(model.eval()(x), expected)
    s, p = 0.05, 0.1
    each = math.log(p / s) + s**2 / (2 * p**2) - 0.5  # means at the prior's
    assert eager.kl_divergence(model).item() == pytest.approx(4 * 8 * each, rel=1e-5)


def test_values_are_bf16_numbers():
    for value in make_values(64, CPU).values():
        assert torch.equal(value, value.bfloat16().float())


def test_absent_contestants_say_why():
    absent = Contestant("x", None, requires=("a_module_that_is_not_there",)).missing()
    assert "a_module_that_is_not_there" in absent
    assert "nothing_of_that_name" in Contestant("x", None, requires=("math:nothing_of_that_name",)).missing()
    assert OF_OPERATION["layer_norm"]["klnorm"].missing() is None


# ---- Peers: stand-ins with the signatures of their sources, so that what is passed to them is checked ----------------


def rms_norm(x, weight, eps):
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


class InPlace(torch.autograd.Function):
    """The identity; its backward overwrites the gradient that it is given, as Liger's does by default."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        dx = dy.clone()
        dy.zero_()
        return dx


class LigerStandIn(nn.Module):
    def __init__(self, hidden_size, eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones", in_place=True):
        super().__init__()
        self.weight, self.eps, self.in_place = nn.Parameter(torch.ones(hidden_size)), eps, in_place

    def forward(self, hidden_states, residual=None):
        total = hidden_states if residual is None else hidden_states + residual
        y = rms_norm(total, self.weight, self.eps)
        y = InPlace.apply(y) if self.in_place else y
        return y if residual is None else (y, total)


class FlaStandIn(nn.Module):
    def __init__(self, hidden_size, elementwise_affine=True, bias=False, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(hidden_size)), eps
        self.bias = nn.Parameter(torch.empty(hidden_size)) if bias else None

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        total = x if residual is None else x + residual
        if self.bias is None:
            y = rms_norm(total, self.weight, self.eps)
        else:
            y = F.layer_norm(total.float(), x.shape[-1:], self.weight, self.bias, self.eps).to(x.dtype)
        return (y, total) if prenorm else y


def quack_stand_in(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False
):
    total = x if residual is None else x + residual
    y = rms_norm(total, weight, eps)
    return (y, total) if prenorm else y


def quack_forward_stand_in(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    mean = x.float().mean(1)
    rstd = (x.float().var(1, correction=0) + eps).rsqrt()
    xhat = (x.float() - mean[:, None]) * rstd[:, None]
    return (xhat * weight + bias).to(x.dtype), *([rstd] if return_rstd else []), *([mean] if return_mean else [])


def quack_backward_stand_in(x, weight, dout, rstd, mean, has_bias=True):
    xhat, dy = (x.float() - mean[:, None]) * rstd[:, None], dout.float()
    dxhat = dy * weight
    along = dxhat.mean(1, keepdim=True) + xhat * (dxhat * xhat).mean(1, keepdim=True)
    return (rstd[:, None] * (dxhat - along)).to(x.dtype), (dy * xhat).sum(0), dy.sum(0) if has_bias else None


class ApexRMSNorm(nn.RMSNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps)


class ApexLayerNorm(nn.LayerNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps)


class ApexFastLayerNorm(nn.LayerNorm):
    def __init__(self, hidden_size, eps=1e-5, memory_efficient=False):
        super().__init__(hidden_size, eps)


class LigerLayerNorm(nn.LayerNorm):
    def __init__(self, hidden_size, eps=1e-6, bias=False, init_fn="ones"):
        super().__init__(hidden_size, eps, bias=bias)

    def forward(self, hidden_states):
        y = F.layer_norm(hidden_states.float(), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.to(hidden_states.dtype)


STAND_INS = {
    "apex.normalization": {"FusedLayerNorm": ApexLayerNorm, "FusedRMSNorm": ApexRMSNorm},
    "apex.contrib.layer_norm": {"FastLayerNorm": ApexFastLayerNorm},
    "fused_layer_norm_cuda": {},
    "liger_kernel.transformers.layer_norm": {"LigerLayerNorm": LigerLayerNorm},
    "liger_kernel.transformers.rms_norm": {"LigerRMSNorm": LigerStandIn},
    "liger_kernel.transformers.fused_add_rms_norm": {"LigerFusedAddRMSNorm": LigerStandIn},
    "quack.rmsnorm": {
        "rmsnorm": quack_stand_in, "layernorm_fwd": quack_forward_stand_in, "layernorm_bwd": quack_backward_stand_in
    },
    "fla.modules": {"LayerNorm": FlaStandIn, "RMSNorm": FlaStandIn},
}  # fmt: skip
PEERS = [
    (operation, name)
    for operation, contestants in OF_OPERATION.items()
    for name, contestant in contestants.items()
    if contestant.requires
]


@pytest.mark.parametrize(("operation", "name"), PEERS)
def test_peers_are_called_as_their_sources_say(operation, name, monkeypatch):
    contestant = OF_OPERATION[operation][name]
    for module, contents in STAND_INS.items():
        stand_in = types.ModuleType(module)
        stand_in.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, module, stand_in)
    assert contestant.missing() is None
    gate(case_of(operation, name))


def test_absent_peers_are_listed(monkeypatch):
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", None)
    families, absent = at_hand()
    assert {"quack", "rms_norm/quack", "rms_residual/quack"} <= absent.keys()
    for operation, contestants in OF_OPERATION.items():
        assert families[operation].keys() == {n for n, c in contestants.items() if c.missing() is None}
        assert "quack" not in families[operation]
        assert families[operation]["klnorm"] == contestants["klnorm"].family
