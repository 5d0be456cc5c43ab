"""A parameter budget -> a rank for each group."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from sharebasis.errors import BudgetError
from sharebasis.grouping import Group


def uniform_ranks(groups: Sequence[Group], removed: float) -> list[int]:
    """Give every group the largest rank that removes at least `removed` of its numbers.

    Args:
        groups: at most one for each part.
        removed: fraction of the original numbers to remove, in (0, 1).

    Raises:
        BudgetError: a group is too small to keep even rank 1.
    """
    # Exact, since 1 - 0.8 is not 0.2 in binary and a rank would be lost to the difference.
    kept = 1 - Fraction(str(removed))
    ranks = []
    for group in groups:
        rank = int(kept * group.n_weights / group.n_stored(1))
        if rank < 1:
            raise BudgetError(
                f"Removing {removed:.4g} of {group.name}, stacked to ({group.d_out}, "
                f"{group.d_in}), leaves no rank: rank 1 already stores {group.n_stored(1)} of "
                f"{group.n_weights} numbers. Lower fit.removed or use a coarser split."
            )
        ranks.append(rank)
    return ranks
