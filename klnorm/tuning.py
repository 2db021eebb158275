"""Chooses tiles, warps, numbers of programs and the preparation of parameters, by plain functions of work and device.

Tiles and warps do not depend on the number of rows, so a row's result never depends on the batch it is in.
"""

import functools
from typing import NamedTuple

REGISTER_WIDTH = 8192  # widest row kept whole in registers
REGISTER_WIDTH_FP64 = 2048

# A separate kernel prepares parameters if the input has more elements than this and at least so many rows per draw: its
# output then takes no more memory than the rows in 16 bits.
PREPARED_ELEMENTS = 1 << 20
PREPARED_ROWS = 4

PREFETCHED_BYTES = 16 << 10  # kernels prefetch rows up to this size two ahead, longer ones one ahead

PARTIAL_BYTES = 32 << 20  # limit of a backward's partial sums, or a quarter of its input if that is more


class Shape(NamedTuple):
    """A tile of `block_m` rows x `block_n` features, processed by `num_warps` warps.

    Loops over rows prefetch in `num_stages`; `per_multiprocessor` programs of a persistent kernel run at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    per_multiprocessor: int = 1


def next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()


def is_wide(n_cols, itemsize):
    """Whether kernels process a row of `n_cols` features of `itemsize` bytes in pieces."""
    return n_cols > (REGISTER_WIDTH_FP64 if itemsize == 8 else REGISTER_WIDTH)


def prepares(rows, n_cols):
    """Whether a separate kernel prepares the parameters; otherwise every program does so for its own rows.

    That launch costs the host 10 us and the device 2.5 us, more than it saves on small inputs.
    """
    draws, _ = rows.in_group
    return (
        rows.noise != "none" and rows.n_rows * n_cols > PREPARED_ELEMENTS and rows.group_rows >= PREPARED_ROWS * draws
    )


def prepare_shape(n_cols):
    return Shape(1, min(512, _block(n_cols)), 4)


@functools.lru_cache(1024)
def forward_shape(n_cols, itemsize):
    """Return a shape in which a thread has 32 features of a row; of wide rows, 8 or 16 features of a piece."""
    block_n, size = _block(n_cols), max(1, itemsize // 4)
    if is_wide(n_cols, itemsize):
        return Shape(1, 4096 // size, 8)
    if block_n <= 256:
        return Shape(2048 // size // block_n, block_n, 2)
    return Shape(max(1, 1024 // size // block_n), block_n, max(1, size * block_n // 1024))


@functools.lru_cache(1024)
def backward_shape(n_cols, itemsize, merged):
    """Return the shape for rows that fit into registers; `merged`: rows have their own noise, and a feature four sums.

    As many programs run as registers allow, up to 12 warps per multiprocessor. A thread has 16 features; 32 for narrow
    and for very wide rows with shared noise; twice 16 if it takes `merged` rows in halves. Rows of more than 16 KB are
    prefetched one ahead instead of two, because most GPUs have less shared memory than an H100.
    """
    block_n, size = _block(n_cols), max(1, itemsize // 4)
    num_stages = 3 if block_n * itemsize <= PREFETCHED_BYTES else 2
    if merged:
        block_n = min(block_n, 4096 // size)
        num_warps = max(1, size * block_n // 512)
        return Shape(max(1, 512 // size // block_n), block_n, num_warps, 1, max(1, 12 // num_warps))
    if block_n <= 512:
        return Shape(max(1, 1024 // size // block_n), block_n, 1, num_stages, 8)
    num_warps = size * (block_n // 512 if block_n <= 2048 else block_n // 1024)
    return Shape(1, block_n, num_warps, num_stages, max(1, (12 if block_n <= 2048 else 8) // num_warps))


def dx_wide_shape(n_cols, itemsize):
    return Shape(1, 2048 // max(1, itemsize // 4), 8)


def sums_wide_shape(n_cols, itemsize, merged):
    """Return the shape for column sums of wide rows: a thread has 8 features, 16 bytes of an operand in 16 bits."""
    return Shape(1, 1024 // max(1, itemsize // 4), 4, 1 if merged else 4, 5 if merged else 4)


def finalizer_shape(n_cols):
    """Return the finalizer's shape: a program adds up 256 partial sums of 8 features at a time."""
    return Shape(256, 8, 4)


@functools.lru_cache(1024)
def backward_programs(rows, shape, n_cols, itemsize, multiprocessors):
    """Return (number of programs that share the rows of each group of `Rows`, whether a program has several draws).

    There are no more programs than can run at once, and no more than PARTIAL_BYTES allow: each writes partial sums.
    """
    draws, _ = rows.in_group
    pieces = -(-n_cols // shape.block_n) if is_wide(n_cols, itemsize) else 1
    at_once = max(1, multiprocessors * shape.per_multiprocessor // pieces)
    affordable = max(PARTIAL_BYTES, rows.n_rows * n_cols * itemsize // 4) // (4 * 4 * n_cols)
    programs = max(1, min(at_once, affordable) // rows.groups)
    if draws > programs:
        return programs, True
    tiles = -(-(rows.group_rows // draws) // shape.block_m)
    return draws * min(tiles, programs // draws), False


def _block(n_cols):
    return max(16, next_power_of_2(n_cols))
