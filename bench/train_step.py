"""One training step of a BERT-base-sized encoder and a GPT-2-small-sized decoder, random weights.

Run: python -m bench.train_step [--output DIR]

Forward, backward and AdamW under bf16 autocast, fp32 weights; with nn.LayerNorm, klnorm in each noise mode and KL-Norm
in eager PyTorch, the KL in the loss; as it is and under torch.compile. On the CPU: --smoke, tiny, to see that it works.
"""

import argparse
import gc
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

import klnorm

from . import eager, models, report
from .warm import warm

NORMS = ["LayerNorm", *[f"{kind}, {noise}" for kind in ("klnorm", "eager") for noise in ("sample", "batch", "token")]]
COMPILED_NORMS = "LayerNorm", "klnorm, sample", "eager, sample"
STEPS = 12
NUM_EXAMPLES = 10_000  # the KL's weight in the loss is 1 / NUM_EXAMPLES; it does not matter to the time
WARM_SHARE = 0.45


def main(arguments=None):
    options = parse(arguments)
    if not (torch.cuda.is_available() or options.smoke):
        print("Timing a training step needs a CUDA GPU, and torch sees none. --smoke runs a tiny one on the CPU.")
        return 0
    device = torch.device("cpu" if options.smoke else "cuda")
    deadline = time.monotonic() + 60 * options.minutes
    sizes = models.SMOKE_SIZES if options.smoke else models.SIZES
    lines = plan(sizes, options)
    result = {"environment": report.environment(), "models": models.source(), "smoke": options.smoke, "records": []}
    print(f"{report.describe(result['environment'])}\nmodels: {result['models']}")
    if device.type == "cuda" and not options.quick:
        compiled = [line for line in lines if line[2]]
        done = warm(compile_line, compiled, len(compiled), WARM_SHARE * 60 * options.minutes)
        print(f"compiled {done} of {len(compiled)} ahead")
    path = options.output / "train_step.json"

    def measured(line):
        return measure_line(line, sizes, device)

    report.run_through(lines, describe, measured, show, result, path, deadline)
    print(f"results in {path}")
    return int(any(r["why"] for r in result["records"] if r["norm"].startswith("klnorm")))


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the encoder only, nothing compiled")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU; wall times that mean nothing")
    parser.add_argument("--output", type=Path, default=Path("bench_out"), help="folder of train_step.json")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no new line after so many (default: 10)")
    return parser.parse_args(arguments)


def plan(sizes, options):
    """(model, normalization, compiled) in order of worth."""
    names = list(sizes)[:1] if options.quick else list(sizes)
    lines = [(name, norm, False) for name in names for norm in NORMS]
    return lines if options.quick else lines + [(name, norm, True) for norm in COMPILED_NORMS for name in names]


def describe(line):
    name, norm, compiled = line
    return f"{name:<12} {norm:<15} {'compiled' if compiled else 'eager':<9}"


def show(record):
    start = describe((record["model"], record["norm"], record["compiled"]))
    if record["why"]:
        return f"{start} FAILED: {record['why']}"
    device = "" if record["device_ms"] is None else f"{record['device_ms']:8.2f} ms on the device,"
    peak = "" if record["peak_bytes"] is None else f", peak {record['peak_bytes'] / 2**30:.2f} GiB"
    return f"{start} {device} {record['wall_ms']:8.2f} ms wall{peak}"


def measure_line(line, sizes, device):
    """The record of a line: milliseconds of a step (median of STEPS), peak memory, the first loss."""
    name, norm, compiled = line
    record = {"model": name, "norm": norm, "compiled": compiled, "device_ms": None, "wall_ms": None}
    record |= {"peak_bytes": None, "loss": None, "why": None}
    # The model of the line before is to leave the GPU.
    torch._dynamo.reset()
    gc.collect()
    try:
        step = make_step(line, sizes[name], device)
        record["loss"] = step().item()
        for _ in range(2):
            step()
        record |= time_steps(step, device)
        if not torch.isfinite(torch.tensor(record["loss"])):
            record["why"] = f"the loss is {record['loss']}"
    except Exception as error:  # the others are still worth measuring
        record["why"] = report.reason(error)
    return record


def make_step(line, size, device):
    """A function that makes one training step and returns the loss."""
    _, norm, compiled = line
    model, divergence = with_norm(models.make_model(size, device), norm)
    tokens, labels = models.make_batch(size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")

    def loss_of(tokens, labels):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(tokens, labels)
        return loss + divergence(model) / NUM_EXAMPLES

    compute = torch.compile(loss_of) if compiled else loss_of

    def step():
        loss = compute(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def with_norm(model, norm):
    """(model with the normalization, function that computes the KL of it)."""
    kind, _, noise = norm.partition(", ")
    if kind == "klnorm":
        # Reading the KL back on every step would make the host wait for the GPU.
        return klnorm.replace_layer_norm(model, noise=noise), lambda m: klnorm.kl_divergence(m, check_finite=False)
    if kind == "eager":
        return eager.replace_with_eager(model, noise), eager.kl_divergence
    return model, lambda m: 0.0


def time_steps(step, device):
    """Median milliseconds from the end of a step on the device to the end of the next, wall time, peak memory."""
    if device.type != "cuda":
        return {"wall_ms": statistics.median(_wall(step) for _ in range(3))}
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    torch.cuda.synchronize()
    begun = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    wall_ms = 1e3 * (time.perf_counter() - begun) / STEPS
    device_ms = statistics.median(a.elapsed_time(b) for a, b in pairwise(events))
    return {"device_ms": device_ms, "wall_ms": wall_ms, "peak_bytes": torch.cuda.max_memory_allocated()}


def _wall(step):
    begun = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begun)


def compile_line(line):
    """One step of a line on the GPU, for what it leaves in the compiler's caches."""
    make_step(line, models.SIZES[line[0]], torch.device("cuda"))()


if __name__ == "__main__":
    sys.exit(main())
