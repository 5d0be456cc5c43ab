"""A budget -> which offers are taken, and which point of each, at one price for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sharebasis.errors import BudgetError
from sharebasis.linalg.exact_cover import Cover
from sharebasis.structures.curve import Curve

BUDGET_SLACK = Fraction(1, 1000)
"""Fraction of the dense numbers by which caps may fall short of the budget."""


def allocate(
    curves: Sequence[Curve], cover: Cover, n_baseline: int, removed: float
) -> dict[int, int]:
    """Choose offers that cover every part once, and an entry of each: those of least loss.

    Minimises Σ loss + λ Σ stored; the largest λ whose choice fits is found by bisection. The
    rest of the budget, less than one step of one curve, goes to the steps that save most per
    number.

    Where the baseline alone loses no more, it is that: it may spend the rest of the budget
    better.

    Args:
        curves: of the offers of the baseline, and after them of those in their place; entries need
            neither be convex nor monotone in what they store.
        cover: of the parts, by all offers.
        n_baseline: how many are the baseline's.
        removed: fraction of the dense numbers to remove, in (0, 1).

    Returns:
        Number of every chosen offer, ascending -> index of the chosen entry of its curve.

    Raises:
        BudgetError: the least that is allowed everywhere stores too much, or the most too little.
    """
    picks = picks_within(partial(_overlapping, curves, cover), removed)
    if all(pick.number < n_baseline for pick in picks):
        return _entries(picks)
    of_baseline = curves[:n_baseline]
    if not all(np.isfinite(curve.loss).any() for curve in of_baseline):  # limits allow only others
        return _entries(picks)
    try:
        baseline = picks_within(partial(_separate, of_baseline), removed)
    except BudgetError:  # only what shares stores so little
        return _entries(picks)
    is_better = sum(pick.loss for pick in baseline) <= sum(pick.loss for pick in picks)
    return _entries(baseline if is_better else picks)


@dataclass(frozen=True, slots=True)
class Pick:
    """A group, and the entry of its curve that is chosen."""

    number: int
    curve: Curve
    entry: int

    @property
    def stored(self) -> int:
        return int(self.curve.stored[self.entry])

    @property
    def loss(self) -> float:
        return float(self.curve.loss[self.entry])


Choose = Callable[[float], Sequence[Pick]]
"""Price a number -> the picks of least loss + price * stored that cover every part once; at an
infinite price, of those that limits allow, what stores least (or, where it is negative, most)."""


def _separate(curves: Sequence[Curve], price: float) -> Sequence[Pick]:
    """Every group, of any rank or dense."""
    entries = [int(np.argmin(_values(curve, price))) for curve in curves]
    return [Pick(i, curves[i], entry) for i, entry in enumerate(entries)]


def _overlapping(curves: Sequence[Curve], cover: Cover, price: float) -> Sequence[Pick]:
    """Those of groups that overlap which cover every part once."""
    values = [_values(curve, price) for curve in curves]
    entries = [int(np.argmin(of_curve)) for of_curve in values]
    costs = [float(of_curve[i]) for of_curve, i in zip(values, entries, strict=True)]
    return [Pick(i, curves[i], entries[i]) for i in cover.best(costs)]


def picks_within(choose: Choose, removed: float) -> Sequence[Pick]:
    """The picks whose sum of losses is least within the budget; see `allocate`.

    Raises:
        BudgetError: as `allocate`.
    """
    budget = _budget(choose, removed)
    low, high = 0.0, 1.0  # low stores too much (or just enough), high fits
    while _stored(choose(high)) > budget:
        low, high = high, 4 * high
    for _ in range(200):
        middle = (low + high) / 2
        fits = _stored(choose(middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
    picks = choose(high)
    return _filled(picks, budget - _stored(picks))


def _entries(picks: Sequence[Pick]) -> dict[int, int]:
    return {pick.number: pick.entry for pick in picks}


def _stored(picks: Sequence[Pick]) -> int:
    return sum(pick.stored for pick in picks)


def _values(curve: Curve, price: float) -> NDArray[np.float64]:
    if np.isinf(price):
        return np.where(np.isfinite(curve.loss), np.sign(price) * curve.stored, np.inf)
    return curve.loss + price * curve.stored


def _budget(choose: Choose, removed: float) -> int:
    """Numbers to be stored, once it is known that they can be."""
    smallest = choose(np.inf)
    least, most = _stored(smallest), _stored(choose(-np.inf))
    dense = sum(pick.curve.original for pick in smallest)
    budget = int((1 - Fraction(str(removed))) * dense)
    if least > budget:
        limited = any(np.isinf(pick.curve.loss[:-1]).any() for pick in smallest)
        minimum = "the least that limits allow" if limited else "the least that there can be"
        remedy = (
            "lower the floors of fit.limits or exclude less" if limited else "use a coarser split"
        )
        raise BudgetError(
            f"Removing {removed:.4g} leaves {budget} numbers, but {minimum} already stores "
            f"{least}. Lower fit.removed or {remedy}."
        )
    if most < budget - BUDGET_SLACK * dense:
        raise BudgetError(
            f"Removing {removed:.4g} leaves {budget} numbers, but limits allow no more than "
            f"{most}, which is removing {1 - most / dense:.4g}. Raise fit.removed or the caps of "
            "fit.limits."
        )
    return budget


def _filled(picks: Sequence[Pick], budget: int) -> Sequence[Pick]:
    """Spend the rest of the budget, step by step, where it saves most per number."""
    picks = list(picks)
    while True:
        best_rate, best_pick, best_entry = 0.0, -1, -1
        for i, pick in enumerate(picks):
            extra, saved = pick.curve.stored - pick.stored, pick.loss - pick.curve.loss
            rate = np.where((extra <= budget) & (saved > 0), saved / np.maximum(extra, 1), 0.0)
            if (highest := rate.max()) > best_rate:
                best_rate, best_pick, best_entry = float(highest), i, int(rate.argmax())
        if best_pick < 0:
            return picks
        step = replace(picks[best_pick], entry=best_entry)
        budget -= step.stored - picks[best_pick].stored
        picks[best_pick] = step
