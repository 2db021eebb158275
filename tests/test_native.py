"""The native compilation of what the tests launch: what it tells apart, and that it can be red."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import native
import pytest
import refused_kernel
import torch
from native import Launch, NativeCompilation

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


def compiled(file, launches):
    """The program's status and what it says."""
    if launches is not None:
        file.write_bytes(pickle.dumps(launches))
    tests = Path(refused_kernel.__file__).parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run([sys.executable, native.__file__, file], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Of launches that are compiled together, some of them good, in one start of the compiler."""
    launches = [
        recorded("good"),
        recorded("returns_before_none", y=False),
        recorded("crashes"),
        recorded("no_instruction"),
        recorded("good", N=1 << 20, BLOCK_N=1 << 18),
        recorded("drops_nan"),
    ]
    status, said = compiled(tmp_path_factory.mktemp("native") / "launches", launches)
    assert status == 1
    _, *refusals, counts = re.split("Refused: |(?=6 kinds)", said)
    assert re.fullmatch(r"6 kinds of launches compiled for sm_90 in \d+ s, 4 refused\n", counts)
    return [refusal.strip() for refusal in refusals]


def test_what_compiles_is_counted(tmp_path):
    status, said = compiled(tmp_path / "launches", [recorded("good")])
    assert status == 0
    assert re.fullmatch(r"1 kinds of launches compiled for sm_90 in \d+ s, 0 refused\n", said)


@pytest.mark.parametrize("launches", [None, []])
def test_without_launches_the_command_that_makes_them_is_told(tmp_path, launches):
    """A session that records nothing must not pass for one that compiles."""
    status, said = compiled(tmp_path / "launches", launches)
    assert status == 1
    assert "as in make test compile" in said


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


def test_the_cheapest_of_a_kind_is_kept():
    plugin = NativeCompilation()
    for block in 64, 16, 256:
        plugin.record(call("good", BLOCK_N=block), (torch.empty(1),), (), None, (torch.empty(1),))
    assert [kept.constants["TILE"].BLOCK_N for kept in plugin.launches.values()] == [16]


def test_workers_hand_over_what_they_recorded_and_the_session_writes_it(tmp_path):
    worker, controller = NativeCompilation(), NativeCompilation()
    worker.record(call("good"), (torch.empty(1),), (), None, (torch.empty(1),))
    session = SimpleNamespace(config=SimpleNamespace(workeroutput={}))
    worker.pytest_sessionfinish(session)
    controller.pytest_testnodedown(session.config)
    cache = SimpleNamespace(mkdir=lambda name: tmp_path)
    controller.pytest_sessionfinish(SimpleNamespace(config=SimpleNamespace(cache=cache)))
    assert pickle.loads((tmp_path / "launches").read_bytes()) == list(worker.launches.values())
