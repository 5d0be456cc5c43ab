"""One budget for all groups: curves, and the choice on them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from allocating import allocate_alone

from sharebasis.errors import BudgetError
from sharebasis.structures.curve import DENSE, Curve


def _curve(d_out: int, d_in: int, decay: float, scale: float, interpolative: bool = True) -> Curve:
    full = min(d_out, d_in)
    energies = scale * np.exp(-decay * np.arange(full))
    ranks = np.arange(1, full + 1)
    stored = ranks * (d_out + d_in - ranks) + ranks if interpolative else ranks * (d_out + d_in)
    loss = np.append(energies.sum() - np.cumsum(energies), 0.0).clip(0)
    loss[full - 1] = 0.0
    return Curve(f"{d_out}x{d_in}", np.append(stored, d_out * d_in), loss)


def _loss(curves: list[Curve], entries: tuple[int, ...] | list[int]) -> float:
    return float(sum(curve.loss[i] for curve, i in zip(curves, entries, strict=True)))


def _stored(curves: list[Curve], entries: tuple[int, ...] | list[int]) -> int:
    return int(sum(curve.stored[i] for curve, i in zip(curves, entries, strict=True)))


@pytest.mark.parametrize("interpolative", [True, False])
@pytest.mark.parametrize("removed", [0.1, 0.3, 0.5, 0.6])
def test_it_is_nearly_the_best_of_all_choices_within_the_budget(
    removed: float, interpolative: bool
) -> None:
    curves = [
        _curve(8, 6, 0.2, 1.0, interpolative),
        _curve(6, 9, 0.7, 5.0, interpolative),
        _curve(5, 5, 0.05, 0.3, interpolative),
    ]
    budget = int((1 - removed) * sum(curve.stored[-1] for curve in curves) + 1e-9)
    entries = allocate_alone(curves, removed)
    assert _stored(curves, entries) <= budget
    every = product(*(range(len(curve.stored)) for curve in curves))
    best = min(_loss(curves, one) for one in every if _stored(curves, one) <= budget)
    assert _loss(curves, entries) <= 1.15 * best + 1e-12
    # the choice is the best of its own price, so nothing cheaper loses less
    others = product(*(range(len(curve.stored)) for curve in curves))
    spent = _stored(curves, entries)
    assert not any(
        _stored(curves, one) < 0.7 * spent and _loss(curves, one) < _loss(curves, entries)
        for one in others
    )


def test_the_budget_is_met_to_a_thousandth_where_there_are_many_groups() -> None:
    generator = np.random.default_rng(0)
    curves = [
        _curve(96, 64, generator.uniform(0.01, 0.2), generator.uniform(0.1, 10)) for _ in range(60)
    ]
    dense = sum(int(curve.stored[-1]) for curve in curves)
    for removed in (0.05, 0.2, 0.35, 0.5, 0.8):
        share = 1 - _stored(curves, allocate_alone(curves, removed)) / dense
        assert removed <= share <= removed + 1e-3


def test_more_budget_never_loses_more_and_no_scale_of_the_loss_matters() -> None:
    curves = [_curve(20, 30, 0.1, s) for s in (0.01, 1.0, 100.0)]
    losses = [
        _loss(curves, allocate_alone(curves, removed)) for removed in (0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    ]
    assert losses == sorted(losses, reverse=True)
    tiny = [Curve(curve.name, curve.stored, 1e-12 * curve.loss) for curve in curves]
    huge = [Curve(curve.name, curve.stored, 1e12 * curve.loss) for curve in curves]
    assert allocate_alone(tiny, 0.4) == allocate_alone(curves, 0.4) == allocate_alone(huge, 0.4)


def test_what_matters_most_stays_dense_and_rank_says_so() -> None:
    curves = [_curve(20, 30, 0.0, 1e6), _curve(20, 30, 0.5, 1e-3)]
    first, second = allocate_alone(curves, 0.4)
    assert curves[0].rank(first) == DENSE
    assert 1 <= curves[1].rank(second) < 20


def test_a_budget_below_rank_1_everywhere_is_refused() -> None:
    with pytest.raises(BudgetError, match="the least that there can be already stores"):
        allocate_alone([_curve(4, 4, 0.1, 1.0)], 0.95)
