"""Time klnorm and its peers on a GPU.   Run: python -m bench.norms [--quick] [--output DIR]

Checks every contestant's output and gradients, then measures device time, wall time and memory; what is measured and
how stands in cases.py, check.py and timing.py. Everything that finished is in DIR/norms.json after every case. Without
a GPU it runs the inspector of compiled kernels and the memory comparison.
"""

import argparse
import faulthandler
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import measure, memory, report, table
from .cases import plan
from .contestants import at_hand
from .timing import CudaClock
from .warm import warm

WARM_SHARE = 0.4  # of the time budget, for compiling ahead
CASE_SECONDS = 60  # a case that takes longer hangs: the process ends, and says where


def main(arguments=None):
    """Exit status: 1 if klnorm was wrong or failed somewhere."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        return without_gpu(options)
    return run(options, torch.device("cuda"), CudaClock(torch.device("cuda")))


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench.norms", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five shapes, all peers at one of them, 1 minute")
    parser.add_argument("--output", type=Path, default=Path("bench_out"), help="folder of results (default: bench_out)")
    parser.add_argument("--only", default="", help="cases with this in [operation/]contestant/noise/MxN/dtype")
    parser.add_argument("--minutes", type=float, help="stop measuring after so many (default: 20, with --quick 1)")
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (1 if options.quick else 20)
    return options


def workers():
    """Processes that compile."""
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def without_gpu(options):
    print("Timing needs a CUDA GPU, and torch sees none: inspecting compiled kernels and counting bytes instead.\n")
    # The interpreter's stand-ins for kernels cannot be compiled.
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.inspect", *(["--n", "4096"] if options.quick else [])]
    status = subprocess.run(command, cwd=report.ROOT, env=settings).returncode
    print(f"(the inspector ended with status {status})\n")
    return memory.main(["--output", str(options.output), *(["--quick"] if options.quick else [])])


def run(options, device, clock):
    """Measure what the options ask for, with results on disk after every case."""
    deadline = time.monotonic() + 60 * options.minutes
    families, absent = at_hand()
    cases = [case for case in plan(families, options.quick) if options.only in str(case)]
    result = {"environment": report.environment(), "copy_gbps": clock.copy_gbps(), "absent": absent, "records": []}
    print(report.describe(result["environment"]))
    for name, why in absent.items():
        print(f"absent: {name} ({why})")
    if device.type == "cuda":
        done = warm(measure.compile_case, cases, workers(), WARM_SHARE * 60 * options.minutes)
        print(f"compiled {done} of {len(cases)} cases ahead")
    print(f"copy bandwidth {result['copy_gbps']:.0f} GB/s")

    def measured(case):
        if device.type == "cuda":
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True, file=sys.__stderr__)
        return measure.measure_case(case, measure.timed, clock, device, result["environment"]["l2_bytes"] or 0)

    path = options.output / "norms.json"
    try:
        report.run_through(cases, measured, lambda r: show(r, result["copy_gbps"]), result, path, deadline)
    finally:
        faulthandler.cancel_dump_traceback_later()
    report.save(path, result | {"copy_gbps_at_end": clock.copy_gbps()})
    print(table.speed(result))
    return int(any(r["status"] != "ok" for r in result["records"] if r["contestant"] == "klnorm"))


def show(record, copy_gbps):
    """Of each direction milliseconds and the share of the copy bandwidth; a star: launch gaps are included."""
    if record["status"] != "ok":
        return f"{record['status'].upper()}: {record['why']}"
    times = [
        f"{direction} {t['median_ms']:.4f} ms{'*' * t['gaps']} {t['gbps'] / copy_gbps:.0%}"
        for direction, t in ((d, record[d]) for d in measure.DIRECTIONS)
    ]
    peak = [] if record["peak_bytes"] is None else [f"peak {record['peak_bytes'] / 2**20:.1f} MiB"]
    return ", ".join([*times, f"wall {record['wall_ms']:.4f} ms", *peak])


if __name__ == "__main__":
    sys.exit(main())
