"""A weight and the second-order loss in which an error of it counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sharebasis.linalg.moments import Moment


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A weight W that is to be approximated, and the moments that say how well.

    An approximation Ŵ loses tr(G (W - Ŵ) C (W - Ŵ)ᵀ), with C = E[x xᵀ] of the inputs of W and
    G = E[g gᵀ] of the gradients of its outputs.

    Source: K-FAC, Martens and Grosse 2015 (a layer's Hessian as a Kronecker product C ⊗ G).
    """

    weight: Float64[Tensor, "d_out d_in"]
    """W."""
    inputs: Moment | None
    """C; None is the identity."""
    gradients: Moment | None
    """G; None is the identity."""

    def loss(self, approximation: Float[Tensor, "d_out d_in"]) -> float:
        """tr(G (W - Ŵ) C (W - Ŵ)ᵀ), in float64.

        Args:
            approximation: Ŵ.
        """
        error = self.weight - approximation.double()
        left = error if self.gradients is None else self.gradients.second @ error
        right = error if self.inputs is None else error @ self.inputs.second
        return (left * right).sum().item()

    @property
    def energy(self) -> float:
        """tr(G W C Wᵀ), the loss of a weight of zeros."""
        return self.loss(torch.zeros_like(self.weight))

    @property
    def input_moment(self) -> Moment:
        """C, for methods that are offered only where calibration gives one."""
        assert self.inputs is not None
        return self.inputs

    def transposed(self) -> Problem:
        """The same problem of Wᵀ: tr(G E C Eᵀ) = tr(C Eᵀ G E), so the moments change places."""
        return Problem(self.weight.T, self.gradients, self.inputs)
