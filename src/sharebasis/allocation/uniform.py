"""The same fraction of every group."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

from sharebasis.architecture.groups import Group
from sharebasis.config.types import Storage
from sharebasis.errors import BudgetError
from sharebasis.structures.curve import DENSE, factor_numbers
from sharebasis.structures.limits import Limit


def uniform_ranks(
    groups: Sequence[Group],
    removed: float,
    storage: Storage = "plain",
    limits: Sequence[Limit] | None = None,
) -> list[int]:
    """Give every group the largest rank that removes at least `removed` of its numbers.

    Groups that stay dense count: the others remove so much more that it is `removed` of all.

    Args:
        groups: at most one for each part.
        removed: fraction of the original numbers to remove, in (0, 1).
        storage: form of the factors, which says what a rank costs.
        limits: of every group; of them `dense` and `multiple`.

    Raises:
        BudgetError: a group is too small to keep even the least rank.
    """
    ranks = []
    limits = limits or [Limit()] * len(groups)
    kept = _kept_of_others(groups, removed, limits)
    for group, limit in zip(groups, limits, strict=True):
        if limit.dense:
            ranks.append(DENSE)
            continue
        allowed = range(limit.multiple, group.full_rank + 1, limit.multiple)
        budget = int(kept * group.n_weights)
        # What a rank costs grows with the rank in either form.
        n = bisect_right(allowed, budget, key=lambda rank: factor_numbers(group, rank, storage))
        if n < 1:
            least = limit.multiple
            why = (
                f"rank {least} already stores {factor_numbers(group, least, storage)} of "
                f"{group.n_weights} numbers. Lower fit.removed or use a coarser split."
                if least <= group.full_rank
                else f"fit.rank_multiple={least} is more than its full rank, {group.full_rank}."
            )
            raise BudgetError(
                f"Removing {float(1 - kept):.4g} of {group.name}, stacked to ({group.d_out}, "
                f"{group.d_in}), leaves no rank: {why}"
            )
        ranks.append(allowed[n - 1])
    return ranks


def _kept_of_others(groups: Sequence[Group], removed: float, limits: Sequence[Limit]) -> Fraction:
    """What the groups that do not stay dense may keep of their numbers."""
    # Exact, since 1 - 0.8 is not 0.2 in binary and a rank would be lost to the difference.
    kept = 1 - Fraction(str(removed))
    total = sum(group.n_weights for group in groups)
    limited = zip(groups, limits, strict=True)
    dense = sum(group.n_weights for group, limit in limited if limit.dense)
    if not dense:
        return kept
    if dense >= kept * total:
        raise BudgetError(
            f"Removing {removed:.4g} leaves {int(kept * total)} numbers, but what fit.exclude "
            f"keeps dense are {dense}. Lower fit.removed or exclude less."
        )
    return (kept * total - dense) / (total - dense)
