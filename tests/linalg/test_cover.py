"""The cheapest exact cover, against all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharebasis.linalg import exact_cover
from sharebasis.linalg.exact_cover import Cover

N_PARTS = 6
Parts = frozenset[int]


@pytest.fixture(params=["states", "program"])
def solver(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to solve it, whatever the size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_cover, "MAX_STATES", 10**6 if request.param == "states" else 0)
        yield


def _every(groups: Sequence[Parts], left: Parts) -> Iterator[list[int]]:
    """All exact covers, by trying every group on the first part that is left."""
    if not left:
        yield []
        return
    for i, parts in enumerate(groups):
        if min(left) in parts and parts <= left:
            for rest in _every(groups, left - parts):
                yield [i, *rest]


def _alone(n_parts: int) -> list[Parts]:
    return [frozenset({i}) for i in range(n_parts)]


def _groups(offered: Sequence[Parts]) -> list[Parts]:
    return [*_alone(N_PARTS), *dict.fromkeys(offered)]


def _cost(chosen: Sequence[int], costs: Sequence[float]) -> float:
    return math.fsum(costs[i] for i in chosen)


OFFERED = st.lists(st.frozensets(st.integers(0, N_PARTS - 1), min_size=2, max_size=4), max_size=10)
COSTS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.25, math.inf]), min_size=16, max_size=16)
SAME_FIXTURE = [HealthCheck.function_scoped_fixture]


@pytest.mark.usefixtures("solver")
@settings(max_examples=200, deadline=None, suppress_health_check=SAME_FIXTURE)
@given(offered=OFFERED, costs=COSTS)
def test_it_is_the_cheapest_of_all_covers(offered: list[Parts], costs: list[float]) -> None:
    groups = _groups(offered)
    chosen = Cover(groups).best(costs)
    assert sorted(part for i in chosen for part in groups[i]) == list(range(N_PARTS))
    assert chosen == sorted(chosen)
    least = min(_cost(one, costs) for one in _every(groups, frozenset(range(N_PARTS))))
    assert _cost(chosen, costs) == pytest.approx(least)


@pytest.mark.usefixtures("solver")
@settings(max_examples=50, deadline=None, suppress_health_check=SAME_FIXTURE)
@given(offered=OFFERED, costs=COSTS)
def test_more_to_choose_from_never_costs_more(offered: list[Parts], costs: list[float]) -> None:
    groups = _groups(offered)
    least = [_cost(Cover(groups[:n]).best(costs), costs) for n in range(N_PARTS, len(groups) + 1)]
    assert least == sorted(least, reverse=True)


@pytest.mark.usefixtures("solver")
def test_where_nothing_is_gained_parts_stay_alone() -> None:
    groups = [*_alone(2), frozenset({0, 1})]
    assert Cover(groups).best([1.0, 1.0, 2.1]) == [0, 1]
    assert Cover(groups).best([1.0, 1.0, 1.9]) == [2]
    assert Cover(groups).best([-1.0, -1.0, -1.9]) == [0, 1]


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_costs_may_be_of_any_size(size: float) -> None:
    groups = [*_alone(4), frozenset({0, 1}), frozenset({1, 2}), frozenset({2, 3})]
    costs = [size * own for own in (1.0, 1.0, 1.0, 1.0, 1.999, 1.5, 1.998)]
    assert Cover(groups).best(costs) == [0, 3, 5]


LAYERS = 30


def _model(far_apart: bool) -> list[Parts]:
    """gate, up and down of some layers: runs of two and three and MLPs as a whole, and pairs of
    layers that are far apart, each family its own ones."""
    parts = {(layer, i): 3 * layer + i for layer in range(LAYERS) for i in range(3)}
    groups = _alone(len(parts))
    groups += [frozenset(parts[layer, i] for i in range(3)) for layer in range(LAYERS)]
    for size in (2, 3):
        for layer in range(LAYERS - size + 1):
            groups += [frozenset(parts[layer + j, i] for j in range(size)) for i in range(3)]
    if far_apart:
        for i, step in enumerate((7, 11, 13)):  # none divides 30: a walk through all layers
            walk = [step * j % LAYERS for j in range(LAYERS)]
            pairs = zip(walk[::2], walk[1::2], strict=True)
            groups += [frozenset({parts[a, i], parts[b, i]}) for a, b in pairs]
    return groups


def test_mixtures_of_which_there_are_too_many_states_are_found_all_the_same() -> None:
    few, many = _model(far_apart=False), _model(far_apart=True)
    generator = np.random.default_rng(0)
    costs = [len(own) * generator.uniform(0.8, 1.2) for own in few]
    assert isinstance(exact_cover._solver(dict(enumerate(few))), exact_cover._Search)
    assert isinstance(exact_cover._solver(dict(enumerate(many))), exact_cover._Program)
    best = Cover(few).best(costs)
    dear, cheap = (
        costs + [price * generator.uniform(0.9, 1.1) for _ in many[len(few) :]]
        for price in (4.0, 1.8)
    )
    assert Cover(many).best(dear) == best
    chosen = Cover(many).best(cheap)
    assert sorted(part for i in chosen for part in many[i]) == list(range(3 * LAYERS))
    assert _cost(chosen, cheap) < _cost(best, costs)
    assert {len(many[i]) for i in chosen} == {1, 2, 3}
    assert max(chosen) >= len(few)


def test_many_layers_and_structures_are_a_matter_of_milliseconds_each() -> None:
    """q, k and v of 60 layers: runs of two, three and four, and joint groups."""
    n_layers, groups = 60, []
    for layer in range(n_layers):
        groups += [frozenset({3 * layer + i}) for i in range(3)]
        groups.append(frozenset({3 * layer + i for i in range(3)}))
        for size in (2, 3, 4):
            if layer + size <= n_layers:
                for i in range(3):
                    groups.append(frozenset(3 * (layer + j) + i for j in range(size)))
    costs = [float(1 + sum(own) % 7) for own in groups]
    chosen = Cover(groups).best(costs)
    assert sorted(part for i in chosen for part in groups[i]) == list(range(3 * n_layers))
