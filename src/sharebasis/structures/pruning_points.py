"""Which ways to store a pruned MLP are the cheapest at some price."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from sharebasis.config.types import Storage
from sharebasis.structures.curve import Curve, curve_of
from sharebasis.structures.limits import Limit
from sharebasis.structures.mlps import Mlp
from sharebasis.structures.width_curve import WidthCurve

PRICES = 10 ** np.linspace(-4, 2, 300)
"""At which the ways to store an MLP are compared; in units of its loss a number."""


@dataclass(frozen=True, slots=True)
class PruningPoint:
    """How a pruned MLP is stored."""

    width: int
    ranks: tuple[int, ...]
    """Of each part; DENSE: its pruned weight as it is."""
    losses: tuple[float, ...]
    """Of each part; what pruning loses is down's."""
    stored: int
    """Numbers."""


def pruning_points(
    mlp: Mlp, losses: WidthCurve, limits: Sequence[Limit], storage: Storage
) -> Sequence[PruningPoint]:
    """The cheapest ways to store a pruned MLP at any price, by what they store.

    At a price a number, a width costs its loss and, for each part, what is least of loss + price ·
    stored. The points are the cheapest at prices so close to each other that none between them
    would differ by much.

    Args:
        mlp: whose neurons may go.
        losses: at every width.
        limits: of each part.
        storage: form of the factors.
    """
    options = list(_options(mlp, losses, limits, storage))
    scale = max((loss for _, loss, _ in options), default=0.0) / mlp.n_weights
    points: set[PruningPoint] = set()
    for price in (scale or 1.0) * PRICES:
        at_price = [_cheapest(option, price) for option in options]
        cost, point = min(at_price, key=itemgetter(0), default=(np.inf, None))
        if point is not None and np.isfinite(cost):
            points.add(point)
    return sorted(points, key=lambda point: point.stored)


Option = tuple[int, float, Sequence[Curve]]
"""(width, loss, curve of each part)"""


def _options(
    mlp: Mlp, losses: WidthCurve, limits: Sequence[Limit], storage: Storage
) -> Iterator[Option]:
    if any(limit.dense for limit in limits):
        return
    for width, loss, energies in zip(mlp.widths, losses.losses, losses.energies, strict=True):
        if any(width % limit.multiple for limit in limits):
            continue
        pruned = zip(mlp.parts, mlp.groups(width), energies, limits, strict=True)
        yield (
            width,
            loss,
            [
                curve_of(group, of_part, storage).limited(limit, part.n_weights)
                for part, group, of_part, limit in pruned
            ],
        )


def _cheapest(option: Option, price: float) -> tuple[float, PruningPoint]:
    width, loss, curves = option
    entries = [int(np.argmin(curve.loss + price * curve.stored)) for curve in curves]
    chosen = list(zip(curves, entries, strict=True))
    losses = [float(curve.loss[entry]) for curve, entry in chosen]
    losses[-1] += loss
    ranks = tuple(curve.rank(entry) for curve, entry in chosen)
    stored = sum(int(curve.stored[entry]) for curve, entry in chosen)
    point = PruningPoint(width, ranks, tuple(losses), stored)
    return sum(losses) + price * point.stored, point


def curve_of_points(name: str, n_weights: int, points: Sequence[PruningPoint]) -> Curve:
    """Points as entries of a curve; the last entry, which nobody may choose, is the original."""
    stored = [*(point.stored for point in points), n_weights]
    return Curve(name, np.array(stored), np.array([*(sum(p.losses) for p in points), np.inf]))
