"""The launches of klnorm where there is no GPU: made, compiled, or stubbed out up to the driver."""

import contextlib
import itertools
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from klnorm import launch, ops, seeds
from klnorm.spec import Parameters, Prior, Rows, dtypes_of, make_spec

ARCHITECTURES = {"sm_80": (80, 108), "sm_90": (90, 132), "sm_100": (100, 148)}  # capability, multiprocessors
ROWS = 1 << 15


class Mode(NamedTuple):
    """What is computed. `draws`: 0 in evaluation; or `rows_of_draw` tells them. `inner`: rows of a block of a draw."""

    draws: int = 1
    rows_of_draw: int = 0
    inner: int = 0
    rms: bool = False
    residual: bool = False
    groups: int = 1


# With "many draws" a program of the backward has several; "two rows" are too few for a draw to be prepared.
MODES = {
    "eval": Mode(draws=0),
    "shared": Mode(),
    "shared, many draws": Mode(rows_of_draw=4),
    "shared, two rows a draw": Mode(rows_of_draw=2),
    "shared, time first": Mode(64, inner=1),
    "shared, middle": Mode(64, inner=16),
    "shared, groups": Mode(64, groups=64),
    "shared, rms": Mode(rms=True),
    "shared, residual": Mode(residual=True),
    "token": Mode(rows_of_draw=1),
    "token, rms": Mode(rows_of_draw=1, rms=True),
    "token, residual": Mode(rows_of_draw=1, residual=True),
}


def calls(n_cols, dtype, mode, multiprocessors, n_rows=ROWS, device="meta"):
    """Kind -> (the `launch.Call` that klnorm makes for n_rows x n_cols in this mode, the arguments of its launch).

    On the meta device, where tensors have no memory, nothing is launched; elsewhere everything is, on random numbers,
    the same in every call.
    """
    device, mode, found, run = torch.device(device), MODES[mode], {}, launch.Call.launch
    real = device.type != "meta"
    target = launch.Target(device, multiprocessors, launch._fast(device) if real else True)
    generator = torch.Generator(device).manual_seed(0) if real else None

    def tensor(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def recorded(call, *arguments):
        kind = call.kernel.__name__.partition("_")[0]
        found[{"dx": "backward"}.get(kind, kind)] = call, arguments
        if real:
            run(call, *arguments)

    x, dy = (tensor(n_rows, n_cols, dtype=dtype) for _ in range(2))
    residual, dsum = (x, dy) if mode.residual else (None, None)
    scale, shift = tensor(mode.groups, n_cols), None if mode.rms else tensor(mode.groups, n_cols)
    parameters = Parameters(scale, shift, scale, shift, tensor(n_cols), None if mode.rms else tensor(n_cols))
    seed = None if mode.draws == 0 else torch.full((1,), 7, dtype=torch.int64, device=device)
    draws = n_rows // mode.rows_of_draw if mode.rows_of_draw else max(1, mode.draws)
    rows = Rows.of(seed is not None, n_rows, mode.groups, draws, mode.inner or n_rows // draws)
    dtypes = dtypes_of(x, residual, *parameters)
    spec = make_spec("rms" if mode.rms else "layer", "sampled", 1e-5, Prior(0.0, 0.0, 0.1), n_cols, rows, dtypes)
    at_target = mock.patch.object(launch, "_target", return_value=target)
    with mock.patch.object(launch.Call, "launch", recorded), at_target:
        _, total, kl, statistics = launch.forward(x, residual, parameters, seed, spec)
        launch.backward(dy, dsum, kl, x if total is None else total, parameters, seed, statistics, spec)
    return found


def driver(capability):
    """What Triton asks of a driver, for a GPU of some capability that is not there: launches do nothing."""
    return SimpleNamespace(
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda name, kernel, shared, device: (1, 2, 0, 0, 1024),
        ),
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        launcher_cls=lambda source, metadata: lambda *arguments: None,
    )


def compile_ahead(call, arguments, capability):
    """The compiled kernel of a call, with the types and alignments that Triton's launcher would find.

    For a process of its own: Triton takes the machine for one with such a GPU from here on.
    """
    triton.runtime.driver.set_active(driver(capability))
    inputs, parameters, seed, outputs = arguments
    return call.kernel.warmup(*inputs, parameters, seed, *outputs, *call._rest, grid=call.grid, **call.options)


# What the host sees of a CUDA generator, in C as there.
GENERATOR = SimpleNamespace(
    initial_seed=itertools.repeat(5).__next__, get_offset=itertools.count(0, 4).__next__, set_offset=abs
)


@contextlib.contextmanager
def way_of_cuda():
    """CPU tensors take the way of CUDA tensors, up to the driver."""
    triton.runtime.driver.set_active(driver(90))
    with (
        mock.patch.object(ops, "_compute_forward", launch.forward),
        mock.patch.object(ops, "_compute_backward", launch.backward),
        mock.patch.object(seeds, "known_to_host", torch.is_tensor),
        mock.patch.object(seeds, "default_generator", {torch.device("cpu"): GENERATOR}.get),
    ):
        yield
