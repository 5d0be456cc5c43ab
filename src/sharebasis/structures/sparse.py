"""Unstructured sparsity: entries of a weight set to zero, the others refitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.forms.masked import Masked
from sharebasis.linalg.optimal_brain_surgeon import sparsify
from sharebasis.linalg.sparsity_curve import SparsityCurve, measure
from sharebasis.moments.problems import Problems
from sharebasis.structures.curve import Curve
from sharebasis.structures.structure import (
    Built,
    Measured,
    MeasuredCell,
    ModelParts,
    Offer,
    Structure,
    Terms,
    Workshop,
)

N_POINTS = 256
"""Numbers of entries that a part may keep, evenly spaced; a fraction of 1/256 of a part is far
less than the budget has to be exact to."""


class Sparse(Structure):
    """Masks the entries whose loss costs the model least, and refits the others."""

    cell_type = Group

    def cells(self, model: ModelParts) -> Sequence[Group]:
        return [Group((part,), structure="sparse") for part in model.parts]

    def measure(
        self, cell: Group, weights: Sequence[Tensor], problems: Problems
    ) -> Measured | None:
        """`curve`: by price, how many entries are removed, what is lost and that price."""
        problem = problems.of_part(cell.parts[0], weights[0])
        curve = measure(problem) if problem is not None else None
        if curve is None:
            return None
        rows = curve.removed, curve.losses, curve.prices
        return Measured({"curve": torch.tensor(rows, dtype=torch.float64)})

    def offers(self, cells: Sequence[MeasuredCell], terms: Terms) -> Iterator[Offer]:
        for cell in cells:
            (part,) = cell.cell.parts
            n_kept, curve = curve_of(cell.cell, _read(cell), terms.weight([part]))
            yield Offer([part], curve.limited(terms.limits[part.name]), cell, n_kept)

    def build(
        self, cell: MeasuredCell, point: int, workshop: Workshop
    ) -> Callable[[], Sequence[Built]]:
        (part,) = cell.cell.parts
        (weight,) = workshop.weights([part])
        price = _read(cell).price_at(1 - point / part.n_weights)
        return partial(_build, cell.cell, weight, point, price, workshop)


def _build(
    group: Group, weight: Tensor, n_kept: int, price: float, workshop: Workshop
) -> Sequence[Built]:
    (part,) = group.parts
    problem = workshop.problems.of_part(part, weight)
    assert problem is not None  # it was measured
    sparse = sparsify(problem, n_kept, price)
    form = Masked(sparse.weight, sparse.kept)
    return [Built(group, form, group.n_weights, sparse.loss, workshop.energy(part))]


def curve_of(group: Group, measured: SparsityCurve, weight: float = 1.0) -> tuple[list[int], Curve]:
    """Numbers of entries that stay, and what they cost; the last point, which nobody may choose,
    is all of them.

    Args:
        group: of one part.
        measured: what it loses.
        weight: what its loss counts.
    """
    n = group.n_weights
    removed = torch.linspace(measured.removed[-1], measured.removed[0], N_POINTS)
    kept = (n * (1 - removed)).int()
    stored = [Masked.n_numbers(n_kept, n) for n_kept in kept.tolist()]
    losses = weight * measured.loss_at(1 - kept.double() / n)
    name = group.parts[0].name
    curve = Curve(name, np.array([*stored, n]), np.array([*losses.tolist(), np.inf]))
    return [*kept.tolist(), n], curve


def _read(cell: MeasuredCell) -> SparsityCurve:
    return SparsityCurve(*cell.read("curve").tolist())
