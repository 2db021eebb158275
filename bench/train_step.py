"""One training step of a BERT-base-sized encoder and a GPT-2-small-sized decoder, random weights.

Run: python -m bench.train_step [--model bert|gpt2] [--norm NAME ...] [--mode eager|captured|compiled] [--output DIR]

Forward, backward and AdamW under bf16 autocast, fp32 weights; with nn.LayerNorm, klnorm in each noise mode and KL-Norm
in eager PyTorch, the weighted KL in the loss; as it is, captured into a CUDA graph as a whole, and under torch.compile.
Beside milliseconds: kernels launched in a step, the time that the host takes for one, and the share of it in which the
GPU has nothing to do. On the CPU: --smoke, of tiny width, to see that it works; for launches it counts operations that
compute on the way that CUDA tensors take, and kernels of klnorm that would be launched there.
"""

import argparse
import ctypes
import gc
import re
import statistics
import sys
import time
import timeit
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import klnorm
from klnorm import compat, launch

from . import eager, overhead, report, table
from .warm import warm

NORMS = ["LayerNorm", *[f"{kind}, {noise}" for kind in ("klnorm", "eager") for noise in ("sample", "batch", "token")]]
OTHER_MODES_NORMS = "LayerNorm", "klnorm, sample", "eager, sample"
MODES = "eager", "captured", "compiled"
MODELS = {"bert": "BERT-base", "gpt2": "GPT-2 small"}
STEPS = 12
NUM_EXAMPLES = 10_000  # the KL's weight in the loss is 1 / NUM_EXAMPLES; it does not matter to the time
WARM_SHARE = 0.45


class Line(NamedTuple):
    """What a record is of. `smoke`: tiny, on the CPU."""

    model: str
    norm: str
    mode: str
    layers: int
    smoke: bool

    def __str__(self):
        return f"{self.model:<12} {self.norm:<15} {self.mode:<9}"

    @property
    def device(self):
        return torch.device("cpu" if self.smoke else "cuda")


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


def make_model(line):
    """(a model of transformers with random weights, random tokens)."""
    import transformers

    torch.manual_seed(0)
    width, heads, positions = (32, 2, 16) if line.smoke else (768, 12, 1024)
    if line.model == MODELS["gpt2"]:
        vocabulary, batch, length = (64, 2, 8) if line.smoke else (50257, 8, 1024)
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=line.layers, n_head=heads,
            bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        vocabulary, batch, length = (64, 2, 8) if line.smoke else (30522, 32, 128)
        config = transformers.BertConfig(
            vocab_size=vocabulary, max_position_embeddings=min(512, positions), hidden_size=width,
            num_hidden_layers=line.layers, num_attention_heads=heads, intermediate_size=4 * width,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config)
    tokens = torch.randint(vocabulary, (2, batch, length), generator=torch.Generator().manual_seed(0))
    return model.to(line.device).train(), tokens.to(line.device)


def make_step(line):
    """A function that makes one training step and returns the loss."""
    model, (tokens, labels) = make_model(line)
    model, weighted_kl = with_norm(model, line.norm, line.device)
    on_gpu = line.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True, capturable=on_gpu)

    def loss_of(tokens, labels):
        with torch.autocast(line.device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=labels).loss
        return loss + weighted_kl(model)

    torch._inductor.config.cpp.enable_kernel_profile = not on_gpu  # to count kernels
    compute = torch.compile(loss_of) if line.mode == "compiled" else loss_of

    def step():
        loss = compute(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return capture(step) if line.mode == "captured" else step


def capture(step):
    """A function that replays `step`, captured into a CUDA graph after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay():
        graph.replay()
        return loss

    return replay


def with_norm(model, norm, device):
    """(model with the normalization, function that computes its weighted KL)."""
    kind, _, noise = norm.partition(", ")
    if kind == "klnorm":
        kl_weight = klnorm.KLWeight(num_examples=NUM_EXAMPLES, device=device)
        return klnorm.replace_layer_norm(model, noise=noise), kl_weight
    if kind == "eager":
        return eager.replace_with_eager(model, noise), lambda m: eager.kl_divergence(m) / NUM_EXAMPLES
    return model, lambda m: 0.0


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
    """(kernels of a step, milliseconds that they take), from torch's profiler; on the CPU (operations, None).

    Compiled code is looked into by the profiler, as torch.compile does nothing under a dispatch mode; an operator of
    klnorm is one operation there.
    """
    if line.smoke:
        return (_count_in_compiled_code if line.mode == "compiled" else _count_operations)(step), None
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    return len(kernels), sum(e.time_range.elapsed_us() for e in on_device) / 1e3


FREE = {
    "view", "_unsafe_view", "alias", "detach", "expand", "t", "transpose", "empty", "empty_like", "empty_strided",
    "new_empty", "unsqueeze", "squeeze", "select", "slice", "split", "permute", "as_strided", "_reshape_alias",
}  # fmt: skip


class _Operations(TorchDispatchMode):
    """Counts dispatched operations, but views and allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._opname not in FREE
        return func(*args, **(kwargs or {}))


def _count_operations(step):
    """Operations of a step that compute, and klnorm's launches, on the way that CUDA tensors take."""
    launches = 0

    def launch_zeros(call, inputs, parameters, seed, outputs):
        nonlocal launches
        launches += 1
        for output in tree_leaves(outputs):
            if output is not None:
                ctypes.memset(output.data_ptr(), 0, output.nbytes)

    as_launched = mock.patch.object(launch.Call, "launch", launch_zeros)
    not_watched = mock.patch.object(compat, "is_watched", bool)  # by what counts here
    with overhead.way_of_cuda(), as_launched, not_watched, _Operations() as operations:
        step()
    return operations.count + launches


def _count_in_compiled_code(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    ahead, count = [e for e in profile.events() if e.cpu_parent is None], 0
    while ahead:
        event = ahead.pop()
        if re.match(r"aten::|klnorm::|graph_\d+_cpp_fused", event.name):
            count += event.name.removeprefix("aten::") not in FREE
        else:
            ahead += event.cpu_children
    return count


def compile_line(line):
    """One step of a line, for what it leaves in the compiler's caches."""
    make_step(line)()


if __name__ == "__main__":
    sys.exit(main())
