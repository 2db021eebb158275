"""Descriptions of a computation that layers, operators and launches hand to each other."""

import dataclasses
import functools
from typing import NamedTuple

import torch


class Parameters(NamedTuple):
    """The posterior's means, its deviations before softplus, and the prior's means; None for absent tensors."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_rho: torch.Tensor | None
    bias_rho: torch.Tensor | None
    weight_prior: torch.Tensor | None
    bias_prior: torch.Tensor | None


class Prior(NamedTuple):
    """The prior's deviation, and its means for `Parameters` that have no tensor of them."""

    weight: float
    bias: float
    std: float


class Rows(NamedTuple):
    """Which group of parameters and which draw of noise each row uses.

    Row r belongs to group r // group_rows and uses draw (r // inner) % draws. With `per_head` groups are heads: row r
    is row k = r // groups of head h = r % groups and uses that head's draw d = (k // inner) % draws, number d * groups
    + h among all draws. `noise`: "none" without sampling; "merged" if every row has its own draw, numbered like the
    row; else "shared".
    """

    n_rows: int
    groups: int
    draws: int
    inner: int
    noise: str
    per_head: bool = False

    @classmethod
    def of(cls, sampled, n_rows, groups, draws, inner, per_head=False):
        all_draws = draws * groups if per_head else draws
        noise = "none" if not sampled else "merged" if all_draws == n_rows else "shared"
        return cls(n_rows, groups, draws, inner, noise, per_head)

    @property
    def group_rows(self):
        return self.n_rows // self.groups

    @property
    def in_group(self):
        """Return (draws, inner) inside a group: its row i uses draw `first_draw` + `step` * ((i // inner) % draws).

        None if rows of a group and rows of a draw overlap only in part.
        """
        rows, cycle = self.group_rows, self.draws * self.inner
        if self.noise != "shared" or not rows:
            return 1, max(1, rows)
        if rows % cycle == 0:
            return self.draws, self.inner
        if cycle % rows == 0 and rows % self.inner == 0:
            return rows // self.inner, self.inner
        return (1, rows) if cycle % rows == 0 and self.inner % rows == 0 else None

    @property
    def step(self):
        """The distance between successive rows of a group, and between its draws."""
        return self.groups if self.per_head else 1

    def first_row(self, group):
        return group if self.per_head else group * self.group_rows

    def first_draw(self, group):
        """Return the draw of a group's first row; 0 if rows share no draws."""
        if self.noise != "shared" or not self.n_rows:
            return 0
        return group if self.per_head else self.first_row(group) // self.inner % self.draws

    @property
    def kl_shape(self):
        """The shape of the KL: one number per group or head; a scalar for a single group that is not a head."""
        return (self.groups,) if self.groups > 1 or self.per_head else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """Everything about a call except its tensors and seed. `make_spec` makes one object per value, so that caches can
    look up a Spec by its identity.

    `kind`: "layer" or "rms"; `posterior`: "sampled" or "deterministic"; `n_cols`: features of a row; `dtypes`: of x,
    the residual and the `Parameters`, None for absent tensors; `out_dtype`: of y; scale = `weight_offset` + weight.
    """

    kind: str
    posterior: str
    eps: float
    prior: Prior
    n_cols: int
    rows: Rows
    dtypes: tuple
    out_dtype: torch.dtype
    weight_offset: float

    @property
    def numbers(self):
        """The numbers that the backward operator takes, in its order, see `klnorm.ops`."""
        rows = self.rows
        layout = rows.draws, rows.inner, rows.groups, rows.per_head
        return *self.prior, self.eps, self.weight_offset, *layout, self.kind == "rms", self.dtypes[0]


@functools.lru_cache(4096)
def make_spec(kind, posterior, eps, prior, n_cols, rows, dtypes, out_dtype=None, weight_offset=0.0):
    """Return the Spec with these fields; an `out_dtype` of None stands for the dtype of x."""
    out_dtype = dtypes[0] if out_dtype is None else out_dtype
    return Spec(kind, posterior, eps, prior, n_cols, rows, dtypes, out_dtype, weight_offset)


def dtypes_of(*tensors):
    """Return the dtypes of tensors, None for None."""
    return tuple([None if t is None else t.dtype for t in tensors])


def empty_like(tensor, dtype=None):
    """Return contiguous memory in the shape of `tensor`, in its dtype unless `dtype` is given; None for None."""
    if tensor is None:
        return None
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
