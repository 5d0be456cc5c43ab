"""One budget for groups that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence

from sharebasis.allocation.lagrangian import allocate
from sharebasis.linalg.exact_cover import Cover
from sharebasis.structures.curve import Curve


def allocate_alone(curves: Sequence[Curve], removed: float) -> list[int]:
    """The entry of every curve, each of which has one part of its own."""
    cover = Cover([frozenset([number]) for number in range(len(curves))])
    entries = allocate(curves, cover, len(curves), removed)
    return [entries[number] for number in range(len(curves))]
