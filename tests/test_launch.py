"""Tiles and numbers of programs, and how many launches and torch calls a forward and a backward make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from small_tiles import in_pieces, prepare
from torch.utils._python_dispatch import TorchDispatchMode

from klnorm import compat, launch, tuning
from klnorm.functional import Settings, normalize
from klnorm.kernels import gaussian
from klnorm.kernels.rows import Mode, rows_of
from klnorm.reference import kl_norm
from klnorm.spec import Parameters, Rows

ROOT = Path(__file__).resolve().parents[1]
REGISTERS = 65536  # of a multiprocessor


@pytest.mark.parametrize("n", [1, 15, 16, 255, 1000, 4097, 8192, 8193, 1 << 20])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tiles(n, itemsize):
    """Powers of two, of at least 16 features; 4 to 32 elements a thread, as registers hold; whole rows unless wide."""
    wide = tuning.is_wide(n, itemsize)
    shapes = {
        "forward": tuning.forward_shape(n, itemsize),
        "dx": tuning.dx_wide_shape(n, itemsize),
        "sums": tuning.sums_wide_shape(n, itemsize, True),
    }
    if not wide:
        shapes |= {
            "shared": tuning.backward_shape(n, itemsize, False),
            "merged": tuning.backward_shape(n, itemsize, True),
        }
        assert min(shapes["forward"].block_n, shapes["shared"].block_n, 2 * shapes["merged"].block_n) >= n
    for name, shape in shapes.items():
        for power in shape.block_m, shape.block_n, shape.num_warps:
            assert power & (power - 1) == 0
        assert shape.block_n >= 16  # the noise comes in eights
        a_thread = shape.block_m * shape.block_n / (32 * shape.num_warps)
        assert 4 <= a_thread * (itemsize == 8) + a_thread <= 32, name
        assert shape.num_warps <= 16


def test_tiles_as_measured():
    """On an H200, see bench/NOTES.md: rows x features, warps, prefetching and programs a multiprocessor."""
    assert tuning.forward_shape(256, 2) == (8, 256, 2, 1, 1)
    assert tuning.forward_shape(1024, 2) == (1, 1024, 1, 1, 1)
    assert tuning.forward_shape(8192, 2) == (1, 8192, 8, 1, 1)
    assert tuning.backward_shape(256, 2, False) == (4, 256, 1, 3, 8)
    assert tuning.backward_shape(1024, 2, False) == (1, 1024, 2, 3, 6)
    assert tuning.backward_shape(8192, 2, False) == (1, 8192, 8, 3, 1)
    assert tuning.backward_shape(1024, 2, True) == (1, 1024, 2, 1, 6)
    assert tuning.finalizer_shape(1024)[:3] == (256, 8, 4)


def test_programs_are_as_many_as_registers_hold():
    """A program more than fits would run alone at the end. The compiler's counts are in the committed result file."""
    rows = json.loads((ROOT / "bench/results/inspect_sm90.json").read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["kind"] == "backward" and row["mode"] in ("shared", "token")]
    assert {256, 1024, 4096, 8192} <= {row["n"] for row in rows}
    for row in rows:
        if not tuning.is_wide(row["n"], 2):
            shape = tuning.backward_shape(row["n"], 2, row["mode"] == "token")
            assert shape.num_warps == row["warps"]
            a_program = 32 * shape.num_warps * -(-row["registers"] // 8) * 8  # granted in eights
            assert shape.per_multiprocessor * a_program <= REGISTERS


def rows_of_batch(n_rows, draws=1, groups=1):
    return Rows.of(True, n_rows, groups, draws, n_rows // draws)


@pytest.mark.parametrize(
    ("rows", "n_cols", "expected"),
    [
        (rows_of_batch(1024), 1024, False),  # 2^20 elements
        (rows_of_batch(1025), 1024, True),
        (rows_of_batch(4 * 1024, 1024), 1024, True),  # four rows a draw
        (rows_of_batch(3 * 1024, 1024), 1024, False),
        (rows_of_batch(4 * 1024, 1, 1024), 1024, True),  # four rows of a group with parameters of its own
        (rows_of_batch(3 * 1024, 1, 1024), 1024, False),
        (Rows.of(True, 1 << 15, 1, 1 << 15, 1), 1024, True),  # a draw a row
        (Rows.of(False, 1 << 15, 1, 1, 1), 1024, False),  # evaluation
    ],
)
def test_parameters_are_prepared_where_it_pays(rows, n_cols, expected):
    assert tuning.prepares(rows, n_cols) is expected


@pytest.mark.parametrize("draws", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("rows_per_draw", [1, 2, 7, 64, 4099])
@pytest.mark.parametrize("multiprocessors", [1, 2, 132])
@pytest.mark.parametrize("block_m", [1, 8])
def test_every_tile_of_a_backward_belongs_to_one_program(draws, rows_per_draw, multiprocessors, block_m):
    shape = tuning.Shape(block_m, 64, 1, 1, 2)
    n_rows = draws * rows_per_draw
    rows = Rows(n_rows, 1, draws, rows_per_draw, "shared")
    programs, many_draws = tuning.backward_programs(rows, shape, 64, 2, multiprocessors)
    tiles = -(-rows_per_draw // block_m)
    owned = []
    for program in range(programs):  # the arithmetic of `draws_of` in kernels/gradients.py
        if many_draws:
            mine = [(draw, tile) for draw in range(program, draws, programs) for tile in range(tiles)]
        else:
            share = programs // draws
            mine = [(program // share, tile) for tile in range(program % share, tiles, share)]
        assert mine, "a program without rows leaves its partial sums unwritten"
        owned += mine
    assert sorted(owned) == [(draw, tile) for draw in range(draws) for tile in range(tiles)]
    assert programs <= 2 * multiprocessors


def test_partial_sums_stay_small_beside_the_input():
    """Few very wide rows: not one row of sums per program that runs at once, which would be several times the input."""
    n_rows, n_cols = 264, 1 << 20
    shape = tuning.sums_wide_shape(n_cols, 2, True)
    programs, _ = tuning.backward_programs(rows_of_batch(n_rows), shape, n_cols, 2, 132)
    assert programs * 4 * n_cols * 4 <= n_rows * n_cols * 2 / 4
    many = Rows.of(True, 1 << 20, 1, 1 << 18, 4)
    programs, many_draws = tuning.backward_programs(many, tuning.backward_shape(1024, 2, False), 1024, 2, 132)
    assert many_draws
    assert programs == 132 * 6
    few_groups, _ = tuning.backward_programs(
        rows_of_batch(1 << 16, 1, 64), tuning.backward_shape(1024, 2, False), 1024, 2, 132
    )
    assert 64 * few_groups <= 132 * 6


def test_the_floor_of_the_deterministic_reading_is_the_references():
    assert gaussian.FLOOR.value == kl_norm.FLOOR


class Kernel:
    """Stands in for a Triton kernel: notes what it is given, compiles `compiled`."""

    arg_names = "x_ptr", "parameters", "seed", "outputs", "n_rows", "TILE", "MODE"

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
    return launch.Call(kernel, torch.device("cpu"), dtypes, grid, (n_rows,), {"MODE": True, "TILE": 4}, 8)


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
    kinds = [(x, x, 9), (x[1:], x, 9), (x, x[2:], 9), (x, x, seed), (x, x, None)]
    for number, (x, weight, key) in enumerate(kinds, 1):
        parameters, outputs = Parameters(weight, *[None] * 5), (y, None)
        call.launch((x,), parameters, key, (outputs,))
        assert len(kernel.bound) == number
        grid, args, options = kernel.bound[-1]
        assert grid == (7, 2)
        assert all(a is b for a, b in zip(args, (x, parameters, key, outputs, 5, 4, True), strict=True))
        assert options == {"num_warps": 8, "enable_fp_fusion": True}
        assert not kernel.launched
    for number, (x, weight, key) in enumerate(kinds, 1):
        call.launch((x,), Parameters(weight, *[None] * 5), key, ((y, None),))
        key = key.data_ptr() if isinstance(key, torch.Tensor) else key
        pointers = x.data_ptr(), (weight.data_ptr(), 0, 0, 0, 0, 0), key, (y.data_ptr(), 0)
        assert kernel.launched[-1] == ((7, 2, 1), (*pointers, 5, 4, True))
        assert (len(kernel.bound), len(kernel.launched)) == (len(kinds), number)
    call.launch((x[4:],), Parameters(x, *[None] * 5), 11, ((y, None),))  # as aligned as the first
    assert (len(kernel.bound), len(kernel.launched)) == (len(kinds), len(kinds) + 1)


@pytest.mark.usefixtures("direct")
def test_another_number_of_rows_is_nothing_new_to_triton():
    kernel, x, y = Kernel(), aligned(32), torch.empty(8)
    for n_rows in 5, 1, 16, 2**31 - 1:
        call_of(kernel, n_rows, (n_rows, 1)).launch((x,), (None,), 9, (y,))
    assert [grid for grid, _, _ in kernel.bound] == [(5, 1)]
    assert [(grid, args[4]) for grid, args in kernel.launched] == [
        ((n_rows, 1, 1), n_rows) for n_rows in (1, 16, 2**31 - 1)
    ]
    call_of(kernel, 2**31).launch((x,), (None,), 9, (y,))  # an integer of 64 bits
    call_of(kernel, dtypes=(torch.bfloat16, None)).launch((x,), (None,), 9, (y,))
    call_of(kernel, dtypes=(torch.float32,) * 2).launch((x,), (x,), 9, (y,))
    assert len(kernel.bound) == 4


@pytest.mark.parametrize("compiles", [True, False])
def test_untried_versions_of_triton_and_its_interpreter_see_every_launch(monkeypatch, compiles):
    monkeypatch.setattr(launch, "_DIRECT", not compiles)
    kernel, x, y = Kernel(compiles), aligned(32), torch.empty(8)
    for _ in range(3):
        call_of(kernel).launch((x,), (None,), 9, (y,))
    assert (len(kernel.bound), len(kernel.launched)) == (3, 0)


OBSERVERS = "debug", "add_stages_inspection_hook", "instrumentation_mode", "pre_run_hooks"


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("observer", OBSERVERS)
def test_who_observes_triton_sees_every_launch(monkeypatch, observer):
    kernel, x, y = Kernel(), aligned(32), torch.empty(8)
    call = call_of(kernel)
    call.launch((x,), (None,), 9, (y,))
    if observer == "pre_run_hooks":
        kernel.pre_run_hooks.append(print)
    else:
        knobs = triton.knobs.compilation if observer == "instrumentation_mode" else triton.knobs.runtime
        monkeypatch.setattr(knobs, observer, "on")
    call.launch((x,), (None,), 9, (y,))
    assert (len(kernel.bound), len(kernel.launched)) == (2, 0)
    kernel.pre_run_hooks.clear()
    monkeypatch.undo()


# A process in which Triton compiles, for a driver that calls hooks as Triton's own does, and does nothing else.
HOOKED = """
import torch, triton
from bench.launches import way_of_cuda
from klnorm import KLLayerNorm

def launcher(x, y, z, stream, function, packed, metadata, enter, exit, *args):
    enter(metadata)

entered, bound, run = [], [], triton.JITFunction.run
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: entered.append(metadata.get()["name"]))
triton.JITFunction.run = lambda self, *args, **options: bound.append(self.__name__) or run(self, *args, **options)
layers = KLLayerNorm(8), KLLayerNorm(8, eps=1e-6, prior_std=0.2)
with way_of_cuda():
    triton.runtime.driver.active.launcher_cls = lambda *args: launcher
    for layer, rows in zip(layers * 3, (3, 5, 16, 1, 2, 2)):
        layer(torch.randn(rows, 8, requires_grad=True)).sum().backward()
print(*bound)
print(*entered)
"""


def test_what_triton_itself_compiles_is_bound_once_for_all_numbers_and_launched_with_its_hooks():
    """Sizes, eps and the prior's deviation, which may be annealed, are numbers."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", HOOKED], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    bound, entered = map(str.split, run.stdout.splitlines())
    assert bound == ["forward_kernel", "backward_kernel", "finalize_kernel"]
    assert entered == bound * 6


@triton.jit
def _rows_kernel(out_ptr, tile, draw, n_draws, inner, rows_per_draw, MODE: tl.constexpr):
    row, mask = rows_of(tile + tl.program_id(0), draw + tl.program_id(0), n_draws, inner, rows_per_draw, MODE, 2)
    tl.store(out_ptr + tl.arange(0, 2)[:, None], tl.where(mask, row, -1))


@pytest.mark.parametrize(
    ("order", "n_draws", "inner", "expected"),
    [
        ("rows", 3, 1 << 30, (3 << 30) - 1),
        ("strided", 3, 1, (3 << 30) - 1),
        ("blocked", 3, 1 << 29, (3 << 30) - 1),
    ],
)
def test_rows_beyond_2_to_the_31(device, order, n_draws, inner, expected):
    """The last row of the last of 3 draws of 2^30 rows, in the kernels' own arithmetic."""
    out = torch.empty(2, dtype=torch.int64, device=device)
    mode = Mode(False, "shared", order, "no", 0.0, False)
    _rows_kernel[(1,)](out, (1 << 29) - 1, n_draws - 1, n_draws, inner, 1 << 30, mode)
    assert out[1].item() == expected
    _rows_kernel[(1,)](out, 1 << 29, n_draws - 1, n_draws, inner, (1 << 30) + 1, mode)
    assert out[1].item() == -1


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


class CountTorchCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


KERNELS = {
    "small": (["forward_kernel"], ["backward_kernel", "finalize_kernel"]),
    "prepared": (["prepare_kernel", "forward_kernel"], ["prepare_kernel", "backward_kernel", "finalize_kernel"]),
    "wide": (["forward_wide_kernel"], ["dx_wide_kernel", "sums_wide_kernel", "finalize_kernel"]),
}


@pytest.mark.parametrize(("sample", "seed_launches"), [(True, 1), (False, 0)])
@pytest.mark.parametrize("work", KERNELS)
def test_launches(device, monkeypatch, kernels_path, work, sample, seed_launches):
    """Beyond the kernels only the seed, as a tensor without a seed is drawn."""
    expected_forward, expected_backward = KERNELS[work if sample or work == "wide" else "small"]
    if work == "prepared":
        prepare(monkeypatch)
    if work == "wide":
        in_pieces(monkeypatch, 16)
    launched = []
    monkeypatch.setattr(launch.Call, "launch", lambda call, *tensors: launched.append(call.kernel.__name__))
    monkeypatch.setattr(compat, "is_watched", lambda: False)  # by what counts here
    torch.use_deterministic_algorithms(False)  # else every allocation is filled
    x = torch.randn(8, 16, 32, device=device, requires_grad=True)
    parameters = [torch.rand(32, device=device, requires_grad=True) for _ in range(4)]
    with CountTorchCalls() as forward:
        settings = Settings("layer", "sampled", "sample", 0, 0.1, 1e-5)
        y, _, kl = normalize(x, None, (32,), Parameters(*parameters, None, None), settings, sample)
    assert launched == expected_forward
    computing = [call for call in forward.calls if call not in FREE]
    assert computing == ["aten::randint"] * seed_launches
    launched.clear()
    cotangents = torch.randn_like(y), torch.ones_like(kl)
    with CountTorchCalls() as backward:
        torch.autograd.grad([y, kl], [x, *parameters], cotangents)
    assert launched == expected_backward
    assert [call for call in backward.calls if call not in FREE] == []


# Calls that launch nothing on a GPU: allocations and views.
FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::view",
        "aten::_unsafe_view", "aten::detach", "aten::alias"}  # fmt: skip
