"""Groups that overlap -> those that cover every part once at the least cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

MOST_STATES = 20_000
"""Of one search; beyond them, structures are not mixed in the parts that it is about."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A group that may be chosen."""

    number: int
    """In the order of the costs."""
    parts: frozenset[int]
    structure: str
    """Of a kind; that of the groups that are always there is the empty string."""


class Cover:
    """Finds the cheapest exact cover, again and again as costs change.

    What is searched: parts that groups tie together, directly or through others, are one problem.
    It is solved exactly over all mixtures of groups, by dynamic programming: parts are covered in
    their order, and what is already covered of those to come is the state. For runs over layers
    that is a handful of states, for runs and joint groups of q, k and v, size³. Where there would
    be more than MOST_STATES, the parts take the best of the covers that have one structure each,
    beside private groups.

    Args:
        choices: at least one group for every part.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._alternatives = [_alternatives(own) for own in _components(choices)]

    def best(self, costs: Sequence[float]) -> list[int]:
        """Numbers of the groups of the cheapest cover, ascending.

        Args:
            costs: of every group; an infinite one is not chosen if that can be helped.
        """
        chosen: list[int] = []
        for alternatives in self._alternatives:
            covers = ([search.best(costs) for search in one] for one in alternatives)
            cheapest = min(covers, key=lambda cover: math.fsum(cost for cost, _ in cover))
            chosen += (number for _, own in cheapest for number in own)
        return sorted(chosen)


class _Search:
    """The covers of some parts, as paths from nothing covered to all covered."""

    def __init__(self, choices: Sequence[Choice], most: int | None = None) -> None:
        """Raises:
        OverflowError: there are more than `most` states.
        """
        parts = sorted({part for choice in choices for part in choice.parts})
        place = {part: i for i, part in enumerate(parts)}
        starting: list[list[tuple[int, int]]] = [[] for _ in parts]
        for choice in choices:
            own = [place[part] for part in choice.parts]
            starting[min(own)].append((choice.number, sum(1 << i for i in own)))
        everything = (1 << len(parts)) - 1
        states = {0: 0}
        layers: list[list[int]] = [[] for _ in range(len(parts) + 1)]
        layers[0].append(0)
        self._edges: list[tuple[int, int, int]] = []
        """(from, to, group), the states numbered so that paths only rise in the order here."""
        for i in range(len(parts)):
            for covered in layers[i]:
                for number, mask in starting[i]:
                    if covered & mask:
                        continue
                    then = covered | mask
                    if then not in states:
                        states[then] = len(states)
                        if most and len(states) > most:
                            raise OverflowError
                        layers[_first_gap(then)].append(then)
                    self._edges.append((states[covered], states[then], number))
        self._n, self._end = len(states), states[everything]

    def best(self, costs: Sequence[float]) -> tuple[float, list[int]]:
        """(cost, numbers of the groups) of the cheapest path."""
        least = [math.inf] * self._n
        last: list[tuple[int, int]] = [(0, -1)] * self._n
        least[0] = 0.0
        for start, end, number in self._edges:
            cost = least[start] + costs[number]
            if cost < least[end] or last[end][1] < 0:
                least[end], last[end] = cost, (start, number)
        numbers, state = [], self._end
        while state:
            state, number = last[state]
            numbers.append(number)
        return least[self._end], numbers


def _first_gap(covered: int) -> int:
    """The first part that is not covered."""
    return (~covered & (covered + 1)).bit_length() - 1


def _alternatives(choices: Sequence[Choice]) -> list[list[_Search]]:
    """All mixtures, or those of one structure each."""
    try:
        return [[_Search(choices, MOST_STATES)]]
    except OverflowError:
        kinds = dict.fromkeys(choice.structure for choice in choices if choice.structure)
    found = []
    for kind in kinds:
        own = [choice for choice in choices if choice.structure in ("", kind)]
        found.append([_Search(component) for component in _components(own)])
    return found


def _components(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Choices that have parts in common, directly or through others, in the order given."""
    ties = [(i, part) for i, choice in enumerate(choices) for part in choice.parts]
    rows, columns = zip(*ties, strict=True)
    n = len(choices)
    shape = (n + max(columns) + 1,) * 2
    graph = coo_array((np.ones(len(ties)), (rows, n + np.array(columns))), shape=shape)
    _, labels = connected_components(graph, directed=False)
    found: dict[int, list[Choice]] = {}
    for choice, label in zip(choices, labels[:n].tolist(), strict=True):
        found.setdefault(label, []).append(choice)
    return list(found.values())
