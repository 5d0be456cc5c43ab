"""What a group costs and loses, as a curve."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sharebasis.architecture.groups import Group
from sharebasis.config.types import Storage
from sharebasis.errors import BudgetError
from sharebasis.forms.table import LOW_RANK_FORMS
from sharebasis.structures.limits import Limit

DENSE = -1
"""In the place of a rank: the weights stay as they are."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What may be stored of some parts, and lost: an entry a point, the last of them dense."""

    name: str
    stored: NDArray[np.int64]
    """Numbers stored."""
    loss: NDArray[np.float64]
    """Infinite where a limit forbids the entry."""
    known: int = 0
    """Numbers of the original that need not be stored even if all of it is dense."""
    by_rank: bool = False
    """Whether entry k is rank k + 1."""

    @property
    def original(self) -> int:
        """How many numbers there were."""
        return int(self.stored[-1]) + self.known

    def beside(self, other: Curve, known: int) -> Curve:
        """The curve with a dense group beside it, of which `known` numbers are not stored."""
        stored = self.stored + other.stored[-1] - known
        return replace(
            self, stored=stored, loss=self.loss + other.loss[-1], known=self.known + known
        )

    def rank(self, entry: int) -> int:
        return DENSE if entry == len(self.stored) - 1 else entry + 1

    def within(self, limit: Limit) -> Curve:
        """The curve without the entries that the limit forbids.

        Raises:
            BudgetError: it forbids all.
        """
        limited = self.limited(limit)
        if not np.isfinite(limited.loss).any():
            n = len(self.stored) - 1
            smallest = (self.stored / self.stored[n]).min()
            raise BudgetError(
                f"{self.name} can be stored in no way that its limits allow ({limit}); dense and "
                f"the ranks 1 to {n} store fractions of {smallest:.4g} to 1. Widen fit.limits."
            )
        return limited

    def offered(self, limits: Collection[Limit]) -> Curve:
        """The curve of a group that is offered in the place of others: its ranks within the limit
        of its parts, no entry if these have several limits. Dense it would be what the others are.
        """
        if len(limits) != 1:
            return replace(self, loss=np.full_like(self.loss, np.inf))
        (limit,) = limits
        limited = self.limited(limit)
        return replace(limited, loss=np.append(limited.loss[:-1], np.inf))

    def limited(self, limit: Limit, original: int | None = None) -> Curve:
        """The curve without the entries that a limit forbids, perhaps all of them.

        Args:
            limit: in fractions of the original numbers.
            original: how many those are; None: as many as the last entry stores.
        """
        n = len(self.stored) - 1
        kept = self.stored / (original or self.original)
        allowed = kept >= limit.floor
        if limit.cap < 1:  # what stores more than dense is never chosen, and needs no cap
            allowed &= kept <= limit.cap
        if self.by_rank:
            allowed[:n] &= np.arange(1, n + 1) % limit.multiple == 0
        if limit.dense:
            allowed = np.arange(n + 1) == n
        return replace(self, loss=np.where(allowed, self.loss, np.inf))


def curve_of(group: Group, energies: NDArray[np.float64], storage: Storage) -> Curve:
    """What every rank of a group stores and loses.

    Args:
        group: with its sizes.
        energies: what each direction saves, the largest first; its full rank of them.
        storage: form of the factors.
    """
    ranks = range(1, len(energies) + 1)
    stored = [*(factor_numbers(group, rank, storage) for rank in ranks), group.n_weights]
    tails = np.append(np.cumsum(energies[::-1])[::-1][1:], [0.0, 0.0])
    return Curve(group.name, np.array(stored), tails, by_rank=True)


def factor_numbers(group: Group, rank: int, storage: Storage) -> int:
    """Numbers in one basis and a coefficient for each part."""
    return LOW_RANK_FORMS[storage].n_numbers(group.d_out, group.d_in, rank)
