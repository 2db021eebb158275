"""Host time of one forward and backward, without a GPU: klnorm with its launches stubbed out, against nn.LayerNorm.

    python -m bench.overhead [--json FILE]

Everything runs but the kernels: checks, autograd, the dispatcher, allocation, tuning, the arguments of every launch.
Triton's own launcher is not in the figure. nn.LayerNorm's includes its CPU arithmetic, so it is also taken at a size
where that is small; klnorm's does not depend on the size, but for the CPU's slow allocation of large tensors.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from klnorm import KLLayerNorm, launch

SHAPE, TINY = (8, 128, 768), (2, 2, 8)


def microseconds(function, repeats=300, rounds=7):
    """Median over rounds of the mean time of a call."""
    for _ in range(repeats // 10):
        function()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        times.append((time.perf_counter() - begin) / repeats * 1e6)
    return statistics.median(times)


def forward_and_backward(layer, shape):
    x = torch.randn(shape, requires_grad=True)
    dy = torch.randn(shape)
    inputs = [x, *layer.parameters()]

    def run():
        torch.autograd.grad(layer(x), inputs, dy)

    return run


def measure():
    """Name -> microseconds."""
    torch.set_num_threads(1)
    figures = {
        f"nn.LayerNorm {SHAPE}, CPU arithmetic included": microseconds(
            forward_and_backward(nn.LayerNorm(SHAPE[-1]), SHAPE), repeats=30
        ),
        f"nn.LayerNorm {TINY}": microseconds(forward_and_backward(nn.LayerNorm(TINY[-1]), TINY)),
    }
    # CPU tensors take the way of CUDA tensors, up to the launch.
    library = torch.library.Library("klnorm", "IMPL")
    library.impl("norm_forward", launch.forward, "CPU", allow_override=True)
    library.impl("norm_backward", lambda *args: launch.backward(*args), "CPU", allow_override=True)
    original, launch.Call.launch = launch.Call.launch, lambda call: None
    try:
        for noise in "batch", "sample", "token":
            for shape in SHAPE, TINY:
                layer = KLLayerNorm(shape[-1], noise=noise)
                name = f"KLLayerNorm {shape}, {noise}, launches stubbed"
                figures[name] = microseconds(forward_and_backward(layer, shape))
    finally:
        launch.Call.launch = original
        library._destroy()
    return figures


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    figures = measure()
    for name, value in figures.items():
        print(f"{value:9.1f} us  {name}")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "microseconds": figures}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
