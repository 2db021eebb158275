"""The benchmarks, as far as a CPU can tell: cases, counts of bytes, timing with a made-up clock, files, tables."""

import io
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from bench_cases import CPU, EVERYONE, GATE, TINY, FakeClock, case_of

from bench import measure, memory, norms, report, table, timing, warm
from bench.cases import (
    FAMILY,
    KL_NOISES,
    KLNORM_NOISES,
    LARGE_SHAPES,
    LAYER_NORM,
    OPERATIONS,
    Case,
    Shape,
    noises_of,
    plan,
    traffic,
)  # fmt: skip
from bench.contestants import OF_OPERATION, Contestant
from bench.layers import Layer

ROOT = Path(__file__).resolve().parents[1]
CONTESTANTS = OF_OPERATION["layer_norm"]
X_BYTES = 4 * 6 * 16 * 4  # of TINY in fp32
pytestmark = pytest.mark.usefixtures("no_gpu")


# ---- Cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_plan_begins_with_klnorm_at_large_shapes(quick):
    cases = plan(EVERYONE, quick)
    assert len(cases) == len(set(cases)) == len({str(case) for case in cases})
    assert [str(case) for case in cases[:2]] == ["klnorm/batch/1024x768/bf16", "native/none/1024x768/bf16"]
    n_shapes = 5 if quick else len(LARGE_SHAPES)
    ours = cases[2 : 2 + 4 * n_shapes]
    assert {(c.contestant, c.noise, c.shape) for c in ours} == set(
        itertools.product(["klnorm"], KLNORM_NOISES, LARGE_SHAPES[:n_shapes])
    )
    assert {case.contestant for case in cases if case.operation == "layer_norm"} == set(CONTESTANTS)
    assert all(case.noise in noises_of(EVERYONE[case.operation][case.contestant]) for case in cases)


def test_plan_covers_dtypes_and_shapes():
    cases = plan(EVERYONE)
    assert {case.dtype for case in cases} == {"bf16", "fp16", "fp32"}
    wanted = {"1024x768", "4096x256", "4096x65536", "16384x4096", "1048576x128", "16x8192"}
    assert wanted <= {str(case.shape) for case in cases}
    keys = [str(case) for case in cases]
    assert keys.index("rms_norm/native/none/8192x8192/bf16") < keys.index("eager/token/1024x768/bf16")


def test_plan_puts_layer_norm_first():
    cases = plan(EVERYONE)
    first = next(i for i, case in enumerate(cases) if case.operation != "layer_norm")
    assert {(c.contestant, c.shape) for c in cases[:first] if c.noise in ("batch", "none")} >= set(
        itertools.product(EVERYONE["layer_norm"], LARGE_SHAPES)
    )
    n_contestants = sum(len(EVERYONE[operation]) for operation in FAMILY)
    telling = cases[first : first + n_contestants]
    assert {(c.operation, c.contestant) for c in telling} == {(op, name) for op in FAMILY for name in EVERYONE[op]}
    assert {c.shape for c in telling} == {LARGE_SHAPES[0]}
    assert {"rms_norm/klnorm/token/4096x65536/bf16", "groups/klnorm/token/1024x768/bf16"} <= {str(c) for c in cases}


def test_quick_plan_has_three_family_rows():
    assert [str(case) for case in plan(EVERYONE, quick=True) if case.operation != "layer_norm"] == [
        "rms_norm/klnorm/batch/16384x4096/bf16",
        "residual/klnorm/batch/16384x4096/bf16",
        "residual/unfused/batch/16384x4096/bf16",
    ]


def test_minimal_traffic():
    for name in OPERATIONS:
        found = [traffic(case_of(name, "klnorm"), d, 2) / (2 * GATE.elements) for d in measure.DIRECTIONS]
        assert found == ([4, 4, 8] if name in ("residual", "rms_residual") else [2, 3, 5])


# ---- Memory ----------------------------------------------------------------------------------------------------------


def kept(*arguments):
    record = measure.measure_case(case_of(*arguments, "fp32", TINY), memory.kept, CPU)
    assert record["why"] is None
    return record["saved_x"], record["saved_parameters"], record["saved_rest"]


@pytest.mark.parametrize(
    ("operation", "name", "noise", "parameters", "rest"),
    [
        *[("layer_norm", "klnorm", n, 6 * 16 * 4, 24 * 8 + 8) for n in KL_NOISES],  # priors; mean, rstd of rows, seed
        ("layer_norm", "native", "none", 2 * 16 * 4, 24 * 8),
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
    assert kept(operation, name, noise) == (X_BYTES, parameters, rest)


def test_eager_token_noise_saves_four_tensors_of_the_size_of_x():
    small = kept("layer_norm", "eager", "token")[2] - 4 * X_BYTES  # xhat, gamma, both noises; then statistics, vectors
    assert 24 * 8 <= small <= 24 * 8 + 12 * 16 * 4


def test_memory_counts_a_storage_once():
    x = torch.randn(4, 8, requires_grad=True)
    assert measure.saved_bytes(Layer(lambda v: (v * v + v.view(8, 4).view(4, 8) * v,), {}), [x]) == (4 * 8 * 4, 0, 0)


def test_memory_counts_what_a_view_keeps_alive():
    x = torch.randn(4, 8, requires_grad=True)
    assert measure.saved_bytes(Layer(lambda v: ((v + 1)[:1].square(),), {}), [x]) == (0, 0, 4 * 8 * 4)


def test_memory_writes_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "BERT", TINY)
    assert memory.main(["--quick", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "memory.json").read_text())
    assert len(result["records"]) == 14
    assert all(r["why"] is None for r in result["records"])


def test_memory_covers_the_family(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "BERT", TINY)
    monkeypatch.setattr(memory, "LARGE", TINY)
    monkeypatch.setattr(memory, "LINES", [])
    assert memory.main(["--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "memory.json").read_text())
    assert {r["operation"] for r in result["records"]} == set(FAMILY)
    assert all(r["why"] is None for r in result["records"])
    printed = capsys.readouterr().out
    assert table.main([str(tmp_path / "memory.json")]) == 0
    text = capsys.readouterr().out
    assert printed.endswith(text)
    header, _, *rows = cells(text)
    assert header == ["bytes beside x (768) and parameters, 24x16 bf16", "batch noise"]
    assert ["residual: add, then klnorm", "200"] in rows
    assert ["deterministic: klnorm", "192"] in rows


def cells(text):
    """The rows of the Markdown tables of a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


# ---- Timing ----------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(measure, "calls", lambda *_: {"both": lambda: lambda i: done.append("call")})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: done.append("read") or 350)
    assert measure.peak(None, None, torch.device("cuda")) == 250
    assert done == ["reset", "call", "read"]
    assert measure.peak(None, None, CPU) is None


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

LINES = [
    ("klnorm", "batch", "layer_norm"), ("klnorm", "token", "layer_norm"), ("native", "none", "layer_norm"),
    ("eager", "batch", "layer_norm"), ("liger", "none", "layer_norm"), ("klnorm", "batch", "residual"),
    ("unfused", "batch", "residual"), ("klnorm", "none", "deterministic"), ("apex_fused", "none", "rms_norm"),
]  # fmt: skip


def breaks(*_):
    raise RuntimeError("not today")


def run_norms(monkeypatch, folder, cases, *options, clock=None, on=CPU):
    """(exit status, result) of a run over these cases."""
    monkeypatch.setattr(norms, "plan", lambda families, quick: cases)
    status = norms.run(norms.parse(["--output", str(folder), *options]), on, clock or FakeClock())
    return status, json.loads((folder / "norms.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(result, its file, printed text, exit status) of a run over tiny shapes that pass for large ones."""
    folder, text = tmp_path_factory.mktemp("norms"), io.StringIO()
    shapes = Shape(4, 6, 16), Shape(4, 6, 1024)
    cases = [Case(name, noise, shape, "bf16", operation) for shape in shapes for name, noise, operation in LINES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr("bench.cases.LARGE_ELEMENTS", 24 * 16)
        patch.setitem(CONTESTANTS, "liger", Contestant("Liger", breaks))
        patch.setitem(CONTESTANTS, "fla", Contestant("fla", breaks, requires=("not_there",)))
        patch.setattr("sys.stdout", text)
        status, result = run_norms(patch, folder, cases, clock=FakeClock([0.25]))
    return result, folder / "norms.json", text.getvalue(), status


def test_run_records_everything(finished):
    result, _, text, status = finished
    assert status == 0
    assert [(r["contestant"], r["noise"], r["operation"]) for r in result["records"]] == 2 * LINES
    assert {"device", "driver", "versions", "commit", "time"} <= result["environment"].keys()
    assert result["copy_gbps"] == result["copy_gbps_at_end"] == 2000.0
    for record in result["records"]:
        if record["contestant"] in ("liger", "apex_fused"):
            assert record["status"] == "failed"
            assert record["why"].startswith(("RuntimeError: not today", "ModuleNotFoundError"))
            continue
        assert record["status"] == "ok", record["why"]
        tensors = (4, 4, 8) if record["operation"] == "residual" else (2, 3, 5)
        for direction, count in zip(measure.DIRECTIONS, tensors, strict=True):
            timed = record[direction]
            assert timed["p20_ms"] == timed["median_ms"] == timed["p80_ms"] == 0.25
            assert timed["gbps"] == pytest.approx(2 * count * record["elements"] / 0.25e-3 / 1e9)
        assert record["wall_ms"] == 0.5
        assert record["parameter_dtype"] == ("bfloat16" if record["contestant"] == "native" else "float32")
    assert "absent: fla (ModuleNotFoundError" in text
    assert "absent: rms_residual/quack (" in text
    share = 4 * 24 * 1024 / 0.25e-3 / 1e9 / 2000
    assert f"klnorm/token/24x1024/bf16  forward 0.2500 ms {share:.0%}, backward" in text
    assert "liger/none/24x16/bf16  FAILED: RuntimeError: not today" in text


def test_tables_of_a_run(finished, capsys, monkeypatch):
    _, path, printed, _ = finished
    monkeypatch.setattr("bench.cases.LARGE_ELEMENTS", 24 * 16)
    assert table.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert printed.endswith(text)
    assert "Share of the copy bandwidth, residual, backward" in text
    rows = cells(text)
    assert ["noise", "N=16", "N=1024"] in rows
    assert ["nn.LayerNorm", "1.00", "1.00"] in rows
    assert ["add, then klnorm", "1.00", "1.00"] in rows
    assert table.main([str(path), "--short"]) == 0
    assert "residual" not in capsys.readouterr().out


def test_table_of_times_says_how_many_times_faster():
    def record(contestant, noise, ms, width=4096, operation="layer_norm"):
        times = {d: {"median_ms": ms, "gbps": 1500 / ms} for d in measure.DIRECTIONS}
        return times | {"contestant": contestant, "noise": noise, "width": width, "operation": operation}

    records = [record("klnorm", "batch", 0.5), record("native", "none", 1.0), record("eager", "token", 9.0)]
    records += [record("native", "none", 1.0, 256)]
    assert cells(table._speedups(records))[::2] == [["over", "N=4096"], ["nn.LayerNorm", "2.00"]]
    assert cells(table._shares(records, "forward", 4000.0))[::2] == [["noise", "N=4096"], ["batch", "75 %"]]


def test_tables_of_nothing():
    where = {"environment": report.environment(), "records": []}
    assert "copy bandwidth" in table.speed(where | {"copy_gbps": 1.0})
    assert "a training step" in table.training(where)


def wrong_layer(name, noise):
    """A contestant whose y is 1 too large, and its case."""
    case = Case(name, noise, TINY, "fp32")

    def build(*arguments):
        layer = right(*arguments)
        return Layer(lambda x: (layer.forward(x)[0] + 1, *layer.forward(x)[1:]), layer.parameters)

    right = CONTESTANTS[name].build
    return Contestant(name, build, CONTESTANTS[name].family), case


def test_wrong_contestant_is_not_timed(monkeypatch):
    contestant, case = wrong_layer("native", LAYER_NORM)
    monkeypatch.setitem(CONTESTANTS, "native", contestant)
    record = measure.measure_case(case, measure.timed, FakeClock(), CPU, 0)
    assert record["status"] == "wrong"
    assert not {"forward", "wall_ms"} & record.keys()
    assert "WRONG: y is off" in norms.show(record, 2000.0)


def test_wrong_klnorm_shows_in_the_exit_status(tmp_path, monkeypatch):
    contestant, case = wrong_layer("klnorm", "batch")
    monkeypatch.setitem(CONTESTANTS, "klnorm", contestant)
    assert run_norms(monkeypatch, tmp_path, [case])[0] == 1


def test_time_is_up(tmp_path, monkeypatch):
    cases = [Case("klnorm", "batch", TINY, "fp32")]
    status, result = run_norms(monkeypatch, tmp_path, cases, "--minutes", "1e-9")
    assert (status, result["not_run"]) == (0, ["klnorm/batch/24x16/fp32"])


def test_what_finished_is_on_disk(tmp_path, monkeypatch):
    cases = [Case(name, "none", TINY, "fp32") for name in ("native", "compiled")]

    def interrupted(case, *_):
        if case == cases[1]:
            raise KeyboardInterrupt
        return {"why": None}

    with pytest.raises(KeyboardInterrupt):
        report.run_through(cases, interrupted, str, {"records": []}, tmp_path / "norms.json")
    assert json.loads((tmp_path / "norms.json").read_text()) == {"records": [{"why": None}]}


@pytest.mark.parametrize("sets", [2, 7, 16])
def test_buffers_exceed_twice_the_cache(sets, monkeypatch):
    made, build = [], measure.build
    monkeypatch.setattr(measure, "build", lambda *arguments: made.append(arguments[-1]) or build(*arguments))
    measure.timed(Case("native", LAYER_NORM, TINY, "fp32"), FakeClock(), CPU, {2: 0, 7: 3.4, 16: 99}[sets] * X_BYTES)
    assert made == [sets]


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
    assert done.stdout.endswith(" klnorm/batch/1024x768/bf16\n")


def test_one_processor_compiles_alone(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert norms.workers() == 1


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
