"""The benchmark's rows beside LayerNorm: RMSNorm, residual addition, parameters per group, deterministic reading."""

import itertools
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from test_bench import CPU, EVERYONE, GATE, TINY, X_BYTES, FakeClock
from torch import nn

from bench import eager, layers, measure, memory, norms, summary, table, targets
from bench.cases import FAMILY, OPERATIONS, TARGET_SHAPES, Case, Shape, noises_of, plan, tensors, traffic
from bench.check import Wrong, check
from bench.contestants import OF_OPERATION, at_hand, contestant_of
from bench.layers import EPS, Layer, dtype_of, plain

pytestmark = pytest.mark.usefixtures("no_gpu")
RIGHT = [
    (operation, name, noise)
    for operation in FAMILY
    for name, contestant in OF_OPERATION[operation].items()
    if name in ("klnorm", "unfused", "native", "eager")
    for noise in noises_of(contestant.family)
]


def case_of(operation, name, noise="none", dtype="bf16"):
    return Case(name, noise, GATE, dtype, operation)


def gate(case, change=lambda layer: layer):
    """Put a case through the gate, its layer changed."""
    layer, buffers = measure.build(case, CPU, 1)
    check(change(layer), case, contestant_of(case).family, buffers.inputs[0], buffers.cotangents[0])


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


# ---- The gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("operation", "name", "noise"), RIGHT)
def test_right_contestants_pass(operation, name, noise, dtype):
    gate(case_of(operation, name, noise, dtype))


COMPILED = [(operation, name) for operation in FAMILY for name in OF_OPERATION[operation] if name.endswith("compiled")]


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
            gate(Case("compiled", "none", Shape(2, 3, width), "fp32"))


def test_compiled_contestants_go_backward_over_and_over(light_compiler):
    call = measure.calls(*measure.build(case_of("layer_norm", "eager_compiled", "token"), CPU, 1))["backward"]()
    call(0)
    call(0)


def test_gate_goes_through_chunks(monkeypatch):
    monkeypatch.setattr("bench.check.CHUNK", 48 * GATE.width)  # a chunk and a half of a sample, and a shorter last one
    for operation, noise in itertools.product(("residual", "groups"), ("sample", "token")):
        gate(case_of(operation, "klnorm", noise, "fp32"))


def test_gate_stays_finite_where_the_sum_is_zero():
    case = case_of("rms_residual", "klnorm", "token")
    layer, buffers = measure.build(case, CPU, 1)
    x, residual = buffers.inputs[0]
    with torch.no_grad():
        residual[:, ::3, ::2] = -x[:, ::3, ::2]
    check(layer, case, "klnorm", (x, residual), buffers.cotangents[0])


@pytest.mark.parametrize(("operation", "name", "noise"), RIGHT)
def test_gate_refuses_wrong_output(operation, name, noise):
    def one_element_off(y, *others):
        bump = torch.zeros_like(y)
        bump[-1, -1, -1] = 0.5
        return y + bump, *others

    with pytest.raises(Wrong, match=r"^y is off"):
        gate(case_of(operation, name, noise), outputs_changed(one_element_off))


@pytest.mark.parametrize(("operation", "name", "noise"), RIGHT)
def test_gate_refuses_wrong_gradients(operation, name, noise):
    def scaled(parameter):
        def change(layer):
            layer.parameters[parameter].register_hook(lambda gradient: 1.1 * gradient)
            return layer

        return change

    case = case_of(operation, name, noise)
    for parameter in measure.build(case, CPU, 1)[0].parameters:
        with pytest.raises(Wrong, match=f"gradient of {parameter}"):
            gate(case, scaled(parameter))


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
        return plain(make(), values, CPU, dtype_of(case))

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


def test_gate_refuses_eager_rms_noise_of_wrong_size(monkeypatch):
    randn = torch.randn
    case = case_of("rms_norm", "eager", "token", "fp32")
    layer, buffers = measure.build(case, CPU, 1)
    monkeypatch.setattr(eager.torch, "randn", lambda *args, **kwargs: 2.5 * randn(*args, **kwargs))
    with pytest.raises(Wrong, match="the noise has variance"):
        check(layer, case, "kl", buffers.inputs[0], buffers.cotangents[0])


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


# ---- Cases, traffic, targets -----------------------------------------------------------------------------------------


def test_plan_puts_layer_norm_first():
    cases = plan(EVERYONE)
    first = next(i for i, case in enumerate(cases) if case.operation != "layer_norm")
    assert {(c.contestant, c.shape) for c in cases[:first] if c.noise in ("batch", "none")} >= set(
        itertools.product(EVERYONE["layer_norm"], TARGET_SHAPES)
    )
    n_contestants = sum(len(EVERYONE[operation]) for operation in FAMILY)
    telling = cases[first : first + n_contestants]
    assert {(c.operation, c.contestant) for c in telling} == {(op, name) for op in FAMILY for name in EVERYONE[op]}
    assert {c.shape for c in telling} == {TARGET_SHAPES[0]}
    assert {"rms_norm/klnorm/token/4096x65536/bf16", "groups/klnorm/token/1024x768/bf16"} <= {c.key for c in cases}


def test_quick_plan_has_three_family_rows():
    assert [case.key for case in plan(EVERYONE, quick=True) if case.operation != "layer_norm"] == [
        "rms_norm/klnorm/batch/16384x4096/bf16",
        "residual/klnorm/batch/16384x4096/bf16",
        "residual/unfused/batch/16384x4096/bf16",
    ]


def test_minimal_traffic():
    found = {name: [tensors(name, d) for d in ("forward", "backward", "both")] for name in OPERATIONS}
    assert found.keys() == OPERATIONS.keys()
    for name, counts in found.items():
        assert counts == ([4, 4, 8] if name in ("residual", "rms_residual") else [2, 3, 5])
    assert traffic(case_of("residual", "klnorm", "batch"), "forward", 2) == 8 * GATE.elements


def record_of(operation, contestant, noise, shape, ms, gbps=3000.0):
    times = {"forward": ms[0], "backward": ms[1], "both": sum(ms)}
    return {
        "operation": operation, "contestant": contestant, "noise": noise, "dtype": "bf16", "shape": str(shape),
        "width": shape.width, "n_rows": shape.n_rows, "elements": shape.elements, "status": "ok", "wall_ms": 1.0,
        "saved_bytes": 0, **{d: {"median_ms": t, "gbps": gbps} for d, t in times.items()},
    }  # fmt: skip


def test_residual_targets_are_the_ratios_of_traffic():
    shape = TARGET_SHAPES[0]
    records = [
        record_of("residual", "unfused", "batch", shape, (1.0, 2.0)),
        record_of("residual", "klnorm", "batch", shape, (0.79, 1.4)),
        record_of("rms_residual", "klnorm", "batch", shape, (0.1, 0.1)),
    ]
    verdicts = {v["target"]: v for v in targets.evaluate({"records": records, "copy_gbps": 3000.0})}
    wanted = {"forward": (4 / 5, 0.79, True), "backward": (4 / 6, 0.7, False), "both": (8 / 11, 0.73, False)}
    for direction, (limit, measured, met) in wanted.items():
        verdict = verdicts[f"residual, {direction}, batch: time over add, then klnorm"]
        assert (verdict["wanted"], verdict["met"]) == (pytest.approx(limit), met)
        assert verdict["measured"] == pytest.approx(measured)
        assert verdicts[f"rms_residual, {direction}, batch: time over add, then klnorm"]["met"] is None


def test_operations_do_not_answer_for_each_other():
    shape = TARGET_SHAPES[0]
    records = [
        record_of("layer_norm", "klnorm", "batch", shape, (1.0, 1.0), gbps=2950.0),
        record_of("layer_norm", "native", "none", shape, (2.0, 2.0)),
        record_of("rms_norm", "klnorm", "batch", shape, (4.0, 4.0), gbps=1500.0),
        record_of("rms_norm", "native", "none", shape, (1.0, 1.0)),
        record_of("groups", "klnorm", "batch", shape, (9.0, 9.0), gbps=30.0),
    ]
    verdicts = {v["target"]: v for v in targets.evaluate({"records": records, "copy_gbps": 3000.0})}
    name = "forward, eval/batch/sample, N=256 to 8192: share of copy"
    assert verdicts[name]["measured"] == pytest.approx(2950 / 3000)
    assert verdicts[f"rms_norm, {name}"]["measured"] == pytest.approx(0.5)
    assert verdicts["forward+backward, batch: time over native"]["measured"] == pytest.approx(0.5)


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "name", "noise", "parameters", "rest"),
    [
        ("rms_norm", "klnorm", "batch", 2 * 16 * 4, 24 * 4 + 8),  # rstd of every row, the seed
        ("residual", "klnorm", "token", 4 * 16 * 4, 24 * 8 + 8),
        ("residual", "unfused", "token", 6 * 16 * 4, 24 * 8 + 8),  # the layer's priors are tensors
        ("residual", "native", "none", 2 * 16 * 4, 24 * 8),
        ("rms_residual", "klnorm", "batch", 2 * 16 * 4, 24 * 4 + 8),
        ("groups", "klnorm", "sample", 4 * 4 * 16 * 4, 24 * 8 + 8),
        ("deterministic", "klnorm", "none", 2 * 16 * 4, 24 * 8),  # no seed
    ],
)
def test_bytes_kept(operation, name, noise, parameters, rest):
    record = memory.count(Case(name, noise, TINY, "fp32", operation), CPU)
    assert record["why"] is None
    assert (record["saved_x"], record["saved_parameters"], record["saved_rest"]) == (X_BYTES, parameters, rest)


def test_memory_covers_the_family(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "BERT", TINY)
    monkeypatch.setattr(memory, "LARGE", TINY)
    monkeypatch.setattr(memory, "LINES", [])
    assert memory.main(["--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "memory.json").read_text())
    assert {r["operation"] for r in result["records"]} == set(FAMILY)
    assert all(r["why"] is None for r in result["records"])
    assert table.main([str(tmp_path / "memory.json")]) == 0
    text = capsys.readouterr().out
    assert text.count("| bytes beside x (768) and parameters, 24x16 bf16 | batch noise |") == 1
    assert "| residual: add, then klnorm | 200 |" in text
    assert "| deterministic: klnorm | 192 |" in text


# ---- The run ---------------------------------------------------------------------------------------------------------


def test_run_with_the_family(tmp_path, monkeypatch, capsys):
    shape = Shape(4, 6, 1024)
    lines = [("klnorm", "batch", "layer_norm"), ("klnorm", "batch", "residual"), ("unfused", "batch", "residual")]
    lines += [("native", "none", "residual"), ("klnorm", "none", "deterministic"), ("apex_fused", "none", "rms_norm")]
    cases = [Case(name, noise, shape, "bf16", operation) for name, noise, operation in lines]
    monkeypatch.setattr(targets, "TARGET_ELEMENTS", shape.elements)
    monkeypatch.setattr(norms, "plan", lambda families, quick: cases)
    assert norms.run(norms.parse(["--output", str(tmp_path)]), CPU, FakeClock([0.25])) == 0
    printed = capsys.readouterr().out
    assert "24x1024 bf16 residual " in printed
    assert "absent: rms_residual/quack (" in printed

    result = json.loads((tmp_path / "norms.json").read_text())
    assert [(r["contestant"], r["noise"], r["operation"]) for r in result["records"]] == lines
    assert [r["status"] for r in result["records"]] == ["ok"] * 5 + ["failed"]
    fused = result["records"][1]
    for direction, bytes_per_element in ("forward", 8), ("backward", 8), ("both", 16):
        expected = bytes_per_element * shape.elements / 0.25e-3 / 1e9
        assert fused[direction]["gbps"] == pytest.approx(expected)

    assert (tmp_path / "norms.png").stat().st_size > 0
    assert table.main([str(tmp_path / "norms.json")]) == 0
    text = capsys.readouterr().out
    assert "Share of the copy bandwidth, residual, backward" in text
    assert "| add, then klnorm | 1.00 |" in text
    page = "\n".join(summary.summarize(tmp_path))
    assert "rms_norm/apex_fused none 24x1024 bf16 failed" in page
