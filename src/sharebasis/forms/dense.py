"""Weights as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sharebasis.forms.form import Form, FormModule, RoleTensors, parameter, trained
from sharebasis.linalg.objective import Problem


class DenseModule(FormModule):
    """x Wᵀ."""

    kind: ClassVar[str] = "dense"

    def __init__(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        super().__init__()
        self.weight = parameter(weight)

    @property
    def shape(self) -> tuple[int, int]:
        d_out, d_in = self.weight.shape
        return d_out, d_in

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.weight

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return functional.linear(x, self.weight)


@dataclass(frozen=True, slots=True)
class Dense(Form):
    """A weight for each part."""

    kind: ClassVar[str] = "dense"
    keeps_weights: ClassVar[bool] = True
    weights: tuple[Float[Tensor, "_ _"], ...]

    @classmethod
    def load(cls, tensors: RoleTensors, shapes: Sequence[tuple[int, int]]) -> Dense:
        return cls(tuple(part["dense"] for part in tensors.parts))

    def tensors(self) -> RoleTensors:
        return RoleTensors({}, tuple({"dense": weight} for weight in self.weights))

    def modules(self) -> Sequence[DenseModule]:
        return [DenseModule(weight) for weight in self.weights]

    def map(self, function: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(tuple(map(function, self.weights)))

    def change_inputs(self, part: int, change: Callable[[Tensor], Tensor]) -> Dense:
        weights = list(self.weights)
        weights[part] = change(weights[part])
        return Dense(tuple(weights))

    def refit(self, problems: Sequence[Problem]) -> Dense:
        return Dense(tuple(problem.weight for problem in problems))

    def trainable(self, edited: bool) -> Dense | None:
        # A weight that nothing was done to is the original's, and stays that.
        return Dense(tuple(map(trained, self.weights))) if edited else None
