"""One basis for several weights, each of them in a metric of its own.

A residual read shares its inputs with the other reads, Ŵ_i = A_i B; a residual write shares its
outputs with the other writes, Ŵ_i = B A_i. One is the other transposed, with the two moments in
each other's place, because tr(G E C Eᵀ) = tr(C Eᵀ G E). So there is one problem here: weights
(own × shared), to be written as A_i B with one B (rank × shared).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add

import torch
from jaxtyping import Float64
from torch import Tensor

from sharebasis.linalg.gram import SHIFT, cholesky
from sharebasis.linalg.moments import Moment, whitening

SWEEPS = 20
"""Most sweeps of `refine`."""

ENOUGH = 2e-3
"""Fraction of the loss that a sweep of `refine` has to save for there to be another."""

STEPS = 2
"""Of conjugate gradients a sweep (measured: with 8, the loss falls by no more than 1e-4 more)."""


@dataclass(frozen=True, slots=True)
class Member:
    """A weight of a group, turned so that its columns are on the side that the group shares."""

    weight: Float64[Tensor, "own shared"]
    shared: Moment | None
    """On the shared side: of the inputs of a read, of the gradients of a write's outputs. None
    is the identity."""
    own: Moment | None
    """On the other side; likewise."""


@dataclass(frozen=True, slots=True)
class SharedFactors:
    """Ŵ_i = coefficient_i @ basis."""

    basis: Float64[Tensor, "rank shared"]
    coefficients: tuple[Float64[Tensor, "_ rank"], ...]
    loss: float
    """Σ_i tr(G_i (W_i - Ŵ_i) C_i (W_i - Ŵ_i)ᵀ)."""
    energy: float
    """Σ_i tr(G_i W_i C_i W_iᵀ), what the loss would be at rank 0."""


def pooled_basis(members: Sequence[Member]) -> Float64[Tensor, "full shared"]:
    """The basis that is best if all members had the mean of their moments on the shared side.

    Its first k rows are the one of rank k. Exact where there is but one such moment: q, k and v
    of a layer read one input. With S S = C and L_i L_i = G_i, B = Vᵀ S⁻¹ of the eigenvectors V of
    S (Σ_i W_iᵀ G_i W_i) S, or, where the weights have fewer rows than columns when stacked, what
    is the same in a smaller problem: B = Uᵀ Z of the eigenvectors U of Z C Zᵀ, Z = stacked L_i W_i.

    Source: Basis Sharing, arXiv:2410.03765, with a moment of gradients for every weight.
    """
    pooled = tuple(member.shared for member in members if member.shared is not None)
    if sum(len(member.weight) for member in members) <= members[0].weight.shape[1]:
        scaled = torch.cat([_rooted(member) for member in members])
        metric = scaled if not pooled else scaled @ _mean(pooled).second
        values, vectors = torch.linalg.eigh(metric @ scaled.T)
        least = (SHIFT * values[-1]).clamp_min(torch.finfo(values.dtype).tiny)  # of zero weights
        lengths = values.clamp_min(least).sqrt()
        return ((vectors / lengths).T @ scaled).flip(0)
    gram = reduce(add, (_weighed(member).T @ member.weight for member in members))
    if not pooled:
        return torch.linalg.eigh(gram)[1].T.flip(0)
    root, inverse = whitening(_mean(pooled))
    return (torch.linalg.eigh(root @ gram @ root)[1].T @ inverse).flip(0)


def energies(
    members: Sequence[Member], basis: Float64[Tensor, "full shared"]
) -> Float64[Tensor, " full"]:
    """What every row of a basis saves of the loss once the rows before it are there.

    Of the members' own loss Σ_i tr(G_i (W_i - A_i B) C_i (W_i - A_i B)ᵀ) at the coefficients that
    are best for it at each rank, which a Cholesky factor of B C_i Bᵀ gives for all ranks at once.
    """
    saved = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    for member in members:
        seen = _seen(member, basis)
        directions = torch.linalg.solve_triangular(
            cholesky(seen @ basis.T), seen @ member.weight.T, upper=False
        )
        weighed = directions if member.own is None else directions @ member.own.second
        saved += (weighed * directions).sum(1)
    return saved


def fit_shared_basis(members: Sequence[Member], rank: int, refined: bool = True) -> SharedFactors:
    """The factors of a rank, each basis row as long as its coefficient column.

    Args:
        members: of a group.
        rank: in [1, min(Σ own, shared)].
        refined: whether to go on from the pooled solution, by `refine`.
    """
    basis = pooled_basis(members)[:rank]
    if refined:
        basis = refine(members, basis)
    coefficients = _coefficients(members, basis)
    scale = (basis.norm(dim=1) / torch.cat(coefficients).norm(dim=0)).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    return SharedFactors(
        basis=basis / scale[:, None],
        coefficients=tuple(coefficient * scale for coefficient in coefficients),
        loss=loss_of(members, basis, coefficients),
        energy=loss_of(members, basis, [torch.zeros_like(own) for own in coefficients]),
    )


def refine(
    members: Sequence[Member], basis: Float64[Tensor, "rank shared"]
) -> Float64[Tensor, "rank shared"]:
    """A basis that is better for moments that differ, by turns with the coefficients.

    For a fixed B, A_i = W_i C_i Bᵀ (B C_i Bᵀ)⁻¹ is best; for fixed A_i, B solves Σ_i (A_iᵀ G_i A_i)
    B C_i = Σ_i A_iᵀ G_i W_i C_i, which conjugate gradients approach from the B that is there. No
    step of either raises the loss, and a sweep that saves less than ENOUGH of it is the last.
    """
    if len({id(member.shared) for member in members}) == 1:
        return basis  # the pooled solution is exact
    coefficients = _coefficients(members, basis)
    now = loss_of(members, basis, coefficients)
    for _ in range(SWEEPS):
        moved = _better_basis(members, basis, coefficients)
        coefficients = _coefficients(members, moved)
        then = loss_of(members, moved, coefficients)
        if not then < now:
            break
        basis, saved, now = moved, now - then, then
        if saved < ENOUGH * now:
            break
    return basis


@lru_cache(maxsize=1)  # gate and up of the same layers ask for the same one in turn
def _mean(moments: tuple[Moment, ...]) -> Moment:
    """Every member counts alike, however many tokens it has seen."""
    if all(moment is moments[0] for moment in moments):
        return moments[0]
    total = reduce(add, (moment.second for moment in moments)) / len(moments)
    return Moment(total, total.diagonal(), 1, moments[0].site)


def _rooted(member: Member) -> Tensor:
    return member.weight if member.own is None else whitening(member.own)[0] @ member.weight


def _weighed(member: Member) -> Tensor:
    """G W."""
    return member.weight if member.own is None else member.own.second @ member.weight


def _seen(member: Member, basis: Tensor) -> Tensor:
    """B C."""
    return basis if member.shared is None else basis @ member.shared.second


def _coefficients(members: Sequence[Member], basis: Tensor) -> tuple[Tensor, ...]:
    """The best ones for a basis."""
    found = []
    for member in members:
        seen = _seen(member, basis)
        factor = cholesky(seen @ basis.T)
        found.append(torch.cholesky_solve(seen @ member.weight.T, factor).T)
    return tuple(found)


def loss_of(
    members: Sequence[Member],
    basis: Float64[Tensor, "rank shared"],
    coefficients: Sequence[Float64[Tensor, "_ rank"]],
) -> float:
    """Σ_i tr(G_i (W_i - A_i B) C_i (W_i - A_i B)ᵀ)."""
    total = 0.0
    for member, coefficient in zip(members, coefficients, strict=True):
        error = member.weight - coefficient @ basis
        right = error if member.shared is None else error @ member.shared.second
        left = error if member.own is None else member.own.second @ error
        total += (left * right).sum().item()
    return total


def _better_basis(
    members: Sequence[Member], basis: Tensor, coefficients: Sequence[Tensor]
) -> Tensor:
    """STEPS of conjugate gradients towards the best basis for some coefficients.

    Preconditioned by what would solve it if all moments on the shared side were their mean.
    """
    weighed = [
        a if m.own is None else m.own.second @ a for m, a in zip(members, coefficients, strict=True)
    ]
    grams = [a.T @ g for a, g in zip(coefficients, weighed, strict=True)]
    shared = [None if member.shared is None else member.shared.second for member in members]
    mean = _mean(tuple(member.shared for member in members if member.shared is not None)).second
    left, right = cholesky(reduce(add, grams)), cholesky(mean)

    def applied(x: Tensor) -> Tensor:
        pairs = zip(grams, shared, strict=True)
        return reduce(add, (g @ x if c is None else g @ x @ c for g, c in pairs))

    def preconditioned(x: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(x, left).T, right).T

    wanted = reduce(
        add,
        (
            g.T @ m.weight if c is None else g.T @ m.weight @ c
            for g, m, c in zip(weighed, members, shared, strict=True)
        ),
    )
    residual = wanted - applied(basis)
    direction = z = preconditioned(residual)
    size = (residual * z).sum()
    for _ in range(STEPS):
        along = applied(direction)
        curvature = (direction * along).sum()
        if not (curvature > 0 and size > 0):
            break
        step = size / curvature
        basis, residual = basis + step * direction, residual - step * along
        z = preconditioned(residual)
        size, last = (residual * z).sum(), size
        direction = z + size / last * direction
    return basis
