"""Allocates outputs, chooses tiles and grids, and launches the kernels. Knows no autograd.

Same arguments and results as `klnorm.cpu`. Forward launches one kernel, backward two. What a launch takes beside its
tensors is worked out once for every shape, as on small inputs the host is what takes the time.
"""

import contextlib
import dataclasses
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
from .versions import reaches

_KEEPS = reaches(triton.__version__, (3, 3))  # compiled kernels; before, they took other arguments
_NO_TENSORS = {type(None), int}  # among a kernel's inputs; an int is a seed, see `klnorm.seeds`


class Target(NamedTuple):
    """What a launch needs to know of a device.

    `fast`: the noise may use NVIDIA's own instructions; `clusters`: a row may be split over several multiprocessors.
    """

    device: torch.device
    multiprocessors: int
    fast: bool
    clusters: bool


@dataclasses.dataclass(eq=False)
class Call:
    """A kernel with everything that its launches take but the tensors, which are its first arguments.

    `grid`: programs, each of `num_ctas` blocks, and groups; `sizes`: the arguments after the tensors; `constants`: the
    others, by name. It belongs to one device, as the compiled kernel does.
    """

    kernel: object
    grid: tuple
    sizes: tuple
    constants: dict
    num_warps: int
    num_ctas: int = 1

    def __post_init__(self):
        ordered = [self.constants[name] for name in self.kernel.arg_names if name in self.constants]
        self._rest = *self.sizes, *ordered
        self._compiled = {}

    @property
    def options(self):
        """Of the compiler; fused multiply-adds explicitly, since Triton's default for them changes with its version."""
        return {"num_warps": self.num_warps, "num_ctas": self.num_ctas, "enable_fp_fusion": True}

    def launch(self, inputs, outputs):
        """Launch, on the current device; `outputs` are new tensors, of dtypes that follow from the inputs'.

        Triton examines every argument of every launch, constants too, which takes longer than all else here. So its
        compiled kernel is kept and launched directly where all that another one could be needed for is the same:
        which inputs there are, their dtypes, and whether they are aligned to 16 bytes, as new memory always is.
        """
        kinds = tuple([(t.dtype, t.data_ptr() % 16) if type(t) not in _NO_TENSORS else type(t) for t in inputs])
        launch = self._compiled.get(kinds)
        if launch is not None:
            launch(*inputs, *outputs, *self._rest)
            return
        compiled = self.kernel[self.grid](*inputs, *outputs, *self._rest, **self.options)
        if _KEEPS and compiled is not None:  # Triton's interpreter compiles nothing
            self._compiled[kinds] = compiled[(*self.grid, 1)]


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
    def of(cls, sampled, n_rows, draws, inner, groups):
        noise = noise_mode(sampled, n_rows, draws)
        if noise != "shared" or not n_rows:
            return cls(noise, n_rows, groups, 1, max(1, n_rows // groups), 1, max(1, n_rows))
        return cls(noise, n_rows, groups, *group_layout(draws, inner, n_rows // groups), draws, inner)


def forward(
    x, residual, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed,
    weight_prior_value, bias_prior_value, prior_std, eps, draws, inner, groups, rms,
):  # fmt: skip
    """(y, sum, kl, mean, rstd); the arguments are those of the operator in `klnorm.ops`."""
    acc, device, n_cols = accumulation_dtype(x), x.device, weight.numel() // groups
    n_rows = x.numel() // n_cols
    rows, residual_rows = _rows(x, n_cols), None if residual is None else _rows(residual, n_cols)
    call = forward_call(
        _target(device), seed is not None, n_rows, n_cols, x.element_size(), draws, inner, groups, rms,
        *_access(n_cols, rows, residual_rows), weight_prior_value, bias_prior_value, prior_std, eps,
    )  # fmt: skip
    y, sum_ = _empty_like(x), None if residual is None else _empty_like(residual)
    kl = torch.empty(() if groups == 1 else groups, dtype=acc, device=device)
    rstd = torch.empty(n_rows, dtype=acc, device=device)
    mean = None if rms else torch.empty_like(rstd)
    parameters = _contiguous(weight, bias, weight_rho, bias_rho, weight_prior, bias_prior)
    with _on_device_of(x):
        call.launch((rows, residual_rows, *parameters, seed), (y, sum_, mean, rstd, kl))
    return y, sum_, kl, mean, rstd


def backward(
    dy, dsum, dkl, z, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed, mean, rstd,
    weight_prior_value, bias_prior_value, prior_std, draws, inner, groups,
):  # fmt: skip
    """(dx, dresidual, dweight, dbias, dweight_rho, dbias_rho), None where there is none, and dresidual like dx as well.

    `z` is what was normalized, x or its sum with the residual; `dy` and `dkl` may be None.
    """
    acc, device, n_cols = rstd.dtype, z.device, weight.numel() // groups
    operands = [None if t is None or dy is None else _rows(t, n_cols) for t in (z, dy, dsum)]
    plan = backward_plan(
        _target(device), seed is not None, len(rstd), n_cols, z.element_size(), draws, inner, groups,
        dy is not None, bias is not None, *_access(n_cols, *operands), weight_prior_value, bias_prior_value, prior_std,
    )  # fmt: skip
    parameters = _contiguous(weight, bias, weight_rho, bias_rho, weight_prior, bias_prior)
    gradients = [None if p is None else _empty_like(p) for p in (weight, bias, weight_rho, bias_rho)]
    partial, *row_sums = [torch.empty(shape, dtype=acc, device=device) for shape in plan.buffers]
    dx = None if dy is None else _empty_like(dy)
    dresidual = None if dy is None or dy.dtype == z.dtype else _empty_like(z)
    with _on_device_of(z):
        if plan.rows is not None:
            inputs = *operands, parameters[0], parameters[2], parameters[3], seed, mean, rstd
            plan.rows.launch(inputs, (dx, dresidual, partial, *row_sums))
        plan.finalize.launch((partial, *parameters, seed, *_contiguous(dkl)), gradients)
    return dx, dresidual, *gradients


@functools.lru_cache(1024)
def forward_call(
    target, sampled, n_rows, n_cols, itemsize, draws, inner, groups, rms, vec, strides,
    weight_prior, bias_prior, prior_std, eps,
):  # fmt: skip
    """The launch of the forward kernel; `vec` and `strides`: `_access` to x and the residual."""
    layout = Layout.of(sampled, n_rows, draws, inner, groups)
    tile = tuning.tile(n_cols, itemsize, clusters=target.clusters)
    runs = tuning.forward_runs(layout.group_rows, layout.draws, groups, tile, n_cols * itemsize, target.multiprocessors)
    sizes = *strides, *_walk(layout, runs), *_places(layout)
    constants = {
        "weight_prior": weight_prior, "bias_prior": bias_prior, "prior_std": prior_std, "FLOOR": FLOOR, "eps": eps,
        **_constants(target, layout, runs, tile, n_cols, vec),
    }  # fmt: skip
    kernel = forward_wide_kernel if tile.wide else forward_kernel
    return Call(kernel, (1 + runs.programs, groups), sizes, constants, tile.num_warps, tile.num_ctas)


class BackwardPlan(NamedTuple):
    """The two launches of a backward, that of the rows None where there is nothing to do for them.

    `buffers`: shapes of the partial sums, see `kernels/backward.py`, and for wide rows of their sums.
    """

    rows: Call | None
    finalize: Call
    buffers: tuple


@functools.lru_cache(1024)
def backward_plan(
    target, sampled, n_rows, n_cols, itemsize, draws, inner, groups, has_dy, has_bias, vec, strides,
    weight_prior, bias_prior, prior_std,
):  # fmt: skip
    """The launches of a backward; `vec` and `strides`: `_access` to z, dy and dsum."""
    layout = Layout.of(sampled, n_rows, draws, inner, groups)
    splits = tuning.splits_in_registers(triton.__version__)
    tile = tuning.tile(n_cols, itemsize, True, target.clusters, layout.noise == "merged" and has_bias, splits)
    layout = layout if has_dy else layout._replace(n_rows=0)
    runs = tuning.backward_runs(layout.group_rows, layout.draws, groups, tile, n_cols, itemsize, target.multiprocessors)
    constants = {"HAS_BIAS": has_bias, **_constants(target, layout, runs, tile, n_cols, vec)}
    constants["SLOTS"] = 4 if layout.noise == "merged" or constants["SPAN"] else 2
    if not tile.wide:
        constants["HALVES"] = tile.halves
    sizes = *strides, *_walk(layout, runs), *_places(layout)
    kernel = backward_wide_kernel if tile.wide else backward_kernel
    rows = Call(kernel, (runs.programs, groups), sizes, constants, tile.num_warps, tile.num_ctas)
    partial = groups * runs.programs, constants["SLOTS"], n_cols
    buffers = (partial, (n_rows, 2)) if tile.wide else (partial,)

    block_p, block_n, num_warps = tuning.finalizer_tile(n_cols)
    sizes = runs.programs, runs.runs_per_share, *_places(layout)
    constants = {
        "weight_prior": weight_prior, "bias_prior": bias_prior, "prior_std": prior_std, "FLOOR": FLOOR,
        **{name: constants[name] for name in ("NOISE", "SPAN", "GROUPED", "FAST", "N", "SLOTS")},
        "BLOCK_P": block_p, "BLOCK_N": block_n,
    }  # fmt: skip
    finalize = Call(finalize_kernel, (triton.cdiv(n_cols, block_n), groups), sizes, constants, num_warps)
    return BackwardPlan(rows if runs.programs else None, finalize, buffers)


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


def _empty_like(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _rows(x, n_cols):
    """x, or as (M, N), with neighbouring features adjacent in memory: itself where its strides allow, else one copy."""
    if x.is_contiguous():
        return x
    rows = x.reshape(-1, n_cols) if x.numel() else x.new_empty((0, n_cols))
    return rows if rows.stride(1) == 1 or n_cols == 1 else rows.contiguous()


def _access(n_cols, *operands):
    """(vec, strides from row to row in units of it) of what `_rows` returns, or of None.

    `vec`: elements, a power of two up to 8, to which every row of the operands starts aligned.
    """
    strides, starts = [], []
    for rows in operands:
        if rows is None:
            strides.append(0)
        else:
            strides.append(n_cols if rows.is_contiguous() else rows.stride(0))
            starts.append(rows.data_ptr() // rows.element_size())
    vec = math.gcd(8, n_cols, *strides, *starts)
    return vec, tuple([stride // vec for stride in strides])


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def _multiprocessors(device):
    """Multiprocessors of a GPU; a handful for CPU tensors, which reach this module in Triton's interpreter alone."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _capability(device):
    """Compute capability; (0, 0) where NVIDIA's own instructions do not run: other devices, Triton's interpreter."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    native = isinstance(forward_kernel, triton.JITFunction)
    return torch.cuda.get_device_capability(device) if nvidia and native else (0, 0)


def _fast(device):
    """Whether the noise may use NVIDIA's own instructions: those of sm_80."""
    return _capability(device) >= (8, 0)


@functools.cache
def _target(device):
    clusters = tuning.has_clusters(_capability(device), triton.__version__)
    return Target(device, _multiprocessors(device), _fast(device), clusters)


def _on_device_of(x):
    """Triton launches on the current device, which must be that of x."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
