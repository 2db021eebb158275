"""Kernels that Triton's interpreter runs and its compiler, or a GPU, does not take the same way."""

import os

import triton
import triton.language as tl


@triton.jit
def returns_before_none(x_ptr, parameters, seed, y_ptr, MODE: tl.constexpr, TILE: tl.constexpr):
    if y_ptr is None:
        return
    tl.store(y_ptr, tl.load(x_ptr))


@triton.jit
def drops_nan(x_ptr, parameters, seed, y_ptr, MODE: tl.constexpr, TILE: tl.constexpr):
    tl.store(y_ptr, tl.maximum(tl.load(x_ptr), 0.0))


@triton.jit
def good(x_ptr, parameters, seed, y_ptr, MODE: tl.constexpr, TILE: tl.constexpr):
    tl.store(y_ptr, tl.load(x_ptr) + 1.0)


@triton.jit
def no_instruction(x_ptr, parameters, seed, y_ptr, MODE: tl.constexpr, TILE: tl.constexpr):
    """Assembly that the interpreter never sees and only ptxas refuses."""
    lane = tl.arange(0, 32)
    lane = tl.inline_asm_elementwise("nonsense.b32 $0, $1;", "=r,r", [lane], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + lane, 0.0)


@tl.core.builtin
def _crash(_semantic=None):
    os.abort()


@triton.jit
def crashes(x_ptr, parameters, seed, y_ptr, MODE: tl.constexpr, TILE: tl.constexpr):
    """Ends the compiler's process, as an assertion in LLVM does."""
    _crash()
