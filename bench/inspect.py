"""What the compiler makes of every kernel, without a GPU: registers, spills, widths of memory accesses, instructions.

    python -m bench.inspect [--arch sm_90] [--n 1024 4096] [--dtype bf16] [--json FILE] [--check]

The variants are the launches that `klnorm.launch` would make, compiled ahead of time by Triton and read back with the
disassembler in its wheel. Counts are of what every row goes through: instructions that a thread issues, per element.
"""

import argparse
import json
import math
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from tabulate import tabulate

from klnorm import launch

from .cases import DTYPES
from .launches import ARCHITECTURES, MODES, calls, compile_ahead
from .report import ROOT, commit
from .sass import access_widths, count, row_code, usage

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


def inspect(variant):
    """A row of figures for (n_cols, dtype name, mode, kind, architecture); None where that mode has no such kernel."""
    n_cols, dtype, mode, kind, arch = variant
    capability, multiprocessors = ARCHITECTURES[arch]
    launches = calls(n_cols, DTYPES[dtype], mode, multiprocessors)
    if kind not in launches:
        return None
    call, arguments = launches[kind]
    compiled = compile_ahead(call, arguments, capability)
    registers, spilled = usage(compiled)
    tile = call.constants["TILE"]
    pieces = -(-n_cols // tile.BLOCK_N)
    in_pieces = kind in ("forward", "backward") and "wide" in call.kernel.fn.__name__  # loops of loops: not counted
    counted = kind in ROW_KINDS and not in_pieces
    ops = row_code(compiled, kind) if counted else []
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
    args = parser.parse_args(argv)
    if args.check and triton.__version__ != pinned_triton():
        print(f"not checked: the budget holds for Triton {pinned_triton()} alone, and this is {triton.__version__}")
        return 0
    if not isinstance(launch.forward_kernel, triton.JITFunction):
        parser.error("TRITON_INTERPRET is set: there is nothing to compile in the interpreter")

    widths = args.n or ((*CHECKED_WIDTHS, *VECTOR_WIDTHS) if args.check else DEFAULT_WIDTHS)
    variants = [(n, args.dtype, mode, kind, args.arch) for n in widths for kind in KINDS for mode in MODES]
    with ProcessPoolExecutor() as pool:
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
