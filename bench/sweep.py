"""Which tiles are fastest on a GPU: every candidate of every kernel beside the tuned one.   Run: python -m bench.sweep

    python -m bench.sweep [--n 256 4096] [--noise token] [--direction forward] [--minutes 3] [--output DIR]
    python -m bench.table DIR/sweep.json

Processes side by side compile all candidates first. Each is then timed as `timing.py` says, on M x N = 64 Mi elements
in bf16, and its results are compared with those of the tuned tile. Without a GPU it ends after compiling, and prints
registers, spills, shared memory and how many warps these leave a multiprocessor of sm_90.
"""

import argparse
import contextlib
import itertools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from pathlib import Path
from unittest import mock

import torch
from tabulate import tabulate

from klnorm import launch, tuning

from . import report, timing
from .inspect import ARCHITECTURES, calls, compile_ahead, flat, usage

WIDTHS = 256, 1024, 4096, 8192, 16384
NOISES = "shared", "token"
DIRECTIONS = "forward", "backward", "sums", "finalize"
ELEMENTS = 64 << 20
BEST = 5
TENSORS = {"forward": 2, "backward": 3, "sums": 2}  # of the size of x that a kernel reads and writes at least
MEASUREMENT_MS = 20.0
CAPABILITY, MULTIPROCESSORS = ARCHITECTURES["sm_90"]  # where there is no GPU
REGISTERS, SHARED_BYTES, MOST_WARPS, MOST_PROGRAMS = 65536, 227 << 10, 64, 32  # of a multiprocessor


def tuner_of(direction, n):
    """Name of the function of `tuning` whose answer is swept."""
    if direction == "backward":
        return "dx_wide_shape" if tuning.is_wide(n, 2) else "backward_shape"
    return {"forward": "forward_shape", "sums": "sums_wide_shape", "finalize": "finalizer_shape"}[direction]


def candidates(direction, noise, n):
    """Shapes, the tuned one first."""
    merged, wide = noise == "token", tuning.is_wide(n, 2)
    if direction == "finalize":
        shapes = [tuning.Shape(*s) for s in itertools.product((64, 128, 256, 512), (8, 16, 32), (2, 4, 8))]
        shapes = [s for s in shapes if 4 <= s.block_m * s.block_n // (32 * s.num_warps) <= 64]
        return _first(tuning.finalizer_shape(n), shapes)
    if direction == "sums":
        shapes = itertools.product((1,), (512, 1024, 2048), (4, 8), (1, 2) if merged else (3, 4), (2, 4, 8))
        return _first(tuning.sums_wide_shape(n, 2, merged), [tuning.Shape(*s) for s in shapes]) if wide else []
    if wide:
        tuned = tuning.forward_shape(n, 2) if direction == "forward" else tuning.dx_wide_shape(n, 2)
        return _first(tuned, [tuning.Shape(1, *s) for s in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16))])
    rows = {max(1, elements // n) for elements in (512, 1024, 2048, 4096)}
    tiles = [(m, n, warps) for m in rows for warps in (1, 2, 4, 8, 16) if 8 <= m * n // (32 * warps) <= 64]
    if direction == "forward":
        return _first(tuning.forward_shape(n, 2), [tuning.Shape(*tile) for tile in tiles])
    stages = (1, 2) if merged else (1, 3, 4)
    tuned = tuning.backward_shape(n, 2, merged)
    shapes = itertools.product([t for t in {*tiles, tuned[:3]} if t[0] * t[1] <= 32 * 32 * t[2]], stages, (1, 2, 3, 4))
    shapes = [tuning.Shape(*tile, s, max(1, k * 4 // tile[2])) for tile, s, k in shapes]
    return _first(tuned, shapes)


def _first(tuned, shapes):
    return list(dict.fromkeys([tuned, *shapes]))


def call_of(direction, noise, n, shape, multiprocessors=MULTIPROCESSORS, device="meta"):
    """(Call, arguments of its launch) of a candidate."""
    with mock.patch.object(tuning, tuner_of(direction, n), return_value=shape):
        return calls(n, torch.bfloat16, noise, multiprocessors, ELEMENTS // n, device)[direction]


def compile_candidate(case, capability):
    """What the compiler made of a candidate, which it leaves in Triton's cache as well."""
    direction, noise, n, shape = case
    found = dict.fromkeys(("registers", "spilled", "shared", "warps", "why"))
    try:
        call, arguments = call_of(direction, noise, n, shape)
        compiled = compile_ahead(call, flat(*arguments), capability)
        registers, spilled = usage(compiled)
    except Exception as error:  # a tile may be too large for the compiler
        return found | {"why": report.reason(error)}
    shared = compiled.metadata.shared
    found |= {"registers": registers, "spilled": spilled, "shared": shared}
    return found | {"warps": resident_warps(registers, shared, shape.num_warps)}


def resident_warps(registers, shared, num_warps):
    """Warps of programs of `num_warps` that a multiprocessor holds."""
    by_registers = REGISTERS // (32 * num_warps * -(-registers // 8) * 8)
    by_shared = SHARED_BYTES // (shared + 1024)  # each program has a kilobyte beside
    return num_warps * min(by_registers, by_shared, MOST_WARPS // num_warps, MOST_PROGRAMS)


def differ(results, tuned):
    """How far results of a candidate are from the tuned one's, of the largest of each; None where they fit."""
    for got, want in zip(results, tuned, strict=True):
        if got is None:
            continue
        got, want = (t.float().sum(0) if t.dim() == 3 else t.float() for t in (got, want))
        error = ((got - want).abs().max() / want.abs().max()).item()
        if not error <= 2.0**-7:  # an ulp of bf16 at the largest; NaN is not less either
            return error
    return None


def main(arguments=None):
    options = parse(arguments)
    begun, gpu = time.monotonic(), torch.cuda.is_available()
    cases = [
        (direction, noise, n, shape)
        for n in options.n
        for noise in options.noise
        for direction in options.direction
        for shape in candidates(direction, noise, n)
    ]
    major, minor = torch.cuda.get_device_capability() if gpu else divmod(CAPABILITY, 10)
    result = {"environment": report.environment(), "copy_gbps": None, "records": [], "not_run": 0}
    print(f"{report.describe(result['environment'])}\n{len(cases)} candidates, {options.workers} processes compile")
    found = compile_all(cases, 10 * major + minor, options.workers, begun + 60 * options.minutes * 0.7)
    print(f"compiled {len(found)} after {time.monotonic() - begun:.0f} s")
    if gpu:
        clock = timing.CudaClock(torch.device("cuda", torch.cuda.current_device()))
        result["copy_gbps"] = clock.copy_gbps()
        measured(cases, found, clock, result, begun + 60 * options.minutes)
    else:
        result["records"] = [record_of(case, found[case]) for case in cases if case in found]
    report.save(options.output / "sweep.json", result)
    print(table(result))
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--noise", choices=NOISES, nargs="+", default=NOISES)
    parser.add_argument("--direction", choices=DIRECTIONS, nargs="+", default=DIRECTIONS)
    parser.add_argument("--minutes", type=float, default=3.0, help="stop after so many (default: 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--output", type=Path, default=Path("bench_out"), help="folder of sweep.json")
    return parser.parse_args(arguments)


def compile_all(cases, capability, workers, deadline):
    """{case: what was found}, for as many as there is time for."""
    found, pool = {}, ProcessPoolExecutor(workers)
    waiting = {pool.submit(compile_candidate, case, capability): case for case in cases}
    with contextlib.suppress(TimeoutError):  # not yet the built-in one in Python 3.10
        for done in as_completed(waiting, timeout=max(1, deadline - time.monotonic())):
            found[waiting[done]] = done.result()
    pool.shutdown(cancel_futures=True)
    return found


def record_of(case, found, ms=None, wrong=None):
    direction, noise, n, shape = case
    return {
        "direction": direction, "noise": noise, "n": n, "shape": list(shape), "ms": ms, "wrong": wrong,
        "tuned": shape == candidates(direction, noise, n)[0], **found,
    }  # fmt: skip


def measured(cases, found, clock, result, deadline):
    """Time case after case that was compiled, until the deadline."""
    multiprocessors, tuned = launch._multiprocessors(clock.device), {}
    for case in cases:
        if time.monotonic() > deadline or case not in found:
            result["not_run"] += 1
            continue
        ms = wrong = None
        if found[case]["why"] is None:
            try:
                ms, wrong = timed(case, clock, multiprocessors, tuned)
            except Exception as error:  # one that does not launch must not end the sweep
                found[case] = found[case] | {"why": report.reason(error)}
        result["records"].append(record_of(case, found[case], ms, wrong))


def timed(case, clock, multiprocessors, tuned):
    """(milliseconds, how far results are from those of the first of its kind, which `tuned` holds)."""
    call, arguments = call_of(*case, multiprocessors, clock.device)
    results = written(case[0], arguments[-1])
    if case[:3] not in tuned:
        tuned.clear()  # those of other kinds are not needed any more
        tuned[case[:3]] = results
    ms = timing.measure(lambda _: call.launch(*arguments), clock, MEASUREMENT_MS).median_ms
    return ms, differ(results, tuned[case[:3]])


def written(direction, outputs):
    """What results are compared by."""
    return outputs if direction == "sums" else outputs[0] if direction == "finalize" else outputs[0][:1]


def table(result):
    """The best of every kernel beside the tuned one, as Markdown; without times, those of most warps."""
    bad = [r for r in result["records"] if r["why"] or r["wrong"] is not None]
    rows = []
    for _, group in itertools.groupby(
        (r for r in result["records"] if r not in bad), key=lambda r: (r["n"], r["noise"], r["direction"])
    ):
        group = sorted(group, key=lambda r: (r["ms"] or 0, r["spilled"], -r["warps"]))
        rows += [_cells(r, result["copy_gbps"]) for r in group if r in group[:BEST] or r["tuned"]]
    parts = [tabulate(rows, "keys", tablefmt="github", disable_numparse=True)]
    parts += [f"{r['direction']} {r['noise']} {r['n']} {r['shape']}: {r['why'] or r['wrong']}" for r in bad]
    return "\n\n".join([*parts, *([f"{result['not_run']} candidates were not run"] if result["not_run"] else [])])


def _cells(record, copy_gbps):
    rows, features, warps, stages, programs = record["shape"]
    ms, gb = record["ms"], TENSORS.get(record["direction"], 0) * ELEMENTS * 2 / 1e6
    return {
        "N": record["n"], "noise": record["noise"], "kernel": record["direction"],
        "rows x features, warps, stages, programs": f"{rows} x {features}, {warps}, {stages}, {programs}"
        + (" (tuned)" if record["tuned"] else ""),
        "ms": ms and f"{ms:.4f}", "of copy": f"{gb / ms / copy_gbps:.2f}" if ms and gb else "",
        "registers, spilled, shared": f"{record['registers']}, {record['spilled']}, {record['shared']}",
        "warps": record["warps"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
