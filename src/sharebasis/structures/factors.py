"""Low-rank factors of groups of parts, or their weights as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.errors import CalibrationError
from sharebasis.forms.dense import Dense
from sharebasis.forms.low_rank import LowRank
from sharebasis.linalg.shared_basis import energies, fit_shared_basis, pooled_basis
from sharebasis.model.part_weights import read_part
from sharebasis.moments.problems import Problems
from sharebasis.structures.curve import DENSE, curve_of
from sharebasis.structures.structure import (
    Built,
    Measured,
    MeasuredCell,
    Offer,
    Structure,
    Terms,
    Workshop,
)


class FactorStructure(Structure):
    """A basis and coefficients for every group, of any rank; of the baseline, dense as well.

    What `decompose` writes of the baseline are factors of full rank, which are cut to any rank.
    Of groups that are offered in its place it writes what every rank would save, and the factors
    are made where they are picked, with the moments of each part.
    """

    cell_type = Group
    side_by_side = False
    takes_in_inputs = True

    def measure(
        self, cell: Group, weights: Sequence[Tensor], problems: Problems
    ) -> Measured | None:
        if self.is_baseline:
            spectrum, seen = problems.decompose(cell, weights)
            factors = {
                "basis": spectrum.basis.to("cpu", torch.float32),
                "coefficient": spectrum.coefficient.to("cpu", torch.float32),
            }
            return Measured({"energies": spectrum.energies.cpu(), **factors}, seen)
        members = problems.of(cell, weights)
        if members is None:
            return None
        return Measured({"energies": energies(members, pooled_basis(members)).cpu()})

    def offers(self, cells: Sequence[MeasuredCell], terms: Terms) -> Iterator[Offer]:
        for cell in cells:
            group: Group = cell.cell
            weighed = terms.weight(group.parts) * terms.energies[cell.number]
            curve = curve_of(group, weighed, terms.settings.storage)
            limits = {terms.limits[part.name] for part in group.parts}
            if self.is_baseline:
                (limit,) = limits  # a group of the baseline has one
                curve = curve.limited(limit)
            else:
                curve = curve.offered(limits)
            yield Offer(group.parts, curve, cell, [*range(1, len(weighed) + 1), DENSE])

    def build(
        self, cell: MeasuredCell, point: int, workshop: Workshop
    ) -> Callable[[], Sequence[Built]]:
        group: Group = cell.cell
        energy = float(workshop.energies[cell.number].sum())
        if point == DENSE:
            weights = [read_part(workshop.dense, part) for part in group.parts]
            built = Built(group, Dense(tuple(weights)), group.n_weights, 0.0, energy)
            return lambda: [built]
        if self.is_baseline:
            return partial(_cut, cell, point, workshop, energy)
        return partial(_fitted, group, point, workshop.weights(group.parts), workshop, energy)


def _cut(cell: MeasuredCell, rank: int, workshop: Workshop, energy: float) -> Sequence[Built]:
    """The first directions of the factors of full rank."""
    group: Group = cell.cell
    basis = cell.read("basis", slice(0, rank)).double().to(workshop.device)
    stacked = cell.read("coefficient", columns=slice(0, rank)).double().to(workshop.device)
    coefficients = stacked.split([part.shape[0] for part in group.parts])
    loss = float(workshop.energies[cell.number][rank:].sum())
    return [Built(group, LowRank(basis, tuple(coefficients)), group.n_weights, loss, energy)]


def _fitted(
    group: Group, rank: int, weights: Sequence[Tensor], workshop: Workshop, energy: float
) -> Sequence[Built]:
    """Factors for the moments of each part."""
    members = workshop.problems.of(group, weights)
    if members is None:
        raise CalibrationError(
            f"There is no moment for all of {group.name}; run calibrate and decompose again."
        )
    factors = fit_shared_basis(members, rank)
    # Weights that are zero lose nothing.
    relative_loss = factors.loss / factors.energy if factors.energy else 0.0
    form = LowRank(factors.basis, factors.coefficients)
    if group.side == "output":
        transposed = tuple(coefficient.T for coefficient in factors.coefficients)
        form = LowRank(factors.basis.T, transposed, "output")
    return [Built(group, form, group.n_weights, relative_loss * energy, energy)]


def by_layer(groups: Iterable[Group]) -> Sequence[Group]:
    """Groups of the same layers in turn: they read the same moments."""
    return sorted(groups, key=lambda group: group.parts[0].sublayer.layer)
