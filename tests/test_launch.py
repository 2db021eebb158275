"""How rows are dealt to programs, and how many launches and torch calls a forward and a backward make."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klnorm import launch, ops, tuning
from klnorm.functional import normalize


@pytest.mark.parametrize("draws", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("rows_per_draw", [1, 2, 7, 64, 4099])
@pytest.mark.parametrize("programs", [1, 2, 132, 528])
@pytest.mark.parametrize("block_m", [1, 8])
def test_every_position_belongs_to_one_program(draws, rows_per_draw, programs, block_m):
    n_rows = draws * rows_per_draw
    runs = tuning._deal(n_rows, draws, block_m, programs)
    owned = []
    for program in range(runs.programs):  # the arithmetic of `run_of` in kernels/rows.py
        group, run = divmod(program, runs.runs_per_group)
        start = group * runs.group_rows + run * runs.run_rows
        stop = min(start + runs.run_rows, (group + 1) * runs.group_rows)
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
def test_tiles(n, itemsize, backward):
    tile = tuning.tile(n, itemsize, backward)
    assert tile.wide == (tile.block_n < n)
    for power in tile.block_m, tile.block_n, tile.num_warps:
        assert power & (power - 1) == 0
    assert tile.block_n >= 8  # the noise comes in eights
    assert tile.block_m * tile.block_n <= max(tuning.TILE_ELEMENTS, tuning.REGISTER_WIDTH)


class CountTorchCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func._overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("sample", "seed_launches"), [(True, 1), (False, 0)])
def test_launches(device, monkeypatch, sample, seed_launches):
    """Forward launches one kernel, backward two; beyond them only the seed, as a tensor without a seed is drawn."""
    launched = []
    monkeypatch.setattr(launch.Call, "launch", lambda call: launched.append(call.kernel.__name__))
    # the operators, straight to the kernels' host code: on the CPU they would lead to the explicit formulas
    monkeypatch.setattr(ops, "_forward", launch.forward)
    monkeypatch.setattr(ops, "_backward", lambda *args: launch.backward(*args))
    torch.use_deterministic_algorithms(False)  # else every allocation is filled
    x = torch.randn(8, 16, 32, device=device, requires_grad=True)
    parameters = [torch.rand(32, device=device, requires_grad=True) for _ in range(4)]
    with CountTorchCalls() as forward:
        y, kl = normalize(x, 32, *parameters, 1.0, 0.0, 0.1, 1e-5, "sample", 0, sample, None, None)
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
FREE = {"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::view", "aten::_unsafe_view", "aten::detach",
        "aten::alias"}  # fmt: skip


def test_instruction_budget():
    """The kernels as compiled for sm_90 stay within the budget of instructions, registers and access widths."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "bench.inspect", "--check"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
