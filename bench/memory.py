"""Bytes that each kind of normalization keeps for backward, and its peak.   Run: python -m bench.memory [--quick]

The bytes saved are exact and need no GPU: autograd hands out each tensor that it keeps. The peak is that of the CUDA
allocator; on a CPU it is left out, as klnorm's CPU path, written for correctness, says nothing about the kernels' peak.
"""

import argparse
import gc
import math
import sys
import time
from pathlib import Path

import torch

from . import report
from .cases import BERT, FAMILY, KL_NOISES, LAYER_NORM, Case, Shape
from .contestants import OF_OPERATION
from .measure import build, calls, peak, record_of, saved_bytes, start_of

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
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so many")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [BERT] if options.quick else [BERT, LARGE]
    cases = [Case(name, noise, shape, dtype) for shape in shapes for dtype in ("bf16", "fp32") for name, noise in LINES]
    if not options.quick:  # compiling takes long: last
        slow = [Case("eager_compiled", c.noise, c.shape, c.dtype) for c in cases if c.contestant == "eager"]
        cases += [Case(name, noise, LARGE, "bf16", operation) for operation, name, noise in FAMILY_LINES] + slow
    result = {"environment": report.environment(), "records": []}
    path = options.output / options.name
    print(f"{report.describe(result['environment'])}\n{HEADER}")
    report.run_through(cases, lambda c: c.key, lambda c: count(c, device), line, result, path, deadline)
    if device.type == "cpu":
        print("The peak is left to a GPU.")
    print(f"results in {path}")
    return int(any(r["why"] for r in result["records"] if r["contestant"] == "klnorm"))


def count(case, device):
    """The record of a case: bytes saved for backward (x, parameters and buffers, the rest) and peak."""
    record = record_of(case) | {
        "x_bytes": None, "saved_x": None, "saved_parameters": None, "saved_rest": None, "peak_bytes": None, "why": None
    }  # fmt: skip
    try:
        _count(record, case, device)
    except Exception as error:
        record["why"] = report.reason(error)
    gc.collect()
    return record


def _count(record, case, device):
    layer, buffers = build(case, device, 1)
    inputs = buffers.inputs[0]
    calls(layer, buffers)["both"]()(0)  # compiles; what a first call initializes is not what a call keeps
    names = "saved_x", "saved_parameters", "saved_rest"
    saved = saved_bytes(layer, inputs)
    record |= {"x_bytes": inputs[0].numel() * inputs[0].element_size(), **dict(zip(names, saved, strict=True))}
    if device.type == "cuda":
        record["peak_bytes"] = peak(calls(layer, buffers)["both"]())


HEADER = (
    f"{'bytes:':14} {'noise':<6} {'M x N':>12} dtype {'x':>12} {'parameters':>12} {'rest':>12}  rest / x{'peak':>13}"
)


def line(record):
    if record["why"]:
        return f"{start_of(record)}  FAILED: {record['why']}"
    saved = " ".join(f"{record[key]:12d}" for key in ("saved_x", "saved_parameters", "saved_rest"))
    peak = "-" if record["peak_bytes"] is None else record["peak_bytes"]
    return f"{start_of(record)}  {saved} {record['saved_rest'] / record['x_bytes']:9.4f} {peak:>12}"


if __name__ == "__main__":
    sys.exit(main())
