"""A parameter budget -> a rank for each group."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sharebasis.errors import BudgetError
from sharebasis.grouping import Group
from sharebasis.settings import Storage

DENSE = -1
"""In the place of a rank: the weights stay as they are."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What a group may cost and lose: entry k is rank k + 1; the last entry is dense."""

    name: str
    stored: NDArray[np.int64]
    """Numbers stored."""
    loss: NDArray[np.float64]

    def rank(self, entry: int) -> int:
        return DENSE if entry == len(self.stored) - 1 else entry + 1


def uniform_ranks(groups: Sequence[Group], removed: float, storage: Storage = "plain") -> list[int]:
    """Give every group the largest rank that removes at least `removed` of its numbers.

    Args:
        groups: at most one for each part.
        removed: fraction of the original numbers to remove, in (0, 1).
        storage: form of the factors, which says what a rank costs.

    Raises:
        BudgetError: a group is too small to keep even rank 1.
    """
    # Exact, since 1 - 0.8 is not 0.2 in binary and a rank would be lost to the difference.
    kept = 1 - Fraction(str(removed))
    ranks = []
    for group in groups:
        allowed = range(1, group.full_rank + 1)
        budget = int(kept * group.n_weights)
        # What a rank costs grows with the rank in either form.
        rank = bisect_right(allowed, budget, key=partial(group.n_stored, storage=storage))
        if rank < 1:
            raise BudgetError(
                f"Removing {removed:.4g} of {group.name}, stacked to ({group.d_out}, "
                f"{group.d_in}), leaves no rank: rank 1 already stores "
                f"{group.n_stored(1, storage)} of {group.n_weights} numbers. Lower fit.removed "
                "or use a coarser split."
            )
        ranks.append(rank)
    return ranks


def curve_of(group: Group, energies: NDArray[np.float64], storage: Storage) -> Curve:
    """What every rank of a group stores and loses.

    Args:
        group: with its sizes.
        energies: what each direction saves, the largest first; its full rank of them.
        storage: form of the factors.
    """
    ranks = range(1, len(energies) + 1)
    stored = [*(group.n_stored(rank, storage) for rank in ranks), group.n_weights]
    tails = np.append(np.cumsum(energies[::-1])[::-1][1:], [0.0, 0.0])
    return Curve(group.name, np.array(stored), tails)


def allocate(curves: Sequence[Curve], removed: float) -> list[int]:
    """Choose an entry of every curve so that the sum of losses is least within the budget.

    Minimises Σ loss + λ Σ stored in every group alone; the largest λ whose choice fits is
    found by bisection. What is left of the budget, less than one step of one curve, goes to
    the steps that save most per number.

    Args:
        curves: of groups; entries need neither be convex nor monotone in what they store.
        removed: fraction of the dense numbers to remove, in (0, 1).

    Returns:
        Index of the chosen entry of every curve.

    Raises:
        BudgetError: rank 1 everywhere stores too much.
    """
    budget = int((1 - Fraction(str(removed))) * sum(int(curve.stored[-1]) for curve in curves))
    least = sum(int(curve.stored.min()) for curve in curves)
    if least > budget:
        raise BudgetError(
            f"Removing {removed:.4g} leaves {budget} numbers, but rank 1 everywhere already "
            f"stores {least}. Lower fit.removed or use a coarser split."
        )
    low, high = 0.0, 1.0  # low stores too much (or just enough), high fits
    while _stored(curves, _choose(curves, high)) > budget:
        low, high = high, 4 * high
    for _ in range(200):
        middle = (low + high) / 2
        fits = _stored(curves, _choose(curves, middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
    entries = _choose(curves, high)
    _fill(curves, entries, budget - _stored(curves, entries))
    return entries


def _choose(curves: Sequence[Curve], price: float) -> list[int]:
    return [int(np.argmin(curve.loss + price * curve.stored)) for curve in curves]


def _stored(curves: Sequence[Curve], entries: Sequence[int]) -> int:
    return sum(int(curve.stored[i]) for curve, i in zip(curves, entries, strict=True))


def _fill(curves: Sequence[Curve], entries: list[int], left: int) -> None:
    """Spend what is left, step by step, where it saves most per number."""
    while True:
        best, which, entry = 0.0, -1, -1
        for i, (curve, now) in enumerate(zip(curves, entries, strict=True)):
            extra, saved = curve.stored - curve.stored[now], curve.loss[now] - curve.loss
            rate = np.where((extra <= left) & (saved > 0), saved / np.maximum(extra, 1), 0.0)
            if (top := rate.max()) > best:
                best, which, entry = float(top), i, int(rate.argmax())
        if which < 0:
            return
        left -= int(curves[which].stored[entry] - curves[which].stored[entries[which]])
        entries[which] = entry
