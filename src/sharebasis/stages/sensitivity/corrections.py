"""Measured over predicted losses of cells of the model -> weights of parts in the allocation.

The allocation adds up quadratic losses, tr(G (W - Ŵ) C (W - Ŵ)ᵀ), half of which is the divergence
that theory predicts (nats a prediction). Where a cell of the model diverges by another amount, its
losses count by measured / predicted: a first-order correction of what the quadratic form does not
see. A factor that all cells have in common would change no allocation, and is taken out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sharebasis.allocation.sensitivity import CellLoss
from sharebasis.architecture.groups import Group
from sharebasis.errors import CalibrationError


@dataclass(frozen=True, slots=True)
class Cell:
    """Groups of one family in a run of layers."""

    kind: str
    """The family."""
    layers: tuple[int, int]
    """The first and the last."""
    groups: tuple[int, ...]
    """Their numbers."""


def cells_of(groups: Sequence[Group], runs: int) -> Sequence[Cell]:
    """Cut the depth into runs of layers, as equal as they can be, and each into families.

    Args:
        groups: of the model; one of several layers counts where its first is.
        runs: of layers, at most as many as there are layers.
    """
    layers = sorted({part.sublayer.layer for group in groups for part in group.parts})
    run_of = {layer: i * runs // len(layers) for i, layer in enumerate(layers)}
    members: dict[tuple[int, str], list[int]] = {}
    for i, group in enumerate(groups):
        run = run_of[group.parts[0].sublayer.layer]
        members.setdefault((run, group.family), []).append(i)
    layers_of = {run: [layer for layer in layers if run_of[layer] == run] for run, _ in members}
    return [
        Cell(family, (layers_of[run][0], layers_of[run][-1]), tuple(numbers))
        for (run, family), numbers in sorted(members.items())
    ]


def corrections(
    cells: Sequence[Cell], predicted: Sequence[float], measured: Sequence[float], clip: float
) -> tuple[Sequence[CellLoss], float]:
    """The weight of every cell.

    Args:
        cells: of the model.
        predicted: of each, nats a prediction; 0 where the draft takes nothing off.
        measured: likewise; one that is not positive gets the least weight.
        clip: weights lie between 1 / clip and clip.

    Returns:
        The losses with their weights, and the ratio of their sums.

    Raises:
        CalibrationError: nothing was lost anywhere, or what was measured is not finite.
    """
    losses = list(zip(predicted, measured, strict=True))
    lost = [(p, m) for p, m in losses if p > 0]
    ratio = sum(m for _, m in lost) / sum(p for p, _ in lost) if lost else 0.0
    if not 0 < ratio < math.inf:
        raise CalibrationError(
            f"The draft's cells lose {sum(m for _, m in lost):.4g} nats a prediction where "
            f"{sum(p for p, _ in lost):.4g} were predicted, which gives no weights. Raise "
            "sensitivity.removed, or set sensitivity=none."
        )
    return [
        CellLoss(
            cell.kind,
            cell.layers,
            len(cell.groups),
            p,
            m,
            min(max(m / p / ratio, 1 / clip), clip) if p > 0 else 1.0,
        )
        for cell, (p, m) in zip(cells, losses, strict=True)
    ], ratio
