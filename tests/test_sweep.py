"""bench.sweep: what it compiles, compares and prints; in the interpreter, with a clock that is not a GPU's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_cases import FakeClock

from bench import sweep, tiles
from klnorm import tuning

ROOT = Path(__file__).resolve().parents[1]


class StillClock(FakeClock):
    """One that makes no calls: each takes the interpreter a second."""

    def batch(self, call, count, host_ms):
        return super().batch(id, count, host_ms)

    def host(self, call, count):
        return super().host(id, count)


@pytest.fixture
def small(monkeypatch):
    """8 rows of 64 features, and what the compiler would have found of every case."""
    monkeypatch.setattr(tiles, "ELEMENTS", 8 * 64)

    def found(cases):
        known = {"registers": 40, "spilled": 0, "shared": 16, "warps": 32, "why": None}
        return dict.fromkeys(cases, known)

    return found


def cases(direction, noise, *shapes, n=64):
    return [(direction, noise, n, shape) for shape in shapes]


def run(small, todo, times=(1.0,)):
    result = {"records": [], "not_run": 0, "copy_gbps": 4000.0}
    sweep.measured(todo, small(todo), StillClock(times), result, float("inf"))
    return result


@pytest.mark.parametrize("noise", sweep.NOISES)
@pytest.mark.parametrize("direction", ["forward", "backward", "finalize"])
def test_candidates_give_the_results_of_the_tuned_one(small, direction, noise):
    tuned, *others = tiles.candidates(direction, noise, 64)
    others = [shape for shape in others if shape.block_m != tuned.block_m or shape.block_n != tuned.block_n][:2]
    result = run(small, cases(direction, noise, tuned, *others))
    assert len(result["records"]) == 3
    assert all(r["ms"] == 1.0 and r["wrong"] is None and r["why"] is None for r in result["records"])
    assert [r["tuned"] for r in result["records"]] == [True, False, False]


@pytest.mark.parametrize("direction", ["forward", "backward", "sums"])
def test_wide_candidates_too(small, monkeypatch, direction):
    monkeypatch.setattr(tuning, "is_wide", lambda n, itemsize: True)
    monkeypatch.setattr(tuning, "sums_wide_shape", lambda *args: tuning.Shape(1, 64, 4, 1, 2))
    shapes = tuning.Shape(1, 64, 4, 1, 2), tuning.Shape(1, 32, 4, 1, 2)
    result = run(small, cases(direction, "shared", *shapes))
    assert [(r["wrong"], r["why"], r["ms"]) for r in result["records"]] == [(None, None, 1.0)] * 2


@pytest.mark.parametrize(
    ("direction", "shapes"), [("forward", [(8, 64)]), ("backward", [(8, 64)]), ("finalize", 4 * [(1, 64)])]
)
def test_candidates_are_compared_by_what_their_kernel_writes(small, direction, shapes):
    (tuned,) = tiles.candidates(direction, "token", 64)[:1]
    _, arguments = tiles.call_of(direction, "token", 64, tuned, 2, "cpu")
    results = sweep.written(direction, arguments[-1])
    assert [tuple(t.shape) for t in results] == shapes
    assert all(t.isfinite().all() and t.any() for t in results)


def test_wrong_results_are_told_and_not_ranked(small, monkeypatch):
    monkeypatch.setattr(sweep, "differ", lambda results, tuned: None if results is tuned else 0.5)
    shapes = tiles.candidates("forward", "shared", 64)[:2]
    result = run(small, cases("forward", "shared", *shapes))
    text = sweep.table(result)
    assert [r["wrong"] for r in result["records"]] == [None, 0.5]
    assert f"forward shared 64 {list(shapes[1])}: 0.5" in text
    assert text.count("| forward ") == 1


def test_differ():
    tuned = [torch.tensor([4.0, 1.0])]
    assert sweep.differ([torch.tensor([4.0, 1.01])], tuned) is None
    assert sweep.differ([torch.tensor([4.0, 1.1])], tuned) == pytest.approx(0.025)
    assert sweep.differ([torch.tensor([float("nan"), 1.0])], tuned) is not None
    two = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    assert sweep.differ([two], [two.sum(0, keepdim=True)]) is None  # as many programs as there are


def test_a_candidate_that_does_not_launch_ends_nothing(small):
    shapes = tuning.Shape(3, 64, 1), *tiles.candidates("forward", "shared", 64)[:1]  # 3 is no power of two
    result = run(small, cases("forward", "shared", *shapes))
    assert result["records"][0]["why"]
    assert result["records"][1]["ms"] == 1.0


def test_the_table_has_the_best_five_and_the_tuned_one(small):
    shapes = tiles.candidates("forward", "shared", 64)[:8]
    result = run(small, cases("forward", "shared", *shapes))
    for i, record in enumerate(result["records"]):
        record["ms"] = 8.0 - i
    lines = [line for line in sweep.table(result).splitlines() if "| forward " in line]
    assert len(lines) == 6
    assert "(tuned)" in lines[-1]
    assert lines[0].split("|")[5].strip() == "1.0000"


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "warps"),
    [(64, 16, 1, 32), (64, 16, 4, 32), (33, 0, 8, 48), (16, 65640, 8, 24)],
)
def test_resident_warps(registers, shared, num_warps, warps):
    """65,536 registers in eights a thread, 227 KB of shared memory, 32 programs of a multiprocessor."""
    assert tiles.resident_warps(registers, shared, num_warps) == warps


def test_without_a_gpu_it_compiles(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    options = ["--n", "8192", "--noise", "token", "--direction", "forward", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "bench.sweep", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "sweep.json").read_text())["records"]
    assert len(records) == len(tiles.candidates("forward", "token", 8192))
    assert all(r["registers"] and r["ms"] is None for r in records)
    again = subprocess.run(
        [sys.executable, "-m", "bench.table", str(tmp_path / "sweep.json")],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert again.stdout.strip() in done.stdout
    assert "1 x 8192, 8, 1, 1 (tuned)" in again.stdout
