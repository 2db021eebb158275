"""One training step of a BERT-base-sized encoder and a GPT-2-small-sized decoder, random weights.

Run: python -m bench.train_step [--model bert|gpt2] [--norm NAME ...] [--mode eager|captured|compiled] [--output DIR]

Forward, backward and AdamW under bf16 autocast, fp32 weights; with nn.LayerNorm, klnorm in each noise mode and KL-Norm
in eager PyTorch, the weighted KL in the loss; as it is, captured into a CUDA graph as a whole, and under torch.compile.
Beside milliseconds: kernels launched in a step, the time that the host takes for one, and the share of it in which the
GPU has nothing to do. On the CPU: --smoke, of tiny width, to see that it works; for launches it counts operations that
compute on the way that CUDA tensors take, and kernels of klnorm that would be launched there.
"""

import argparse
import gc
import statistics
import sys
import time
import timeit
from itertools import pairwise
from pathlib import Path

import torch

from . import report, table
from .models import MODELS, Line, make_step
from .operations import count_in_compiled_code, count_operations
from .warm import warm

NORMS = ["LayerNorm", *[f"{kind}, {noise}" for kind in ("klnorm", "eager") for noise in ("sample", "batch", "token")]]
OTHER_MODES_NORMS = "LayerNorm", "klnorm, sample", "eager, sample"
MODES = "eager", "captured", "compiled"
STEPS = 12
WARM_SHARE = 0.45


def main(arguments=None):
    options = parse(arguments)
    if not (torch.cuda.is_available() or options.smoke):
        print("Timing a training step needs a CUDA GPU, and torch sees none. --smoke runs a tiny one on the CPU.")
        return 0
    import transformers

    deadline = time.monotonic() + 60 * options.minutes
    lines = plan(options)
    models = f"transformers {transformers.__version__}"
    result = {"environment": report.environment(), "models": models, "smoke": options.smoke, "records": []}
    print(f"{report.describe(result['environment'])}\nmodels: {models}")
    if not (options.smoke or options.quick):
        compiled = [line for line in lines if line.mode == "compiled"]
        done = warm(compile_line, compiled, len(compiled), WARM_SHARE * 60 * options.minutes)
        print(f"compiled {done} of {len(compiled)} ahead")
    report.run_through(lines, measure_line, show, result, options.output / "train_step.json", deadline)
    print(table.training(result))
    return int(any(r["why"] for r in result["records"] if r["norm"].startswith("klnorm")))


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS), help="these models only")
    parser.add_argument("--norm", choices=NORMS, nargs="+", default=NORMS, help="these normalizations only")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=MODES, help="these modes only")
    parser.add_argument("--quick", action="store_true", help="the encoder only, in eager mode only")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU; wall times that mean nothing")
    parser.add_argument("--layers", type=int, help="so many of the models' layers (default: 12, with --smoke 2)")
    parser.add_argument("--output", type=Path, default=Path("bench_out"), help="folder of train_step.json")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no new line after so many (default: 10)")
    return parser.parse_args(arguments)


def plan(options):
    """Lines in order of worth."""
    models, layers = (["bert"] if options.quick else list(MODELS)), options.layers or (2 if options.smoke else 12)
    lines = [(model, norm, "eager") for model in models for norm in NORMS]
    if not options.quick:
        others = ["compiled"] if options.smoke else ["captured", "compiled"]
        lines += [(model, norm, mode) for mode in others for norm in OTHER_MODES_NORMS for model in models]
    return [
        Line(MODELS[model], norm, mode, layers, options.smoke)
        for model, norm, mode in lines
        if model in options.model and norm in options.norm and mode in options.mode
    ]


def show(record):
    """The figures of a record that there are."""
    if record["why"]:
        return f"FAILED: {record['why']}"
    forms = {
        "device_ms": "{:.2f} ms on the device", "wall_ms": "{:.2f} ms wall", "host_ms": "{:.2f} ms host",
        "idle": "{:.0%} idle", "launches": "{} launches", "peak_bytes": "peak {:,} bytes",
    }  # fmt: skip
    return ", ".join(form.format(record[key]) for key, form in forms.items() if record[key] is not None)


def measure_line(line):
    """The record of a line: milliseconds of a step (median of STEPS), peak memory, the first loss."""
    record = {"model": line.model, "norm": line.norm, "mode": line.mode, "why": None, "loss": None}
    record |= dict.fromkeys(("device_ms", "wall_ms", "host_ms", "idle", "launches", "peak_bytes"))
    # The model of the line before is to leave the GPU.
    torch._dynamo.reset()
    gc.collect()
    try:
        step = make_step(line)
        record["loss"] = step().item()
        for _ in range(2):
            step()
        record |= time_steps(step, line.device)
        record["launches"], busy_ms = count_launches(step, line)
        if busy_ms is not None:
            record["idle"] = max(0.0, 1 - busy_ms / record["device_ms"])
        if not torch.isfinite(torch.tensor(record["loss"])):
            record["why"] = f"the loss is {record['loss']}"
    except Exception as error:  # the others are still worth measuring
        record["why"] = report.reason(error)
    return record


def time_steps(step, device):
    """Median milliseconds from the end of a step on the device to the end of the next, wall time, peak memory."""
    if device.type != "cuda":
        return {"wall_ms": statistics.median(timeit.repeat(step, number=1, repeat=3)) * 1e3}
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    torch.cuda.synchronize()
    begun = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    host_ms = 1e3 * (time.perf_counter() - begun) / STEPS
    torch.cuda.synchronize()
    wall_ms = 1e3 * (time.perf_counter() - begun) / STEPS
    device_ms = statistics.median(a.elapsed_time(b) for a, b in pairwise(events))
    peak_bytes = torch.cuda.max_memory_allocated()
    return {"device_ms": device_ms, "wall_ms": wall_ms, "host_ms": host_ms, "peak_bytes": peak_bytes}


def count_launches(step, line):
    """(kernels of a step, milliseconds that they take), from torch's profiler; on the CPU (operations, None)."""
    if line.smoke:
        return (count_in_compiled_code if line.mode == "compiled" else count_operations)(step), None
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    return len(kernels), sum(e.time_range.elapsed_us() for e in on_device) / 1e3


def compile_line(line):
    """One step of a line, for what it leaves in the compiler's caches."""
    make_step(line)()


if __name__ == "__main__":
    sys.exit(main())
