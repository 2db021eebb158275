"""What the compiler makes of every kernel, without a GPU: registers, spills, widths of memory accesses, instructions.

    python -m bench.inspect [--arch sm_90] [--n 1024 4096] [--dtype bf16] [--json FILE] [--check]

The variants are the launches that `klnorm.launch` would make, compiled ahead of time by Triton and read back with the
disassembler in its wheel. Counts are of what every row goes through: instructions that a thread issues, per element.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget

from klnorm import launch
from klnorm.spec import Parameters, Prior, Rows, dtypes_of, make_spec

from .report import ROOT, commit

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
POINTERS = {dtype: f"*{name}" for name, dtype in DTYPES.items()} | {torch.int64: "*i64"}
ARCHITECTURES = {"sm_80": (80, 108), "sm_90": (90, 132), "sm_100": (100, 148)}  # capability, multiprocessors
ROWS = 1 << 15


class Mode(NamedTuple):
    """What is computed. `draws`: 0 in evaluation; or `rows_of_draw` tells them. `inner`: rows of a block of a draw."""

    draws: int = 1
    rows_of_draw: int = 0
    inner: int = 0
    rms: bool = False
    residual: bool = False
    groups: int = 1


# With "many draws" a program of the backward has several; "two rows" are too few for a draw to be prepared.
MODES = {
    "eval": Mode(draws=0),
    "shared": Mode(),
    "shared, many draws": Mode(rows_of_draw=4),
    "shared, two rows a draw": Mode(rows_of_draw=2),
    "shared, time first": Mode(64, inner=1),
    "shared, middle": Mode(64, inner=16),
    "shared, groups": Mode(64, groups=64),
    "shared, rms": Mode(rms=True),
    "shared, residual": Mode(residual=True),
    "token": Mode(rows_of_draw=1),
    "token, rms": Mode(rows_of_draw=1, rms=True),
    "token, residual": Mode(rows_of_draw=1, residual=True),
}
ROW_KINDS = "forward", "backward", "sums"
KINDS = "prepare", *ROW_KINDS, "finalize"
DEFAULT_WIDTHS = 256, 1024, 4096, 8192, 16384

# Instructions per element of rows, as compiled by Triton 3.7, and what other forms of a mode take beside. Evaluation
# counts as shared.
BUDGET = {
    ("forward", "shared"): {1024: 12.6, 4096: 13.7, 8192: 14.1},
    ("forward", "token"): {1024: 27.8, 4096: 28.7, 8192: 28.5},
    ("backward", "shared"): {1024: 20.4, 4096: 17.0, 8192: 17.2},
    ("backward", "token"): {1024: 36.4, 4096: 36.6, 8192: 36.7},
}
EXTRA = {
    ("forward", "residual"): 2.6,
    ("forward", "middle"): 0.8,  # a division a row
    ("forward", "two rows a draw"): 70.0,  # two deviations and two normals
    ("backward", "residual"): 3.3,
    ("backward", "middle"): 1.4,
    ("backward", "many draws"): 0.2,
    ("backward", "two rows a draw"): 0.3,
}
FORWARD_SHARED = 64  # bytes: more is a conversion between layouts
CHECKED_WIDTHS = 1024, 4096, 8192
VECTOR_WIDTHS = 768, 1000, 3072, 5120, 12288
ROW_SCALARS = 8  # accesses of single numbers of a row, at most: mean, rstd, row sums, first feature


class Driver:
    """What Triton asks of a driver, for a GPU of some capability that is not there: launches do nothing."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda name, kernel, shared, device: (1, 2, 0, 0, 1024),
    )

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *args: None


def calls(n_cols, dtype, mode, multiprocessors, n_rows=ROWS, device="meta"):
    """Kind -> (the `launch.Call` that klnorm makes for n_rows x n_cols in this mode, the arguments of its launch).

    On the meta device, where tensors have no memory, nothing is launched; elsewhere everything is, on random numbers,
    the same in every call.
    """
    device, mode, found, run = torch.device(device), MODES[mode], {}, launch.Call.launch
    real = device.type != "meta"
    target = launch.Target(device, multiprocessors, launch._fast(device) if real else True)
    generator = torch.Generator(device).manual_seed(0) if real else None

    def tensor(*shape, dtype=torch.float32):
        if not real:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def recorded(call, *arguments):
        kind = call.kernel.__name__.partition("_")[0]
        found[{"dx": "backward"}.get(kind, kind)] = call, arguments
        if real:
            run(call, *arguments)

    x, dy = (tensor(n_rows, n_cols, dtype=dtype) for _ in range(2))
    residual, dsum = (x, dy) if mode.residual else (None, None)
    scale, shift = tensor(mode.groups, n_cols), None if mode.rms else tensor(mode.groups, n_cols)
    parameters = Parameters(scale, shift, scale, shift, tensor(n_cols), None if mode.rms else tensor(n_cols))
    seed = None if mode.draws == 0 else torch.full((1,), 7, dtype=torch.int64, device=device)
    draws = n_rows // mode.rows_of_draw if mode.rows_of_draw else max(1, mode.draws)
    rows = Rows.of(seed is not None, n_rows, mode.groups, draws, mode.inner or n_rows // draws)
    dtypes = dtypes_of(x, residual, *parameters)
    spec = make_spec("rms" if mode.rms else "layer", "sampled", 1e-5, Prior(0.0, 0.0, 0.1), n_cols, rows, dtypes)
    at_target = mock.patch.object(launch, "_target", return_value=target)
    with mock.patch.object(launch.Call, "launch", recorded), at_target:
        _, total, kl, statistics = launch.forward(x, residual, parameters, seed, spec)
        launch.backward(dy, dsum, kl, x if total is None else total, parameters, seed, statistics, spec)
    return found


def flat(inputs, parameters, seed, outputs):
    """The arguments of a launch in the order of the kernel's."""
    return *inputs, parameters, seed, *outputs


def compile_ahead(call, tensors, capability):
    """The compiled kernel of a call, with the types and alignments that Triton's launcher would find.

    For a process of its own: Triton takes the machine for one with such a GPU from here on.
    """
    triton.runtime.driver.set_active(Driver(capability))
    return call.kernel.warmup(*tensors, *call._rest, grid=call.grid, **call.options)


def disassemble(cubin, *options):
    """Output of the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def usage(compiled):
    """(registers a thread, bytes that a thread spills)."""
    found = disassemble(compiled.asm["cubin"], "-res-usage")
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", found).groups())
    return registers, stack + local


def row_code(sass, kind):
    """Opcodes of what a program does for one tile of rows, once; of kernels with a loop over rows its body.

    The forward's first branch parts rows from the divergence, which stores a single number.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    jumps = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))]
    if kind == "forward":
        target, branch = jumps[0]
        parts = [[opcode(text) for at, text in code if branch < at < target and "NOP" not in text]]
        parts.append([opcode(text) for at, text in code if at >= target and "NOP" not in text])
        before = [opcode(text) for at, text in code if at <= branch]
        return before + max(parts, key=lambda ops: count(ops, "STG"))
    loops = {(first, last) for first, last in jumps if first < last}
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[opcode(text) for at, text in code if first <= at <= last] for first, last in sorted(innermost)]
    return next((ops for ops in bodies if count(ops, "LDG|LDGSTS")), [])


def opcode(text):
    """IMAD.WIDE.U32 of "@!P0 IMAD.WIDE.U32 R2, R3, ..."."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def count(ops, pattern):
    return sum(bool(re.match(rf"(?:{pattern})(?:\.|$)", op)) for op in ops)


def access_widths(ops):
    """Bytes per thread -> number of global loads and stores of that width."""
    widths = Counter()
    for op in ops:
        if re.match(r"(LDG|STG|LDGSTS)(\.|$)", op):
            parts = op.split(".")
            narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
            widths[next((narrow[p] for p in parts if p in narrow), 4)] += 1
    return dict(sorted(widths.items()))


def inspect(variant):
    """A row of figures for (n_cols, dtype name, mode, kind, architecture); None where that mode has no such kernel."""
    n_cols, dtype, mode, kind, arch = variant
    capability, multiprocessors = ARCHITECTURES[arch]
    launches = calls(n_cols, DTYPES[dtype], mode, multiprocessors)
    if kind not in launches:
        return None
    call, arguments = launches[kind]
    compiled = compile_ahead(call, flat(*arguments), capability)
    registers, spilled = usage(compiled)
    tile = call.constants["TILE"]
    pieces = -(-n_cols // tile.BLOCK_N)
    in_pieces = kind in ("forward", "backward") and "wide" in call.kernel.fn.__name__  # loops of loops: not counted
    counted = kind in ROW_KINDS and not in_pieces
    ops = row_code(disassemble(compiled.asm["cubin"], "-sass"), kind) if counted else []
    per_element = tile.BLOCK_M * min(tile.BLOCK_N, n_cols) / (32 * call.num_warps)
    per_element *= pieces if kind == "backward" else 1
    figures = {
        "total": len(ops),
        "multiply": count(ops, "IMAD|UIMAD|XMAD"),
        "special": count(ops, "MUFU"),
        "memory": count(ops, "LDG|STG|LDGSTS|LDS|STS|LDL|STL"),
    }
    return {
        "n": n_cols, "dtype": dtype, "mode": mode, "kind": kind, "arch": arch, "kernel": call.kernel.fn.__name__,
        "warps": call.num_warps, "registers": registers, "spilled": spilled,
        "shared": compiled.metadata.shared, "widths": access_widths(ops),
        **{name: round(figure / per_element, 2) if counted else None for name, figure in figures.items()},
    }  # fmt: skip


def check(rows):
    """What is past the budget, as messages."""
    for row in rows:
        name = f"{row['kind']} {row['mode']} N={row['n']} {row['dtype']} {row['arch']}"
        if row["spilled"]:
            yield f"{name}: {row['spilled']} bytes spilled"
        if row["kind"] == "forward" and row["n"] > 512 and row["shared"] > FORWARD_SHARED:
            yield f"{name}: {row['shared']} bytes of shared memory, budget {FORWARD_SHARED}"
        if (row["kind"], "shared") not in BUDGET or row["total"] is None:
            continue
        budget = BUDGET[row["kind"], "token" if row["mode"].startswith("token") else "shared"].get(row["n"], math.inf)
        budget += EXTRA.get((row["kind"], row["mode"].partition(", ")[2]), 0.0)
        if row["total"] > budget:
            yield f"{name}: {row['total']} instructions per element, budget {budget}"
        narrow = {width: number for width, number in row["widths"].items() if width < 16}
        if sum(narrow.values()) > ROW_SCALARS or set(narrow) - {2, 4, 8}:
            yield f"{name}: accesses of {row['widths']}, budget 16 bytes but for numbers of a row"


def pinned_triton():
    """The version of Triton in constraints.txt."""
    return re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90")
    parser.add_argument("--n", type=int, nargs="+")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--check", action="store_true", help="compare with the budget; exit 1 past it")
    parser.add_argument("--jobs", type=int, help="compilations at once (default: one per core)")
    args = parser.parse_args(argv)
    if args.check and triton.__version__ != pinned_triton():
        print(f"not checked: the budget holds for Triton {pinned_triton()} alone, and this is {triton.__version__}")
        return 0
    if not isinstance(launch.forward_kernel, triton.JITFunction):
        parser.error("TRITON_INTERPRET is set: there is nothing to compile in the interpreter")

    widths = args.n or ((*CHECKED_WIDTHS, *VECTOR_WIDTHS) if args.check else DEFAULT_WIDTHS)
    variants = [(n, args.dtype, mode, kind, args.arch) for n in widths for kind in KINDS for mode in MODES]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = [row for row in pool.map(inspect, variants) if row]
    print(f"{args.arch}, x {args.dtype}, parameters fp32, triton {triton.__version__}; per element of rows")
    shown = [{name: value for name, value in row.items() if name not in ("dtype", "arch", "kernel")} for row in rows]
    print(tabulate(shown, "keys", tablefmt="github"))
    if args.json:
        found = {"triton": triton.__version__, "commit": commit(), "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    past = list(check(rows)) if args.check else []
    for message in past:
        print(f"past the budget: {message}")
    return 1 if past else 0


if __name__ == "__main__":
    sys.exit(main())
