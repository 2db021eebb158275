"""The native compilation of what the tests launch: what it tells apart, and that it can be red."""

import os
from types import SimpleNamespace

import pytest
import refused_kernel
import torch
from native import Launch, NativeCompilation, compile_apart

from klnorm import launch
from klnorm.kernels.rows import Mode, Tile

MODE, TILE = Mode(False, "none", "rows", "no", 0.0, False), Tile(8, 1, 1, 16, 1)


def call(kernel, *, num_warps=4, **options):
    constants = {
        "MODE": MODE._replace(**{k: v for k, v in options.items() if k in MODE._fields}),
        "TILE": TILE._replace(**{k: v for k, v in options.items() if k in TILE._fields}),
    }
    return launch.Call(getattr(refused_kernel, kernel), torch.device("cpu"), (), (1, 1), (), constants, num_warps)


def recorded(kernel, x_dtype=torch.float32, y=True, **options):
    x = torch.empty(1, dtype=x_dtype)
    return Launch.of(call(kernel, **options), ((x,), (x, None), None, (x if y else None,)))


@pytest.fixture(scope="module", autouse=True)
def _tests_on_the_path():
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("PYTHONPATH", os.path.dirname(refused_kernel.__file__))
        yield


@pytest.fixture(scope="module")
def refusals():
    """Of launches that are compiled together, some of them good, in one start of the compiler."""
    return compile_apart(
        [
            recorded("good"),
            recorded("returns_before_none", y=False),
            recorded("crashes"),
            recorded("no_instruction"),
            recorded("good", N=1 << 20, BLOCK_N=1 << 18),
            recorded("drops_nan"),
        ]
    )


def test_what_is_good_is_not_refused(refusals):
    names = [refusal.partition("(")[0] for refusal in refusals]
    assert names == ["returns_before_none", "crashes", "no_instruction", "drops_nan"]


def test_what_the_compiler_refuses_is_told_in_its_words(refusals):
    refusal = refusals[0]
    name, again, *words = refusal.splitlines()
    assert name == (
        "returns_before_none(((float32,), (float32, None), None, (None,)); IS_RMS=False, NOISE='none', ORDER='rows', "
        "GROUPED='no', OFFSET=0.0, FAST=True, N=8, VEC=1, BLOCK_M=1, BLOCK_N=16, STAGES=1)"
    )
    assert again.startswith("To see it again: python -m pytest tests/test_native.py::test_")
    assert words[0].startswith("CompilationError")
    assert "tl.store(y_ptr" in refusal
    assert "AttributeError: 'constexpr_type'" in words[-1]  # why, which Triton says last


def test_what_ptxas_refuses_and_what_ends_the_compiler_is_told_beside_the_others(refusals):
    _, crash, ptxas, _ = refusals
    assert crash.startswith("crashes(")
    assert crash.endswith("The compiler ended its process.")
    assert "Not a name of any known instruction: 'nonsense'" in ptxas


def test_tiles_for_the_interpreter_alone_are_cut():
    """A test's tile of 2^18 features would take the compiler hours."""
    assert recorded("good", N=1 << 20, BLOCK_N=1 << 18).constants["TILE"].BLOCK_N <= 1024


def test_code_that_drops_nan_is_told(refusals):
    assert "max.f32 lets no NaN through. Remedy: propagate_nan" in refusals[-1]


def test_kinds_differ_by_what_decides_the_code():
    first = recorded("good")
    assert first.kind == recorded("good", N=12, num_warps=8).kind
    others = [
        recorded("good", x_dtype=torch.bfloat16), recorded("good", y=False), recorded("good", N=1),
        recorded("good", NOISE="merged"), recorded("good", GROUPED="heads"), recorded("drops_nan"),
        recorded("good", N=32),
    ]  # fmt: skip
    assert len({other.kind for other in [first, *others]}) == 1 + len(others)


def test_the_cheapest_of_a_kind_is_kept_and_a_refusal_fails_the_session():
    plugin = NativeCompilation()
    x = torch.empty(1)
    for block in 64, 16, 256:
        plugin.record(call("returns_before_none", BLOCK_N=block), (x,), (), None, (None,))
    assert [kept.constants["TILE"].BLOCK_N for kept in plugin.launches.values()] == [16]
    session = SimpleNamespace(config=SimpleNamespace(), exitstatus=0, shouldfail="stopping after 1 failures")
    plugin.pytest_sessionfinish(session)
    assert plugin.report is None
    session.shouldfail = False
    plugin.pytest_sessionfinish(session)
    assert session.exitstatus == 1
    assert "1 of them refused" in plugin.report


def test_workers_hand_over_what_they_recorded():
    worker, controller = NativeCompilation(), NativeCompilation()
    worker.record(call("good"), (torch.empty(1),), (), None, (torch.empty(1),))
    session = SimpleNamespace(config=SimpleNamespace(workeroutput={}), exitstatus=0)
    worker.pytest_sessionfinish(session)
    controller.pytest_testnodedown(session.config)
    assert controller.launches == worker.launches
