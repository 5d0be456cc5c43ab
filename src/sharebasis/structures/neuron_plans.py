"""Which ways to store a pruned MLP are worth doing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from sharebasis.config.types import Storage
from sharebasis.structures.curve import Curve, curve_of
from sharebasis.structures.limits import Limit
from sharebasis.structures.neurons import Mlp, Widths

PRICES = 10 ** np.linspace(-4, 2, 300)
"""At which the ways to store an MLP are compared; in units of its loss a number."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How an MLP that lacks neurons is stored."""

    width: int
    ranks: tuple[int, ...]
    """Of each part; DENSE: its narrowed weight as it is."""
    losses: tuple[float, ...]
    """Of each part; what went with the neurons is down's."""
    stored: int
    """Numbers."""


def plans_of(mlp: Mlp, found: Widths, limits: Sequence[Limit], storage: Storage) -> Sequence[Plan]:
    """All that is worth doing with an MLP at any price, by what it stores.

    At a price a number, a width costs its loss and, for each part, what is least of loss + price ·
    stored. The plans are the cheapest at prices so close to each other that none between them
    would differ by much.

    Args:
        mlp: to be narrowed.
        found: what it loses.
        limits: of each part.
        storage: form of the factors.
    """
    options = list(_options(mlp, found, limits, storage))
    scale = max((loss for _, loss, _ in options), default=0.0) / mlp.n_weights
    plans: set[Plan] = set()
    for price in (scale or 1.0) * PRICES:
        at_price = [_cheapest(option, price) for option in options]
        cost, plan = min(at_price, key=itemgetter(0), default=(np.inf, None))
        if plan is not None and np.isfinite(cost):
            plans.add(plan)
    return sorted(plans, key=lambda plan: plan.stored)


Option = tuple[int, float, Sequence[Curve]]
"""(width, loss, curve of each part)"""


def _options(
    mlp: Mlp, found: Widths, limits: Sequence[Limit], storage: Storage
) -> Iterator[Option]:
    if any(limit.dense for limit in limits):
        return
    for width, loss, energies in zip(mlp.widths, found.losses, found.energies, strict=True):
        if any(width % limit.multiple for limit in limits):
            continue
        triples = zip(mlp.parts, mlp.groups(width), energies, limits, strict=True)
        yield (
            width,
            loss,
            [
                curve_of(group, own, storage).limited(limit, part.n_weights)
                for part, group, own, limit in triples
            ],
        )


def _cheapest(option: Option, price: float) -> tuple[float, Plan]:
    width, loss, curves = option
    entries = [int(np.argmin(curve.loss + price * curve.stored)) for curve in curves]
    pairs = list(zip(curves, entries, strict=True))
    losses = [float(curve.loss[entry]) for curve, entry in pairs]
    losses[-1] += loss
    ranks = tuple(curve.rank(entry) for curve, entry in pairs)
    plan = Plan(width, ranks, tuple(losses), sum(int(c.stored[entry]) for c, entry in pairs))
    return sum(losses) + price * plan.stored, plan


def curve_of_plans(name: str, n_weights: int, plans: Sequence[Plan]) -> Curve:
    """Plans as entries of a curve; the last entry, which nobody may choose, is the original."""
    stored = [*(plan.stored for plan in plans), n_weights]
    return Curve(name, np.array(stored), np.array([*(sum(p.losses) for p in plans), np.inf]))
