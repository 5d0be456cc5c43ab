"""Which entries of a weight go, what that costs, and what the others become."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sharebasis.errors import CalibrationError
from sharebasis.linalg.moments import Moment
from sharebasis.linalg.objective import Problem
from sharebasis.linalg.optimal_brain_surgeon import (
    OptimalBrainSurgeon,
    refit,
    sparsify,
)
from sharebasis.linalg.sparsity_curve import SparsityCurve, measure


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _moment(d: int, seed: int, n: int = 200) -> Moment:
    """Of inputs that are correlated and of different sizes."""
    scale = torch.logspace(0, -1, d, dtype=torch.float64)
    x = _random(n, d, seed=seed) @ _random(d, d, seed=seed + 1) * scale
    return Moment(x.T @ x, x.sum(0), n, "site")


# Which entries go, and what the others become


def test_what_it_costs_to_let_one_entry_go() -> None:
    """G_ii w² over what is left of the inverse once the columns left of it are settled."""
    weight, inputs, gradient = _random(6, 5), _moment(5, 1), _moment(6, 7)
    surgeon = OptimalBrainSurgeon(Problem(weight, inputs, gradient))
    rows = gradient.second.diagonal()[:, None] * weight**2
    for j in range(5):
        precision = torch.linalg.inv(inputs.second[j:, j:])[0, 0]
        found = surgeon.saliency[:, j].double()
        torch.testing.assert_close(found, rows[:, j] / precision, rtol=1e-4, atol=0)
    least = surgeon.saliency.min().item()
    assert surgeon.sweep(0.99 * least).kept.all()
    assert torch.equal(surgeon.sweep(0.0).weight, weight.float())


def test_what_goes_at_a_price_costs_what_it_says() -> None:
    """With a diagonal G, rows have nothing to do with each other: the sum is the loss."""
    weight, inputs = _random(8, 12), _moment(12, 3)
    gradient = _moment(8, 5).diagonal()
    problem = Problem(weight, inputs, gradient)
    surgeon = OptimalBrainSurgeon(problem)
    price = surgeon.saliency.median().item()
    sweep = surgeon.sweep(price)
    assert 0.2 < sweep.kept.double().mean() < 0.8
    assert (sweep.saliency[sweep.kept] >= price).all()
    assert (sweep.saliency[~sweep.kept] < price).all()
    told = sweep.saliency[~sweep.kept].double().sum().item()
    assert told == pytest.approx(problem.loss(sweep.weight), rel=1e-4)
    assert told == pytest.approx(surgeon.loss(sweep.weight), rel=1e-3)


@pytest.mark.parametrize("two_sided", [False, True])
def test_values_are_those_of_least_loss(two_sided: bool) -> None:
    """By the normal equations of the entries that there are."""
    weight, inputs = _random(4, 5), _moment(5, 2)
    gradient = _moment(4, 9) if two_sided else None
    kept = torch.zeros(4, 5, dtype=torch.bool)
    kept.flatten()[torch.randperm(20, generator=torch.Generator().manual_seed(3))[:10]] = True
    outer = torch.eye(4, dtype=torch.float64) if gradient is None else gradient.second
    metric = torch.kron(outer, inputs.second)
    own = kept.flatten()
    values = torch.linalg.solve(metric[own][:, own], (metric @ weight.flatten())[own])
    expected = torch.zeros(20, dtype=torch.float64).masked_scatter(own, values).view(4, 5)
    found = refit(Problem(weight, inputs, gradient), torch.where(kept, weight, 0.0), kept)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert (found[~kept] == 0).all()


@pytest.mark.parametrize("two_sided", [False, True])
def test_refitted_values_lose_less_and_the_loss_told_is_the_loss(two_sided: bool) -> None:
    weight, inputs = _random(30, 40), _moment(40, 2)
    gradient = _moment(30, 9) if two_sided else None
    problem = Problem(weight, inputs, gradient)
    points = measure(problem)
    assert points is not None
    for n in range(1150, round(1200 * (1 - points.removed[-1])), -150):
        found = sparsify(problem, n, points.price_at(1 - n / 1200))
        assert found.kept.sum() == n
        assert (found.weight[~found.kept] == 0).all()
        error = weight - found.weight
        weighed = error if gradient is None else gradient.second @ error
        loss = (weighed @ inputs.second * error).sum().item()
        assert found.loss == pytest.approx(loss, rel=1e-6)
        assert found.loss < 1.5 * points.loss_at(torch.tensor([1 - n / 1200]).double()).item()
    surgeon = OptimalBrainSurgeon(problem)
    for price in points.prices:
        sweep = surgeon.sweep(price)
        refitted = surgeon.refit(sweep, sweep.kept)
        assert surgeon.loss(refitted) < 0.97 * surgeon.loss(sweep.weight)
    # Where they were measured refitted, if by fewer steps.
    removed, told, price = points.removed[1], points.losses[1], points.prices[1]
    found = sparsify(problem, round(1200 * (1 - removed)), price)
    assert 0.5 * told < found.loss <= told


@pytest.mark.parametrize(("steps", "zeros"), [(1000, 0), (8, 0.05), (3.3, 0.13), (0.75, 0.5)])
def test_what_is_told_is_near_what_is_lost_however_many_entries_are_zero(
    steps: float, zeros: float
) -> None:
    """Between the prices that are looked at, too. Zeros are those of quantized weights."""
    weight = (steps * _random(64, 96)).round() / steps
    assert (weight == 0).double().mean().item() == pytest.approx(zeros, abs=0.01)
    moments = []
    for seed, d in ((4, 96), (6, 64)):
        mixed = torch.eye(d, dtype=torch.float64) + 0.1 * _random(d, d, seed=seed + 1)
        x = _random(400, d, seed=seed) @ mixed
        moments.append(Moment(x.T @ x, x.sum(0), 400, "site"))
    problem = Problem(weight, *moments)
    points = measure(problem)
    assert points is not None
    first, last = max(points.removed[0], zeros + 0.01), points.removed[-1]
    assert first < zeros + 0.07
    assert last > 0.7
    for removed in torch.linspace(first, last, 14, dtype=torch.float64).tolist():
        n = round((1 - removed) * weight.numel())
        lost = sparsify(problem, n, points.price_at(removed)).loss
        told = points.loss_at(torch.tensor([removed], dtype=torch.float64)).item()
        assert 0.5 < told / lost < 6


def test_losses_are_told_where_inputs_are_fewer_than_their_width() -> None:
    """C has no inverse but by the ridge, and float32 sees losses below zero."""
    for seed in range(20):
        moments = _moment(40, seed, n=12), _moment(30, 9)
        points = measure(Problem(_random(30, 40, seed=seed), *moments))
        if points is not None:
            every = torch.linspace(points.removed[0], points.removed[-1], 9, dtype=torch.float64)
            losses = points.loss_at(every)
            assert losses.isfinite().all()
            assert (losses > 0).all()


def test_more_entries_lose_less() -> None:
    problem = Problem(_random(20, 30), _moment(30, 2), _moment(20, 9))
    points = measure(problem)
    assert points is not None
    for own in (points.removed, points.losses, points.prices):
        assert list(own) == sorted(set(own))
    losses = [
        sparsify(problem, n, points.price_at(1 - n / 600)).loss
        for n in range(round(600 * (1 - points.removed[-1])), 600, 50)
    ]
    assert losses == sorted(losses, reverse=True)


def test_zeros_go_and_nothing_is_lost() -> None:
    planted = torch.rand(20, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = torch.where(planted, _random(20, 30), 0.0)
    problem = Problem(weight, _moment(30, 2), _moment(20, 9))
    found = sparsify(problem, int(planted.sum()), 1e-12)
    assert torch.equal(found.kept, planted)
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-4)


def test_of_an_input_that_is_there_twice_one_is_enough() -> None:
    x = _random(200, 6, seed=4)
    x = torch.cat([x, x], dim=1)
    problem = Problem(_random(8, 12), Moment(x.T @ x, x.sum(0), 200, "site"), None)
    found = sparsify(problem, 48, 1e-9)
    assert problem.loss(found.weight) < 1e-5 * problem.energy


def test_rows_that_nobody_hears_go_first() -> None:
    weight, gradient = _random(6, 10), _moment(6, 9)
    deaf = torch.tensor([1, 4])
    gradient.total[deaf] = gradient.total[:, deaf] = 0
    found = sparsify(Problem(weight, _moment(10, 2), gradient), 40, 1e-9)
    assert not found.kept[deaf].any()
    assert found.loss < 1e-6


def test_an_input_that_never_comes_takes_its_column_along() -> None:
    inputs = _moment(10, 2)
    inputs.total[3] = inputs.total[:, 3] = 0
    found = sparsify(Problem(_random(6, 10), inputs, None), 54, 1e-9)
    assert not found.kept[:, 3].any()


def test_a_weight_of_zeros_has_nothing_to_offer() -> None:
    assert measure(Problem(torch.zeros(6, 10).double(), _moment(10, 2), None)) is None


def test_a_moment_that_is_none_says_which() -> None:
    broken = Moment(-torch.eye(5, dtype=torch.float64), torch.zeros(5).double(), 3, "h.1.mlp")
    with pytest.raises(CalibrationError, match=r"h\.1\.mlp has no inverse"):
        OptimalBrainSurgeon(Problem(_random(4, 5), broken, None))


def test_between_measured_points_a_loss_is_a_power() -> None:
    points = SparsityCurve((0.1, 0.2, 0.4), (1.0, 8.0, 16.0), (1.0, 4.0, 16.0))
    removed = torch.tensor([0.1, 0.1 * math.sqrt(2), 0.2, 0.2 * math.sqrt(2)]).double()
    assert points.loss_at(removed).tolist() == pytest.approx([1, 8**0.5, 8, 8 * 2**0.5])
    assert points.price_at(0.1 * math.sqrt(2)) == pytest.approx(2)


def test_gradients_that_vanish_leave_finite_values() -> None:
    """Their squares are next to what float32 can tell from zero, or below."""
    for power in range(0, 40, 2):
        inputs, gradient = _moment(12, 2), _moment(8, 9)
        tiny = replace(gradient, total=gradient.total * 10.0**-power)
        weight, kept = _random(8, 12), torch.rand(8, 12) < 0.5
        found = refit(Problem(weight, inputs, tiny), torch.where(kept, weight, 0.0), kept)
        assert found.isfinite().all()
