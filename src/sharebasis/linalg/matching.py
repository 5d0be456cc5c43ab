"""Things that are more or less far from each other -> groups of those that are near."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations, product

import networkx as nx
import numpy as np
from jaxtyping import Float64

MIN_GAIN = 1e-12
"""By how much an exchange has to lower the sum, so that rounding does not go round in circles."""

Groups = Sequence[Sequence[int]]


def partition(distances: Float64[np.ndarray, "n n"], size: int) -> Groups:
    """Cut 0, 1, ..., n - 1 into groups of `size` with a small sum of the distances within groups.

    If n is no multiple of `size`, one group is smaller. Pairs have the least sum there is: that is
    a matching of minimum weight (Edmonds' algorithm). For larger groups finding it is NP-hard; they
    come from runs and from nearest neighbours by exchanges of two members, whichever ends
    lower. So their sum is never above that of runs, and no exchange lowers it further.

    Args:
        distances: symmetric; the diagonal is not looked at.
        size: at least 1.

    Returns:
        Ascending groups in the order of their first members; the same for the same distances.
    """
    if size == 2:
        return _sorted(_matching(distances))
    starts = _runs(distances, size), _near(distances, size)
    partitions = map(partial(_exchanged, distances), starts)
    return _sorted(min(partitions, key=partial(total, distances)))


def total(distances: Float64[np.ndarray, "n n"], groups: Groups) -> float:
    """The sum of the distances of every two members of a group."""
    return float(sum(distances[i, j] for group in groups for i, j in combinations(group, 2)))


def _matching(distances: Float64[np.ndarray, "n n"]) -> Groups:
    """Of an odd number, one stays alone."""
    n, graph = len(distances), nx.Graph()
    for i, j in combinations(range(n), 2):
        graph.add_edge(i, j, weight=float(distances[i, j]))
    pairs = nx.min_weight_matching(graph)
    return [*pairs, *((i,) for i in set(range(n)).difference(*pairs))]


def _runs(distances: Float64[np.ndarray, "n n"], size: int) -> Groups:
    n = len(distances)
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _near(distances: Float64[np.ndarray, "n n"], size: int) -> Groups:
    """The first that has no group yet and those nearest to it, again and again."""
    remaining, groups = list(range(len(distances))), []
    while remaining:
        group = sorted(remaining, key=lambda i: (i != remaining[0], distances[remaining[0], i]))[
            :size
        ]
        groups.append(group)
        remaining = [i for i in remaining if i not in group]
    return groups


def _exchanged(distances: Float64[np.ndarray, "n n"], start: Groups) -> Groups:
    """Exchange the two members that lower the sum most, until none do."""
    groups = [list(group) for group in start]
    while True:
        least, best = -MIN_GAIN, None
        for a, b in combinations(groups, 2):
            to = {i: (distances[i, a].sum(), distances[i, b].sum()) for i in (*a, *b)}
            diagonal = {i: distances[i, i] for i in to}
            for i, j in product(a, b):
                # i leaves a and joins b without j, and the other way round.
                change = to[i][1] - to[i][0] + to[j][0] - to[j][1]
                change += diagonal[i] + diagonal[j] - 2 * distances[i, j]
                if change < least:
                    least, best = change, (a, b, i, j)
        if best is None:
            return groups
        a, b, i, j = best
        a[a.index(i)], b[b.index(j)] = j, i


def _sorted(groups: Groups) -> Groups:
    return sorted(tuple(sorted(group)) for group in groups)
