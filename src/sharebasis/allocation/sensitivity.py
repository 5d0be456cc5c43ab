"""What the stage `sensitivity` measured, or that it measured nothing; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sharebasis.config.analyse import Sensing


@dataclass(frozen=True, slots=True)
class CellLoss:
    """What a cell was predicted to lose and what it was measured to, nats a prediction."""

    kind: str
    layers: tuple[int, int]
    n_groups: int
    predicted: float
    """Half of the quadratic loss."""
    measured: float
    weight: float
    """(measured / predicted) / (Σ measured / Σ predicted), clipped; 1 where nothing was lost."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What the losses of parts count in the allocation; artifacts/sensitivity.json."""

    by: Sensing
    removed: float | None
    """Of the draft that was measured."""
    clip: float
    """Weights lie between its inverse and this."""
    n_predictions: int
    ratio: float
    """Σ measured / Σ predicted, which the weights are relative to."""
    cells: tuple[CellLoss, ...]
    parts: Mapping[str, float]
    """Name of a part (of a sublayer that is one part: the sublayer's) -> its weight."""


UNWEIGHED = Sensitivity("none", None, 1.0, 0, 1.0, (), {})
"""Every weight is 1."""
