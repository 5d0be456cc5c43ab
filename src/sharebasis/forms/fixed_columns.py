"""Values of heads in the value gauge: columns of W_V are the identity and are not stored.

Dense in memory, and in products. The output of the heads has taken in what the columns were
(`linalg.value_gauge`), which the edit `value_gauge` stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from sharebasis.forms.dense import Dense, DenseModule
from sharebasis.forms.form import Form, RoleTensors
from sharebasis.linalg.objective import Problem
from sharebasis.linalg.value_gauge import dense_values


@dataclass(frozen=True, slots=True)
class FixedColumns(Form):
    """One weight, W_V of head h being [I C_h] with its columns in another order."""

    kind: ClassVar[str] = "fixed_columns"
    pivots: Int[Tensor, "n_kv_heads d_value"]
    """The columns that are the identity, ascending."""
    coefficient: Float[Tensor, "n_rows others"]
    """C of every head, one below the other; the other columns in their order."""

    @classmethod
    def load(cls, tensors: RoleTensors, shapes: Sequence[tuple[int, int]]) -> FixedColumns:
        (part,) = tensors.parts
        return cls(part["pivots"], part["dense"])

    def tensors(self) -> RoleTensors:
        return RoleTensors({}, ({"dense": self.coefficient, "pivots": self.pivots.int()},))

    def modules(self) -> Sequence[DenseModule]:
        return self.editable().modules()

    def map(self, function: Callable[[Tensor], Tensor]) -> FixedColumns:
        return replace(self, coefficient=function(self.coefficient))

    @classmethod
    def n_in_memory(cls, shapes: Sequence[tuple[int, int]]) -> int:
        return sum(map(prod, shapes))

    def editable(self) -> Dense:
        """The dense weight, whose columns may then be anything."""
        return Dense((dense_values(self.pivots, self.coefficient.detach()),))

    def refit(self, problems: Sequence[Problem]) -> Form:
        return self.editable().refit(problems)

    def trainable(self, edited: bool) -> Dense | None:
        return self.editable().trainable(edited)
