"""Factors of one rank, of weights that read one input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sharebasis.linalg.low_rank import decompose
from sharebasis.linalg.moments import Moment
from sharebasis.linalg.objective import Problem
from sharebasis.linalg.shared_basis import Factors


def problems_of(
    weights: Sequence[Tensor], inputs: Moment | None, gradients: Sequence[Moment] | None = None
) -> list[Problem]:
    """Of weights (d_out_i, d_in), whatever their dtype."""
    pairs = zip(weights, gradients or [None] * len(weights), strict=True)
    return [Problem(weight.double(), inputs, gradient) for weight, gradient in pairs]


def fit_rank(
    weights: Sequence[Tensor],
    inputs: Moment | None,
    rank: int,
    gradients: Sequence[Moment] | None = None,
) -> Factors:
    """What `decompose` says of a rank."""
    spectrum = decompose(problems_of(weights, inputs, gradients))
    basis, stacked = spectrum.truncated(rank)
    coefficients = stacked.split([len(weight) for weight in weights])
    loss, energy = (spectrum.energies[start:].sum().item() for start in (rank, 0))
    return Factors(basis, tuple(coefficients), loss, energy)
