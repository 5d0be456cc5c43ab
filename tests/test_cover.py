"""The cheapest exact cover, against all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharebasis import cover
from sharebasis.cover import Choice, Cover

N_PARTS = 6


def _every(choices: Sequence[Choice], left: frozenset[int]) -> Iterator[list[Choice]]:
    """All exact covers, by trying every group on the first part that is left."""
    if not left:
        yield []
        return
    for choice in choices:
        if min(left) in choice.parts and choice.parts <= left:
            for rest in _every(choices, left - choice.parts):
                yield [choice, *rest]


def _choices(offered: Sequence[frozenset[int]], n_parts: int = N_PARTS) -> list[Choice]:
    alone = [Choice(i, frozenset({i}), "") for i in range(n_parts)]
    kinds = ("a", "b", "c")
    return alone + [
        Choice(n_parts + i, own, kinds[i % 3]) for i, own in enumerate(dict.fromkeys(offered))
    ]


def _cost(chosen: Sequence[int], costs: Sequence[float]) -> float:
    return math.fsum(costs[i] for i in chosen)


OFFERED = st.lists(st.frozensets(st.integers(0, N_PARTS - 1), min_size=2, max_size=4), max_size=10)
COSTS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.25, math.inf]), min_size=16, max_size=16)


@settings(max_examples=200, deadline=None)
@given(offered=OFFERED, costs=COSTS)
def test_it_is_the_cheapest_of_all_covers(
    offered: list[frozenset[int]], costs: list[float]
) -> None:
    choices = _choices(offered)
    chosen = Cover(choices).best(costs)
    parts = [part for i in chosen for part in choices[i].parts]
    assert sorted(parts) == list(range(N_PARTS))
    assert chosen == sorted(chosen)
    every = list(_every(choices, frozenset(range(N_PARTS))))
    least = min(_cost([choice.number for choice in one], costs) for one in every)
    assert _cost(chosen, costs) == pytest.approx(least)


@settings(max_examples=50, deadline=None)
@given(offered=OFFERED, costs=COSTS)
def test_more_to_choose_from_never_costs_more(
    offered: list[frozenset[int]], costs: list[float]
) -> None:
    choices = _choices(offered)
    least = [_cost(Cover(choices[:n]).best(costs), costs) for n in range(N_PARTS, len(choices) + 1)]
    assert least == sorted(least, reverse=True)


def test_where_nothing_is_gained_parts_stay_alone() -> None:
    choices = _choices([frozenset({0, 1})], 2)
    assert Cover(choices).best([1.0, 1.0, 2.1]) == [0, 1]
    assert Cover(choices).best([1.0, 1.0, 1.9]) == [2]


def _grid(n: int) -> list[Choice]:
    """n × n parts: rows and columns share; mixtures of both are many."""
    rows = [frozenset(range(n * i, n * i + n)) for i in range(n)]
    columns = [frozenset(range(i, n * n, n)) for i in range(n)]
    alone = [Choice(i, frozenset({i}), "") for i in range(n * n)]
    both = [(own, "row") for own in rows] + [(own, "column") for own in columns]
    return alone + [Choice(n * n + i, own, kind) for i, (own, kind) in enumerate(both)]


def test_too_many_mixtures_are_left_out_and_each_structure_alone_is_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices, n = _grid(4), 16
    rows, columns = list(range(n, n + 4)), list(range(n + 4, n + 8))
    costs = [1.0] * n + [3.5, 9.0, 9.0, 9.0, 9.0, 3.0, 3.0, 9.0]
    assert Cover(choices).best(costs) == [0, 3, 4, 7, 8, 11, 12, 15, columns[1], columns[2]]
    monkeypatch.setattr(cover, "MOST_STATES", 8)
    few = Cover(choices)
    assert few.best(costs) == [0, 3, 4, 7, 8, 11, 12, 15, columns[1], columns[2]]
    assert few.best([2.0] * n + [1.0] * 4 + [9.0] * 4) == rows


def test_many_layers_and_structures_are_a_matter_of_milliseconds_each() -> None:
    """q, k and v of 60 layers: runs of two, three and four, and joint groups."""
    n_layers, choices = 60, []
    for layer in range(n_layers):
        choices += [Choice(0, frozenset({3 * layer + i}), "") for i in range(3)]
        choices.append(Choice(0, frozenset({3 * layer + i for i in range(3)}), "joint"))
        for size in (2, 3, 4):
            if layer + size <= n_layers:
                for i in range(3):
                    own = frozenset(3 * (layer + j) + i for j in range(size))
                    choices.append(Choice(0, own, f"shared:{size}"))
    choices = [Choice(i, one.parts, one.structure) for i, one in enumerate(choices)]
    costs = [float(1 + sum(one.parts) % 7) for one in choices]
    chosen = Cover(choices).best(costs)
    assert sorted(part for i in chosen for part in choices[i].parts) == list(range(3 * n_layers))
