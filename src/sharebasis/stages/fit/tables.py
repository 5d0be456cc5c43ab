"""Where a fit put its numbers, and what every rank would have cost, by layer and family, as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sharebasis.architecture.groups import Group
from sharebasis.io.tables import csv_text
from sharebasis.stages.fit.metrics import FittedModel

RANKS = "ranks.csv"
SPECTRUM = "spectrum.csv"
STEPS = 16
"""Ranks in the spectrum, evenly spaced from 0 to just below the full one."""

Cell = tuple[str, int]
"""Family and layer."""


def ranks_csv(fitted: FittedModel) -> str:
    """A row for each family of each layer: what its parts keep.

    Columns: family, layer, parts (how many), rank (the mean of those that have one; empty where
    none has), full_rank and width (means), stored and original (numbers). A basis counts for each
    part that uses it by the part's share of the group's weights. The width is the fraction of its
    neurons that an MLP's matrix still has, 1 for all others; both ranks are of the pruned weights.
    """
    cells: dict[Cell, NDArray[np.float64]] = {}
    for fitted_group in fitted.groups:
        group, rank = fitted_group.group, fitted_group.rank
        for cell, share in _parts(group):
            width = group.n_weights / fitted_group.n_original
            row = [1, rank is not None, rank or 0, group.full_rank, width]
            row += [share * fitted_group.n_stored, share * fitted_group.n_original]
            cells[cell] = cells.get(cell, 0) + np.array(row, dtype=np.float64)
    rows = [
        [
            *cell,
            int(n),
            f"{rank / n_ranked:.6g}" if n_ranked else "",
            f"{full_rank / n:.6g}",
            f"{width / n:.6g}",
            round(stored),
            round(original),
        ]
        for cell, (n, n_ranked, rank, full_rank, width, stored, original) in sorted(cells.items())
    ]
    columns = ("family", "layer", "parts", "rank", "full_rank", "width", "stored", "original")
    return csv_text(columns, rows)


def spectrum_csv(groups: Sequence[Group], energies: Sequence[NDArray[np.float64]]) -> str:
    """The loss of a family of a layer when it is cut to a fraction of its full rank.

    Relative to the loss of rank 0; by the method's own measure.

    Args:
        groups: that cover every part once.
        energies: of each, the largest first, and perhaps those of further ones.
    """
    cells: dict[Cell, NDArray[np.float64]] = {}
    for group, of_group in zip(groups, energies, strict=False):
        for cell, share in _parts(group):
            cells[cell] = cells.get(cell, 0) + share * _losses(of_group, group.full_rank)
    rows = [
        [*cell, step / STEPS, f"{loss:.4g}"]
        for cell, losses in sorted(cells.items())
        for step, loss in enumerate(losses / losses[0] if losses[0] else losses)
    ]
    return csv_text(("family", "layer", "rank_fraction", "loss"), rows)


def _losses(energies: NDArray[np.float64], full_rank: int) -> NDArray[np.float64]:
    """The loss at every step's rank."""
    tails = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    ranks = np.minimum(np.arange(STEPS) * full_rank // STEPS, len(energies))
    losses: NDArray[np.float64] = tails[ranks]
    return losses


def _parts(group: Group) -> Iterator[tuple[Cell, float]]:
    """The cell of every part, and its share of the group's weights."""
    for part in group.parts:
        share = part.n_weights / group.n_weights
        yield (part.family, part.sublayer.layer), share
