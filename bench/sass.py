"""Reads compiled kernels with the disassembler in Triton's wheel: registers, spills, instructions, memory accesses."""

import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton


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


def row_code(compiled, kind):
    """Opcodes of what a program does for one tile of rows, once; of kernels with a loop over rows its body.

    The forward's first branch parts rows from the divergence, which stores a single number.
    """
    sass = disassemble(compiled.asm["cubin"], "-sass")
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    jumps = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))]

    def between(first, last):
        return [opcode(text) for at, text in code if first <= at <= last and "NOP" not in text]

    if kind == "forward":
        target, branch = jumps[0]
        parts = between(branch + 1, target - 1), between(target, math.inf)
        return between(0, branch) + max(parts, key=lambda ops: count(ops, "STG"))
    loops = {(first, last) for first, last in jumps if first < last}
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [between(*loop) for loop in sorted(innermost)]
    return next((ops for ops in bodies if count(ops, "LDG|LDGSTS")), [])


def opcode(text):
    """IMAD.WIDE.U32 of "@!P0 IMAD.WIDE.U32 R2, R3, ..."."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def count(ops, pattern):
    return sum(bool(re.match(rf"(?:{pattern})(?:\.|$)", op)) for op in ops)


def access_widths(ops):
    """Bytes per thread -> number of global loads and stores of that width."""
    narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    accesses = [op.split(".") for op in ops if count([op], "LDG|STG|LDGSTS")]
    return dict(sorted(Counter(next((narrow[p] for p in parts if p in narrow), 4) for parts in accesses).items()))
