"""What is to be computed, beside the tensors: one description that every part between layer and kernel passes on."""

import dataclasses
import functools
from typing import NamedTuple

import torch


class Parameters(NamedTuple):
    """The posterior's means, its deviations before softplus, and the prior's means; None where there is none."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_rho: torch.Tensor | None
    bias_rho: torch.Tensor | None
    weight_prior: torch.Tensor | None
    bias_prior: torch.Tensor | None


class Prior(NamedTuple):
    """The prior's means where no tensor gives them, and its deviation."""

    weight: float
    bias: float
    std: float


class Rows(NamedTuple):
    """How rows fall into groups with parameters of their own, and into draws of noise.

    Row r belongs to group r // group_rows and uses draw (r // inner) % draws. `per_head`: it is row k = r // groups of
    group r % groups, its head, and uses draw (k // inner) % draws of this head's own; that of head h counts as
    draw * groups + h among all. `noise`: "none" in evaluation, "merged" where every row has a draw of its own, which is
    its number, else "shared".
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
        """(draws, inner) inside a group: its row i uses draw `first_draw` + `step` * ((i // inner) % draws).

        None where groups and draws cut each other.
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
        """From a row of a group to its next, and from a draw to the next."""
        return self.groups if self.per_head else 1

    def first_row(self, group):
        return group if self.per_head else group * self.group_rows

    def first_draw(self, group):
        """The draw of a group's first row; 0 where rows share no draws."""
        if self.noise != "shared" or not self.n_rows:
            return 0
        return group if self.per_head else self.first_row(group) // self.inner % self.draws

    @property
    def kl_shape(self):
        """One number for every group; a scalar for a group alone that is no head."""
        return (self.groups,) if self.groups > 1 or self.per_head else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """`kind`: "layer" or "rms"; `posterior`: "sampled" or "deterministic"; `n_cols`: features of a row; `dtypes`: of x,
    the residual and the `Parameters`, None for what there is not; `out_dtype`: of y; `weight_offset`: added to the
    weight, it gives the scale.

    There is one Spec of the same fields, see `make_spec`, so that what is worked out for it is found by its identity.
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
        """As the operator of the backward takes it, see `klnorm.ops`."""
        rows = self.rows
        layout = rows.draws, rows.inner, rows.groups, rows.per_head
        return *self.prior, self.eps, self.weight_offset, *layout, self.kind == "rms", self.dtypes[0]


@functools.lru_cache(4096)
def make_spec(kind, posterior, eps, prior, n_cols, rows, dtypes, out_dtype=None, weight_offset=0.0):
    """The Spec of these fields; an `out_dtype` of None is that of x."""
    out_dtype = dtypes[0] if out_dtype is None else out_dtype
    return Spec(kind, posterior, eps, prior, n_cols, rows, dtypes, out_dtype, weight_offset)


def dtypes_of(*tensors):
    """As a Spec has them."""
    return tuple([None if t is None else t.dtype for t in tensors])


def empty_like(tensor, dtype=None):
    """Contiguous, of its own dtype or another; None for None."""
    if tensor is None:
        return None
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
