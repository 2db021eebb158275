"""Which rows a program owns and where they lie; loads and stores that the kernels share."""

from typing import NamedTuple

import triton
import triton.language as tl

# Numbers that vary with the batch: Triton must not compile a kernel again because one of them is 1, or divisible by 16.
BATCH_SIZES = [
    "seed", "x_stride", "residual_stride", "dy_stride", "dsum_stride", "n_draws", "inner", "rows_per_draw",
    "all_draws", "all_inner", "n_programs",
]  # fmt: skip


class Mode(NamedTuple):
    """What a kernel computes, known at compile time.

    NOISE: "none" evaluation, "shared" draws that several rows share, "merged" one draw a row. ORDER of a draw's rows:
    "rows" neighbours, "strided" every n_draws-th, "blocked" blocks of `inner` neighbours. GROUPED: how rows lie in
    groups with parameters of their own: "no", "blocks" of neighbours, "heads" every so many-th. OFFSET: added to the
    weight, it gives the scale. FAST: the noise by NVIDIA's own instructions.
    """

    IS_RMS: bool
    NOISE: str
    ORDER: str
    GROUPED: str
    OFFSET: float
    FAST: bool


class Tile(NamedTuple):
    """Tiles of BLOCK_M rows x BLOCK_N features. Rows have N features and start at multiples of VEC elements.

    Loops over tiles or pieces load ahead in a pipeline of STAGES.
    """

    N: int
    VEC: int
    BLOCK_M: int
    BLOCK_N: int
    STAGES: int


@triton.jit
def group_start(n_draws, rows_per_draw, all_draws, all_inner, MODE: tl.constexpr):
    """(first row, first draw) of the group that this program works for: rows with their own parameters.

    Without groups, both are 0. Everything else about rows and draws is counted inside the group, see `among_all`.
    """
    if MODE.GROUPED == "blocks":
        first_row = tl.program_id(1).to(tl.int64) * n_draws * rows_per_draw
        return first_row, (first_row // all_inner) % all_draws
    elif MODE.GROUPED == "heads":
        head = tl.program_id(1).to(tl.int64)
        return head, head
    else:
        return 0, 0


@triton.jit
def among_all(first, number, MODE: tl.constexpr):
    """The number among all rows, or all draws, of number `number` in this program's group; `first` is its number 0."""
    if MODE.GROUPED == "heads":
        return first + as_int64(number) * tl.num_programs(1)
    else:
        return first + number


@triton.jit
def in_group(cols, MODE: tl.constexpr, N: tl.constexpr):
    """Where features [1, BLOCK_N] lie in a parameter (groups, N)."""
    if MODE.GROUPED != "no":
        return tl.program_id(1).to(tl.int64) * N + cols
    else:
        return cols


@triton.jit
def as_int64(number):
    """A number as int64, also one of Python's: such are the counters of loops in Triton's interpreter."""
    return tl.full((), 0, tl.int64) + number


@triton.jit
def tiles_of(rows_per_draw, BLOCK_M: tl.constexpr):
    """How many tiles the rows of a draw take, one at least; `tl.cdiv` would overflow just below 2^31 rows."""
    return (rows_per_draw - 1) // BLOCK_M + 1


@triton.jit
def rows_of(tile, draw, n_draws, inner, rows_per_draw, MODE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(rows [BLOCK_M, 1], their mask) of a tile of `draw`, which has the rows with (row // inner) % n_draws == draw."""
    k = as_int64(tile) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    mask = k < rows_per_draw
    if MODE.ORDER == "rows":
        return as_int64(draw) * rows_per_draw + k, mask
    elif MODE.ORDER == "strided":
        return k * n_draws + draw, mask
    else:
        narrow = k.to(tl.uint32)  # a third of the cost of dividing in 64 bits
        block = narrow // inner.to(tl.uint32)
        return (block.to(tl.int64) * n_draws + draw) * inner + (narrow - block * inner.to(tl.uint32)), mask


@triton.jit
def load_parameter(ptr, cols, mask, ACC: tl.constexpr):
    """A parameter [1, BLOCK_N] in the accumulation dtype; 0 everywhere where ptr is None."""
    if ptr is None:
        return tl.zeros(cols.shape, ACC)
    else:
        return tl.load(ptr + cols, mask, other=0.0).to(ACC)


@triton.jit
def load_statistics(ptr, row, row_mask, MODE: tl.constexpr):
    """(mean, 1 / deviation) [rows, 1]; RMSNorm has no mean, 0."""
    if MODE.IS_RMS:
        rstd = tl.load(ptr + row, row_mask, other=0.0)
        return tl.zeros_like(rstd), rstd
    else:
        return tl.load(ptr + 2 * row, row_mask, other=0.0), tl.load(ptr + 2 * row + 1, row_mask, other=0.0)


@triton.jit
def store_statistics(ptr, mean, rstd, row, row_mask, MODE: tl.constexpr):
    """What `load_statistics` loads."""
    if MODE.IS_RMS:
        tl.store(ptr + row, rstd, row_mask)
    else:
        tl.store(ptr + 2 * row, mean, row_mask)
        tl.store(ptr + 2 * row + 1, rstd, row_mask)


@triton.jit
def tile_at(ptr, row, stride, cols, TILE: tl.constexpr):
    """Pointers [rows, cols] into a matrix whose rows start at multiples of VEC elements; `stride` counts VECs.

    The hint makes vector width, and with it the order of a row's sums, depend on VEC alone: Triton's own guess would
    look at the alignment of the base pointer, so a row could differ in its last bit with its place in memory.
    """
    BYTES: tl.constexpr = TILE.VEC * ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr + (row * stride * TILE.VEC + cols), (1, BYTES))


@triton.jit
def load_tile(ptr, row, stride, cols, mask, TILE: tl.constexpr, ACC: tl.constexpr):
    """A tile [rows, cols] in the accumulation dtype, 0 where masked."""
    return tl.load(tile_at(ptr, row, stride, cols, TILE), mask, other=0.0).to(ACC)


@triton.jit
def store_tile(ptr, row, cols, value, mask, TILE: tl.constexpr):
    """Store a tile into contiguous rows, rounded to their dtype."""
    tl.store(tile_at(ptr, row, TILE.N // TILE.VEC, cols, TILE), value.to(ptr.dtype.element_ty), mask)
