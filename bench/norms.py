"""Time klnorm and its peers on a GPU.   Run: python -m bench.norms [--quick] [--output DIR]

Checks every contestant's output and gradients, then measures device time, wall time and memory; what is measured and
how stands in cases.py, check.py and timing.py. Everything that finished is in DIR/norms.json after every case. Without
a GPU it runs the inspector of compiled kernels and the memory comparison.
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import measure, memory, report
from .cases import plan
from .contestants import at_hand
from .plots import plot
from .targets import evaluate, lines
from .timing import CudaClock
from .warm import warm

WARM_SHARE = 0.4  # of the time budget, for compiling ahead
CASE_SECONDS = 60  # a case that takes longer hangs: the process ends, and says where


def main(arguments=None):
    """Exit status: 0; 1 if klnorm was wrong or failed somewhere; 2 if the GPU was lost on the way."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        return without_gpu(options)
    return run(options, torch.device("cuda"), CudaClock(torch.device("cuda")))


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench.norms", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="five shapes, the peers and the family at one of them, 1 minute"
    )
    parser.add_argument("--output", type=Path, default=Path("bench_out"), help="folder of results (default: bench_out)")
    parser.add_argument(
        "--only", default="", help="cases whose name, [operation/]contestant/noise/MxN/dtype, contains this"
    )
    parser.add_argument("--minutes", type=float, help="stop measuring after so many (default: 20, with --quick 1)")
    parser.add_argument(
        "--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2 or 1), help="processes that compile"
    )
    parser.add_argument(
        "--resume", action="store_true", help="after the case at which a run in the same folder lost the GPU or hung"
    )
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (1 if options.quick else 20)
    return options


def without_gpu(options):
    print("Timing needs a CUDA GPU, and torch sees none: inspecting compiled kernels and counting bytes instead.\n")
    # The interpreter's stand-ins for kernels cannot be compiled.
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.inspect", *(["--n", "4096"] if options.quick else [])]
    status = subprocess.run(command, cwd=report.ROOT, env=settings).returncode
    print(f"(the inspector ended with status {status})\n")
    memory.main(["--output", str(options.output), *(["--quick"] if options.quick else [])])
    return 0


def run(options, device, clock):
    """Measure what the options ask for, with results on disk after every case."""
    deadline = time.monotonic() + 60 * options.minutes
    families, absent = at_hand()
    cases = [case for case in plan(families, options.quick) if options.only in case.key]
    environment = report.environment()
    result = {"environment": environment, "copy_gbps": clock.copy_gbps(), "absent": absent, "records": []}
    if options.resume:
        result["records"], cases = resumed(json.loads((options.output / "norms.json").read_text("utf-8")), cases)
    print(report.describe(environment))
    for name, why in absent.items():
        print(f"absent: {name} ({why})")
    if device.type == "cuda":
        done = warm(measure.compile_case, cases, options.workers, WARM_SHARE * 60 * options.minutes)
        print(f"compiled {done} of {len(cases)} cases ahead")
    print(f"copy bandwidth {result['copy_gbps']:.0f} GB/s, {len(cases)} cases\n{measure.HEADER}")
    lost = measure_all(cases, clock, device, result, deadline, options.output / "norms.json")
    finish(result, clock, lost, options.output)
    ours = [r for r in result["records"] if r["contestant"] == "klnorm"]
    return 2 if lost else int(any(r["status"] != "ok" for r in ours))


def resumed(before, cases):
    """(records of an earlier run, cases left); the case that it was running has failed."""
    records = before["records"]

    def is_done(case):
        return any(measure.record_of(case).items() <= record.items() for record in records)

    left = [case for case in cases if not is_done(case)]
    hung = [measure.untimed(c, "failed", "hung, or ended the process") for c in left if c.key == before.get("running")]
    return [*records, *hung], [case for case in left if case.key != before.get("running")]


def measure_all(cases, clock, device, result, deadline, path):
    """Measure case after case until the deadline; whether the GPU was lost."""
    cache_bytes = result["environment"]["l2_bytes"] or 0

    def measured(case):
        if device.type == "cuda":
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True, file=sys.__stderr__)
        try:
            return measure.measure_case(case, clock, device, cache_bytes)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def line(record):
        return measure.line(record, result["copy_gbps"])

    def lost(record):
        return record["status"] == "failed" and device.type == "cuda" and not _alive()

    return report.run_through(cases, lambda case: case.key, measured, line, result, path, deadline, lost)


def _alive():
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError:
        print("The GPU answers every call with an error after this case: stopping here.")
        return False
    return True


def finish(result, clock, lost, output):
    """Targets, plot and the last word."""
    if not lost:
        result["copy_gbps_at_end"] = clock.copy_gbps()
        report.save(output / "norms.json", result)
        print(f"\ncopy bandwidth at the end {result['copy_gbps_at_end']:.0f} GB/s")
    print("\nTargets (the worst case of each counts)")
    for text in lines(evaluate(result)):
        print(text)
    try:
        plot(result, output / "norms.png")
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"\nresults in {output}")


if __name__ == "__main__":
    sys.exit(main())
