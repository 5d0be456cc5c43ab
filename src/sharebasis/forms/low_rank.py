"""Low-rank factors: one basis for all parts, a coefficient for each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sharebasis.config.types import Side
from sharebasis.errors import StateError
from sharebasis.forms.form import Form, FormModule, RoleTensors, parameter, trained
from sharebasis.linalg.low_rank import balance, decompose
from sharebasis.linalg.objective import Problem
from sharebasis.runtime import matmul

NEGLIGIBLE_EIGENVALUE = 1e-10
"""Of the largest eigenvalue: directions whose inputs are smaller are not learned from."""


class LowRankModule(FormModule):
    """x -> (x inᵀ) outᵀ, with W = out @ in."""

    kind: ClassVar[str] = "low_rank"

    def __init__(
        self, basis: Float[Tensor, "_ _"], coefficient: Float[Tensor, "_ _"], side: Side
    ) -> None:
        """Args:
        basis: the same Parameter for every part that shares it.
        coefficient: of this part.
        side: where the basis lies: input, W = coefficient @ basis; output, W = basis @ coefficient.

        Raises:
            StateError: the factors are not of one rank.
        """
        super().__init__()
        self.basis, self.coefficient = parameter(basis), parameter(coefficient)
        self._side: Side = side
        inner, outer = self.factors
        if len(inner) != outer.shape[1]:
            raise StateError(
                f"Factors of shapes {tuple(outer.shape)} and {tuple(inner.shape)} have no product."
            )

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The one that sees the inputs, and the other."""
        if self._side == "input":
            return self.basis, self.coefficient
        return self.coefficient, self.basis

    @property
    def rank(self) -> int:  # type: ignore[override]
        return len(self.factors[0])

    @property
    def shape(self) -> tuple[int, int]:
        inner, outer = self.factors
        return outer.shape[0], inner.shape[1]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        inner, outer = self.factors
        return outer @ inner

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        inner, outer = self.factors
        return matmul.linear(matmul.linear(x, inner), outer)


Same = TypeVar("Same", bound="Factors")


@dataclass(frozen=True, slots=True)
class Factors(Form):
    """A basis that all parts share, and a coefficient for each."""

    basis: Float[Tensor, "_ _"]
    """(rank, d_in); on the output side (d_out, rank), perhaps without some rows."""
    coefficients: tuple[Float[Tensor, "_ _"], ...]
    """(d_out_i, rank), perhaps without some rows; on the output side (rank, d_in_i)."""

    @property
    @abstractmethod
    def side(self) -> Side:
        """Where the basis lies."""

    @property
    def rank(self) -> int:
        return self.basis.shape[0] if self.side == "input" else self.basis.shape[1]

    def map(self: Same, function: Callable[[Tensor], Tensor]) -> Same:
        coefficients = tuple(map(function, self.coefficients))
        return replace(self, basis=function(self.basis), coefficients=coefficients)

    def change_inputs(self: Same, part: int, change: Callable[[Tensor], Tensor]) -> Same:
        if self.side == "input":
            assert len(self.coefficients) == 1  # other parts would see the change, too
            return replace(self, basis=change(self.basis))
        coefficients = list(self.coefficients)
        coefficients[part] = change(coefficients[part])
        return replace(self, coefficients=tuple(coefficients))


@dataclass(frozen=True, slots=True)
class LowRank(Factors):
    """W_i = coefficient_i @ basis, or, on the output side, basis @ coefficient_i."""

    kind: ClassVar[str] = "low_rank"
    side: Side = "input"

    @staticmethod
    def n_numbers(d_out: int, d_in: int, rank: int) -> int:
        """Numbers that a group stores, whose parts are stacked to (d_out, d_in)."""
        return rank * (d_in + d_out)

    @classmethod
    def load(cls, tensors: RoleTensors, shapes: Sequence[tuple[int, int]]) -> LowRank:
        coefficients = tuple(part["coefficient"] for part in tensors.parts)
        return cls(tensors.shared["basis"], coefficients, tensors.side)

    def tensors(self) -> RoleTensors:
        parts = tuple({"coefficient": coefficient} for coefficient in self.coefficients)
        return RoleTensors({"basis": self.basis}, parts, self.side)

    def modules(self) -> Sequence[LowRankModule]:
        basis = parameter(self.basis)
        return [LowRankModule(basis, factor, self.side) for factor in self.coefficients]

    def refit(self, problems: Sequence[Problem]) -> LowRank:
        assert self.side == "input"
        basis, stacked = decompose(problems).truncated(self.rank)
        lengths = [len(problem.weight) for problem in problems]
        return LowRank(basis, tuple(stacked.split(lengths)))

    def update(self, problems: Sequence[Problem]) -> LowRank | None:
        """The coefficients that are best for the basis.

        A = W C Bᵀ (B C Bᵀ)⁻¹; in directions of B that the inputs do not reach, A stays.

        Args:
            problems: C is the first one's; gradients do not matter.

        Source: the update of Basis Sharing, arXiv:2410.03765, after SVD-LLM, arXiv:2403.07378.
        """
        if self.side == "output":
            return None  # these are the best for all inputs
        assert problems[0].inputs is not None
        basis = self.basis.double()
        seen = basis @ problems[0].inputs.total
        inverse = torch.linalg.pinv(seen @ basis.T, rtol=NEGLIGIBLE_EIGENVALUE, hermitian=True)
        coefficients = []
        for coefficient, problem in zip(self.coefficients, problems, strict=True):
            before = coefficient.double()
            residual = problem.weight.double() - before @ basis
            coefficients.append(before + residual @ seen.T @ inverse)
        return LowRank(basis, tuple(coefficients))

    def trainable(self, edited: bool) -> LowRank:
        """Balanced, so that a step of gradient descent moves both factors by as much."""
        if self.side == "output":  # the same problem, transposed
            return self._transposed("input").trainable(edited)._transposed("output").map(trained)
        stacked = torch.cat(list(self.coefficients)).double()
        lengths = [len(coefficient) for coefficient in self.coefficients]
        stacked, basis = balance(stacked, self.basis.double())
        return LowRank(basis, tuple(stacked.split(lengths))).map(trained)

    def _transposed(self, side: Side) -> LowRank:
        """The factors of the transposed weights."""
        return LowRank(self.basis.T, tuple(factor.T for factor in self.coefficients), side)
