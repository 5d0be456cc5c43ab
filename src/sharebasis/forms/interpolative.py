"""Low-rank factors of which the one that sees the inputs consists of rows of the weight.

rank² numbers fewer than plain factors, for the same product (`linalg.interpolative`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sharebasis.config.types import Side
from sharebasis.forms.form import Form, RoleTensors, parameter
from sharebasis.forms.low_rank import Factors, LowRank, LowRankModule
from sharebasis.linalg.interpolative import interpolate
from sharebasis.linalg.objective import Problem
from sharebasis.runtime import matmul


class InterpolativeModule(LowRankModule):
    """Some outputs are those of the first factor; the others are made of these by the second."""

    kind: ClassVar[str] = "interpolative"
    order: Int64[Tensor, " d_out"]
    """Where each output lies, pivots before the others."""

    def __init__(
        self,
        basis: Float[Tensor, "_ _"],
        coefficient: Float[Tensor, "_ _"],
        side: Side,
        pivots: Int[Tensor, " n"],
        first: int,
    ) -> None:
        """Args:
        basis, coefficient, side: as of `LowRankModule`, for the outputs that are no pivots.
        pivots: rows of the weight that are rows `first`, `first` + 1, ... of the first factor.
        first: see `pivots`.
        """
        super().__init__(basis, coefficient, side)
        self._pivot_rows = slice(first, first + len(pivots))
        d_out = len(pivots) + len(self.factors[1])
        self.register_buffer("order", _order(pivots.long(), d_out), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.order), self.factors[0].shape[1]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        inner, outer = self.factors
        return torch.cat([inner[self._pivot_rows], outer @ inner]).index_select(0, self.order)

    def plain(self) -> Float[Tensor, "d_out rank"]:
        """The second factor with the rows of all outputs."""
        inner, outer = self.factors
        unit = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        return torch.cat([unit[self._pivot_rows], outer]).index_select(0, self.order)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        inner, outer = self.factors
        z = matmul.linear(x, inner)
        y = matmul.linear(z, outer)
        return torch.cat([z[..., self._pivot_rows], y], dim=-1).index_select(-1, self.order)


@dataclass(frozen=True, slots=True)
class Interpolative(Factors):
    """Factors without the rows of outputs that are pivots, and which outputs these are."""

    kind: ClassVar[str] = "interpolative"
    pivots: tuple[Int[Tensor, " _"], ...]
    """Rows of each part; on the output side those that all parts have, once."""
    side: Side = "input"

    @staticmethod
    def n_numbers(d_out: int, d_in: int, rank: int) -> int:
        """Numbers that a group stores, whose parts are stacked to (d_out, d_in); the index of a
        pivot is one."""
        return rank * (d_in + d_out - rank) + rank

    @classmethod
    def of(cls, edited: Form) -> Interpolative:
        """The same weights; no coefficient is larger than `interpolative.BOUND`."""
        assert isinstance(edited, LowRank)
        factors = edited
        if factors.side == "output":
            inner = torch.cat([coefficient.T for coefficient in factors.coefficients]).T
            form = interpolate(factors.basis, inner)
            lengths = [coefficient.shape[1] for coefficient in factors.coefficients]
            split = form.basis.split(lengths, dim=1)
            return cls(form.coefficient, tuple(split), (form.pivots,), "output")
        form = interpolate(torch.cat(list(factors.coefficients)), factors.basis)
        coefficients, pivots = [], []
        start = row = 0
        for length in map(len, factors.coefficients):
            inside = (form.pivots >= start) & (form.pivots < start + length)
            pivots.append(form.pivots[inside] - start)
            n_others = length - len(pivots[-1])
            coefficients.append(form.coefficient[row : row + n_others])
            start, row = start + length, row + n_others
        return cls(form.basis, tuple(coefficients), tuple(pivots))

    @classmethod
    def load(cls, tensors: RoleTensors, shapes: Sequence[tuple[int, int]]) -> Interpolative:
        pivots = [tensors.shared["pivots"]] if tensors.side == "output" else []
        pivots += [part["pivots"] for part in tensors.parts if "pivots" in part]
        coefficients = tuple(part["coefficient"] for part in tensors.parts)
        return cls(tensors.shared["basis"], coefficients, tuple(pivots), tensors.side)

    def tensors(self) -> RoleTensors:
        pivots = [of_part.int() for of_part in self.pivots]
        if self.side == "output":
            parts = tuple({"coefficient": coefficient} for coefficient in self.coefficients)
            return RoleTensors({"basis": self.basis, "pivots": pivots[0]}, parts, "output")
        parts = tuple(
            {"coefficient": coefficient, "pivots": of_part}
            for coefficient, of_part in zip(self.coefficients, pivots, strict=True)
        )
        return RoleTensors({"basis": self.basis}, parts)

    def modules(self) -> Sequence[InterpolativeModule]:
        basis = parameter(self.basis)
        if self.side == "output":
            pivots, firsts = self.pivots * len(self.coefficients), [0] * len(self.coefficients)
        else:
            pivots, firsts = self.pivots, [0, *accumulate(map(len, self.pivots))]
        return [
            InterpolativeModule(basis, coefficient, self.side, of_part, first)
            for coefficient, of_part, first in zip(self.coefficients, pivots, firsts, strict=False)
        ]

    def editable(self) -> LowRank:
        """Plain factors."""
        modules = self.modules()
        if self.side == "output":
            return LowRank(modules[0].plain(), self.coefficients, "output")
        return LowRank(self.basis, tuple(module.plain() for module in modules))

    def refit(self, problems: Sequence[Problem]) -> Form:
        return self.editable().refit(problems)

    def trainable(self, edited: bool) -> LowRank:
        return self.editable().trainable(edited)


def _order(pivots: Int64[Tensor, " n"], d_out: int) -> Int64[Tensor, " d_out"]:
    """Where each row lies when the pivots come first and the others follow in their order."""
    others = torch.ones(d_out, dtype=torch.bool, device=pivots.device)
    others[pivots] = False
    return torch.cat([pivots, others.nonzero().flatten()]).argsort()
