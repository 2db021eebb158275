"""Host time of one forward and backward, without a GPU: klnorm with its launches stubbed out, against nn.LayerNorm.

    python -m bench.overhead [--json FILE]

Everything runs but the kernels: checks, autograd, allocation, tuning, the arguments of every launch. In one figure
Triton's side of a launch is stubbed out as well; in the others it runs, on a driver that does nothing, so that what a
launch takes in CUDA's driver is missing. The floor is a bare autograd Function around two launches (`bench.bare`).
Inputs are tiny, as nn.LayerNorm's figure includes its CPU arithmetic; klnorm's does not depend on the size.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import nn

from klnorm import KLLayerNorm, launch

from .bare import BareNorm
from .launches import way_of_cuda

SHAPE = 2, 2, 8
NOISES = "batch", "sample", "token"
REPEATS, ROUNDS = 5, 300
EVALUATION = {  # case: what klnorm stands beside
    "evaluation, fp32": "nn.LayerNorm",
    "evaluation, bf16 beside fp32": "nn.LayerNorm of x.float(), rounded",
}


def microseconds(functions):
    """Name -> least mean time of REPEATS calls over rounds, in each of which every function has a turn.

    Turns are short, so that on a busy machine some are not interrupted.
    """
    best = dict.fromkeys(functions, math.inf)
    for round_ in range(ROUNDS):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(REPEATS):
                function()
            if round_:  # the first warms up
                best[name] = min(best[name], (time.perf_counter() - begin) / REPEATS * 1e6)
    return best


def forward_and_backward(layer):
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    inputs = [x, *layer.parameters()]

    def run():
        torch.autograd.grad(layer(x), inputs, dy)

    return run


def evaluation(layer, x):
    def run():
        with torch.no_grad():
            layer(x)

    return run


def no_launch(call, *arguments):
    """In the place of `launch.Call.launch`."""


def measure():
    """Name -> microseconds."""
    torch.set_num_threads(1)
    n, x = SHAPE[-1], torch.randn(SHAPE)
    plain, layer = nn.LayerNorm(n), KLLayerNorm(n).eval()
    others = {"nn.LayerNorm": forward_and_backward(plain), "floor": forward_and_backward(BareNorm(n))}
    plains = (plain, x), (lambda x: plain(x.float()).bfloat16(), x.bfloat16())
    for (case, name), (theirs, x_of_case) in zip(EVALUATION.items(), plains, strict=True):
        others[f"{case}: {name}"] = evaluation(theirs, x_of_case)
        others[f"{case}: KLLayerNorm"] = evaluation(layer, x_of_case)
    ours = {f"KLLayerNorm, {noise}": forward_and_backward(KLLayerNorm(n, noise=noise)) for noise in NOISES}
    with way_of_cuda():
        figures = microseconds(others | ours)
        with mock.patch.object(launch.Call, "launch", no_launch):
            without = microseconds(ours)
    return figures | {f"{name}, Triton's side left out": value for name, value in without.items()}


def ratios(figures):
    """Name -> how many times its baseline's time a figure of klnorm is."""
    training = {f"KLLayerNorm, {n}, over the floor": figures[f"KLLayerNorm, {n}"] / figures["floor"] for n in NOISES}
    return training | {
        f"{case}, over nn.LayerNorm": figures[f"{case}: KLLayerNorm"] / figures[f"{case}: {name}"]
        for case, name in EVALUATION.items()
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    figures = measure()
    for name, value in figures.items():
        print(f"{value:9.1f} us  {name}")
    for name, ratio in ratios(figures).items():
        print(f"{ratio:9.2f} x   {name}")
    if args.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        result = {**versions, "microseconds": figures, "ratios": ratios(figures)}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
