"""Allocates outputs, chooses tiles and grids, and launches the kernels; autograd is in `klnorm.ops`.

Arguments and results are those of `klnorm.cpu`. Forward launches one kernel and backward two. Preparing parameters
takes one more in both, wide rows one more in backward. The launch arguments that are not tensors are computed once for
every shape, because on small inputs the host's work takes most of the time.
"""

import dataclasses
import functools
import math
import operator
from typing import NamedTuple

import torch
import triton

from . import tuning
from .kernels.backward import backward_kernel
from .kernels.finalize import finalize_kernel
from .kernels.forward import forward_kernel
from .kernels.gaussian import LEAST_VARIANCE
from .kernels.prepare import prepare_kernel
from .kernels.rows import Mode, Tile
from .kernels.wide import dx_wide_kernel, forward_wide_kernel, sums_wide_kernel
from .spec import Parameters, dtypes_of, empty_like
from .versions import reaches

# Versions of Triton with which direct launches of compiled kernels were tried and work; see `Call.launch`.
_DIRECT = reaches(triton.__version__, (3, 6)) and not reaches(triton.__version__, (3, 8))


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """Properties of a device that a launch needs. `fast`: whether the noise may use NVIDIA's own instructions."""

    device: torch.device
    multiprocessors: int
    fast: bool


@dataclasses.dataclass(eq=False)
class Call:
    """A kernel with all arguments of its launches except tensors and seed, which come first.

    `device`: of the tensors; `dtypes`: their dtypes, and which of them are None; `grid`: programs, groups and, if rows
    are read in pieces, pieces; `numbers`: the arguments after the tensors; `constants`: compile-time arguments by name.
    """

    kernel: object
    device: torch.device
    dtypes: tuple
    grid: tuple
    numbers: tuple
    constants: dict
    num_warps: int

    def __post_init__(self):
        ordered = tuple([self.constants[name] for name in self.kernel.arg_names if name in self.constants])
        widths = tuple([number < 2**31 for number in self.numbers])
        self._rest = *self.numbers, *ordered
        self._compiled = _compiled(self.kernel, self.device, self.dtypes, widths, ordered, self.num_warps)
        self._launchers = {}
        self._index = self.device.index if self.device.type == "cuda" else None

    @property
    def options(self):
        """Return compiler options; fused multiply-adds are explicit: their default differs between Triton versions."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}

    def launch(self, inputs, parameters, seed, outputs):
        """Launch with new memory for `outputs`, tensors or tuples of them, and a seed that is an int, a tensor or None.

        Triton examines every argument of every launch, constants too, which takes longer than everything else here. A
        compiled kernel is therefore kept and launched directly when the same kernel applies: the same type of seed and
        the same tensors aligned to 16 bytes, as new memory always is.
        """
        if self._index is not None and self._index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self.launch(inputs, parameters, seed, outputs)
        pointers, of_parameters = _pointers(inputs), _pointers(parameters)
        aligned = not functools.reduce(operator.or_, pointers + of_parameters) % 16
        kind = type(seed) if aligned else (type(seed), *[p % 16 for p in pointers + of_parameters])
        launcher = self._launchers.get(kind) or self._launcher(kind)
        if launcher is None or _is_observed(self.kernel):
            return self._launch_by_triton(kind, inputs, parameters, seed, outputs)
        seed = seed if type(seed) is int or seed is None else seed.data_ptr()
        return launcher(*pointers, of_parameters, seed, *_pointers(outputs), *self._rest)

    def _launcher(self, kind):
        """Return the launcher of the compiled kernel for this grid; None if no call has compiled it for `kind` yet."""
        compiled = self._compiled.get(kind)
        if compiled is not None:
            self._launchers[kind] = compiled[(*self.grid, 1)[:3]]
        return self._launchers.get(kind)

    def _launch_by_triton(self, kind, inputs, parameters, seed, outputs):
        compiled = self.kernel[self.grid](*inputs, parameters, seed, *outputs, *self._rest, **self.options)
        if _DIRECT and compiled is not None and not _is_observed(self.kernel):  # the interpreter compiles nothing
            self._compiled[kind] = compiled


@functools.lru_cache(4096)
def _compiled(kernel, device, dtypes, widths, constants, num_warps):
    """Return the compiled kernels {kind: kernel} that all calls with these arguments share; see `Call.launch`."""
    return {}


def _pointers(tensors):
    """Return the addresses of tensors as Triton's launcher takes them: nested like the tensors, 0 for None."""
    return tuple([0 if t is None else _pointers(t) if type(t) is tuple else t.data_ptr() for t in tensors])


def _is_observed(kernel):
    """Whether debugging or instrumentation is on, for which Triton itself has to make every launch.

    Direct launches call Triton's hooks before and after launches, too.
    """
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    return (
        runtime.debug or runtime.add_stages_inspection_hook or compilation.instrumentation_mode or kernel.pre_run_hooks
    )


def forward(x, residual, parameters, seed, spec):
    """Return (y, sum or None, kl, statistics); statistics are mean and rstd (M, 2), rstd alone (M, 1) for RMSNorm."""
    operands, vec, strides = _access(spec.n_cols, (x, residual))
    plan = forward_plan(spec, _target(x.device), vec, strides)
    parameters = _contiguous(parameters)
    y, sum_ = empty_like(x, spec.out_dtype), empty_like(residual)
    statistics = torch.empty(plan.statistics, dtype=plan.dtype, device=x.device)
    kl = statistics.new_empty(plan.kl)
    prepared = _prepared(plan, parameters, seed, statistics)
    plan.rows.launch((*operands, prepared), parameters, seed, ((y, sum_, statistics), kl))
    return y, sum_, kl, statistics


def backward(dy, dsum, dkl, z, parameters, seed, statistics, spec):
    """Return (dx, dresidual, dweight, dbias, dweight_rho, dbias_rho), None for a gradient that does not exist.

    dresidual is also None if it equals dx. `z`: the normalized tensor, x or its sum with the residual; `dy`, `dsum` and
    `dkl` may be None. Scratch memory: 16 bytes per feature and program for partial sums, see
    `tuning.backward_programs`; 8 bytes per feature and draw for prepared parameters.
    """
    operands, vec, strides = _access(spec.n_cols, (z, dy, dsum) if dy is not None else (None,) * 3)
    plan = backward_plan(spec, _target(z.device), dtypes_of(dy, dsum, dkl), vec, strides)
    parameters = _contiguous(parameters)
    partial = statistics.new_empty(plan.partial)
    dx = dresidual = None
    if dy is not None:
        x_dtype = spec.dtypes[0]
        dx, dresidual = empty_like(z, x_dtype), None if x_dtype == z.dtype else empty_like(z)
    if plan.rows is not None:
        inputs = (*operands, statistics, _prepared(plan, parameters, seed, statistics))
        if plan.sums is None:
            plan.rows.launch(inputs, parameters, seed, ((dx, dresidual), partial))
        else:
            plan.rows.launch(inputs, parameters, seed, ((dx, dresidual),))
            plan.sums.launch((*operands[:2], *inputs[3:]), parameters, seed, (partial,))
    gradients = tuple([None if p is None else torch.empty_like(p) for p in parameters[:4]])
    plan.finalize.launch((partial, None if dkl is None else dkl.contiguous()), parameters, seed, (gradients,))
    return dx, dresidual, *gradients


def _prepared(plan, parameters, seed, like):
    """Launch the preparation of the parameters and return its output; None if every program prepares its own."""
    if plan.prepare is None:
        return None
    prepared = like.new_empty(plan.prepared)
    plan.prepare.launch((), parameters, seed, (prepared,))
    return prepared


class ForwardPlan(NamedTuple):
    """The launches of a forward and the shapes of its tensors; `prepare` is None if each program prepares parameters.

    `dtype`: of statistics, KL and prepared parameters.
    """

    prepare: Call | None
    rows: Call
    prepared: tuple
    statistics: tuple
    kl: tuple
    dtype: torch.dtype


class BackwardPlan(NamedTuple):
    """The launches of a backward, None if not needed, and the shapes of its scratch tensors.

    `sums`: the separate launch for the column sums of wide rows.
    """

    prepare: Call | None
    rows: Call | None
    sums: Call | None
    finalize: Call
    prepared: tuple
    partial: tuple


@functools.lru_cache(4096)
def forward_plan(spec, target, vec, strides):
    """Return the launches of a forward; `vec`, `strides`: of x and the residual, from `_access`."""
    rows, n_cols, itemsize = spec.rows, spec.n_cols, spec.dtypes[0].itemsize
    shape, (draws, _) = tuning.forward_shape(n_cols, itemsize), rows.in_group
    prepare, prepared = _prepare(spec, target, 0.0)
    kernel = forward_wide_kernel if tuning.is_wide(n_cols, itemsize) else forward_kernel
    grid = 1 + draws * triton.cdiv(rows.group_rows // draws, shape.block_m), rows.groups
    numbers = *strides, *_numbers(rows), *spec.prior, spec.eps
    constants = {"MODE": _mode(spec, target), "TILE": _tile(spec, shape, vec)}
    of_rows = Call(kernel, target.device, _dtypes(spec, prepare), grid, numbers, constants, shape.num_warps)
    statistics, dtype = (rows.n_rows, 1 if spec.kind == "rms" else 2), torch.float64 if itemsize == 8 else torch.float32
    return ForwardPlan(prepare, of_rows, prepared, statistics, rows.kl_shape, dtype)


@functools.lru_cache(4096)
def backward_plan(spec, target, cotangents, vec, strides):
    """Return the launches of a backward; `cotangents`: dtypes of dy, dsum, dkl; `vec`, `strides`: of z, dy, dsum."""
    rows, n_cols = spec.rows, spec.n_cols
    z = spec.dtypes[1] or spec.dtypes[0]
    merged, mode = rows.noise == "merged", _mode(spec, target)
    prepare = of_rows = sums = None
    prepared, programs, many_draws = (), 0, False
    if cotangents[0] is not None and rows.n_rows:
        prepare, prepared = _prepare(spec, target, LEAST_VARIANCE.value)
        dtypes, numbers = (z, *cotangents, *_dtypes(spec, prepare)), (*strides, *_numbers(rows))
        itemsize = max(z.itemsize, cotangents[0].itemsize)
        wide = tuning.is_wide(n_cols, itemsize)
        shape = (tuning.sums_wide_shape if wide else tuning.backward_shape)(n_cols, itemsize, merged)
        programs, many_draws = tuning.backward_programs(rows, shape, n_cols, itemsize, target.multiprocessors)
        constants = {"MANY_DRAWS": many_draws, "MODE": mode, "TILE": _tile(spec, shape, vec)}
        grid = programs, rows.groups
        if not wide:
            of_rows = Call(backward_kernel, target.device, dtypes, grid, numbers, constants, shape.num_warps)
        else:
            grid, of_sums = (*grid, triton.cdiv(n_cols, shape.block_n)), (*numbers[:2], *numbers[3:])
            sums = Call(sums_wide_kernel, target.device, dtypes, grid, of_sums, constants, shape.num_warps)
            shape, (draws, _) = tuning.dx_wide_shape(n_cols, itemsize), rows.in_group
            grid = draws * triton.cdiv(rows.group_rows // draws, shape.block_m), rows.groups
            constants = {"MODE": mode, "TILE": _tile(spec, shape, vec)}
            of_rows = Call(dx_wide_kernel, target.device, dtypes, grid, numbers, constants, shape.num_warps)
    shape = tuning.finalizer_shape(n_cols)
    draws, _, *places = _numbers(rows)
    numbers = programs, draws, *places, *spec.prior
    constants = {"MANY_DRAWS": many_draws, "MODE": mode._replace(ORDER="rows"), "TILE": _tile(spec, shape)}
    grid, dtypes = (triton.cdiv(n_cols, shape.block_n), rows.groups), (z, *cotangents, *spec.dtypes)
    finalize = Call(finalize_kernel, target.device, dtypes, grid, numbers, constants, shape.num_warps)
    slots = 4 if merged or many_draws else 2
    return BackwardPlan(prepare, of_rows, sums, finalize, prepared, (rows.groups * programs, slots, n_cols))


def _prepare(spec, target, least):
    """Return (the launch that prepares parameters or None, its output's shape); `least`: least variance of a shift."""
    rows = spec.rows
    if not tuning.prepares(rows, spec.n_cols):
        return None, ()
    shape, (draws, _, *places) = tuning.prepare_shape(spec.n_cols), _numbers(rows)
    grid = draws * triton.cdiv(spec.n_cols, shape.block_n), rows.groups
    constants = {
        "LEAST": 0.0 if rows.noise == "shared" else least,
        "MODE": _mode(spec, target)._replace(ORDER="rows"), "TILE": _tile(spec, shape),
    }  # fmt: skip
    dtypes = spec.dtypes[0].itemsize == 8, *spec.dtypes[2:]
    call = Call(prepare_kernel, target.device, dtypes, grid, (draws, *places), constants, shape.num_warps)
    halves = (spec.dtypes[3] is not None) + 1
    return call, (rows.groups * draws, 2 * halves if rows.noise == "merged" else halves, spec.n_cols)


def _dtypes(spec, prepare):
    """Return the part of `Call.dtypes` that forward and backward kernels share."""
    return *spec.dtypes, spec.out_dtype, prepare is not None


def _numbers(rows):
    """Return the kernel arguments (draws, inner and rows per draw of a group, then draws and inner of all rows)."""
    draws, inner = rows.in_group
    return draws, inner, rows.group_rows // draws, max(1, rows.draws), max(1, rows.inner)


def _mode(spec, target):
    rows = spec.rows
    draws, inner = rows.in_group
    order = "strided" if inner == 1 else "blocked"
    if rows.noise != "shared" or draws * inner >= rows.group_rows:
        order = "rows"
    grouped = "no" if rows.groups == 1 else "heads" if rows.per_head else "blocks"
    return Mode(spec.kind == "rms", rows.noise, order, grouped, spec.weight_offset, target.fast)


def _tile(spec, shape, vec=1):
    return Tile(spec.n_cols, vec, shape.block_m, shape.block_n, shape.num_stages)


def _access(n_cols, operands):
    """Return (operands as rows, vec, strides between rows in units of vec); an operand may be None.

    `vec`: a power of two up to 8; every row of the operands starts at a multiple of `vec` elements.
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
    """Return x with neighbouring features adjacent in memory, viewed as (M, N), and the stride of its rows.

    Copies x if its strides do not allow this.
    """
    rows = x.reshape(-1, n_cols) if x.numel() else x.new_empty((0, n_cols))
    rows = rows if rows.stride(1) == 1 or n_cols == 1 else rows.contiguous()
    return rows, n_cols if rows.is_contiguous() else rows.stride(0)


def _contiguous(parameters):
    return Parameters(*[t if t is None or t.is_contiguous() else t.contiguous() for t in parameters])


def _multiprocessors(device):
    """Return the number of multiprocessors; 2 for the CPU, which runs kernels only in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _fast(device):
    """Whether the noise may use NVIDIA's own instructions, those of sm_80; not in Triton's interpreter."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    native = isinstance(forward_kernel, triton.JITFunction)
    return nvidia and native and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _target(device):
    return Target(device, _multiprocessors(device), _fast(device))
