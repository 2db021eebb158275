"""Kernels that Triton's interpreter runs and its compiler, or a GPU, does not take the same way."""

import triton
import triton.language as tl


@triton.jit
def returns_before_none(x_ptr, y_ptr, FAST: tl.constexpr, N: tl.constexpr):
    if y_ptr is None:
        return
    tl.store(y_ptr, tl.load(x_ptr))


@triton.jit
def drops_nan(x_ptr, y_ptr, FAST: tl.constexpr, N: tl.constexpr):
    tl.store(y_ptr, tl.maximum(tl.load(x_ptr), 0.0))


@triton.jit
def good(x_ptr, y_ptr, FAST: tl.constexpr, N: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr) + 1.0)
