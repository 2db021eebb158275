"""Which rows a program owns and where they lie; loads and stores that both directions share.

Rows are walked in draw-major order: position p belongs to draw p // rows_per_draw, so that a run of positions keeps one
posterior sample as long as possible. Where the draws' dimension is the outermost one, a position is a row.
"""

import triton
import triton.language as tl

# Numbers that vary with the batch: Triton must not compile a kernel again because one of them is 1, or divisible by 16.
BATCH_SIZES = [
    "seed", "x_stride", "residual_stride", "dy_stride", "dsum_stride", "n_draws", "inner", "rows_per_draw",
    "run_rows", "runs_per_share", "share_rows", "group_rows", "all_draws", "all_inner", "n_programs",
]  # fmt: skip


@triton.jit
def group_start(group_rows, all_draws, all_inner, GROUPED: tl.constexpr):
    """(first row, first draw) of the group of rows, with parameters of its own, that this program works for.

    Without groups, both are 0. Everything else about rows and draws is counted inside the group.
    """
    if GROUPED:
        first_row = tl.program_id(1).to(tl.int64) * group_rows
        return first_row, (first_row // all_inner) % all_draws
    else:
        return 0, 0


@triton.jit
def in_group(cols, N: tl.constexpr, GROUPED: tl.constexpr):
    """Where features [1, BLOCK_N] lie in a parameter (groups, N)."""
    if GROUPED:
        return tl.program_id(1).to(tl.int64) * N + cols
    else:
        return cols


@triton.jit
def run_of(program, run_rows, runs_per_share, share_rows):
    """Positions [start, stop) of a program: one run of `run_rows`, cut at the end of its share."""
    share = (program // runs_per_share).to(tl.int64)
    start = share * share_rows + (program % runs_per_share).to(tl.int64) * run_rows
    return start, tl.minimum(start + run_rows, (share + 1) * share_rows)


@triton.jit
def draws_of(start, stop, rows_per_draw, SPAN: tl.constexpr):
    """(first draw, number of draws) of a run; one unless SPAN, known at compile time to spare a loop's registers."""
    if SPAN:
        return start // rows_per_draw, tl.cdiv(stop, rows_per_draw) - start // rows_per_draw
    else:
        return start // rows_per_draw, 1


@triton.jit
def row_at(position, draw, n_draws, inner, rows_per_draw, ORDER: tl.constexpr):
    """Row of x at a position of `draw`: its k-th row with (row // inner) % n_draws == draw.

    ORDER: "rows" where rows of a draw are neighbours, "strided" where inner is 1, "blocked" otherwise.
    """
    if ORDER == "rows":
        return position
    elif ORDER == "strided":
        return (position - draw * rows_per_draw) * n_draws + draw
    else:
        k = (position - draw * rows_per_draw).to(tl.uint32)  # a third of the cost of dividing in 64 bits
        block = k // inner.to(tl.uint32)
        return (block.to(tl.int64) * n_draws + draw) * inner + (k - block * inner.to(tl.uint32))


@triton.jit
def load_parameter(ptr, cols, mask, fill: tl.constexpr, ACC: tl.constexpr):
    """A parameter [1, BLOCK_N] in the accumulation dtype; `fill` everywhere where ptr is None."""
    if ptr is None:
        return tl.full(cols.shape, fill, ACC)
    else:
        return tl.load(ptr + cols, mask, other=0.0).to(ACC)


@triton.jit
def load_statistics(ptr, row, row_mask, IS_RMS: tl.constexpr):
    """(mean, 1 / deviation) [rows, 1]; RMSNorm has no mean, 0."""
    if IS_RMS:
        rstd = tl.load(ptr + row, row_mask, other=0.0)
        return tl.zeros_like(rstd), rstd
    else:
        return tl.load(ptr + 2 * row, row_mask, other=0.0), tl.load(ptr + 2 * row + 1, row_mask, other=0.0)


@triton.jit
def tile_at(ptr, row, stride, cols, VEC: tl.constexpr):
    """Pointers [rows, cols] into a matrix whose rows start at multiples of VEC elements; `stride` counts VECs.

    The hint makes vector width, and with it the order of a row's sums, depend on VEC alone: Triton's own guess would
    look at the alignment of the base pointer, so a row could differ in its last bit with its place in memory.
    """
    BYTES: tl.constexpr = VEC * ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr + (row * stride * VEC + cols), (1, BYTES))
