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
def draws_of(start, stop, rows_per_draw, SPAN: tl.constexpr):
    """(first draw, number of draws) of a run; one unless SPAN, known at compile time to spare a loop's registers."""
    if SPAN:
        return start // rows_per_draw, tl.cdiv(stop, rows_per_draw) - start // rows_per_draw
    else:
        return start // rows_per_draw, 1


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
def tile_at(ptr, row, stride, cols, VEC: tl.constexpr):
    """Pointers [rows, cols] into a matrix whose rows start at multiples of VEC elements; `stride` counts VECs.

    The hint makes vector width, and with it the order of a row's sums, depend on VEC alone: Triton's own guess would
    look at the alignment of the base pointer, so a row could differ in its last bit with its place in memory.
    """
    return tl.multiple_of(ptr + (row * stride * VEC + cols), (1, VEC * (ptr.dtype.element_ty.primitive_bitwidth // 8)))
