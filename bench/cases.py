"""What is measured: operations, shapes, dtypes, noise modes, contestants; most telling first, a budget may cut it."""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch

LAYER_NORM = "none"  # noise of a contestant that is a plain normalization
KL_NOISES = "batch", "sample", "token"
KLNORM_NOISES = "eval", *KL_NOISES
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class Operation(NamedTuple):
    """What is computed beside LayerNorm. `groups`: every sample has parameters of its own, (samples, width)."""

    rms: bool = False
    residual: bool = False
    groups: bool = False
    deterministic: bool = False


OPERATIONS = {
    "layer_norm": Operation(),
    "rms_norm": Operation(rms=True),
    "residual": Operation(residual=True),
    "rms_residual": Operation(rms=True, residual=True),
    "groups": Operation(groups=True),
    "deterministic": Operation(deterministic=True),
}
FAMILY = tuple(OPERATIONS)[1:]


@dataclass(frozen=True)
class Shape:
    """x of (samples, rows, width): `rows` per sample, M = samples * rows."""

    samples: int
    rows: int
    width: int

    @property
    def n_rows(self):
        return self.samples * self.rows

    @property
    def elements(self):
        return self.n_rows * self.width

    def __str__(self):
        return f"{self.n_rows}x{self.width}"


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    contestant: str
    noise: str
    shape: Shape
    dtype: str
    operation: str = "layer_norm"

    @property
    def variant(self):
        return OPERATIONS[self.operation]

    @property
    def draws(self):
        return {"batch": 1, "sample": self.shape.samples, "token": self.shape.n_rows}[self.noise]

    @property
    def parameter_shape(self):
        return (self.shape.samples, self.shape.width) if self.variant.groups else (self.shape.width,)

    def __str__(self):
        return f"{name_of(self.operation, self.contestant)}/{self.noise}/{self.shape}/{self.dtype}"


def name_of(operation, contestant):
    """The contestant's name, after that of the operation unless it is LayerNorm."""
    return contestant if operation == "layer_norm" else f"{operation}/{contestant}"


# At least 64 Mi elements each, far more than L2 holds.
LARGE_SHAPES = [
    Shape(32, 512, 4096),
    Shape(128, 512, 1024),
    Shape(16, 512, 8192),
    Shape(512, 512, 256),
    Shape(8, 512, 16384),
    Shape(8, 512, 65536),
    Shape(64, 512, 2048),
    Shape(8, 512, 32768),
]
LARGE_ELEMENTS = min(shape.elements for shape in LARGE_SHAPES)
BERT = Shape(8, 128, 768)
SMALL_SHAPES = [
    Shape(8, 512, 256),
    Shape(8, 512, 1024),
    Shape(8, 512, 4096),
    Shape(8, 512, 8192),
    Shape(2048, 512, 128),  # tall and narrow
    Shape(4, 4, 8192),  # few rows
]


def noises_of(family):
    """Noise modes that a family of contestants has."""
    return {"klnorm": KLNORM_NOISES, "kl": KL_NOISES}.get(family, (LAYER_NORM,))


def is_large(record):
    """Whether a record's time is one of bf16 at a large shape, of which the tables are made."""
    return record["dtype"] == "bf16" and record["elements"] >= LARGE_ELEMENTS


# Contestants (None: all at hand), operations, shapes, dtypes, noises: stages in order of worth.
NORM, BF16 = ("layer_norm",), ("bf16",)
STAGES = (
    (("klnorm", "native"), NORM, (BERT,), BF16, ("batch",)),
    (("klnorm",), NORM, LARGE_SHAPES, BF16, KLNORM_NOISES),
    (None, NORM, LARGE_SHAPES, BF16, ("batch",)),
    (None, FAMILY, LARGE_SHAPES[:3], BF16, ("batch",)),
    (("klnorm",), ("rms_norm",), LARGE_SHAPES, BF16, KLNORM_NOISES),
    (None, NORM, (BERT,), BF16, KLNORM_NOISES),
    (("klnorm", "native", "compiled"), NORM, SMALL_SHAPES, BF16, KLNORM_NOISES),
    (None, NORM, LARGE_SHAPES[:1], ("bf16", "fp32", "fp16"), KLNORM_NOISES),
    (None, NORM, SMALL_SHAPES, BF16, ("batch",)),
    (None, FAMILY, (*LARGE_SHAPES, BERT), BF16, ("batch", "token")),
)
QUICK_STAGES = (
    (("klnorm", "native"), NORM, (BERT,), BF16, ("batch",)),
    (("klnorm",), NORM, LARGE_SHAPES[:5], BF16, KLNORM_NOISES),
    (None, NORM, LARGE_SHAPES[:1], BF16, ("batch",)),
    (("klnorm", "unfused"), ("rms_norm", "residual"), LARGE_SHAPES[:1], BF16, ("batch",)),
)


def plan(families, quick=False):
    """Cases in order of worth; `families` maps operations to {contestant at hand: its family}.

    A normalization without noise has the one "noise" it has.
    """
    planned = [
        Case(name, noise, shape, dtype, operation)
        for names, operations, shapes, dtypes, noises in (QUICK_STAGES if quick else STAGES)
        for shape, dtype, operation in itertools.product(shapes, dtypes, operations)
        for name in names or families[operation]
        if name in families[operation]
        for noise in noises_of(families[operation][name])
        if noise in (LAYER_NORM, *noises)
    ]
    return list(dict.fromkeys(planned))


def traffic(case, direction, itemsize):
    """The fewest bytes the direction can move; parameters and statistics, small beside x, are left out.

    Forward reads x and writes y; backward reads x and dy and writes dx. With a residual forward also reads it and
    writes the sum; backward, in which the sum takes the place of x, also reads the sum's gradient, and the gradients of
    x and of the residual are one tensor.
    """
    counts = {"forward": 4, "backward": 4} if case.variant.residual else {"forward": 2, "backward": 3}
    return counts.get(direction, sum(counts.values())) * case.shape.elements * itemsize
