"""The benchmarks, as far as a CPU can tell: the gate, counts, timing with a made-up clock, files, the GPU script."""

import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from bench import contestants, eager, measure, memory, norms, report, summary, table, targets, timing, train_step, warm
from bench.cases import (
    BERT,
    KL_NOISES,
    KLNORM_NOISES,
    LAYER_NORM,
    TARGET_SHAPES,
    Case,
    Shape,
    noises_of,
    plan,
    sets_beyond,
)
from bench.check import Wrong, check
from bench.contestants import CONTESTANTS, OF_OPERATION
from bench.layers import Layer, make_values

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = Shape(4, 6, 16)
GATE = Shape(4, 32, 64)
X_BYTES = 4 * 6 * 16 * 4  # of TINY in fp32


pytestmark = pytest.mark.usefixtures("no_gpu")


class FakeClock:
    """A clock on which calls take the milliseconds that it is given; the calls are made, once a batch."""

    def __init__(self, times=(1.0,), gaps=False):
        self.times, self.gaps = itertools.cycle(times), gaps

    def copy_gbps(self):
        return 2000.0

    def batch(self, call, count, host_ms):
        call(0)
        return count * next(self.times), self.gaps

    def host(self, call, count):
        call(0)
        return 0.1, 0.5


# ---- Contestants and their gate --------------------------------------------------------------------------------------


def gate(case, layer=None, family=None):
    """Put a case through the gate; `layer` instead of the contestant's own."""
    built, buffers = measure.build(case, CPU, 1)
    family = family or CONTESTANTS[case.contestant].family
    check(layer or built, case, family, buffers.inputs[0], buffers.cotangents[0])


RIGHT = [(name, noise) for name in ("klnorm", "native", "eager") for noise in noises_of(CONTESTANTS[name].family)]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("name", "noise"), RIGHT)
def test_right_contestants_pass(name, noise, dtype):
    gate(Case(name, noise, GATE, dtype))


def test_gate_goes_through_chunks(monkeypatch):
    monkeypatch.setattr("bench.check.CHUNK", 48 * GATE.width)  # a chunk and a half of a sample, and a shorter last one
    for noise in KLNORM_NOISES:
        gate(Case("klnorm", noise, GATE, "fp32"))


def test_gate_handles_samples_of_one_row():
    gate(Case("klnorm", "sample", Shape(16, 1, 64), "fp32"))


def wrong_layer(case, output=None, gradient=None):
    """The contestant's layer with its y, or the gradient of a parameter, made wrong."""
    layer = CONTESTANTS[case.contestant].build(case, make_values(case.shape.width, CPU), CPU)
    if gradient:
        layer.parameters[gradient].register_hook(lambda g: 1.1 * g)
    if not output:
        return layer

    def forward(x):
        y, *kl = layer.forward(x)
        return output(y), *kl

    return Layer(forward, layer.parameters)


@pytest.mark.parametrize(("name", "noise"), RIGHT)
def test_gate_refuses_wrong_output(name, noise):
    def one_element_off(y):
        bump = torch.zeros_like(y)
        bump[-1, -1, -1] = 0.5
        return y + bump

    case = Case(name, noise, GATE, "bf16")
    with pytest.raises(Wrong, match=r"^y is off"):
        gate(case, wrong_layer(case, one_element_off))
    with pytest.raises(Wrong, match=r"^y is off"):
        gate(case, wrong_layer(case, lambda y: y * float("nan")))


@pytest.mark.parametrize(("name", "noise"), RIGHT)
def test_gate_refuses_wrong_gradients(name, noise):
    case = Case(name, noise, GATE, "bf16")
    for parameter in CONTESTANTS[name].build(case, make_values(GATE.width, CPU), CPU).parameters:
        with pytest.raises(Wrong, match=f"gradient of {parameter}"):
            gate(case, wrong_layer(case, gradient=parameter))


class Straight(torch.autograd.Function):
    """Twice the gradient."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_gate_refuses_wrong_dx():
    case = Case("native", LAYER_NORM, GATE, "fp32")
    with pytest.raises(Wrong, match=r"^dx is off"):
        gate(case, wrong_layer(case, Straight.apply))


def test_gate_refuses_wrong_kl():
    case = Case("klnorm", "batch", GATE, "fp32")
    layer = wrong_layer(case)
    half = Layer(lambda x: (lambda y, kl: (y, kl / 2))(*layer.forward(x)), layer.parameters)
    with pytest.raises(Wrong, match=r"^kl is off"):
        gate(case, half)


def test_gate_refuses_klnorm_without_its_noise():
    case = Case("klnorm", "token", GATE, "fp32")
    layer = CONTESTANTS["eager"].build(case, make_values(GATE.width, CPU), CPU)
    with pytest.raises(Wrong, match="0 seeds"):
        gate(case, layer)


@pytest.mark.parametrize("noise", KL_NOISES)
def test_gate_refuses_eager_noise_of_wrong_size(noise, monkeypatch):
    randn = torch.randn
    case = Case("eager", noise, GATE, "fp32")
    layer = CONTESTANTS["eager"].build(case, make_values(GATE.width, CPU), CPU)
    buffers = measure.Buffers(case, CPU, 1)
    monkeypatch.setattr(eager.torch, "randn", lambda *args, **kwargs: 2.5 * randn(*args, **kwargs))
    with pytest.raises(Wrong, match="the noise has variance"):
        check(layer, case, "kl", buffers.inputs[0], buffers.cotangents[0])


def test_gate_refuses_eager_noise_without_gradient(monkeypatch):
    softplus = torch.nn.functional.softplus
    case = Case("eager", "batch", GATE, "fp32")
    layer = CONTESTANTS["eager"].build(case, make_values(GATE.width, CPU), CPU)
    forward = layer.forward

    def detached(x):
        with monkeypatch.context() as patch:
            patch.setattr(eager.F, "softplus", lambda rho: softplus(rho).detach() + 0 * rho)
            return forward(x)

    with pytest.raises(Wrong, match=r"gradient of weight_rho|identity"):
        gate(case, Layer(detached, layer.parameters))


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
    absent = contestants.Contestant("x", "layer_norm", None, ("a_module_that_is_not_there",)).missing()
    assert "a_module_that_is_not_there" in absent
    assert "nothing_of_that_name" in contestants.Contestant("x", "kl", None, ("math:nothing_of_that_name",)).missing()
    assert CONTESTANTS["klnorm"].missing() is None


# ---- Cases -----------------------------------------------------------------------------------------------------------


EVERYONE = {operation: {name: c.family for name, c in those.items()} for operation, those in OF_OPERATION.items()}


@pytest.mark.parametrize("quick", [False, True])
def test_plan_begins_with_what_the_targets_need(quick):
    cases = plan(EVERYONE, quick)
    assert len(cases) == len(set(cases)) == len({case.key for case in cases})
    assert [case.key for case in cases[:2]] == ["klnorm/batch/1024x768/bf16", "native/none/1024x768/bf16"]
    n_shapes = 5 if quick else len(TARGET_SHAPES)
    ours = cases[2 : 2 + 4 * n_shapes]
    assert {(c.contestant, c.noise, c.shape) for c in ours} == set(
        itertools.product(["klnorm"], KLNORM_NOISES, TARGET_SHAPES[:n_shapes])
    )
    assert {case.contestant for case in cases if case.operation == "layer_norm"} == set(CONTESTANTS)
    assert all(case.noise in noises_of(EVERYONE[case.operation][case.contestant]) for case in cases)


def test_plan_covers_dtypes_and_shapes():
    cases = plan(EVERYONE)
    assert {case.dtype for case in cases} == {"bf16", "fp16", "fp32"}
    wanted = {"1024x768", "4096x256", "4096x65536", "16384x4096", "1048576x128", "16x8192"}
    assert wanted <= {str(case.shape) for case in cases}
    keys = [case.key for case in cases]
    assert keys.index("rms_norm/native/none/8192x8192/bf16") < keys.index("eager/token/1024x768/bf16")


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", KL_NOISES)
def test_klnorm_saves_x_parameters_seed_and_statistics(noise):
    record = memory.count(Case("klnorm", noise, TINY, "fp32"), CPU)
    assert record["why"] is None
    assert record["saved_x"] == record["x_bytes"] == X_BYTES
    assert record["saved_parameters"] == 6 * 16 * 4  # four parameters, two priors
    assert record["saved_rest"] == 24 * 8 + 8  # mean and rstd of every row, the seed


def test_layer_norm_saves_x_parameters_and_statistics():
    record = memory.count(Case("native", LAYER_NORM, TINY, "fp32"), CPU)
    assert (record["saved_x"], record["saved_parameters"], record["saved_rest"]) == (X_BYTES, 2 * 16 * 4, 24 * 8)


def test_eager_token_noise_saves_four_tensors_of_the_size_of_x():
    record = memory.count(Case("eager", "token", TINY, "fp32"), CPU)
    small = record["saved_rest"] - 4 * X_BYTES  # xhat, gamma and both noises; then statistics and vectors
    assert 24 * 8 <= small <= 24 * 8 + 12 * 16 * 4


def test_memory_counts_a_storage_once():
    x = torch.randn(4, 8, requires_grad=True)
    assert measure.saved_bytes(Layer(lambda v: (v * v + v.view(8, 4).view(4, 8) * v,), {}), [x]) == (4 * 8 * 4, 0, 0)


def test_memory_counts_what_a_view_keeps_alive():
    x = torch.randn(4, 8, requires_grad=True)
    assert measure.saved_bytes(Layer(lambda v: ((v + 1)[:1].square(),), {}), [x]) == (0, 0, 4 * 8 * 4)


def test_memory_writes_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "BERT", TINY)
    assert memory.main(["--quick", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "memory.json").read_text())
    assert len(result["records"]) == 14
    assert all(r["why"] is None for r in result["records"])
    assert "left to a GPU" in capsys.readouterr().out


# ---- Timing ----------------------------------------------------------------------------------------------------------


def test_quantile():
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2
    assert timing.quantile([0.0, 10.0], 0.2) == pytest.approx(2)
    assert timing.quantile([5.0], 0.8) == 5


def test_measure_on_a_made_up_clock():
    found = timing.measure(lambda i: None, FakeClock([0.5, 0.1, 0.2, 0.3, 0.4]))
    assert found.calls == 2  # of 0.5 ms each, by the first batch
    assert found.samples == timing.SAMPLES
    assert found.median_ms == pytest.approx(0.3)
    assert (found.p20_ms, found.p80_ms) == pytest.approx((0.18, 0.42), abs=0.03)
    assert not found.gaps
    assert timing.measure(lambda i: None, FakeClock([1.0], gaps=True)).gaps


def test_measure_keeps_to_its_limits():
    slow = timing.measure(lambda i: None, FakeClock([1000.0]))
    assert (slow.calls, slow.samples) == (1, timing.LEAST_SAMPLES)
    assert timing.measure(lambda i: None, FakeClock([0.001])).calls == timing.MOST_CALLS


def test_buffers_exceed_twice_the_cache():
    assert [sets_beyond(50, size, most=16) for size in (1000, 50, 10, 9, 1)] == [2, 2, 10, 12, 16]


@pytest.mark.parametrize("direction", measure.DIRECTIONS)
def test_calls_rotate_their_buffers_and_results(direction):
    buffers = measure.Buffers(Case("native", LAYER_NORM, TINY, "fp32"), CPU, 3)
    seen, results = [], weakref.WeakSet()

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            y = x.clone()
            results.add(y)
            if direction != "backward":
                seen.append(x.data_ptr())
            return y

        @staticmethod
        def backward(ctx, dy):
            dx = dy.clone()
            if direction == "backward":
                seen.append(ctx.saved_tensors[0].data_ptr())
            if direction != "forward":
                results.add(dx)
            return dx

    call = measure.calls(Layer(lambda x: (Noted.apply(x),), {}), buffers)[direction]()
    results.clear()
    for i in range(7):
        call(i)
    assert seen == [buffers.inputs[i % 3][0].data_ptr() for i in range(7)]
    assert len(results) == 3


def test_peak_is_beyond_what_there_was(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: done.append("read") or 350)
    assert measure.peak(lambda i: done.append("call")) == 250
    assert done == ["reset", "call", "read"]


class FakeEvent:
    """A CUDA event of a GPU whose time stands still but for `elapsed_time`; reached at once if `reached`."""

    reached = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def query(self):
        return self.reached

    def elapsed_time(self, end):
        return 2.0


@pytest.mark.parametrize("behind", [False, True])
def test_cuda_clock(behind, monkeypatch):
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(FakeEvent, "reached", behind)
    clock = timing.CudaClock(CPU)
    assert clock.copy_gbps() == pytest.approx(2 * (1 << 10) / 0.5e-3 / 1e9)
    seen = []
    assert clock.batch(seen.append, 3, host_ms=1.0) == (2.0, behind)
    assert seen == [0, 1, 2] * (3 if behind else 1)  # tried again, with more in front of it
    enqueued, done = clock.host(seen.append, 2)
    assert 0 < enqueued <= done
    assert timing.wall(lambda i: None, clock) > 0


def test_warm_does_what_it_can():
    assert warm.warm(math.sqrt, [4.0, -1.0], workers=1, seconds=60) == 1  # the root of -1 raises, and ends nothing


def test_warm_ends_what_hangs_or_dies():
    begun = time.monotonic()
    assert warm.warm(exec, ["import time; time.sleep(1000)", "import os; os._exit(1)", "pass"], 3, seconds=10) == 1
    assert time.monotonic() - begun < 30
    assert not multiprocessing.active_children()


def test_warm_function_runs(monkeypatch):
    ran = []
    monkeypatch.setattr(measure, "calls", lambda *built: {"both": lambda: ran.append})
    measure.compile_case(Case("klnorm", "sample", TINY, "bf16"), "cpu")
    assert ran == [0]


# ---- The run ---------------------------------------------------------------------------------------------------------

LINES = [("klnorm", "batch"), ("klnorm", "token"), ("native", LAYER_NORM), ("eager", "batch"), ("liger", LAYER_NORM)]


def breaks(case, values, device):
    raise RuntimeError("not today")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(result, folder, printed text, exit status) of a run over tiny shapes that pass for large ones."""
    folder, text = tmp_path_factory.mktemp("norms"), io.StringIO()
    shapes = Shape(4, 6, 16), Shape(4, 6, 1024)
    cases = [Case(name, noise, shape, "bf16") for shape in shapes for name, noise in LINES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(targets, "TARGET_ELEMENTS", 24 * 16)
        patch.setitem(CONTESTANTS, "liger", contestants.Contestant("Liger", "layer_norm", breaks))
        patch.setitem(CONTESTANTS, "fla", contestants.Contestant("fla", "layer_norm", breaks, ("not_there",)))
        patch.setattr(norms, "plan", lambda families, quick: cases)
        patch.setattr("sys.stdout", text)
        status = norms.run(norms.parse(["--output", str(folder)]), CPU, FakeClock([0.25]))
    return json.loads((folder / "norms.json").read_text()), folder, text.getvalue(), status


def test_run_records_everything(finished):
    result, _, text, status = finished
    assert status == 0
    assert len(result["records"]) == 2 * len(LINES)
    assert {"device", "driver", "versions", "commit", "time"} <= result["environment"].keys()
    for record in result["records"]:
        if record["contestant"] == "liger":
            assert (record["status"], record["why"]) == ("failed", "RuntimeError: not today")
            continue
        assert record["status"] == "ok", record["why"]
        for direction, bytes_per_element in ("forward", 4), ("backward", 6), ("both", 10):
            timed = record[direction]
            assert timed["p20_ms"] == timed["median_ms"] == timed["p80_ms"] == 0.25
            assert timed["gbps"] == pytest.approx(bytes_per_element * record["elements"] / 0.25e-3 / 1e9)
        assert record["wall_ms"] == 0.5
        assert record["parameter_dtype"] == ("bfloat16" if record["contestant"] == "native" else "float32")
    assert "absent: fla (ModuleNotFoundError" in text
    assert "klnorm         token         24x16 bf16" in text


def test_run_evaluates_targets(finished, monkeypatch):
    result, _, text, _ = finished
    monkeypatch.setattr(targets, "TARGET_ELEMENTS", 24 * 16)
    verdicts = targets.evaluate(result)
    by_name = {v["target"]: v for v in verdicts}
    wide = by_name["forward, eval/batch/sample, N=256 to 8192: share of copy"]
    assert wide["measured"] == pytest.approx(4 * 24 * 1024 / 0.25e-3 / 1e9 / 2000)
    assert (wide["met"], wide["at"]) == (False, "N=1024, batch")
    assert by_name["forward+backward, batch: time over native"]["measured"] == 1
    assert by_name["forward+backward, batch: time over quack"]["met"] is None
    memory_target = by_name["bytes per row saved beyond x, parameters, seed"]
    assert (memory_target["measured"], memory_target["met"]) == (8, True)
    assert text.count("MISSED") == sum(v["met"] is False for v in verdicts) > 0
    assert "not measured" in text


def test_run_draws_its_plot(finished):
    imread = pytest.importorskip("matplotlib.image").imread
    _, folder, _, _ = finished
    assert (folder / "norms.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert imread(folder / "norms.png")[..., :3].std() > 0.05


def test_table_and_summary(finished, capsys, monkeypatch):
    result, folder, _, _ = finished
    monkeypatch.setattr(targets, "TARGET_ELEMENTS", 24 * 16)
    assert table.main([str(folder / "norms.json")]) == 0
    text = capsys.readouterr().out
    assert "| noise | N=16 | N=1024 |" in text
    assert "| nn.LayerNorm | 1.00 | 1.00 |" in text
    (folder / "log.txt").write_text(
        "FAILED tests/test_x.py::test_y - boom\n3 failed, 12 passed in 4.20s\n== tests: STATUS 1\n"
    )
    page = "\n".join(summary.summarize(folder))
    assert "3 failed, 12 passed" in page
    assert "test_y - boom" in page
    missed = sum(v["met"] is False for v in targets.evaluate(result))
    assert f"{missed} missed" in page


def test_wrong_contestant_is_not_timed(monkeypatch):
    case = Case("native", LAYER_NORM, TINY, "fp32")
    layer = wrong_layer(case, lambda y: y + 1)
    monkeypatch.setitem(CONTESTANTS, "native", dataclasses.replace(CONTESTANTS["native"], build=lambda *_: layer))
    record = measure.measure_case(case, FakeClock(), CPU, 0)
    assert (record["status"], record["forward"], record["wall_ms"]) == ("wrong", None, None)
    assert "WRONG: y is off" in measure.line(record, 2000.0)


def test_wrong_klnorm_shows_in_the_exit_status(tmp_path, monkeypatch):
    case = Case("klnorm", "batch", TINY, "fp32")
    layer = wrong_layer(case, lambda y: y + 1)
    monkeypatch.setitem(CONTESTANTS, "klnorm", dataclasses.replace(CONTESTANTS["klnorm"], build=lambda *_: layer))
    monkeypatch.setattr(norms, "plan", lambda families, quick: [case])
    assert norms.run(norms.parse(["--output", str(tmp_path)]), CPU, FakeClock()) == 1


def test_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(norms, "plan", lambda families, quick: [Case("klnorm", "batch", TINY, "fp32")])
    assert norms.run(norms.parse(["--output", str(tmp_path), "--minutes", "1e-9"]), CPU, FakeClock()) == 0
    assert json.loads((tmp_path / "norms.json").read_text())["not_run"] == ["klnorm/batch/24x16/fp32"]


def test_the_case_that_never_came_back_is_on_disk(tmp_path, monkeypatch):
    cases = [Case(name, noise, TINY, "fp32") for name, noise in LINES[:3]]

    def interrupted(case, *_):
        if case == cases[1]:
            raise KeyboardInterrupt
        return measure.untimed(case)

    monkeypatch.setattr(norms, "plan", lambda families, quick: cases)
    monkeypatch.setattr(measure, "measure_case", interrupted)
    monkeypatch.setattr(measure, "line", lambda record, copy_gbps: "")
    with pytest.raises(KeyboardInterrupt):
        norms.run(norms.parse(["--output", str(tmp_path)]), CPU, FakeClock())
    before = json.loads((tmp_path / "norms.json").read_text())
    assert [(r["contestant"], r["noise"]) for r in before["records"]] == LINES[:1]
    assert before["running"] == cases[1].key
    assert f"stopped in   {cases[1].key}" in summary.summarize(tmp_path)

    monkeypatch.undo()
    monkeypatch.setattr(norms, "plan", lambda families, quick: cases)
    assert norms.run(norms.parse(["--output", str(tmp_path), "--resume"]), CPU, FakeClock()) == 1
    after = json.loads((tmp_path / "norms.json").read_text())
    assert [(r["contestant"], r["noise"], r["status"]) for r in after["records"]] == [
        ("klnorm", "batch", "ok"), ("klnorm", "token", "failed"), ("native", LAYER_NORM, "ok")
    ]  # fmt: skip
    assert "running" not in after
    assert after["records"][2]["forward"]["gbps"] == pytest.approx(8 * TINY.elements / 1e-3 / 1e9)  # fp32


@pytest.fixture
def pretended_gpu(monkeypatch):
    """The GPU of a run: a CPU device that passes for one. Nothing is compiled ahead; `lost` says it is no more."""
    lost = []

    def synchronize(*_):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Device:
        type = "cuda"

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(norms, "warm", lambda *_: 0)
    return Device(), lost


@pytest.mark.parametrize("fatal", [False, True])
def test_a_failure_ends_the_run_only_with_the_gpu(fatal, pretended_gpu, tmp_path, monkeypatch, capsys):
    device, lost = pretended_gpu
    cases = [Case(name, noise, TINY, "fp32") for name, noise in LINES[:3]]

    def one_fails(case, *_):
        if case == cases[1]:
            lost.extend([True] * fatal)
            return measure.untimed(case, "failed", "OutOfMemoryError: no")
        return measure.untimed(case)

    class Clock(FakeClock):
        def copy_gbps(self):
            torch.cuda.synchronize()
            return 2000.0

    monkeypatch.setattr(norms, "plan", lambda families, quick: cases)
    monkeypatch.setattr(measure, "measure_case", one_fails)
    monkeypatch.setattr(measure, "line", lambda record, copy_gbps: record["status"])
    monkeypatch.setattr(norms, "plot", lambda *_: None)
    monkeypatch.setattr(norms, "evaluate", lambda *_: [])
    assert norms.run(norms.parse(["--output", str(tmp_path)]), device, Clock()) == (2 if fatal else 1)
    result = json.loads((tmp_path / "norms.json").read_text())
    assert [r["status"] for r in result["records"]] == ["ok", "failed", "ok"][: 2 if fatal else 3]
    assert ("stopping here" in capsys.readouterr().out) is fatal
    # What --resume goes by: the fatal case counts as done.
    assert result.get("running") == (cases[1].key if fatal else None)
    assert norms.resumed(result, cases) == (result["records"], cases[2:] if fatal else [])


def test_a_case_that_hangs_ends_the_process(tmp_path):
    code = """
import time, torch
from bench import measure, norms
class Device: type = "cuda"
class Clock: copy_gbps = lambda self: 1.0
norms.CASE_SECONDS, norms.warm, measure.measure_case = 1, lambda *_: 0, lambda *_: time.sleep(1000)
norms.run(norms.parse(["--quick", "--output", "OUT"]), Device(), Clock())
"""
    command = [sys.executable, "-c", code.replace("OUT", str(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in measured" in done.stderr
    assert json.loads((tmp_path / "norms.json").read_text())["running"] == "klnorm/batch/1024x768/bf16"


def test_one_processor_compiles_alone(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert norms.parse([]).workers == 1


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(memory, "BERT", TINY)
    monkeypatch.setattr(report, "_output", lambda *command: None)
    monkeypatch.setattr(
        norms.subprocess, "run", lambda command, **_: ran.append(command) or subprocess.CompletedProcess([], 0)
    )
    assert norms.main(["--quick", "--output", str(tmp_path)]) == 0
    assert "needs a CUDA GPU" in capsys.readouterr().out
    assert (tmp_path / "memory.json").exists()
    assert [command[1:] for command in ran] == [["-m", "bench.inspect", "--n", "4096"]]


# ---- Targets ---------------------------------------------------------------------------------------------------------


def record_of(contestant, noise, shape, ms, **changes):
    """A record as measure_case makes it."""
    times = {
        d: {"median_ms": ms, "gbps": b * shape.elements / ms / 1e6}
        for d, b in (("forward", 4), ("backward", 6), ("both", 10))
    }
    return {
        "contestant": contestant, "noise": noise, "dtype": "bf16", "shape": str(shape), "width": shape.width,
        "n_rows": shape.n_rows, "elements": shape.elements, "status": "ok", "wall_ms": ms, "saved_bytes": 0,
    } | times | changes  # fmt: skip


def evaluate(records):
    return targets.evaluate({"records": records, "copy_gbps": 3000.0})


def test_worst_case_decides():
    narrow, wide = TARGET_SHAPES[1], TARGET_SHAPES[2]
    good, bad = (4 * narrow.elements / (share * 3000) / 1e6 for share in (0.95, 0.92))
    records = [record_of("klnorm", "batch", narrow, good), record_of("klnorm", "eval", wide, bad)]
    verdict = evaluate(records)[0]
    assert verdict["wanted"] == 0.93
    assert verdict["measured"] == pytest.approx(0.92)
    assert (verdict["met"], verdict["at"]) == (False, "N=8192, eval")
    assert evaluate(records[:1])[0]["met"] is True


def test_ratio_and_wall_targets():
    shape = TARGET_SHAPES[0]
    records = [
        record_of("klnorm", "batch", shape, 0.65),
        record_of("klnorm", "token", shape, 7.0),
        record_of("klnorm", "batch", shape, 7.0, dtype="fp32"),
        record_of("native", "none", shape, 1.0),
        record_of("klnorm", "batch", BERT, 0.3),
        record_of("native", "none", BERT, 0.1),
    ]
    by_name = {v["target"]: v for v in evaluate(records)}
    assert by_name["forward+backward, batch: time over native"]["met"] is True
    assert by_name["wall time of a call: over native"]["measured"] == pytest.approx(3)
    assert by_name["wall time of a call: over native"]["met"] is False


def test_memory_target():
    shape = TARGET_SHAPES[0]
    for per_row, met in (8, True), (9, False):
        record = record_of("klnorm", "token", shape, 1.0, saved_bytes=per_row * shape.n_rows + 8)
        # In evaluation the layer saves deviations that are not among its parameters there.
        evaluation = record_of("klnorm", "eval", shape, 1.0, saved_bytes=99 * shape.n_rows)
        assert evaluate([record, evaluation])[-1]["met"] is met


def test_table_of_times_says_how_many_times_faster():
    shape = TARGET_SHAPES[0]
    records = [record_of("klnorm", "batch", shape, 0.5), record_of("native", "none", shape, 1.0)]
    assert "| nn.LayerNorm | 2.00 |" in table._speedups(records, "layer_norm")
    share = f"{100 * records[0]['forward']['gbps'] / 3000:.0f} %"
    slow = record_of("eager", "batch", shape, 5.0)
    rows = table._shares([*records, slow], "forward", 3000.0).splitlines()
    assert rows == ["| noise | N=4096 |", "| --- | ---: |", f"| batch | {share} |"]


# ---- Training step and the script for a GPU --------------------------------------------------------------------------


def test_training_step_smoke(tmp_path):
    assert train_step.main(["--smoke", "--quick", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "train_step.json").read_text())
    assert [r["norm"] for r in result["records"]] == train_step.NORMS
    assert all(r["why"] is None and r["wall_ms"] > 0 for r in result["records"])
    launches = {r["norm"]: r["launches"] for r in result["records"]}
    assert launches["LayerNorm"] < launches["klnorm, sample"] < launches["eager, sample"]


def test_training_step_of_one_line(tmp_path):
    chosen = ["--model", "gpt2", "--norm", "klnorm, token", "--mode", "eager"]
    assert train_step.main(["--smoke", *chosen, "--output", str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / "train_step.json").read_text())["records"]
    assert (record["model"][:5], record["norm"], record["mode"]) == ("GPT-2", "klnorm, token", "eager")


def test_training_step_without_a_gpu(capsys):
    assert train_step.main([]) == 0
    assert "needs a CUDA GPU" in capsys.readouterr().out


@pytest.mark.parametrize("causal", [False, True])
def test_plain_models_learn_from_every_parameter(causal):
    size = dataclasses.replace(train_step.models.SMOKE_SIZES["BERT-base"], causal=causal)
    model = train_step.models.PlainTransformer(size)
    loss = model(*train_step.models.make_batch(size, CPU))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(size.vocabulary), rel=0.3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def run_script(tmp_path, *arguments, does=()):
    """gpu.sh with a stand-in for Python, which notes its arguments, and {words in them: what it does}."""
    fake, calls = tmp_path / "python", tmp_path / "calls"
    cases = "".join(f'*"{words}"*) {command} ;;\n' for words, command in dict(does).items())
    fake.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\ncase "$*" in\n{cases}esac\n')
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    command = ["bash", ROOT / "bench" / "gpu.sh", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHON": str(fake)}, capture_output=True, text=True)
    modules = [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []
    return done, [words for words in modules if words[0] == "-m"]


def minutes(words):
    return float(words[words.index("--minutes") + 1])


def test_script_runs_every_part(tmp_path):
    done, calls = run_script(tmp_path, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    modules = ["pytest", "bench.sweep", "bench.norms", "bench.train_step", "bench.summary"]
    assert [words[1] for words in calls] == modules
    tests, sweep_part, norms_part, training, _ = calls
    assert tests.index("tests/test_kernels.py") < tests.index("tests/test_bench.py")
    files = {f"tests/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    on_device = {name for name, text in files.items() if re.search(r"\bdevice\b", text)}
    assert on_device == {word for word in tests if word.startswith("tests/")} < set(files)
    assert tests[tests.index("-n") + 1] == "auto"
    # Nothing took time: the norms have all but what the training step is promised, and the training step all of that.
    assert minutes(sweep_part) == pytest.approx((180 - 10) / 60, abs=1e-4)
    assert minutes(norms_part) == pytest.approx((720 - 10 - 180 - 15) / 60, abs=0.1)
    assert minutes(training) == pytest.approx((720 - 10 - 15) / 60, abs=0.1)
    assert "== train_step: ended well" in (tmp_path / "out" / "log.txt").read_text()


def test_script_goes_on_after_failures_and_tells(tmp_path):
    done, calls = run_script(
        tmp_path, str(tmp_path / "out"), "--quick", does={"-m pytest": "exit 1", "bench.norms": "exit 3"}
    )
    assert done.returncode == 1
    assert "tests: STATUS 1" in done.stdout
    assert "norms: STATUS 3" in done.stdout
    assert [words[1] for words in calls[2:]] == ["bench.norms", "bench.train_step", "bench.summary"]
    assert sum("--quick" in words for words in calls) == 2
    assert calls[1][1:4] == ["bench.sweep", "--output", str(tmp_path / "out")]
    assert "1024" in calls[1]


def test_script_without_xdist(tmp_path):
    _, calls = run_script(tmp_path, str(tmp_path / "out"), does={"import xdist": "exit 1"})
    assert "-n" not in calls[0]


def test_script_needs_a_gpu(tmp_path):
    done, calls = run_script(tmp_path, str(tmp_path / "out"), does={"torch.cuda": "exit 1"})
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr
    assert not calls


def test_script_goes_on_after_the_case_that_lost_the_gpu(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train_step.json").write_text("of an earlier run")
    resumed = f"""printf '{{\\n "records": []\\n}}\\n' > {out}/norms.json"""
    lost = f"""printf '{{\\n "running": 1\\n}}\\n' > {out}/norms.json; exit 2"""
    done, calls = run_script(tmp_path, str(out), does={"--resume": resumed, "bench.norms": lost})
    assert done.returncode == 1
    assert ["--resume" in words for words in calls if words[1] == "bench.norms"] == [False, True]
    assert not (out / "train_step.json").exists()
    # One that gets no further is not tried for ever.
    done, calls = run_script(tmp_path, str(out), does={"bench.norms": lost})
    assert [words[1] for words in calls[-4:]] == ["bench.norms", "bench.norms", "bench.train_step", "bench.summary"]


@pytest.mark.parametrize("arguments", [[], ["--quick"], ["out", "--slow"]])
def test_script_refuses_wrong_usage(arguments, tmp_path):
    done, calls = run_script(tmp_path, *arguments)
    assert done.returncode == 2
    assert "usage" in done.stderr
    assert not calls


def test_markdown_and_progress(capsys):
    assert report.markdown(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    progress = report.Progress(2)
    progress.begin("first")
    progress.finish("done")
    assert capsys.readouterr().out == "[ 50 %] done\n"
