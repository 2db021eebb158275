"""Tile sizes, warps and how rows are dealt to programs: plain functions of width, dtype, the device and Triton's
version.

Tiles, warps and clusters do not depend on the number of rows, so a row's result never depends on the batch it is in.
"""

import functools
from typing import NamedTuple

from .versions import reaches

REGISTER_WIDTH = 8192  # widest row kept whole in registers
REGISTER_WIDTH_FP64 = 2048
KEPT_WIDTH = 4096  # widest row whose backward with four sums keeps its parameters in registers
TILE_ELEMENTS = 2048  # of a tile of several narrow rows
REGISTERS = 65536  # of a multiprocessor
# Tile width -> registers a thread of the backward with four sums, compiled for sm_90 from bf16; 256 at other widths.
_FOUR_SUMS_REGISTERS = {32: 168, 128: 168, 256: 168, 1024: 168, 4096: 176}
CLUSTER_SHARE = 4096  # features of a row that one block of a cluster takes, while the cluster can grow
MAX_CLUSTER = 8  # blocks; more than that not every GPU schedules
CLUSTER_WIDTH = 65536  # widest row kept whole in the registers of a cluster
CLUSTER_GROUP = 16  # multiprocessors that lie together on every GPU; a cluster stays within one group

WIDE_TILE_BYTES = 24 << 20  # of input that all programs together may read twice and still find in L2

PARTIAL_BYTES = 32 << 20  # of partial sums that a backward may take in any case; else a quarter of its input


class Tile(NamedTuple):
    """Shape of the tile a program works on; `wide` rows are worked through in pieces of `block_n`.

    A program is a cluster of `num_ctas` blocks of `num_warps` warps each, on as many multiprocessors; a thread takes up
    to `registers`. With `halves`, a row stays in registers but its parameters are loaded half by half.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    wide: bool
    num_ctas: int = 1
    halves: bool = False
    registers: int = 128


class Runs(NamedTuple):
    """How positions are dealt: shares of `share_rows`, each in `runs_per_share` runs of `run_rows`, one run a program.

    `span`: a run may hold several draws. Otherwise every run lies in one draw.
    """

    programs: int
    run_rows: int
    runs_per_share: int
    share_rows: int
    span: bool


def next_power_of_2(n):
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache
def has_clusters(capability, triton_version):
    """Whether a row may be split over a cluster of multiprocessors: from sm_90 and Triton 3.9 on.

    Replace by a function that returns False, before the first launch, to keep every row on one multiprocessor.
    """
    return capability >= (9, 0) and reaches(triton_version, (3, 9))


@functools.lru_cache
def splits_in_registers(triton_version):
    """Whether halves of a tile stay where they are; older versions send them through shared memory."""
    return reaches(triton_version, (3, 6))


@functools.lru_cache(1024)
def tile(n_cols, itemsize, backward=False, clusters=False, four_sums=False, splits=True):
    """The tile for rows of `n_cols` features of `itemsize` bytes, on a device that has `clusters` or not.

    `four_sums`: every row has noise of its own for scale and shift, whose backward takes four sums and three parameters
    a feature; `splits`: Triton `splits_in_registers`.
    """
    num_ctas = _cluster_size(n_cols, itemsize, backward) if clusters else 1
    if num_ctas == 1 and n_cols > (REGISTER_WIDTH_FP64 if itemsize == 8 else REGISTER_WIDTH):
        return Tile(1, 1024 if itemsize == 8 else 2048 if backward else 4096, 8, 1, True)
    block_n = max(16, next_power_of_2(n_cols))
    registers = _FOUR_SUMS_REGISTERS.get(block_n, 256) if backward and four_sums else 128
    if backward and four_sums and splits and num_ctas == 1 and n_cols > KEPT_WIDTH:
        return Tile(1, block_n, 8, 1, False, halves=True, registers=registers)
    block_m = max(1, TILE_ELEMENTS // block_n // (itemsize // 2 or 1))
    num_warps = min(16, max(4, block_n // num_ctas // 512))
    return Tile(block_m, block_n, num_warps, 1, False, num_ctas, registers=min(registers, 2048 // num_warps))


def _cluster_size(n_cols, itemsize, backward):
    """Blocks that share a row: several where that is better than going through a wide row twice.

    Forward reads a wide row again from L2 and gains nothing where more than a tenth of the lanes would lie idle.
    """
    block_n = next_power_of_2(n_cols)
    filled = backward or n_cols >= 0.9 * block_n
    fits = REGISTER_WIDTH < n_cols <= CLUSTER_WIDTH and itemsize < 8
    return min(MAX_CLUSTER, block_n // CLUSTER_SHARE) if fits and filled else 1


@functools.lru_cache(1024)
def forward_runs(n_rows, draws, groups, tile, row_bytes, multiprocessors):
    """Runs of the forward kernel in each of `groups` of `n_rows`: short, so that programs even out.

    Runs of wide rows are small enough to be read again from L2.
    """
    programs = 8 * _resident(tile, multiprocessors)
    if tile.wide:
        run_rows = max(1, WIDE_TILE_BYTES // (2 * multiprocessors * row_bytes))
        programs = max(multiprocessors, -(-n_rows * groups // run_rows))
    return _deal(n_rows, draws, tile.block_m, -(-programs // groups))


@functools.lru_cache(1024)
def backward_runs(n_rows, draws, groups, tile, n_cols, itemsize, multiprocessors):
    """Runs of the backward kernel: no more programs than are resident at once, as each writes partial sums."""
    row_of_sums = 4 * 4 * n_cols
    affordable = max(PARTIAL_BYTES, groups * n_rows * n_cols * itemsize // 4) // row_of_sums
    programs = min(_resident(tile, multiprocessors), affordable)
    return _deal(n_rows, draws, tile.block_m, max(1, programs // groups))


def _resident(tile, multiprocessors):
    """Programs that run at once, as registers last; clusters as many as whole groups hold."""
    if tile.num_ctas > 1:
        multiprocessors = max(1, multiprocessors // CLUSTER_GROUP * CLUSTER_GROUP // tile.num_ctas)
    return multiprocessors * max(1, REGISTERS // (32 * tile.num_warps * tile.registers))


def finalizer_tile(n_cols):
    """(programs, features, warps) per step of the finalizer."""
    return 64, min(64, max(8, next_power_of_2(n_cols))), 4


def _deal(n_rows, draws, block_m, programs):
    """At most about `programs` runs over `draws` equal groups of rows, in whole tiles where a group is cut."""
    if not n_rows:
        return Runs(0, 1, 1, 1, False)
    rows_per_draw = n_rows // draws
    if draws > programs:
        run_rows = -(-draws // programs) * rows_per_draw
        return Runs(-(-n_rows // run_rows), run_rows, -(-n_rows // run_rows), n_rows, True)
    tiles = -(-rows_per_draw // block_m)
    run_rows = -(-tiles // max(1, programs // draws)) * block_m
    runs = -(-rows_per_draw // run_rows)
    return Runs(runs * draws, run_rows, runs, rows_per_draw, False)
