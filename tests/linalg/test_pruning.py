"""Fewer neurons: against regressions of the outputs themselves, and against brute force."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from low_rank_fits import problems_of
from torch import Tensor

from sharebasis.linalg.low_rank import decompose
from sharebasis.linalg.moments import Moment, MomentAccumulator
from sharebasis.linalg.neuron_pruning import prune, refit
from sharebasis.linalg.objective import Problem


def _moment(rows: Tensor) -> Moment:
    accumulator = MomentAccumulator("site", rows.shape[1])
    accumulator.update(rows)
    return accumulator.moment()


def _draw(d_model: int, d_mlp: int, n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, correlated neurons, gradients)."""
    torch.manual_seed(seed)
    mix = torch.randn(d_mlp, d_mlp, dtype=torch.float64) * torch.logspace(0, -2, d_mlp)
    neurons = torch.randn(n, d_mlp, dtype=torch.float64) @ mix
    weight = torch.randn(d_model, d_mlp, dtype=torch.float64)
    gradients = torch.randn(n, d_model, dtype=torch.float64) * torch.logspace(0, -1, d_model)
    return weight, neurons, gradients


def _loss(weight: Tensor, narrowed: Tensor, kept: Tensor, neurons: Tensor, g: Tensor) -> float:
    """The mean of gᵀ e e ᵀ g over tokens, with e the error of the output."""
    error = neurons @ weight.T - neurons[:, kept] @ narrowed.T
    return torch.einsum("ti,tj,ij->", error, error, g).item() / len(neurons)


@pytest.mark.parametrize("two_sided", [False, True])
def test_weights_are_the_regression_on_what_stays_and_losses_those_of_the_outputs(
    two_sided: bool,
) -> None:
    weight, neurons, gradients = _draw(6, 24)
    gradient = _moment(gradients) if two_sided else None
    g = gradient.second if gradient else torch.eye(6, dtype=torch.float64)
    widths = (24, 17, 8, 3)
    problem = Problem(weight, _moment(neurons), gradient)
    found = list(prune(problem, widths))
    assert tuple(len(one.kept) for one in found) == widths
    for one in found:
        wanted = torch.linalg.lstsq(neurons[:, one.kept], neurons @ weight.T).solution.T
        narrowed = refit(problem, one.kept)
        torch.testing.assert_close(narrowed, wanted, rtol=1e-5, atol=1e-6)
        measured = _loss(weight, narrowed, one.kept, neurons, g)
        assert one.loss == pytest.approx(measured, rel=1e-6, abs=1e-6)
        kept_inputs = _moment(neurons).at(one.kept)
        spectrum = decompose(problems_of([narrowed], kept_inputs, gradient and [gradient]))
        torch.testing.assert_close(one.energies, spectrum.energies, rtol=1e-5, atol=1e-6)
    losses = [one.loss for one in found]
    assert losses == sorted(losses)
    for larger, smaller in pairwise(found):
        assert set(smaller.kept.tolist()) < set(larger.kept.tolist())


def test_it_is_hardly_worse_than_the_best_of_all_choices() -> None:
    ratios = []
    for seed in range(10):
        weight, neurons, gradients = _draw(3, 8, seed=seed)
        gradient = _moment(gradients)
        problem = Problem(weight, _moment(neurons), gradient)
        (one,) = prune(problem, [4])
        every = [
            _loss(weight, refit(problem, kept), kept, neurons, gradient.second)
            for kept in map(torch.tensor, combinations(range(8), 4))
        ]
        assert one.loss >= min(every) * (1 - 1e-9)
        ratios.append(one.loss / min(every))
        assert one.loss < sorted(every)[len(every) // 4]
    assert sum(ratios) / len(ratios) < 1.2


def test_neurons_that_are_combinations_of_others_cost_nothing() -> None:
    weight, neurons, gradients = _draw(5, 12)
    neurons[:, 4:] = neurons[:, :4] @ torch.randn(4, 8, dtype=torch.float64)
    weight[:, 0] = 0  # a neuron that nobody reads
    energy = _loss(weight, 0 * weight, torch.arange(12), neurons, _moment(gradients).second)
    four, three = prune(Problem(weight, _moment(neurons), _moment(gradients)), [4, 3])
    assert four.loss < 1e-6 * energy
    assert three.loss > 1e-3 * energy


def test_neurons_that_never_fire_go_first() -> None:
    weight, neurons, _ = _draw(5, 12)
    neurons[:, [2, 7]] = 0
    problem = Problem(weight, _moment(neurons), None)
    (one,) = prune(problem, [10])
    assert set(range(12)) - set(one.kept.tolist()) == {2, 7}
    narrowed = refit(problem, one.kept)
    torch.testing.assert_close(narrowed, weight[:, one.kept], rtol=1e-6, atol=1e-6)
