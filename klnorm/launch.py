"""Allocates outputs, chooses tiles and grids, and launches the kernels. Knows no autograd.

Same arguments and results as `klnorm.cpu`. Forward launches one kernel, backward two. What a launch takes beside its
tensors is worked out once for every shape, as on small inputs the host is what takes the time.
"""

import dataclasses
import functools
import math
import operator
from typing import NamedTuple

import torch
import triton

from . import tuning
from .kernels.backward import backward_kernel, backward_wide_kernel
from .kernels.finalize import finalize_kernel
from .kernels.forward import forward_kernel, forward_wide_kernel
from .reference.kl_norm import FLOOR
from .spec import dtypes_of
from .versions import reaches

# Versions whose compiled kernels can be launched directly, as was tried out; see `Call.launch`.
_DIRECT = reaches(triton.__version__, (3, 6)) and not reaches(triton.__version__, (3, 8))


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What a launch needs to know of a device.

    `fast`: the noise may use NVIDIA's own instructions; `clusters`: a row may be split over several multiprocessors.
    """

    device: torch.device
    multiprocessors: int
    fast: bool
    clusters: bool


@dataclasses.dataclass(eq=False)
class Call:
    """A kernel with everything that its launches take but tensors and seed, which are its first arguments.

    `device` is where the tensors are, `dtypes` tells what their dtypes are; `grid`: programs, each of `num_ctas`
    blocks, and groups; `sizes`: the arguments after the seed; `constants`: the others, by name.
    """

    kernel: object
    device: torch.device
    dtypes: tuple
    grid: tuple
    sizes: tuple
    constants: dict
    num_warps: int
    num_ctas: int = 1

    def __post_init__(self):
        ordered = tuple([self.constants[name] for name in self.kernel.arg_names if name in self.constants])
        widths = tuple([size < 2**31 for size in self.sizes])
        self._rest = *self.sizes, *ordered
        self._compiled = _compiled(
            self.kernel, self.device, self.dtypes, widths, ordered, self.num_warps, self.num_ctas
        )
        self._launchers = {}
        self._index = self.device.index if self.device.type == "cuda" else None

    @property
    def options(self):
        """Of the compiler; fused multiply-adds explicitly, since Triton's default for them changes with its version."""
        return {"num_warps": self.num_warps, "num_ctas": self.num_ctas, "enable_fp_fusion": True}

    def launch(self, inputs, outputs, seed):
        """Launch with new `outputs` and a seed that is an int, a tensor or None.

        Triton examines every argument of every launch, constants too, which takes longer than all else here. So what
        it has compiled is kept, whatever the sizes, and launched directly where nothing differs that another kernel
        could be needed for: the kind of the seed, and which tensors are aligned to 16 bytes, as new memory always is.
        """
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.launch(inputs, outputs, seed)
        pointers = [0 if t is None else t.data_ptr() for t in inputs]
        aligned = not functools.reduce(operator.or_, pointers) % 16
        kind = type(seed) if aligned else (type(seed), *[p % 16 for p in pointers])
        launcher = self._launchers.get(kind) or self._launcher(kind)
        if launcher is None or _is_observed(self.kernel):
            return self._launch_by_triton(kind, inputs, outputs, seed)
        pointers += [0 if t is None else t.data_ptr() for t in outputs]
        return launcher(*pointers, seed if type(seed) is int or seed is None else seed.data_ptr(), *self._rest)

    def _launcher(self, kind):
        """The launcher of this grid, of a kernel that a call of other sizes may have had compiled."""
        compiled = self._compiled.get(kind)
        if compiled is not None:
            self._launchers[kind] = compiled[(*self.grid, 1)]
        return self._launchers.get(kind)

    def _launch_by_triton(self, kind, inputs, outputs, seed):
        compiled = self.kernel[self.grid](*inputs, *outputs, seed, *self._rest, **self.options)
        if _DIRECT and compiled is not None and not _is_observed(self.kernel):  # the interpreter compiles nothing
            self._compiled[kind] = compiled


@functools.lru_cache(4096)
def _compiled(kernel, device, dtypes, widths, constants, num_warps, num_ctas):
    """What Triton has compiled for launches that agree in these: kind, see `Call.launch` -> compiled kernel."""
    return {}


def _is_observed(kernel):
    """Whether Triton has to make every launch itself, for what somebody wants to see of it: debugging, instrumentation.

    Its hooks before and after launches are called all the same.
    """
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    return (
        runtime.debug or runtime.add_stages_inspection_hook or compilation.instrumentation_mode or kernel.pre_run_hooks
    )


def forward(x, residual, parameters, seed, spec):
    """(y, sum, kl, statistics) of `Parameters` and a `Spec`; statistics (M, 2): mean and rstd, (M, 1) for RMSNorm."""
    device, rows = x.device, spec.rows
    operands, vec, strides = _access(spec.n_cols, (x, residual))
    call, acc = forward_call(spec, _target(device), vec, strides)
    y, sum_ = _empty_like(x), None if residual is None else _empty_like(residual)
    statistics = torch.empty((rows.n_rows, 1 if spec.kind == "rms" else 2), dtype=acc, device=device)
    kl = statistics.new_empty(() if rows.groups == 1 else rows.groups)
    call.launch((*operands, *_contiguous(parameters)), (y, sum_, statistics, kl), seed)
    return y, sum_, kl, statistics


def backward(dy, dsum, dkl, z, parameters, seed, statistics, spec):
    """(dx, dresidual, dweight, dbias, dweight_rho, dbias_rho), None where there is none, and dresidual like dx as well.

    `z` is what was normalized, x or its sum with the residual; `dy` and `dkl` may be None.
    """
    operands, vec, strides = _access(spec.n_cols, (z, dy, dsum) if dy is not None else (None,) * 3)
    plan = backward_plan(spec, _target(z.device), dtypes_of(dy, dsum, dkl), vec, strides)
    parameters = _contiguous(parameters)
    weight, bias, weight_rho, bias_rho, *_ = parameters
    buffers = [statistics.new_empty(shape) for shape in plan.buffers]
    dx = None if dy is None else _empty_like(dy)
    dresidual = None if dy is None or dy.dtype == z.dtype else _empty_like(z)
    if plan.rows is not None:
        plan.rows.launch((*operands, weight, weight_rho, bias_rho, statistics), (dx, dresidual, *buffers), seed)
    gradients = [None if p is None else torch.empty_like(p) for p in (weight, bias, weight_rho, bias_rho)]
    plan.finalize.launch((buffers[0], None if dkl is None else dkl.contiguous(), *parameters), gradients, seed)
    return dx, dresidual, *gradients


@functools.lru_cache(4096)
def forward_call(spec, target, vec, strides):
    """(the launch of the forward kernel, the dtype it computes in), for an `_access` to x and the residual."""
    rows, n_cols, itemsize = spec.rows, spec.n_cols, spec.dtypes[0].itemsize
    draws, _ = rows.in_group
    tile = tuning.tile(n_cols, itemsize, clusters=target.clusters)
    runs = tuning.forward_runs(rows.group_rows, draws, rows.groups, tile, n_cols * itemsize, target.multiprocessors)
    sizes = *strides, *_walk(rows, runs)
    constants = {
        **_prior(spec), "eps": spec.eps, "IS_RMS": spec.kind == "rms",
        **_constants(target, rows, runs, tile, n_cols, vec),
    }  # fmt: skip
    kernel = forward_wide_kernel if tile.wide else forward_kernel
    grid = 1 + runs.programs, rows.groups
    call = Call(kernel, target.device, spec.dtypes, grid, sizes, constants, tile.num_warps, tile.num_ctas)
    return call, torch.float64 if itemsize == 8 else torch.float32


class BackwardPlan(NamedTuple):
    """The two launches of a backward, that of the rows None where there is nothing to do for them.

    `buffers`: shapes of the partial sums, see `kernels/backward.py`, and for wide rows of their sums.
    """

    rows: Call | None
    finalize: Call
    buffers: tuple


@functools.lru_cache(4096)
def backward_plan(spec, target, cotangents, vec, strides):
    """The launches of a backward: `dtypes_of` dy, dsum and dkl, `_access` to z, dy and dsum."""
    rows, n_cols = spec.rows, spec.n_cols
    z = spec.dtypes[1] or spec.dtypes[0]
    has_dy, has_bias, itemsize = cotangents[0] is not None, spec.dtypes[3] is not None, z.itemsize
    splits = tuning.splits_in_registers(triton.__version__)
    tile = tuning.tile(n_cols, itemsize, True, target.clusters, rows.noise == "merged" and has_bias, splits)
    draws, _ = rows.in_group
    runs = tuning.backward_runs(
        rows.group_rows if has_dy else 0, draws, rows.groups, tile, n_cols, itemsize, target.multiprocessors
    )
    constants = {
        "IS_RMS": spec.kind == "rms", "HAS_BIAS": has_bias, **_constants(target, rows, runs, tile, n_cols, vec)
    }  # fmt: skip
    constants["SLOTS"] = 4 if rows.noise == "merged" or constants["SPAN"] else 2
    if not tile.wide:
        constants["HALVES"] = tile.halves
    kernel = backward_wide_kernel if tile.wide else backward_kernel
    grid, sizes = (runs.programs, rows.groups), (*strides, *_walk(rows, runs))
    dtypes = z, *cotangents, *spec.dtypes
    of_rows = Call(kernel, target.device, dtypes, grid, sizes, constants, tile.num_warps, tile.num_ctas)
    partial = rows.groups * runs.programs, constants["SLOTS"], n_cols
    buffers = (partial, (rows.n_rows, 2)) if tile.wide else (partial,)

    block_p, block_n, num_warps = tuning.finalizer_tile(n_cols)
    sizes = runs.programs, runs.runs_per_share, *_places(rows)
    constants = {
        **_prior(spec),
        **{name: constants[name] for name in ("NOISE", "SPAN", "GROUPED", "FAST", "N", "SLOTS")},
        "BLOCK_P": block_p, "BLOCK_N": block_n,
    }  # fmt: skip
    grid = triton.cdiv(n_cols, block_n), rows.groups
    finalize = Call(finalize_kernel, target.device, dtypes, grid, sizes, constants, num_warps)
    return BackwardPlan(of_rows if runs.programs else None, finalize, buffers)


def _walk(rows, runs):
    """Kernel arguments: how programs walk through the rows of a group, and where these lie among all."""
    draws, inner = rows.in_group
    rows_per_draw = rows.group_rows // draws
    return draws, inner, rows_per_draw, runs.run_rows, runs.runs_per_share, runs.share_rows, *_places(rows)


def _places(rows):
    """Kernel arguments: where a group's rows and draws lie among all."""
    return rows.group_rows, rows.draws, max(1, rows.inner)


def _prior(spec):
    prior = spec.prior
    return {"weight_prior": prior.weight, "bias_prior": prior.bias, "prior_std": prior.std, "FLOOR": FLOOR}


def _constants(target, rows, runs, tile, n_cols, vec):
    draws, inner = rows.in_group
    order = "rows" if rows.noise != "shared" or draws * inner >= rows.group_rows else "blocked"
    return {
        "NOISE": rows.noise, "SPAN": rows.noise == "shared" and runs.span,
        "ORDER": "strided" if order == "blocked" and inner == 1 else order,
        "GROUPED": rows.groups > 1, "FAST": target.fast, "N": n_cols, "VEC": vec,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages,
    }  # fmt: skip


def _empty_like(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _access(n_cols, operands):
    """(operands as rows, vec, strides from row to row in units of it); an operand may be None.

    `vec`: elements, a power of two up to 8, to which every row of the operands starts aligned.
    """
    found, strides, starts = [], [], [8, n_cols]
    for rows in operands:
        stride = 0
        if rows is not None:
            stride = n_cols
            if not rows.is_contiguous():
                rows, stride = _rows(rows, n_cols)
            starts += rows.data_ptr() // rows.itemsize, stride
        found.append(rows)
        strides.append(stride)
    vec = math.gcd(*starts)
    return found, vec, tuple([stride // vec for stride in strides])


def _rows(x, n_cols):
    """x as (M, N), with neighbouring features adjacent in memory, and the stride of its rows.

    Itself where its strides allow, else one copy.
    """
    rows = x.reshape(-1, n_cols) if x.numel() else x.new_empty((0, n_cols))
    rows = rows if rows.stride(1) == 1 or n_cols == 1 else rows.contiguous()
    return rows, n_cols if rows.is_contiguous() else rows.stride(0)


def _contiguous(tensors):
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


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
