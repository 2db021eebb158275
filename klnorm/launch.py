"""Allocates outputs, chooses tiles and grids, and launches the kernels. Knows no autograd.

Same arguments and results as `klnorm.cpu`. Forward launches one kernel, backward two.
"""

import contextlib
import functools
import math

import torch
import triton

from . import tuning
from .cpu import noise_mode
from .kernels.backward import backward_kernel, backward_wide_kernel
from .kernels.finalize import finalize_kernel
from .kernels.forward import forward_kernel, forward_wide_kernel
from .reference.kl_norm import accumulation_dtype


def forward(
    x, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed,
    weight_prior_value, bias_prior_value, prior_std, eps, draws, inner,
):  # fmt: skip
    """(y, kl, mean, rstd); the arguments are those of the operator in `klnorm.ops`."""
    rows = _rows(x, weight.numel())
    n_rows, n_cols = rows.shape
    acc = accumulation_dtype(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = rows.new_empty((n_rows,), dtype=acc), rows.new_empty((n_rows,), dtype=acc)
    kl = rows.new_empty((), dtype=acc)
    noise, n_draws = _draws(seed, n_rows, draws)
    tile = tuning.tile(n_cols, x.element_size())
    runs = tuning.forward_runs(n_rows, n_draws, tile, n_cols * x.element_size(), _multiprocessors(x.device))
    vec = _vector_width(n_cols, rows)
    kernel = forward_wide_kernel if tile.wide else forward_kernel
    with _on_device_of(x):
        kernel[(1 + runs.programs,)](
            rows, *_contiguous(weight, bias, weight_rho, bias_rho, weight_prior, bias_prior), seed,
            y, mean, rstd, kl,
            rows.stride(0) // vec, n_cols // vec, n_draws, inner, max(1, n_rows // n_draws),
            runs.run_rows, runs.runs_per_group, runs.group_rows,
            weight_prior=weight_prior_value, bias_prior=bias_prior_value, prior_std=prior_std, eps=eps,
            NOISE=noise, SPAN=noise == "shared" and runs.span, CONTIGUOUS=_in_order(noise, n_rows, n_draws, inner),
            FAST=_fast(x.device), N=n_cols, VEC=vec,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages, num_warps=tile.num_warps,
        )  # fmt: skip
    return y, kl, mean, rstd


def backward(
    dy, dkl, x, weight, bias, weight_rho, bias_rho, weight_prior, bias_prior, seed, mean, rstd,
    weight_prior_value, bias_prior_value, prior_std, draws, inner,
):  # fmt: skip
    """(dx, dweight, dbias, dweight_rho, dbias_rho), None where there is no shift; `dy` or `dkl` may be None."""
    n_rows, n_cols = mean.numel(), weight.numel()
    parameters = _contiguous(weight, bias, weight_rho, bias_rho, weight_prior, bias_prior)
    noise, n_draws = _draws(seed, n_rows, draws)
    tile = tuning.tile(n_cols, x.element_size(), backward=True)
    runs = tuning.backward_runs(n_rows, n_draws, tile, _multiprocessors(x.device))
    span = noise == "shared" and runs.span
    programs = runs.programs if dy is not None else 0
    partial = mean.new_empty((4 if noise == "merged" or span else 2, programs, n_cols))
    dx = None
    with _on_device_of(x):
        if dy is not None:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if programs:
            rows, dy_rows = _rows(x, n_cols), _rows(dy, n_cols)
            vec = _vector_width(n_cols, rows, dy_rows)
            scratch = (mean.new_empty((n_rows, 2)),) if tile.wide else ()
            (backward_wide_kernel if tile.wide else backward_kernel)[(programs,)](
                rows, dy_rows, parameters[0], parameters[2], parameters[3], seed, mean, rstd,
                dx, partial, *scratch,
                rows.stride(0) // vec, dy_rows.stride(0) // vec, n_cols // vec, n_draws, inner, n_rows // n_draws,
                runs.run_rows, runs.runs_per_group, runs.group_rows,
                NOISE=noise, SPAN=span, CONTIGUOUS=_in_order(noise, n_rows, n_draws, inner),
                FAST=_fast(x.device), N=n_cols, VEC=vec,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages, num_warps=tile.num_warps,
            )  # fmt: skip
        dweight, dweight_rho = _like(weight), _like(weight_rho)
        dbias, dbias_rho = (None, None) if bias is None else (_like(bias), _like(bias_rho))
        block_p, block_n, num_warps = tuning.finalizer_tile(n_cols)
        finalize_kernel[(triton.cdiv(n_cols, block_n),)](
            partial, *parameters, seed, dkl,
            dweight, dbias, dweight_rho, dbias_rho,
            programs, runs.runs_per_group,
            weight_prior=weight_prior_value, bias_prior=bias_prior_value, prior_std=prior_std,
            NOISE=noise, SPAN=span, FAST=_fast(x.device),
            N=n_cols, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip
    return dx, dweight, dbias, dweight_rho, dbias_rho


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


def _in_order(noise, n_rows, draws, inner):
    """Whether rows of one draw are neighbours, as they are where the draws' dimension is the outermost one."""
    return noise != "shared" or draws * inner == n_rows


def _contiguous(*parameters):
    return [None if p is None else p.contiguous() for p in parameters]


def _like(parameter):
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


@functools.cache
def _multiprocessors(device):
    """Multiprocessors of a GPU; a handful for CPU tensors, which reach this module in Triton's interpreter alone."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _fast(device):
    """Whether the noise may use NVIDIA's own instructions."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and isinstance(forward_kernel, triton.JITFunction)  # not the interpreter's stand-in
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _on_device_of(x):
    """Triton launches on the current device, which must be that of x."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
