"""Allocates outputs, chooses tiles and grids, and launches the kernels. Knows no autograd.

Same arguments and results as `klnorm.cpu`. Forward launches one kernel, backward two.
"""

import contextlib
import functools
import math
from typing import NamedTuple

import torch
import triton

from . import tuning
from .cpu import noise_mode
from .kernels.backward import backward_kernel, backward_wide_kernel
from .kernels.finalize import finalize_kernel
from .kernels.forward import forward_kernel, forward_wide_kernel
from .reference.kl_norm import accumulation_dtype


class Target(NamedTuple):
    """What a launch needs to know of a device.

    `fast`: the noise may use NVIDIA's own instructions; `clusters`: a row may be split over several multiprocessors.
    """

    multiprocessors: int
    fast: bool
    clusters: bool


class Call(NamedTuple):
    """A kernel with everything that one launch of it takes; `grid` counts programs, each of `num_ctas` blocks."""

    kernel: object
    grid: int
    args: tuple
    constants: dict
    num_warps: int
    num_ctas: int = 1

    @property
    def options(self):
        """Of the compiler; fused multiply-adds explicitly, since Triton's default for them changes with its version."""
        return {"num_warps": self.num_warps, "num_ctas": self.num_ctas, "enable_fp_fusion": True}

    def launch(self):
        self.kernel[(self.grid,)](*self.args, **self.constants, **self.options)


def forward(
    x, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed,
    weight_prior_value, bias_prior_value, prior_std, eps, draws, inner,
):  # fmt: skip
    """(y, kl, mean, rstd); the arguments are those of the operator in `klnorm.ops`."""
    rows = _rows(x, weight.numel())
    acc = accumulation_dtype(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kl, mean, rstd = (torch.empty(shape, dtype=acc, device=x.device) for shape in ((), len(rows), len(rows)))
    parameters = _contiguous(weight, bias, weight_rho, bias_rho, weight_prior, bias_prior)
    numbers = {"weight_prior": weight_prior_value, "bias_prior": bias_prior_value, "prior_std": prior_std}
    call = forward_call(
        _target(x.device), rows, parameters, seed, y, mean, rstd, kl, {**numbers, "eps": eps}, draws, inner
    )
    with _on_device_of(x):
        call.launch()
    return y, kl, mean, rstd


def backward(
    dy, dkl, x, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed, mean, rstd,
    weight_prior_value, bias_prior_value, prior_std, draws, inner,
):  # fmt: skip
    """(dx, dweight, dbias, dweight_rho, dbias_rho), None where there is no shift; `dy` or `dkl` may be None."""
    target, n_cols = _target(x.device), weight.numel()
    parameters = _contiguous(weight, bias, weight_rho, bias_rho, weight_prior, bias_prior)
    gradients = [None if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device)
                 for p in (weight, bias, weight_rho, bias_rho)]  # fmt: skip
    numbers = {"weight_prior": weight_prior_value, "bias_prior": bias_prior_value, "prior_std": prior_std}
    plan = _backward_plan(target, len(mean) if dy is not None else 0, n_cols, x.element_size(), seed, draws)
    partial = mean.new_empty((plan.slots, plan.runs.programs, n_cols))
    dx = None if dy is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with _on_device_of(x):
        if plan.runs.programs:
            rows, dy_rows = _rows(x, n_cols), _rows(dy, n_cols)
            backward_call(target, plan, rows, dy_rows, parameters, seed, mean, rstd, dx, partial, inner).launch()
        finalize_call(target, plan, partial, parameters, seed, dkl, gradients, numbers).launch()
    return dx, *gradients


def forward_call(target, rows, parameters, seed, y, mean, rstd, kl, numbers, draws, inner):
    """The launch of the forward kernel on `rows` (M, N); `numbers` are the prior means, its deviation, and eps."""
    n_rows, n_cols = rows.shape
    noise, n_draws = _draws(seed, n_rows, draws)
    tile = tuning.tile(n_cols, rows.element_size(), clusters=target.clusters)
    runs = tuning.forward_runs(n_rows, n_draws, tile, n_cols * rows.element_size(), target.multiprocessors)
    vec = _vector_width(n_cols, rows)
    args = (
        rows, *parameters, seed, y, mean, rstd, kl,
        rows.stride(0) // vec, n_draws, inner, n_rows // n_draws,
        runs.run_rows, runs.runs_per_group, runs.group_rows,
    )  # fmt: skip
    constants = {
        **numbers, "NOISE": noise, "SPAN": noise == "shared" and runs.span,
        "ORDER": _order(noise, n_rows, n_draws, inner), "FAST": target.fast, "N": n_cols, "VEC": vec,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages,
    }  # fmt: skip
    kernel = forward_wide_kernel if tile.wide else forward_kernel
    return Call(kernel, 1 + runs.programs, args, constants, tile.num_warps, tile.num_ctas)


class BackwardPlan(NamedTuple):
    """What the two kernels of a backward agree on; `slots` of partial sums, see `kernels/backward.py`."""

    noise: str
    n_draws: int
    tile: tuning.Tile
    runs: tuning.Runs
    span: bool
    slots: int


def _backward_plan(target, n_rows, n_cols, itemsize, seed, draws):
    noise, n_draws = _draws(seed, n_rows, draws)
    tile = tuning.tile(n_cols, itemsize, True, target.clusters)
    runs = tuning.backward_runs(n_rows, n_draws, tile, n_cols, itemsize, target.multiprocessors)
    span = noise == "shared" and runs.span
    return BackwardPlan(noise, n_draws, tile, runs, span, 4 if span or noise == "merged" else 2)


def backward_call(target, plan, rows, dy_rows, parameters, seed, mean, rstd, dx, partial, inner):
    """The launch of the backward kernel: dx (M, N) and the partial sums (slots, programs, N)."""
    (n_rows, n_cols), (noise, n_draws, tile, runs, span, _) = rows.shape, plan
    weight, _, weight_rho, bias_rho, *_ = parameters
    vec = _vector_width(n_cols, rows, dy_rows)
    args = (
        rows, dy_rows, weight, weight_rho, bias_rho, seed, mean, rstd, dx, partial,
        *([mean.new_empty((n_rows, 2))] if tile.wide else []),
        rows.stride(0) // vec, dy_rows.stride(0) // vec, n_draws, inner, n_rows // n_draws,
        runs.run_rows, runs.runs_per_group, runs.group_rows,
    )  # fmt: skip
    constants = {
        "NOISE": noise, "SPAN": span, "ORDER": _order(noise, n_rows, n_draws, inner), "FAST": target.fast,
        "N": n_cols, "VEC": vec, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages,
    }  # fmt: skip
    kernel = backward_wide_kernel if tile.wide else backward_kernel
    return Call(kernel, runs.programs, args, constants, tile.num_warps, tile.num_ctas)


def finalize_call(target, plan, partial, parameters, seed, dkl, gradients, numbers):
    """The launch of the finalizer: partial sums to the gradients of the parameters."""
    _, programs, n_cols = partial.shape
    block_p, block_n, num_warps = tuning.finalizer_tile(n_cols)
    args = (partial, *parameters, seed, dkl, *gradients, programs, plan.runs.runs_per_group)
    constants = {
        **numbers, "NOISE": plan.noise, "SPAN": plan.span, "FAST": target.fast,
        "N": n_cols, "BLOCK_P": block_p, "BLOCK_N": block_n,
    }  # fmt: skip
    return Call(finalize_kernel, triton.cdiv(n_cols, block_n), args, constants, num_warps)


def _rows(x, n_cols):
    """x as (M, N) with neighbouring features adjacent in memory: a view where its strides allow, else one copy."""
    rows = x.reshape(-1, n_cols) if x.numel() else x.new_empty((0, n_cols))
    return rows if rows.stride(1) == 1 or n_cols == 1 else rows.contiguous()


def _vector_width(n_cols, *operands):
    """Elements, a power of two up to 8, to which every row of the operands starts aligned."""
    offsets = (v for rows in operands for v in (rows.stride(0), rows.data_ptr() // rows.element_size()))
    return math.gcd(8, n_cols, *offsets)


def _draws(seed, n_rows, draws):
    """(noise mode, number of draws that rows share)."""
    noise = noise_mode(seed, n_rows, draws)
    return noise, draws if noise == "shared" else 1


def _order(noise, n_rows, draws, inner):
    """How the rows of one draw lie, see `kernels/rows.py`: neighbours where the draws' dimension is the outermost."""
    if noise != "shared" or draws * inner == n_rows:
        return "rows"
    return "strided" if inner == 1 else "blocked"


def _contiguous(*parameters):
    return [None if p is None else p.contiguous() for p in parameters]


@functools.cache
def _multiprocessors(device):
    """Multiprocessors of a GPU; a handful for CPU tensors, which reach this module in Triton's interpreter alone."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _capability(device):
    """Compute capability; (0, 0) where NVIDIA's own instructions do not run: other devices, Triton's interpreter."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    native = isinstance(forward_kernel, triton.JITFunction)
    return torch.cuda.get_device_capability(device) if nvidia and native else (0, 0)


def _fast(device):
    """Whether the noise may use NVIDIA's own instructions: those of sm_80."""
    return _capability(device) >= (8, 0)


def _target(device):
    clusters = tuning.has_clusters(_capability(device), triton.__version__)
    return Target(_multiprocessors(device), _fast(device), clusters)


def _on_device_of(x):
    """Triton launches on the current device, which must be that of x."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
