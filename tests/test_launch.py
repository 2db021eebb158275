"""How rows are dealt to programs, and how many launches and torch calls a forward and a backward make."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from bench import inspect as inspector
from klnorm import launch, ops, tuning
from klnorm.functional import Settings, normalize
from klnorm.kernels.rows import run_of
from klnorm.spec import Parameters

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("draws", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("rows_per_draw", [1, 2, 7, 64, 4099])
@pytest.mark.parametrize("programs", [1, 2, 132, 528])
@pytest.mark.parametrize("block_m", [1, 8])
def test_every_position_belongs_to_one_program(draws, rows_per_draw, programs, block_m):
    n_rows = draws * rows_per_draw
    runs = tuning._deal(n_rows, draws, block_m, programs)
    owned = []
    for program in range(runs.programs):  # the arithmetic of `run_of` in kernels/rows.py
        share, run = divmod(program, runs.runs_per_share)
        start = share * runs.share_rows + run * runs.run_rows
        stop = min(start + runs.run_rows, (share + 1) * runs.share_rows)
        assert start < stop, "a program without rows leaves its partial sums unwritten"
        if not runs.span:
            assert start // rows_per_draw == (stop - 1) // rows_per_draw, "one draw a run"
        owned.append((start, stop))
    assert owned[0][0] == 0
    assert owned[-1][1] == n_rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(owned))
    assert runs.programs <= max(programs, 1) * (1 if runs.span else 2)


@pytest.mark.parametrize("n", [1, 15, 16, 255, 1000, 8192, 8193, 1 << 20])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("four_sums", [False, True])
def test_tiles(n, itemsize, backward, clusters, four_sums):
    tile = tuning.tile(n, itemsize, backward, clusters, four_sums)
    assert tile.wide == (tile.block_n < n)
    for power in tile.block_m, tile.block_n, tile.num_warps, tile.num_ctas:
        assert power & (power - 1) == 0
    assert tile.block_n >= 8  # the noise comes in eights
    assert tile.block_m * tile.block_n // tile.num_ctas <= max(tuning.TILE_ELEMENTS, tuning.REGISTER_WIDTH)
    assert tile.num_ctas == 1 or clusters
    assert not tile.halves or (backward and four_sums and not tile.wide)
    assert tile.registers == 128 or (backward and four_sums)
    assert 32 * tile.num_warps * tile.registers <= tuning.REGISTERS


@pytest.mark.parametrize(
    ("version", "expected"), [("3.2.0", False), ("3.5.1", False), ("3.6.0", True), ("3.10.0", True)]
)
def test_splits_in_registers(version, expected):
    assert tuning.splits_in_registers(version) is expected


@pytest.mark.parametrize(("n", "itemsize", "halves"), [(4096, 2, False), (4097, 2, True), (8192, 4, True)])
def test_rows_in_halves_take_a_multiprocessor_each(n, itemsize, halves):
    """65,536 registers of a multiprocessor: 8 warps of 32 threads with up to 255."""
    tile = tuning.tile(n, itemsize, backward=True, four_sums=True)
    assert tile.halves == halves
    assert not tuning.tile(n, itemsize, backward=True, four_sums=True, splits=False).halves
    if halves:
        assert tile.num_warps == 8
        assert tuning.backward_runs(1 << 20, 1 << 20, 1, tile, n, itemsize, 132).programs == 132


def test_programs_are_dealt_for_the_registers_that_they_take():
    """A program more than fits would run alone at the end. The compiler's counts are in the committed result file."""
    rows = json.loads((ROOT / "bench/results/inspect_sm90.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if (row["kind"], row["mode"]) == ("backward", "token")]
    assert {256, 1024, 4096, 8192} <= {row["n"] for row in rows}
    for row in rows:
        tile = tuning.tile(row["n"], 2, backward=True, four_sums=True)
        if not tile.wide:
            assert tile.num_warps == row["warps"]
            assert tile.registers - 8 < -(-row["registers"] // 8) * 8 <= tile.registers  # granted in eights


@pytest.mark.parametrize(
    ("capability", "triton_version", "expected"),
    [
        ((9, 0), "3.9.0", True),
        ((10, 0), "3.10.0+git1a2b", True),
        ((9, 0), "3.8.0", False),  # compiles pairs to three times the instructions, larger clusters not at all
        ((9, 0), "3.7.1", False),
        ((8, 9), "3.9.0", False),
        ((0, 0), "3.9.0", False),
    ],
)
def test_has_clusters(capability, triton_version, expected):
    assert tuning.has_clusters(capability, triton_version) is expected


@pytest.mark.parametrize(
    ("n", "itemsize", "forward", "backward"),  # (blocks, warps) that share a row, None where it is worked in pieces
    [
        (4096, 2, (1, 8), (1, 8)),
        (8192, 2, (1, 16), (1, 16)),
        (8193, 2, None, (4, 8)),  # forward: nearly half of the lanes idle
        (12288, 2, None, (4, 8)),
        (15000, 2, (4, 8), (4, 8)),
        (16384, 4, (4, 8), (4, 8)),
        (32768, 2, (8, 8), (8, 8)),
        (65536, 2, (8, 16), (8, 16)),
        (65537, 2, None, None),
        (2048, 8, (1, 4), (1, 4)),
        (16384, 8, None, None),
    ],
)
def test_cluster_sizes(n, itemsize, forward, backward):
    for expected, is_backward in (forward, False), (backward, True):
        tile = tuning.tile(n, itemsize, is_backward, clusters=True)
        assert tile.wide == (expected is None)
        assert (tile.num_ctas, tile.num_warps) == (expected or (1, 8))


@pytest.mark.parametrize(("num_ctas", "clusters"), [(1, 132), (4, 32), (8, 16)])
@pytest.mark.parametrize(("num_warps", "per_multiprocessor"), [(16, 1), (8, 2)])
def test_programs_are_clusters(num_ctas, clusters, num_warps, per_multiprocessor):
    """132 multiprocessors: 8 groups of at least 16, each with whole clusters alone."""
    tile = tuning.Tile(1, 16384, num_warps, 1, False, num_ctas)
    resident = clusters * per_multiprocessor
    assert tuning.backward_runs(1 << 20, 1, 1, tile, 16384, 2, 132).programs == resident
    assert tuning.forward_runs(1 << 20, 1, 1, tile, 32768, 132).programs == pytest.approx(8 * resident, rel=0.01)
    assert tuning.backward_runs(1 << 20, 1, 1, tile, 16384, 2, 3).programs >= 1


@pytest.mark.parametrize("clusters", [False, True])
def test_launches_of_clusters(monkeypatch, clusters):
    """Rows of 16384 in clusters of 4: a program is a cluster, in the grid as in the partial sums."""
    monkeypatch.setattr(tuning, "has_clusters", lambda capability, version: clusters)
    launched = []

    class Kernel:
        arg_names, pre_run_hooks = (), ()

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, options["num_ctas"], options["num_warps"]))

    calls = inspector.calls(16384, torch.bfloat16, "token", "sm_90")
    assert [call.kernel.__name__ for call, _ in calls.values()] == (
        ["forward_kernel", "backward_kernel", "finalize_kernel"]
        if clusters
        else ["forward_wide_kernel", "backward_wide_kernel", "finalize_kernel"]
    )
    for call, tensors in calls.values():
        dataclasses.replace(call, kernel=Kernel()).launch(tensors[:-1], (), tensors[-1])
    programs = [call.grid for call, _ in calls.values()]
    assert launched == list(zip(programs, [4, 4, 1] if clusters else [1] * 3, [8, 8, 4], strict=True))
    partial = calls["finalize"][1][0]
    assert partial.shape == (programs[1][0], 4, 16384)


class Kernel:
    """Stands in for a Triton kernel: notes what it is given, compiles `compiled`."""

    arg_names = "x_ptr", "prior_ptr", "y_ptr", "seed", "n_rows", "N", "FAST"

    def __init__(self, compiles=True):
        self.pre_run_hooks, self.bound, self.launched, self.compiles = [], [], [], compiles

    def __getitem__(self, grid):
        def bind(*args, **options):
            self.bound.append((grid, args, options))
            return Compiled(self) if self.compiles else None

        return bind


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append((grid, args))


def call_of(kernel, n_rows=5, grid=(7, 2), dtypes=(torch.float32, None)):
    return launch.Call(kernel, torch.device("cpu"), dtypes, grid, (n_rows,), {"FAST": True, "N": 4}, 8, 4)


@pytest.fixture
def direct(monkeypatch):
    monkeypatch.setattr(launch, "_DIRECT", True)


def aligned(n):
    storage = torch.zeros(n + 8)
    return storage[(-storage.data_ptr() // 4) % 4 :]


@pytest.mark.usefixtures("direct")
def test_what_triton_has_compiled_is_launched_directly():
    """Triton sees the first call of every kind of inputs; later ones go to the compiled kernel, with all arguments."""
    kernel, seed, y = Kernel(), torch.tensor([3]), torch.empty(8)
    call, x = call_of(kernel, dtypes=(torch.float32,) * 2), aligned(32)
    kinds = [((x, x), 9), ((x[1:], x), 9), ((x, x[2:]), 9), ((x, x), seed), ((x, x), None)]
    for number, (inputs, key) in enumerate(kinds, 1):
        call.launch(inputs, (y,), key)
        assert len(kernel.bound) == number
        grid, args, options = kernel.bound[-1]
        assert grid == (7, 2)
        assert all(a is b for a, b in zip(args, (*inputs, y, key, 5, 4, True), strict=True))
        assert options == {"num_warps": 8, "num_ctas": 4, "enable_fp_fusion": True}
        assert not kernel.launched
    for number, (inputs, key) in enumerate(kinds, 1):
        call.launch(inputs, (y,), key)
        pointers = [0 if t is None else t.data_ptr() for t in (*inputs, y)]
        key = key.data_ptr() if isinstance(key, torch.Tensor) else key
        assert kernel.launched[-1] == ((7, 2, 1), (*pointers, key, 5, 4, True))
        assert (len(kernel.bound), len(kernel.launched)) == (len(kinds), number)
    call.launch((x[4:], x), (y,), 11)  # as aligned as the first, and another seed of its kind
    assert (len(kernel.bound), len(kernel.launched)) == (len(kinds), len(kinds) + 1)


@pytest.mark.usefixtures("direct")
def test_another_number_of_rows_is_nothing_new_to_triton():
    kernel, x, y = Kernel(), aligned(32), torch.empty(8)
    for n_rows in 5, 1, 16, 2**31 - 1:
        call_of(kernel, n_rows, (n_rows, 1)).launch((x, None), (y,), 9)
    assert [grid for grid, _, _ in kernel.bound] == [(5, 1)]
    assert [(grid, args[4]) for grid, args in kernel.launched] == [
        ((n_rows, 1, 1), n_rows) for n_rows in (1, 16, 2**31 - 1)
    ]
    call_of(kernel, 2**31).launch((x, None), (y,), 9)  # an integer of 64 bits
    call_of(kernel, dtypes=(torch.bfloat16, None)).launch((x, None), (y,), 9)
    call_of(kernel, dtypes=(torch.float32,) * 2).launch((x, x), (y,), 9)
    assert len(kernel.bound) == 4


@pytest.mark.parametrize("compiles", [True, False])
def test_untried_versions_of_triton_and_its_interpreter_see_every_launch(monkeypatch, compiles):
    monkeypatch.setattr(launch, "_DIRECT", not compiles)
    kernel, x, y = Kernel(compiles), aligned(32), torch.empty(8)
    for _ in range(3):
        call_of(kernel).launch((x, None), (y,), 9)
    assert (len(kernel.bound), len(kernel.launched)) == (3, 0)


OBSERVERS = "debug", "add_stages_inspection_hook", "instrumentation_mode", "pre_run_hooks"


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("observer", OBSERVERS)
def test_who_observes_triton_sees_every_launch(monkeypatch, observer):
    kernel, x, y = Kernel(), aligned(32), torch.empty(8)
    call = call_of(kernel)
    call.launch((x, None), (y,), 9)
    if observer == "pre_run_hooks":
        kernel.pre_run_hooks.append(print)
    else:
        knobs = triton.knobs.compilation if observer == "instrumentation_mode" else triton.knobs.runtime
        monkeypatch.setattr(knobs, observer, "on")
    call.launch((x, None), (y,), 9)
    assert (len(kernel.bound), len(kernel.launched)) == (2, 0)
    kernel.pre_run_hooks.clear()
    monkeypatch.undo()


# A process in which Triton compiles, for a driver that calls hooks as Triton's own does, and does nothing else.
HOOKED = """
import torch, triton
from bench.overhead import Driver, way_of_cuda
from klnorm import KLLayerNorm

def launcher(x, y, z, stream, function, packed, metadata, enter, exit, *args):
    enter(metadata)

entered, bound, run = [], [], triton.JITFunction.run
Driver.launcher_cls = lambda *args: launcher
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: entered.append(metadata.get()["name"]))
triton.JITFunction.run = lambda self, *args, **options: bound.append(self.__name__) or run(self, *args, **options)
layer = KLLayerNorm(8)
with way_of_cuda():
    for rows in 3, 5, 16, 1:
        layer(torch.randn(rows, 8, requires_grad=True)).sum().backward()
print(*bound)
print(*entered)
"""


def test_what_triton_itself_compiles_is_bound_once_for_all_sizes_and_launched_with_its_hooks():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", HOOKED], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    bound, entered = map(str.split, run.stdout.splitlines())
    assert bound == ["forward_kernel", "backward_kernel", "finalize_kernel"]
    assert entered == bound * 4


@triton.jit
def _run_kernel(out_ptr, program, run_rows, runs_per_share, share_rows):
    start, stop = run_of(program + tl.program_id(0), run_rows, runs_per_share, share_rows)
    tl.store(out_ptr, start)
    tl.store(out_ptr + 1, stop)


def test_runs_beyond_2_to_the_31(device):
    """The last run of 3 * 2^30 rows, in the kernel's own arithmetic."""
    runs = tuning.forward_runs(3 << 30, 1, 1, tuning.tile(1, 2), 2, 132)
    out = torch.empty(2, dtype=torch.int64, device=device)
    _run_kernel[(1,)](out, runs.programs - 1, runs.run_rows, runs.runs_per_share, runs.share_rows)
    assert out.tolist() == [(runs.programs - 1) * runs.run_rows, 3 << 30]


def test_vector_width():
    """As many elements as every row of every operand starts at a multiple of, up to 8: a promise to Triton."""
    storage = torch.zeros(4096, dtype=torch.bfloat16)
    aligned = storage[(-storage.data_ptr() // 2) % 64 :]

    def width(n_cols, stride, offset):
        return launch._access(n_cols, [aligned[offset:].as_strided((3, n_cols), (stride, 1))])[1]

    assert width(64, 64, 0) == 8
    assert width(1000, 1000, 0) == 8
    assert width(100, 104, 0) == 4  # the output's rows are 100 apart
    assert width(64, 68, 0) == 4
    assert width(64, 65, 0) == 1
    assert width(64, 64, 2) == 2
    whole, odd = aligned[:192].view(3, 64), aligned[1:193].view(3, 64)
    assert launch._access(64, [whole, odd])[1] == 1
    assert launch._access(64, [whole, None, aligned[:192].as_strided((3, 64), (60, 1))])[1:] == (4, (16, 0, 15))


def test_partial_sums_stay_small_beside_the_input():
    """Few very wide rows: not one row of sums per resident program, which would be several times the input."""
    n_rows, n_cols = 264, 1 << 20
    runs = tuning.backward_runs(n_rows, 1, 1, tuning.tile(n_cols, 2, True), n_cols, 2, 132)
    assert runs.programs * 4 * n_cols * 4 <= n_rows * n_cols * 2 / 4
    narrow = tuning.backward_runs(1 << 16, 1, 1, tuning.tile(4096, 2, True), 4096, 2, 132)
    assert narrow.programs >= 132


class CountTorchCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("sample", "seed_launches"), [(True, 1), (False, 0)])
def test_launches(device, monkeypatch, kernels_path, sample, seed_launches):
    """Forward launches one kernel, backward two; beyond them only the seed, as a tensor without a seed is drawn."""
    launched = []
    monkeypatch.setattr(launch.Call, "launch", lambda call, *tensors: launched.append(call.kernel.__name__))
    monkeypatch.setattr(ops, "is_watched", lambda: False)  # by what counts here
    torch.use_deterministic_algorithms(False)  # else every allocation is filled
    x = torch.randn(8, 16, 32, device=device, requires_grad=True)
    parameters = [torch.rand(32, device=device, requires_grad=True) for _ in range(4)]
    with CountTorchCalls() as forward:
        settings = Settings("layer", "sampled", "sample", 0, 0.1, 1e-5)
        y, _, kl = normalize(x, None, (32,), Parameters(*parameters, None, None), settings, sample)
    assert launched == ["forward_kernel"]
    computing = [call for call in forward.calls if call not in FREE]
    assert computing == ["aten::randint"] * seed_launches
    launched.clear()
    cotangents = torch.randn_like(y), torch.ones_like(kl)
    with CountTorchCalls() as backward:
        torch.autograd.grad([y, kl], [x, *parameters], cotangents)
    assert launched == ["backward_kernel", "finalize_kernel"]
    assert [call for call in backward.calls if call not in FREE] == []


# Calls that launch nothing on a GPU: allocations and views.
FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::view",
        "aten::_unsafe_view", "aten::detach", "aten::alias"}  # fmt: skip


def test_instruction_budget():
    """The kernels as compiled for sm_90 stay within the budget of instructions, registers and access widths."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "bench.inspect", "--check"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
