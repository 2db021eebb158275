"""Bytes that each kind of normalization keeps for backward, and its peak.   Run: python -m bench.memory [--quick]

The bytes saved are exact and need no GPU: autograd hands out each tensor that it keeps. The peak is that of the CUDA
allocator; on a CPU it is left out, as klnorm's CPU path, written for correctness, says nothing about the kernels' peak.
"""

import argparse
import sys
from pathlib import Path

import torch

from . import report, table
from .cases import BERT, FAMILY, KL_NOISES, LAYER_NORM, Case, Shape
from .contestants import OF_OPERATION
from .measure import build, calls, measure_case, peak, saved_bytes

LARGE = Shape(8, 512, 1024)
LINES = [("native", LAYER_NORM), *[(name, noise) for name in ("klnorm", "eager") for noise in KL_NOISES]]
FAMILY_LINES = [
    (operation, name, LAYER_NORM if contestant.family == "layer_norm" else "batch")
    for operation in FAMILY
    for name, contestant in OF_OPERATION[operation].items()
    if name in ("klnorm", "unfused", "native", "eager")
]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, and nothing under torch.compile")
    parser.add_argument("--output", type=Path, default=Path("bench_out"), help="folder of memory.json")
    parser.add_argument("--name", default="memory.json", help="name of the result file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [BERT] if options.quick else [BERT, LARGE]
    cases = [Case(name, noise, shape, dtype) for shape in shapes for dtype in ("bf16", "fp32") for name, noise in LINES]
    if not options.quick:  # compiling takes long: last
        slow = [Case("eager_compiled", c.noise, c.shape, c.dtype) for c in cases if c.contestant == "eager"]
        cases += [Case(name, noise, LARGE, "bf16", operation) for operation, name, noise in FAMILY_LINES] + slow
    result = {"environment": report.environment(), "records": []}
    print(report.describe(result["environment"]))
    path = options.output / options.name
    report.run_through(cases, lambda case: measure_case(case, kept, device), show, result, path)
    print(table.memory(result))
    return int(any(r["why"] for r in result["records"] if r["contestant"] == "klnorm"))


def kept(case, device):
    """Bytes saved for backward (x, parameters and buffers, the rest) and peak."""
    layer, buffers = build(case, device)
    inputs = buffers.inputs[0]
    calls(layer, buffers)["both"]()(0)  # compiles; what a first call initializes is not what a call keeps
    saved = zip(("saved_x", "saved_parameters", "saved_rest"), saved_bytes(layer, inputs), strict=True)
    found = {"x_bytes": inputs[0].numel() * inputs[0].element_size(), **dict(saved)}
    return found | {"peak_bytes": peak(layer, buffers, device)}


def show(record):
    if record["why"]:
        return f"FAILED: {record['why']}"
    saved = ", ".join(f"{name} {record[f'saved_{name}']:,}" for name in ("x", "parameters", "rest"))
    return f"bytes of {saved}" + ("" if record["peak_bytes"] is None else f"; peak {record['peak_bytes']:,}")


if __name__ == "__main__":
    sys.exit(main())
