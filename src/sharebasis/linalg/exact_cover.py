"""Groups that overlap -> those that cover every part once at the least cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_STATES = 20_000
"""Of one search; beyond them, an integer program takes less time and memory."""

Groups = Mapping[int, frozenset[int]]
"""The parts of every group, by its number, which is its place in the order of the costs."""


class Cover:
    """Finds the cheapest exact cover, again and again as costs change.

    Parts that groups tie together, directly or through others, are one problem, which is solved
    exactly over all mixtures of groups. By dynamic programming: parts are covered in their order,
    and what is already covered of those to come is the state. For runs over layers that is a
    handful of states, for runs and joint groups of q, k and v, size³. Where there would be more
    than MAX_STATES, as with groups of layers that are far apart, as an integer program.

    Args:
        groups: the parts of each; some of them cover every part once.
    """

    def __init__(self, groups: Sequence[frozenset[int]]) -> None:
        self._solvers = [_solver(component) for component in _components(dict(enumerate(groups)))]

    def best(self, costs: Sequence[float]) -> list[int]:
        """Numbers of the groups of the cheapest cover, ascending.

        Args:
            costs: of every group; an infinite one is not chosen if that can be helped.
        """
        return sorted(number for solver in self._solvers for number in solver.best(costs))


class _Search:
    """The covers of some parts, as paths from nothing covered to all covered."""

    def __init__(self, groups: Groups) -> None:
        """Raises:
        OverflowError: there are more than MAX_STATES.
        """
        parts = sorted(frozenset().union(*groups.values()))
        place = {part: i for i, part in enumerate(parts)}
        starting: list[list[tuple[int, int]]] = [[] for _ in parts]
        for number, of_group in groups.items():
            places = [place[part] for part in of_group]
            starting[min(places)].append((number, sum(1 << i for i in places)))
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
                        if len(states) > MAX_STATES:
                            raise OverflowError
                        layers[_first_gap(then)].append(then)
                    self._edges.append((states[covered], states[then], number))
        self._n, self._end = len(states), states[everything]

    def best(self, costs: Sequence[float]) -> Sequence[int]:
        """The cheapest path."""
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
        return numbers


class _Program:
    """The covers of some parts, as whole numbers that sum to one over the groups of a part.

    Solved by SciPy's HiGHS.
    """

    def __init__(self, groups: Groups) -> None:
        ties = [(part, i) for i, parts in enumerate(groups.values()) for part in parts]
        parts, columns = zip(*ties, strict=True)
        _, rows = np.unique(parts, return_inverse=True)
        self._numbers = np.array([*groups])
        self._once = coo_array((np.ones(len(ties)), (rows, columns))).tocsr()

    def best(self, costs: Sequence[float]) -> Sequence[int]:
        of_groups = np.array([costs[number] for number in self._numbers])
        finite = np.isfinite(of_groups)
        chosen = self._solve(np.where(finite, of_groups, 0.0), finite)
        if chosen is None:  # some part has to have an infinite one: as few as there can be
            chosen = self._solve(np.where(finite, 0.0, 1.0), np.ones_like(finite))
        assert chosen is not None  # some of them do cover every part once
        return [int(number) for number in self._numbers[chosen]]

    def _solve(
        self, costs: NDArray[np.float64], allowed: NDArray[np.bool_]
    ) -> NDArray[np.bool_] | None:
        """The groups that are chosen; None: those that are allowed cover nothing."""
        scale = np.abs(costs).max() or 1.0  # HiGHS compares with absolute tolerances
        solution = milp(
            costs / scale,
            integrality=np.ones_like(costs),
            bounds=Bounds(0, allowed.astype(float)),
            constraints=LinearConstraint(self._once, 1, 1),
            options={"mip_rel_gap": 0},
        )
        return None if solution.x is None else solution.x > 0.5


def _solver(groups: Groups) -> _Search | _Program:
    try:
        return _Search(groups)
    except OverflowError:
        return _Program(groups)


def _first_gap(covered: int) -> int:
    """The first part that is not covered."""
    return (~covered & (covered + 1)).bit_length() - 1


def _components(groups: Groups) -> list[Groups]:
    """Groups that have parts in common, directly or through others, in the order given."""
    ties = [(i, part) for i, parts in groups.items() for part in parts]
    rows, columns = zip(*ties, strict=True)
    n = len(groups)
    shape = (n + max(columns) + 1,) * 2
    graph = coo_array((np.ones(len(ties)), (rows, n + np.array(columns))), shape=shape)
    _, labels = connected_components(graph, directed=False)
    components: dict[int, dict[int, frozenset[int]]] = {}
    for (number, parts), label in zip(groups.items(), labels[:n].tolist(), strict=True):
        components.setdefault(label, {})[number] = parts
    return list(components.values())
