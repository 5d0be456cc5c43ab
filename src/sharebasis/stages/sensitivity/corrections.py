"""Measured over predicted losses of cells of the model -> weights of parts in the allocation.

The allocation adds up quadratic losses, tr(G (W - Ŵ) C (W - Ŵ)ᵀ), half of which is the divergence
that theory predicts (nats a prediction). Where a cell of the model diverges by another amount, its
losses count by measured / predicted: a first-order correction of what the quadratic form does not
see. A factor that all cells have in common would change no allocation, and is taken out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sharebasis.allocation.sensitivity import CellLoss
from sharebasis.architecture.groups import Group
from sharebasis.errors import CalibrationError


@dataclass(frozen=True, slots=True)
class Cell:
    """Groups of one kind in a run of layers."""

    kind: str
    """A family; or attn or mlp."""
    layers: tuple[int, int]
    """The first and the last."""
    groups: tuple[int, ...]
    """Their numbers."""


def cells_of(
    groups: Sequence[Group], runs: int, kind: Callable[[Group], str | None]
) -> Sequence[Cell]:
    """Cut the depth into runs of layers, as equal as they can be, and each into kinds.

    Args:
        groups: of the model; one of several layers counts where its first is.
        runs: of layers, at most as many as there are layers.
        kind: of a group; None leaves it out.
    """
    layers = sorted({part.sublayer.layer for group in groups for part in group.parts})
    run_of = {layer: i * runs // len(layers) for i, layer in enumerate(layers)}
    found: dict[tuple[int, str], list[int]] = {}
    for i, group in enumerate(groups):
        own = kind(group)
        if own is not None:
            found.setdefault((run_of[group.parts[0].sublayer.layer], own), []).append(i)
    ends = {run: [layer for layer in layers if run_of[layer] == run] for run, _ in found}
    return [
        Cell(own, (ends[run][0], ends[run][-1]), tuple(members))
        for (run, own), members in sorted(found.items())
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
    pairs = list(zip(predicted, measured, strict=True))
    lost = [(p, m) for p, m in pairs if p > 0]
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
        for cell, (p, m) in zip(cells, pairs, strict=True)
    ], ratio
