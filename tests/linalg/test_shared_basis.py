"""One basis for several weights: its loss at every rank, and that nothing near it is better."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharebasis.linalg.low_rank import decompose
from sharebasis.linalg.moments import Moment
from sharebasis.linalg.objective import Problem
from sharebasis.linalg.shared_basis import (
    Factors,
    best_coefficients,
    energies,
    fit_shared_basis,
    pooled_basis,
    refine,
)

SHARED = 14


def _moment(d: int, seed: int, n_tokens: int = 200) -> Moment:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, d, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(d, d, dtype=torch.float64, generator=generator)
    return Moment(x.T @ x, x.sum(0), n_tokens, f"site{seed}").damped(1e-4)


def _problems(
    owns: Sequence[int], shared: int = SHARED, seed: int = 0, one: bool = False, bare: bool = False
) -> list[Problem]:
    """With moments that differ, or (one) the same on the shared side, or (bare) none."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(own, shared, dtype=torch.float64, generator=generator) for own in owns]
    if bare:
        return [Problem(weight, None, None) for weight in weights]
    single = _moment(shared, seed + 1)
    return [
        Problem(
            w, single if one else _moment(shared, seed + 10 + i), _moment(len(w), seed + 30 + i)
        )
        for i, w in enumerate(weights)
    ]


def _loss(problems: Sequence[Problem], products: Sequence[Tensor]) -> float:
    """By the roots: ‖G^½ (W - Ŵ) C^½‖², Cholesky factors in the place of roots."""
    total = 0.0
    for problem, product in zip(problems, products, strict=True):
        error = problem.weight - product
        if problem.gradients is not None:
            error = torch.linalg.cholesky(problem.gradients.second).T @ error
        if problem.inputs is not None:
            error = error @ torch.linalg.cholesky(problem.inputs.second)
        total += error.square().sum().item()
    return total


def _fit(problems: Sequence[Problem], rank: int, refined: bool) -> Factors:
    """Without refinement, with the pooled basis and what is best for it."""
    if refined:
        return fit_shared_basis(problems, rank)
    basis = pooled_basis(problems)[:rank]
    coefficients = best_coefficients(problems, basis)
    products = [coefficient @ basis for coefficient in coefficients]
    energy = _loss(problems, [torch.zeros_like(problem.weight) for problem in problems])
    return Factors(basis, coefficients, _loss(problems, products), energy)


def _products(factors: Factors) -> list[Tensor]:
    return [coefficient @ factors.basis for coefficient in factors.coefficients]


CASES = {"tall": (9, 11, 8), "wide": (4, 5), "one": (20,)}
"""Rows of every weight: more than SHARED of them, or fewer."""


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("one", [False, True], ids=["private moments", "one moment"])
@pytest.mark.parametrize("owns", CASES.values(), ids=CASES)
def test_the_loss_told_is_that_of_the_dense_products_at_every_rank(
    owns: Sequence[int], one: bool, refined: bool
) -> None:
    problems = _problems(owns, one=one)
    saved = energies(problems, pooled_basis(problems))
    total = _loss(problems, [torch.zeros_like(problem.weight) for problem in problems])
    assert len(saved) == min(sum(owns), SHARED)
    assert saved.sum().item() == pytest.approx(total, rel=1e-7)
    losses = []
    for rank in range(1, len(saved) + 1):
        factors = _fit(problems, rank, refined)
        told = factors.loss
        assert factors.energy == pytest.approx(total, rel=1e-9)
        losses.append(_loss(problems, _products(factors)))
        assert told == pytest.approx(losses[-1], rel=1e-9, abs=1e-9 * total)
        predicted = saved[rank:].sum().item()
        if refined:
            assert told <= predicted * (1 + 1e-7) + 1e-9 * total
        else:
            assert told == pytest.approx(predicted, rel=1e-6, abs=1e-9 * total)
    assert all(more <= less * (1 + 1e-9) + 1e-9 * total for less, more in pairwise(losses))
    torch.testing.assert_close(
        torch.cat(_products(factors)), torch.cat([p.weight for p in problems]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("owns", CASES.values(), ids=CASES)
def test_with_one_moment_it_is_the_exact_solution_which_reads_have(owns: Sequence[int]) -> None:
    problems = _problems(owns, one=True)
    exact = decompose(problems).energies
    found = energies(problems, pooled_basis(problems))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9 * exact.sum().item())


@pytest.mark.parametrize("owns", CASES.values(), ids=CASES)
def test_without_moments_it_is_the_truncated_svd_of_the_stacked_weights(
    owns: Sequence[int],
) -> None:
    problems = _problems(owns, bare=True)
    stacked = torch.cat([problem.weight for problem in problems])
    u, s, v = torch.linalg.svd(stacked, full_matrices=False)
    found = energies(problems, pooled_basis(problems))
    torch.testing.assert_close(found, s.square(), rtol=1e-6, atol=1e-9)
    factors = fit_shared_basis(problems, 3)
    torch.testing.assert_close(
        torch.cat(_products(factors)), (u[:, :3] * s[:3]) @ v[:3], rtol=0, atol=1e-8
    )


def test_writes_are_the_same_problem_transposed() -> None:
    """Loss of B A_i with G on the left and C_i on the right, by its own formula."""
    gradient, inputs = _moment(SHARED, 3), [_moment(9, 4), _moment(7, 5)]
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(SHARED, d, dtype=torch.float64, generator=generator) for d in (9, 7)]
    pairs = zip(weights, inputs, strict=True)
    problems = [Problem(weight, moment, gradient).transposed() for weight, moment in pairs]
    factors = fit_shared_basis(problems, 4)
    root = torch.linalg.cholesky(gradient.second).T
    scaled = torch.cat(
        [root @ w @ torch.linalg.cholesky(c.second) for w, c in zip(weights, inputs, strict=True)],
        dim=1,
    )
    best = torch.linalg.svdvals(scaled)[4:].square().sum().item()
    assert factors.loss == pytest.approx(best, rel=1e-8)
    errors = [w - factors.basis.T @ a.T for w, a in zip(weights, factors.coefficients, strict=True)]
    loss = sum(
        torch.trace(gradient.second @ e @ c.second @ e.T).item()
        for e, c in zip(errors, inputs, strict=True)
    )
    assert loss == pytest.approx(best, rel=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    owns=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    shared=st.integers(2, 12),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_refinement_never_loses(
    owns: list[int], shared: int, seed: int, data: st.DataObject
) -> None:
    problems = _problems(owns, shared, seed)
    rank = data.draw(st.integers(1, min(sum(owns), shared)))
    pooled, refined = (_fit(problems, rank, which).loss for which in (False, True))
    energy = _loss(problems, [torch.zeros_like(problem.weight) for problem in problems])
    assert refined <= pooled + 1e-9 * energy


def test_refinement_gains_where_moments_differ_and_ends_where_nothing_near_is_better() -> None:
    problems = _problems((9, 11, 8))
    pooled, refined = (_fit(problems, 4, which) for which in (False, True))
    assert refined.loss < 0.97 * pooled.loss
    generator = torch.Generator().manual_seed(1)
    for size in (3e-1, 1e-1):
        noise = torch.randn(4, SHARED, dtype=torch.float64, generator=generator)
        moved = refined.basis * (1 + size * noise)
        products = [coefficient @ moved for coefficient in refined.coefficients]
        assert _loss(problems, products) > refined.loss


def test_refinement_leaves_alone_what_is_exact() -> None:
    problems = _problems((9, 11), one=True)
    basis = pooled_basis(problems)[:4]
    assert refine(problems, basis) is basis


def test_a_basis_that_all_weights_have_is_found() -> None:
    generator = torch.Generator().manual_seed(2)
    basis = torch.randn(3, SHARED, dtype=torch.float64, generator=generator)
    problems = [
        Problem(
            torch.randn(len(p.weight), 3, dtype=torch.float64, generator=generator) @ basis,
            p.inputs,
            p.gradients,
        )
        for p in _problems((9, 11, 8))
    ]
    saved = energies(problems, pooled_basis(problems))
    assert saved[3:].sum() < 1e-8 * saved.sum()
    assert saved[2] > 1e-4 * saved.sum()


def test_a_moment_that_fewer_tokens_than_dimensions_made_is_no_special_case() -> None:
    x = torch.randn(2, 5, SHARED, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    singular = [Moment(own.T @ own, own.sum(0), 5, "few") for own in x]
    pairs = zip(_problems((9, 11)), singular, strict=True)
    problems = [Problem(problem.weight, own, problem.gradients) for problem, own in pairs]
    # Two sets of five tokens span ten directions, and a basis of ten can have all of them.
    factors = fit_shared_basis(problems, 10)
    assert torch.cat(_products(factors)).isfinite().all()
    assert factors.loss < 1e-6 * factors.energy
    assert fit_shared_basis(problems, 4).loss > 1e-3 * factors.energy
