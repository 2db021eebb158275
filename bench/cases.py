"""What is measured: shapes, dtypes, noise modes and contestants, most telling first, for a budget may cut the list."""

import math
from dataclasses import dataclass

LAYER_NORM = "none"  # noise of a contestant that is a plain normalization
KL_NOISES = "batch", "sample", "token"
KLNORM_NOISES = "eval", *KL_NOISES
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


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

    @property
    def draws(self):
        return {"batch": 1, "sample": self.shape.samples, "token": self.shape.n_rows}[self.noise]

    @property
    def key(self):
        return f"{self.contestant}/{self.noise}/{self.shape}/{self.dtype}"


# At least 64 Mi elements each, the size that the targets speak of: far more than L2 holds.
TARGET_SHAPES = [
    Shape(32, 512, 4096),
    Shape(128, 512, 1024),
    Shape(16, 512, 8192),
    Shape(512, 512, 256),
    Shape(8, 512, 16384),
    Shape(8, 512, 65536),
    Shape(64, 512, 2048),
    Shape(8, 512, 32768),
]
TARGET_ELEMENTS = min(shape.elements for shape in TARGET_SHAPES)
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


def plan(families, quick=False):
    """Cases in order of worth; `families` maps every contestant at hand to its family."""
    shapes = TARGET_SHAPES[:5] if quick else TARGET_SHAPES
    middle = TARGET_SHAPES[0]
    cases = [Case(name, noise, BERT, "bf16") for name, noise in _lines(families, ("klnorm", "native"), ("batch",))]
    for shape in shapes:
        cases += [Case(name, noise, shape, "bf16") for name, noise in _lines(families, ("klnorm",), KLNORM_NOISES)]
    for shape in shapes[:1] if quick else shapes:
        cases += [Case(name, noise, shape, "bf16") for name, noise in _lines(families, families, ("batch",))]
    if not quick:
        cases += [Case(name, noise, BERT, "bf16") for name, noise in _lines(families, families, KLNORM_NOISES)]
        for shape in SMALL_SHAPES:
            names = "klnorm", "native", "compiled"
            cases += [Case(name, noise, shape, "bf16") for name, noise in _lines(families, names, KLNORM_NOISES)]
        for dtype in "bf16", "fp32", "fp16":
            cases += [Case(name, noise, middle, dtype) for name, noise in _lines(families, families, KLNORM_NOISES)]
        for shape in SMALL_SHAPES:
            cases += [Case(name, noise, shape, "bf16") for name, noise in _lines(families, families, ("batch",))]
    return list(dict.fromkeys(cases))


def _lines(families, names, noises):
    """(contestant, noise) for the names at hand; a plain normalization has the one noise it has."""
    wanted = {LAYER_NORM, *noises}
    return [
        (name, noise) for name in names if name in families for noise in noises_of(families[name]) if noise in wanted
    ]


def traffic(case, direction, itemsize):
    """The fewest bytes the direction can move: x in and y out; x and dy in and dx out; or all five."""
    return {"forward": 2, "backward": 3, "both": 5}[direction] * case.shape.elements * itemsize


def sets_beyond(cache_bytes, bytes_of_one, most):
    """Number of buffers that together exceed twice the cache: two at least, `most` at most."""
    return min(most, max(2, math.ceil(2 * cache_bytes / bytes_of_one)))
