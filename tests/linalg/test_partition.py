"""Groups of what is near: against all partitions there are, and what exchanges promise."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharebasis.linalg.matching import partition, total


def every_partition(items: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """All cuts into groups of `size`, and one of what is left over."""
    if len(items) <= size:
        yield [items] if items else []
        return
    sizes = {size, len(items) % size} - {0}
    for own in sizes:
        for others in combinations(items[1:], own - 1):
            group = (items[0], *others)
            rest = tuple(x for x in items if x not in group)
            yield from (
                [group, *more]
                for more in every_partition(rest, size)
                if sum(len(one) < size for one in (group, *more)) <= 1
            )


@st.composite
def symmetric(draw: st.DrawFn) -> np.ndarray:
    n = draw(st.integers(1, 7))
    matrix = np.zeros((n, n))
    for i, j in combinations(range(n), 2):
        matrix[i, j] = matrix[j, i] = draw(st.floats(0, 2, width=16))
    return matrix + draw(st.sampled_from([0.0, 5.0])) * np.eye(n)


@settings(max_examples=60, deadline=None)
@given(symmetric(), st.integers(1, 4))
def test_pairs_are_the_best_there_are_and_larger_groups_no_worse_than_runs(distances, size):
    n = len(distances)
    found = partition(distances, size)
    assert sorted(i for group in found for i in group) == list(range(n))
    n_left = n % size
    assert sorted(map(len, found)) == sorted([size] * (n // size) + [n_left] * bool(n_left))
    assert found == sorted(tuple(sorted(group)) for group in found)
    assert found == partition(distances, size)
    least = min(total(distances, own) for own in every_partition(tuple(range(n)), size))
    here = total(distances, found)
    if size <= 2:
        assert here == pytest.approx(least, abs=1e-9)
    runs = [range(i, min(i + size, n)) for i in range(0, n, size)]
    assert least - 1e-9 <= here <= total(distances, runs) + 1e-9
    for a, b in combinations(found, 2):
        for i in a:
            for j in b:
                swapped = [{*a, j} - {i}, {*b, i} - {j}]
                others = [own for own in found if own not in (a, b)]
                groups = [*others, *(tuple(own) for own in swapped)]
                assert total(distances, groups) >= here - 1e-9


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_planted_groups_are_found_wherever_they_lie(size):
    of = np.random.default_rng(0).permutation(np.arange(20) // size)
    distances = np.where(of[:, None] == of, 0.2, 1.4)
    wanted = {tuple(np.flatnonzero(of == group).tolist()) for group in set(of.tolist())}
    assert set(partition(distances, size)) == wanted
