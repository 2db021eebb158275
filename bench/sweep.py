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

import torch
from tabulate import tabulate

from klnorm import launch

from . import report, tiles, timing
from .tiles import CAPABILITY, DIRECTIONS, ELEMENTS, candidates, compile_candidate

WIDTHS = 256, 1024, 4096, 8192, 16384
NOISES = "shared", "token"
BEST = 5
TENSORS = {"forward": 2, "backward": 3, "sums": 2}  # of the size of x that a kernel reads and writes at least
MEASUREMENT_MS = 20.0


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
    print(f"{report.describe(result['environment'])}\n{len(cases)} candidates")
    found = compile_all(cases, 10 * major + minor, begun + 60 * options.minutes * 0.7)
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
    parser.add_argument("--output", type=Path, default=Path("bench_out"), help="folder of sweep.json")
    return parser.parse_args(arguments)


def compile_all(cases, capability, deadline):
    """{case: what was found}, for as many as there is time for."""
    found, pool = {}, ProcessPoolExecutor(os.cpu_count())
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
    call, arguments = tiles.call_of(*case, multiprocessors, clock.device)
    results = written(case[0], arguments[-1])
    if case[:3] not in tuned:
        tuned.clear()  # those of other kinds are not needed any more
        tuned[case[:3]] = results
    ms = timing.measure(lambda _: call.launch(*arguments), clock, MEASUREMENT_MS).median_ms
    return ms, differ(results, tuned[case[:3]])


def written(direction, outputs):
    """What results are compared by."""
    return outputs if direction == "sums" else outputs[0] if direction == "finalize" else outputs[0][:1]


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
