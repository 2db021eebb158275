"""Which rows a program owns and where they lie; loads and stores that both directions share.

Rows are walked in draw-major order: position p belongs to draw p // rows_per_draw, so that a run of positions keeps one
posterior sample as long as possible. Where the draws' dimension is the outermost one, a position is a row.
"""

import triton
import triton.language as tl


@triton.jit
def run_of(program, run_rows, runs_per_group, group_rows):
    """Positions [start, stop) of a program: one run of `run_rows`, cut at the end of its group."""
    group = (program // runs_per_group).to(tl.int64)
    start = group * group_rows + (program % runs_per_group) * run_rows
    return start, tl.minimum(start + run_rows, (group + 1) * group_rows)


@triton.jit
def row_at(position, draw, n_draws, inner, rows_per_draw, CONTIGUOUS: tl.constexpr):
    """Row of x at a position of `draw`: its k-th row with (row // inner) % n_draws == draw."""
    if CONTIGUOUS:
        return position
    k = position - draw * rows_per_draw
    return (k // inner * n_draws + draw) * inner + k % inner


@triton.jit
def load_parameter(ptr, cols, mask, fill: tl.constexpr, ACC: tl.constexpr):
    """A parameter [1, BLOCK_N] in the accumulation dtype; `fill` everywhere where ptr is None."""
    if ptr is None:
        return tl.full(cols.shape, fill, ACC)
    else:
        return tl.load(ptr + cols, mask, other=0.0).to(ACC)


@triton.jit
def offsets(row, stride, cols, VEC: tl.constexpr):
    """Element offsets [rows, cols]; `stride` counts vectors of VEC elements, which tells the compiler what is aligned."""
    return row * (stride * VEC) + cols
