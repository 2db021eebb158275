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
from .layout import group_layout
from .reference.kl_norm import FLOOR, accumulation_dtype


class Target(NamedTuple):
    """What a launch needs to know of a device.

    `fast`: the noise may use NVIDIA's own instructions; `clusters`: a row may be split over several multiprocessors.
    """

    multiprocessors: int
    fast: bool
    clusters: bool


class Call(NamedTuple):
    """A kernel with everything that one launch of it takes; `grid`: programs, each of `num_ctas` blocks, and groups."""

    kernel: object
    grid: tuple
    args: tuple
    constants: dict
    num_warps: int
    num_ctas: int = 1

    @property
    def options(self):
        """Of the compiler; fused multiply-adds explicitly, since Triton's default for them changes with its version."""
        return {"num_warps": self.num_warps, "num_ctas": self.num_ctas, "enable_fp_fusion": True}

    def launch(self):
        self.kernel[self.grid](*self.args, **self.constants, **self.options)


class Layout(NamedTuple):
    """How rows fall into groups with parameters of their own, and the rows of a group into draws of noise.

    `draws` and `inner` are those inside a group, `all_draws` and `all_inner` those of all rows.
    """

    noise: str
    n_rows: int
    groups: int
    draws: int
    inner: int
    all_draws: int
    all_inner: int

    @property
    def group_rows(self):
        return self.n_rows // self.groups

    @property
    def rows_per_draw(self):
        return self.group_rows // self.draws

    @property
    def order(self):
        """How the rows of one draw lie, see `kernels/rows.py`: neighbours where the draws' dimension is outermost."""
        if self.noise != "shared" or self.draws * self.inner == self.group_rows:
            return "rows"
        return "strided" if self.inner == 1 else "blocked"

    @classmethod
    def of(cls, seed, n_rows, draws, inner, groups):
        noise = noise_mode(seed, n_rows, draws)
        if noise != "shared" or not n_rows:
            return cls(noise, n_rows, groups, 1, max(1, n_rows // groups), 1, max(1, n_rows))
        return cls(noise, n_rows, groups, *group_layout(draws, inner, n_rows // groups), draws, inner)


def forward(
    x, residual, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed,
    weight_prior_value, bias_prior_value, prior_std, eps, draws, inner, groups, rms,
):  # fmt: skip
    """(y, sum, kl, mean, rstd); the arguments are those of the operator in `klnorm.ops`."""
    n_cols = weight.numel() // groups
    rows, residual_rows = _rows(x, n_cols), None if residual is None else _rows(residual, n_cols)
    acc = accumulation_dtype(x)
    y, sum_ = _empty(x.shape, x), None if residual is None else _empty(x.shape, residual)
    kl = torch.empty(() if groups == 1 else groups, dtype=acc, device=x.device)
    mean, rstd = None if rms else _empty(len(rows), kl), _empty(len(rows), kl)
    parameters = _contiguous(weight, bias, weight_rho, bias_rho, weight_prior, bias_prior)
    numbers = {"weight_prior": weight_prior_value, "bias_prior": bias_prior_value, "prior_std": prior_std}
    layout = Layout.of(seed, len(rows), draws, inner, groups)
    call = forward_call(
        _target(x.device),
        layout,
        rows,
        residual_rows,
        parameters,
        seed,
        y,
        sum_,
        mean,
        rstd,
        kl,
        {**numbers, "eps": eps},
    )
    with _on_device_of(x):
        call.launch()
    return y, sum_, kl, mean, rstd


def backward(
    dy, dsum, dkl, z, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed, mean, rstd,
    weight_prior_value, bias_prior_value, prior_std, draws, inner, groups,
):  # fmt: skip
    """(dx, dresidual, dweight, dbias, dweight_rho, dbias_rho), None where there is none, and dresidual like dx as well.

    `z` is what was normalized, x or its sum with the residual; `dy` and `dkl` may be None.
    """
    target, n_cols = _target(z.device), weight.numel() // groups
    parameters = _contiguous(weight, bias, weight_rho, bias_rho, weight_prior, bias_prior)
    gradients = [None if p is None else _empty(p.shape, p) for p in (weight, bias, weight_rho, bias_rho)]
    numbers = {"weight_prior": weight_prior_value, "bias_prior": bias_prior_value, "prior_std": prior_std}
    layout = Layout.of(seed, len(rstd), draws, inner, groups)
    plan = _backward_plan(target, layout if dy is not None else layout._replace(n_rows=0), n_cols, z.element_size())
    partial = rstd.new_empty((groups * plan.runs.programs, plan.slots, n_cols))
    dx = None if dy is None else _empty(z.shape, dy)
    dresidual = None if dy is None or dy.dtype == z.dtype else _empty(z.shape, z)
    with _on_device_of(z):
        if plan.runs.programs:
            rows, dy_rows, dsum_rows = (
                _rows(z, n_cols),
                _rows(dy, n_cols),
                None if dsum is None else _rows(dsum, n_cols),
            )
            outputs = dx, dresidual, partial
            backward_call(target, plan, rows, dy_rows, dsum_rows, parameters, seed, mean, rstd, outputs).launch()
        finalize_call(target, plan, partial, parameters, seed, dkl, gradients, numbers).launch()
    return dx, dresidual, *gradients


def forward_call(target, layout, rows, residual_rows, parameters, seed, y, sum_, mean, rstd, kl, numbers):
    """The launch of the forward kernel on `rows` (M, N); `numbers` are the prior means, its deviation, and eps."""
    n_cols = rows.shape[1]
    tile = tuning.tile(n_cols, rows.element_size(), clusters=target.clusters)
    runs = tuning.forward_runs(
        layout.group_rows, layout.draws, layout.groups, tile, n_cols * rows.element_size(), target.multiprocessors
    )
    vec = _vector_width(n_cols, rows, residual_rows)
    args = (
        rows, residual_rows, *parameters, seed, y, sum_, mean, rstd, kl,
        *_strides(vec, rows, residual_rows), *_walk(layout, runs), *_places(layout),
    )  # fmt: skip
    constants = {**numbers, "FLOOR": FLOOR, **_constants(target, layout, runs, tile, n_cols, vec)}
    kernel = forward_wide_kernel if tile.wide else forward_kernel
    return Call(kernel, (1 + runs.programs, layout.groups), args, constants, tile.num_warps, tile.num_ctas)


class BackwardPlan(NamedTuple):
    """What the two kernels of a backward agree on; `slots` of partial sums, see `kernels/backward.py`."""

    layout: Layout
    tile: tuning.Tile
    runs: tuning.Runs
    slots: int

    @property
    def span(self):
        return self.layout.noise == "shared" and self.runs.span


def _backward_plan(target, layout, n_cols, itemsize):
    merged = layout.noise == "merged" and tuning.splits_in_registers(triton.__version__)
    tile = tuning.tile(n_cols, itemsize, True, target.clusters, merged)
    runs = tuning.backward_runs(
        layout.group_rows, layout.draws, layout.groups, tile, n_cols, itemsize, target.multiprocessors
    )
    slots = 4 if layout.noise == "merged" or (layout.noise == "shared" and runs.span) else 2
    return BackwardPlan(layout, tile, runs, slots)


def backward_call(target, plan, rows, dy_rows, dsum_rows, parameters, seed, mean, rstd, outputs):
    """The launch of the backward kernel; `outputs`: dx, dresidual (M, N), partial sums (programs, slots, N)."""
    n_cols, (layout, tile, runs, slots) = rows.shape[1], plan
    weight, bias, weight_rho, bias_rho, *_ = parameters
    vec = _vector_width(n_cols, rows, dy_rows, dsum_rows)
    args = (
        rows, dy_rows, dsum_rows, weight, weight_rho, bias_rho, seed, mean, rstd, *outputs,
        *([rstd.new_empty((layout.n_rows, 2))] if tile.wide else []),
        *_strides(vec, rows, dy_rows, dsum_rows), *_walk(layout, runs), *_places(layout),
    )  # fmt: skip
    constants = {
        "HAS_BIAS": bias is not None, "SLOTS": slots, **({} if tile.wide else {"HALVES": tile.halves}),
        **_constants(target, layout, runs, tile, n_cols, vec),
    }  # fmt: skip
    kernel = backward_wide_kernel if tile.wide else backward_kernel
    return Call(kernel, (runs.programs, layout.groups), args, constants, tile.num_warps, tile.num_ctas)


def finalize_call(target, plan, partial, parameters, seed, dkl, gradients, numbers):
    """The launch of the finalizer: partial sums to the gradients of the parameters."""
    layout, n_cols = plan.layout, partial.shape[2]
    block_p, block_n, num_warps = tuning.finalizer_tile(n_cols)
    args = (
        partial, *parameters, seed, dkl, *gradients,
        plan.runs.programs, plan.runs.runs_per_share, *_places(layout),
    )  # fmt: skip
    constants = {
        **numbers, "FLOOR": FLOOR, "NOISE": layout.noise, "SPAN": plan.span, "GROUPED": layout.groups > 1,
        "FAST": target.fast, "N": n_cols, "SLOTS": plan.slots, "BLOCK_P": block_p, "BLOCK_N": block_n,
    }  # fmt: skip
    return Call(finalize_kernel, (triton.cdiv(n_cols, block_n), layout.groups), args, constants, num_warps)


def _walk(layout, runs):
    """Kernel arguments: how programs walk through the rows of a group."""
    return layout.draws, layout.inner, layout.rows_per_draw, runs.run_rows, runs.runs_per_share, runs.share_rows


def _places(layout):
    """Kernel arguments: where a group's rows and draws lie among all."""
    return layout.group_rows, layout.all_draws, layout.all_inner


def _constants(target, layout, runs, tile, n_cols, vec):
    return {
        "NOISE": layout.noise, "SPAN": layout.noise == "shared" and runs.span, "ORDER": layout.order,
        "GROUPED": layout.groups > 1, "FAST": target.fast, "N": n_cols, "VEC": vec,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages,
    }  # fmt: skip


def _empty(shape, like):
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _rows(x, n_cols):
    """x as (M, N) with neighbouring features adjacent in memory: a view where its strides allow, else one copy."""
    rows = x.reshape(-1, n_cols) if x.numel() else x.new_empty((0, n_cols))
    return rows if rows.stride(1) == 1 or n_cols == 1 else rows.contiguous()


def _vector_width(n_cols, *operands):
    """Elements, a power of two up to 8, to which every row of the operands starts aligned."""
    offsets = (
        v for rows in operands if rows is not None for v in (rows.stride(0), rows.data_ptr() // rows.element_size())
    )
    return math.gcd(8, n_cols, *offsets)


def _strides(vec, *operands):
    return [0 if rows is None else rows.stride(0) // vec for rows in operands]


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
