"""One basis for several weights, each of them with moments of its own.

A residual read shares its inputs with the other reads, Ŵ_i = A_i B; a residual write shares its
outputs with the other writes, Ŵ_i = B A_i, which is the first for the transposed problems. So there
is one task here: weights (d_out_i × shared), to be written as A_i B with one B (rank × shared).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import islice
from operator import add

import torch
from jaxtyping import Float64
from torch import Tensor

from sharebasis.linalg.conjugate_gradients import conjugate_gradients
from sharebasis.linalg.gram import SHIFT, cholesky
from sharebasis.linalg.low_rank import equalizing_scale
from sharebasis.linalg.moments import Moment, whitening
from sharebasis.linalg.objective import Problem

MAX_SWEEPS = 20
"""Of `refine`."""

SWEEP_RTOL = 2e-3
"""Fraction of the loss that a sweep of `refine` has to save for there to be another."""

CG_STEPS = 2
"""A sweep (measured: with 8, the loss falls by no more than 1e-4 more)."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Ŵ_i = coefficient_i @ basis."""

    basis: Float64[Tensor, "rank shared"]
    coefficients: tuple[Float64[Tensor, "_ rank"], ...]
    loss: float
    """Σ_i tr(G_i (W_i - Ŵ_i) C_i (W_i - Ŵ_i)ᵀ)."""
    energy: float
    """Σ_i tr(G_i W_i C_i W_iᵀ), what the loss would be at rank 0."""


def pooled_basis(problems: Sequence[Problem]) -> Float64[Tensor, "full shared"]:
    """The basis that is best if all problems had the mean of their input moments.

    Its first k rows are the one of rank k. Exact where there is but one such moment: q, k and v
    of a layer read one input. With S S = C and L_i L_i = G_i, B = Vᵀ S⁻¹ of the eigenvectors V of
    S (Σ_i W_iᵀ G_i W_i) S, or, where the weights have fewer rows than columns when stacked, what
    is the same in a smaller problem: B = Uᵀ Z of the eigenvectors U of Z C Zᵀ, Z = stacked L_i W_i.

    Source: Basis Sharing, arXiv:2410.03765, with a moment of gradients for every weight.
    """
    moments = _input_moments(problems)
    if sum(len(problem.weight) for problem in problems) <= problems[0].weight.shape[1]:
        scaled = torch.cat([_rooted(problem) for problem in problems])
        metric = scaled if not moments else scaled @ _mean(moments).second
        values, vectors = torch.linalg.eigh(metric @ scaled.T)
        floor = (SHIFT * values[-1]).clamp_min(torch.finfo(values.dtype).tiny)  # of zero weights
        lengths = values.clamp_min(floor).sqrt()
        return ((vectors / lengths).T @ scaled).flip(0)
    gram = reduce(add, (_by_gradients(p, p.weight).T @ p.weight for p in problems))
    if not moments:
        return torch.linalg.eigh(gram)[1].T.flip(0)
    root, inverse = whitening(_mean(moments))
    return (torch.linalg.eigh(root @ gram @ root)[1].T @ inverse).flip(0)


def energies(
    problems: Sequence[Problem], basis: Float64[Tensor, "full shared"]
) -> Float64[Tensor, " full"]:
    """What every row of a basis saves of the loss once the rows before it are there.

    Of the problems' own loss Σ_i tr(G_i (W_i - A_i B) C_i (W_i - A_i B)ᵀ) at the coefficients that
    are best for it at each rank, which a Cholesky factor of B C_i Bᵀ gives for all ranks at once.
    """
    saved = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    for problem in problems:
        seen = _by_inputs(problem, basis)
        directions = torch.linalg.solve_triangular(
            cholesky(seen @ basis.T), seen @ problem.weight.T, upper=False
        )
        gradients = problem.gradients
        weighted = directions if gradients is None else directions @ gradients.second
        saved += (weighted * directions).sum(1)
    return saved


def fit_shared_basis(problems: Sequence[Problem], rank: int) -> Factors:
    """The factors of a rank, each basis row as long as its coefficient column.

    Args:
        problems: of a group.
        rank: in [1, min(Σ d_out_i, shared)].
    """
    basis = refine(problems, pooled_basis(problems)[:rank])
    coefficients = best_coefficients(problems, basis)
    scale = equalizing_scale(torch.cat(coefficients), basis)
    return Factors(
        basis=basis / scale[:, None],
        coefficients=tuple(coefficient * scale for coefficient in coefficients),
        loss=_loss(problems, basis, coefficients),
        energy=reduce(add, (problem.energy for problem in problems)),
    )


def best_coefficients(
    problems: Sequence[Problem], basis: Float64[Tensor, "rank shared"]
) -> tuple[Float64[Tensor, "_ rank"], ...]:
    """A_i = W_i C_i Bᵀ (B C_i Bᵀ)⁻¹, the best ones for a basis."""
    coefficients = []
    for problem in problems:
        seen = _by_inputs(problem, basis)
        factor = cholesky(seen @ basis.T)
        coefficients.append(torch.cholesky_solve(seen @ problem.weight.T, factor).T)
    return tuple(coefficients)


def refine(
    problems: Sequence[Problem], basis: Float64[Tensor, "rank shared"]
) -> Float64[Tensor, "rank shared"]:
    """A basis that is better for moments that differ, by turns with the coefficients.

    For a fixed B, `best_coefficients`; for fixed A_i, B solves Σ_i (A_iᵀ G_i A_i) B C_i =
    Σ_i A_iᵀ G_i W_i C_i, which conjugate gradients approach from the B that is there. No step of
    either raises the loss, and a sweep that saves less than SWEEP_RTOL of it is the last.
    """
    if len({id(problem.inputs) for problem in problems}) == 1:
        return basis  # the pooled solution is exact
    coefficients = best_coefficients(problems, basis)
    loss = _loss(problems, basis, coefficients)
    for _ in range(MAX_SWEEPS):
        candidate = _better_basis(problems, basis, coefficients)
        coefficients = best_coefficients(problems, candidate)
        candidate_loss = _loss(problems, candidate, coefficients)
        if not candidate_loss < loss:
            break
        basis, saved, loss = candidate, loss - candidate_loss, candidate_loss
        if saved < SWEEP_RTOL * loss:
            break
    return basis


def _better_basis(
    problems: Sequence[Problem], basis: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """CG_STEPS towards the best basis for some coefficients.

    Preconditioned by what would solve it if all input moments were their mean.
    """
    weighted = [_by_gradients(p, a) for p, a in zip(problems, coefficients, strict=True)]
    grams = [a.T @ weighted_a for a, weighted_a in zip(coefficients, weighted, strict=True)]
    mean = _mean(_input_moments(problems)).second
    left, right = cholesky(reduce(add, grams)), cholesky(mean)

    def apply(x: Tensor) -> Tensor:
        terms = zip(problems, grams, strict=True)
        return reduce(add, (_by_inputs(problem, gram @ x) for problem, gram in terms))

    def precondition(x: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(x, left).T, right).T

    terms = zip(problems, weighted, strict=True)
    wanted = reduce(add, (_by_inputs(p, a.T @ p.weight) for p, a in terms))
    steps = conjugate_gradients(apply, precondition, basis, wanted - apply(basis))
    for better, _saved in islice(steps, CG_STEPS):
        basis = better
    return basis


def _loss(problems: Sequence[Problem], basis: Tensor, coefficients: Sequence[Tensor]) -> float:
    """Σ_i tr(G_i (W_i - A_i B) C_i (W_i - A_i B)ᵀ)."""
    pairs = zip(problems, coefficients, strict=True)
    return reduce(add, (problem.loss(coefficient @ basis) for problem, coefficient in pairs))


def _input_moments(problems: Sequence[Problem]) -> tuple[Moment, ...]:
    return tuple(problem.inputs for problem in problems if problem.inputs is not None)


@lru_cache(maxsize=1)  # gate and up of the same layers ask for the same one in turn
def _mean(moments: tuple[Moment, ...]) -> Moment:
    """Every problem counts alike, however many tokens it has seen."""
    if all(moment is moments[0] for moment in moments):
        return moments[0]
    total = reduce(add, (moment.second for moment in moments)) / len(moments)
    return Moment(total, total.diagonal(), 1, moments[0].site)


def _rooted(problem: Problem) -> Tensor:
    """L W."""
    if problem.gradients is None:
        return problem.weight
    return whitening(problem.gradients)[0] @ problem.weight


def _by_gradients(problem: Problem, left: Tensor) -> Tensor:
    """G A."""
    return left if problem.gradients is None else problem.gradients.second @ left


def _by_inputs(problem: Problem, right: Tensor) -> Tensor:
    """B C."""
    return right if problem.inputs is None else right @ problem.inputs.second
