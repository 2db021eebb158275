"""Device time by CUDA events, wall time, copy bandwidth.

Why buffers are rotated and L2 is not flushed before each call: a flush by writing leaves dirty lines, whose way to
memory is then charged to the call under test; a flush by reading lets a call leave its own last writes in L2 for free.
Here a batch of calls runs back to back, each call on buffers that L2 no longer holds, so each pays for all that it
reads and writes, as in a model.

Before each batch the GPU is given copies to do for longer than the host needs to enqueue the batch, so that launch gaps
do not count as device time. Whether that worked is looked up after each batch, and reported.
"""

import statistics
import time
from typing import NamedTuple

import numpy as np
import torch

SAMPLES = 25
LEAST_SAMPLES = 7
BATCH_MS = 1.0  # device time of one batch, far above the resolution of an event
MOST_CALLS = 16  # in a batch, which has to fit into the queue of launches
BUDGET_MS = 40.0  # device time of one measurement
COPY_BYTES = 512 << 20


class Timing(NamedTuple):
    """Milliseconds of one call: quantiles over batches of `calls`. `gaps`: the host did not keep ahead of the GPU."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    calls: int
    gaps: bool


class CudaClock:
    """Times batches of calls on the current CUDA stream."""

    def __init__(self, device):
        self.device = device
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.source = torch.zeros(COPY_BYTES // 4, device=device)
        self.target = torch.empty_like(self.source)
        self.copy_ms = self._events(lambda: [self.target.copy_(self.source) for _ in range(10)]) / 10

    def _events(self, work):
        torch.cuda.synchronize(self.device)
        self.start.record()
        work()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)

    def copy_gbps(self):
        """Bytes read and written per second by torch's own copy of 512 MiB, the median of 20."""
        times = [self._events(lambda: [self.target.copy_(self.source) for _ in range(4)]) / 4 for _ in range(20)]
        return 2 * COPY_BYTES / statistics.median(times) / 1e6

    def batch(self, call, count, host_ms):
        """(device milliseconds of `count` calls, whether launch gaps are part of them)."""
        blocks = 1 + int(2 * host_ms * count / self.copy_ms)
        for _ in range(3):
            torch.cuda.synchronize(self.device)
            for _ in range(blocks):
                self.target.copy_(self.source)
            self.start.record()
            for i in range(count):
                call(i)
            self.end.record()
            gaps = self.start.query()  # the GPU had begun before the last call was enqueued
            self.end.synchronize()
            if not gaps:
                break
            blocks *= 2
        return self.start.elapsed_time(self.end), gaps

    def host(self, call, count):
        """Milliseconds per call until `count` of them are enqueued, and until they are done."""
        torch.cuda.synchronize(self.device)
        begun = time.perf_counter()
        for i in range(count):
            call(i)
        enqueued = time.perf_counter()
        torch.cuda.synchronize(self.device)
        return 1e3 * (enqueued - begun) / count, 1e3 * (time.perf_counter() - begun) / count


def measure(call, clock, budget_ms=BUDGET_MS):
    """Timing of `call(i)`, i counting up from 0 in every batch: buffers are rotated by it."""
    clock.host(call, 3)  # compiles, tunes, fills the allocator's cache
    host_ms = min(clock.host(call, 2)[0] for _ in range(3))
    once = max(1e-4, clock.batch(call, 2, host_ms)[0] / 2)
    count = max(1, min(MOST_CALLS, round(BATCH_MS / once)))
    samples = max(LEAST_SAMPLES, min(SAMPLES, int(budget_ms / (count * once))))
    times, gaps = zip(*(clock.batch(call, count, host_ms) for _ in range(samples)), strict=True)
    median, p20, p80 = (np.quantile(times, (0.5, 0.2, 0.8)) / count).tolist()
    return Timing(median, p20, p80, samples, count, any(gaps))


def wall(call, clock):
    """Milliseconds per call as a program waits for them: calls enqueued back to back, then waited for; median of 7."""
    once = max(1e-3, clock.host(call, 3)[1])
    count = max(3, min(50, int(20 / once)))
    return statistics.median(clock.host(call, count)[1] for _ in range(7))
