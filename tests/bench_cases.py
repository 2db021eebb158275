"""What the tests of the benchmarks share: small cases, a clock that is not a GPU's."""

import itertools

import torch

from bench import measure
from bench.cases import LAYER_NORM, Case, Shape, noises_of
from bench.contestants import OF_OPERATION, contestant_of

CPU = torch.device("cpu")
TINY = Shape(4, 6, 16)
GATE = Shape(4, 32, 64)
OURS = "klnorm", "unfused", "native", "eager"  # what is at hand everywhere and compiles nothing
EVERYONE = {operation: {name: c.family for name, c in those.items()} for operation, those in OF_OPERATION.items()}
RIGHT = [
    (operation, name, noise)
    for operation, families in EVERYONE.items()
    for name, family in families.items()
    if name in OURS
    for noise in noises_of(family)
]


def case_of(operation, name, noise=LAYER_NORM, dtype="bf16", shape=GATE):
    return Case(name, noise, shape, dtype, operation)


def gate(case, change=lambda layer: layer):
    """Put a case through the gate, its layer changed."""
    layer, buffers = measure.build(case, CPU)
    measure.check(change(layer), case, contestant_of(case).family, buffers.inputs[0], buffers.cotangents[0])


class FakeClock:
    """A clock on which calls take the milliseconds that it is given; the calls are made, once a batch."""

    def __init__(self, times=(1.0,), gaps=False):
        self.times, self.gaps, self.device = itertools.cycle(times), gaps, CPU

    def copy_gbps(self):
        return 2000.0

    def batch(self, call, count, host_ms):
        call(0)
        return count * next(self.times), self.gaps

    def host(self, call, count):
        call(0)
        return 0.1, 0.5
