"""Host time of one forward and backward, without a GPU: klnorm with its launches stubbed out, against nn.LayerNorm.

    python -m bench.overhead [--json FILE]

Everything runs but the kernels: checks, autograd, allocation, tuning, the arguments of every launch. In one figure
Triton's side of a launch is stubbed out as well; in the other it runs, on a driver that does nothing, so that what a
launch takes in CUDA's driver is missing. nn.LayerNorm's figure includes its CPU arithmetic, so it is also taken at a
size where that is small; klnorm's does not depend on the size, but for the CPU's slow allocation of large tensors.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget

from klnorm import KLLayerNorm, launch, ops

SHAPE, TINY = (8, 128, 768), (2, 2, 8)
NOISES = "batch", "sample", "token"


def microseconds(functions, repeats=5, rounds=300):
    """Name -> least mean time of a call over rounds, in each of which every function has a turn.

    Turns are short, so that on a busy machine some are not interrupted.
    """
    best = dict.fromkeys(functions, math.inf)
    for round_ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                function()
            if round_:  # the first warms up
                best[name] = min(best[name], (time.perf_counter() - begin) / repeats * 1e6)
    return best


def forward_and_backward(layer, shape):
    x = torch.randn(shape, requires_grad=True)
    dy = torch.randn(shape)
    inputs = [x, *layer.parameters()]

    def run():
        torch.autograd.grad(layer(x), inputs, dy)

    return run


class Driver:
    """What Triton asks of a driver, for an H100 that is not there."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda name, kernel, shared, device: (1, 2, 0, 0, 1024),
    )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        return lambda *args: None


def no_launch(call, inputs, outputs):
    """In the place of `launch.Call.launch`."""


@contextlib.contextmanager
def way_of_cuda():
    """CPU tensors take the way of CUDA tensors, up to the driver."""
    triton.runtime.driver.set_active(Driver())
    with (
        mock.patch.object(ops, "_compute_forward", launch.forward),
        mock.patch.object(ops, "_compute_backward", launch.backward),
    ):
        yield


def measure(shapes=(SHAPE, TINY), **options):
    """Name -> microseconds."""
    torch.set_num_threads(1)
    native = {f"nn.LayerNorm {shape}": forward_and_backward(nn.LayerNorm(shape[-1]), shape) for shape in shapes}
    ours = {
        f"KLLayerNorm {shape}, {noise}": forward_and_backward(KLLayerNorm(shape[-1], noise=noise), shape)
        for shape in shapes
        for noise in NOISES
    }
    with way_of_cuda():
        with_triton = microseconds(ours, **options)
        with mock.patch.object(launch.Call, "launch", no_launch):
            figures = microseconds(native | ours, **options)
    return figures | {f"{name}, Triton included": value for name, value in with_triton.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    figures = measure()
    for name, value in figures.items():
        print(f"{value:9.1f} us  {name}")
    if args.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        args.json.write_text(json.dumps({**versions, "microseconds": figures}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
