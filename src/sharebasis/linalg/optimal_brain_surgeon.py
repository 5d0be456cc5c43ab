"""Unstructured sparsity: which entries of a weight stay, and what they become.

A weight W without some of its entries is a weight Ŵ that is zero there, and loses

    L = tr(G (W - Ŵ) C (W - Ŵ)ᵀ)

with C = E[x xᵀ] of its inputs and G = E[g gᵀ] of the gradients of its outputs. Row by row, what an
entry takes along can be made up for by the entries right of it: with C⁻¹ = Uᵀ U and U upper
triangular, removing entry (i, j) costs G_ii w_ij² / U_jj² once the columns left of j are settled.
That is its saliency. Which entries are there being settled, their values are the best ones of L as
a whole: rows make up for each other, too, as far as G says they can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sharebasis.errors import CalibrationError
from sharebasis.linalg.conjugate_gradients import conjugate_gradients
from sharebasis.linalg.moments import RIDGE, Moment
from sharebasis.linalg.objective import Problem
from sharebasis.runtime.matmul import linear

PANEL = 64
"""Columns that are settled one by one before the others hear of them, by one product."""

CG_STEPS = 8
"""Of conjugate gradients for the values at once."""

CG_ROUNDS = 8
"""Most times that there are so many."""

CG_RTOL = 0.01
"""Fraction of the loss that so many steps have to save for there to be more."""

MAX_SWEEPS = 20
"""That look for a price; of large weights it takes two or three."""

KEEP_TOLERANCE = 0.002
"""Fraction of the entries that a sweep may keep too many of; those of least saliency go, then."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """What is left of a weight."""

    weight: Float64[Tensor, "d_out d_in"]
    """Ŵ, zero where there is nothing."""
    kept: Bool[Tensor, "d_out d_in"]
    loss: float
    """L."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep makes of a weight at a price."""

    price: float
    weight: Float[Tensor, "d_out d_in"]
    kept: Bool[Tensor, "d_out d_in"]
    saliency: Float[Tensor, "d_out d_in"]
    """What it would have cost to remove an entry."""


class OptimalBrainSurgeon:
    """Removes entries of one weight at any price.

    Args:
        problem: with a moment of the inputs.

    Raises:
        CalibrationError: C has no inverse.

    Source: the sweep over columns is that of SparseGPT (Frantar and Alistarh, arXiv:2301.00774),
        after Optimal Brain Surgeon (Hassibi and Stork 1993), with a price of its own for every row.
    """

    def __init__(self, problem: Problem) -> None:
        self._weight = problem.weight.float()
        self._metric = _Metric(problem)
        self._inverse = _inverse_factor(problem.input_moment).float()

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self._weight.numel()

    @property
    def saliency(self) -> Float[Tensor, "d_out d_in"]:
        """What it costs to remove an entry if it is the only one, and those right of it make up
        for it."""
        return self._metric.rows * (self._weight / self._inverse.diagonal()).square()

    def sweep(self, price: float) -> Sweep:
        """Remove what costs less than a price, column by column, in float32."""
        remaining, root, rows = self._weight.clone(), self._inverse, self._metric.rows[:, 0]
        threshold = (
            price / rows
        ).sqrt()  # of what an entry is times the root of its price, to stay
        settled = torch.empty_like(remaining)
        for start in range(0, remaining.shape[1], PANEL):
            columns = slice(start, min(start + PANEL, remaining.shape[1]))
            panel, factor = remaining[:, columns].T.contiguous(), root[columns, columns]
            errors, diagonal = torch.empty_like(panel), factor.diagonal().tolist()
            for j, column in enumerate(panel):
                errors[j] = column / diagonal[j]
                errors[j] *= errors[j].abs() < threshold
                panel[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
            settled[:, columns] = panel.T
            remaining[:, columns.stop :] -= errors.T @ root[columns, columns.stop :]
        scaled = settled / root.diagonal()
        kept = ~(scaled.abs() < threshold[:, None])
        saliency = self._metric.rows * scaled.square()
        return Sweep(price, torch.where(kept, settled, 0.0), kept, saliency)

    def sweep_keeping(self, n_kept: int, price: float) -> Sweep:
        """One that keeps so many entries at least, and hardly more.

        Args:
            n_kept: entries to keep.
            price: about that at which so many stay.
        """
        best: Sweep | None = None
        low, high = 0.0, math.inf  # prices at which enough stay, and too few
        most, least = self.size - n_kept, self.size - n_kept - KEEP_TOLERANCE * self.size
        for _ in range(MAX_SWEEPS):
            sweep = self.sweep(price)
            n_removed = self.size - int(sweep.kept.sum())
            if n_removed > most:
                high = price
            else:
                best, low = sweep, price
                if n_removed >= least:
                    break
            # What goes is close to the square root of the price.
            price *= (((most + least) / 2) / max(n_removed, 1)) ** 2
            if not low < price < high:
                price = math.sqrt(low * high) if low else high / 2
        return best or self.sweep(0.0)

    def loss(self, weight: Float[Tensor, "d_out d_in"]) -> float:
        """L of another weight, in float32."""
        error = self._weight - weight
        return (self._metric(error) * error).sum(dtype=torch.float64).item()

    def refit(
        self, sweep: Sweep, kept: Bool[Tensor, "d_out d_in"], rounds: int = CG_ROUNDS
    ) -> Float[Tensor, "d_out d_in"]:
        """Better values for some of the entries that a sweep has kept, in float32."""
        start = torch.where(kept, sweep.weight, 0.0)
        return _refit(self._metric, self._weight, start, kept, rounds)


def sparsify(problem: Problem, n_kept: int, price: float) -> Sparse:
    """Keep so many entries of a weight, those of the largest saliency, and refit their values.

    Args:
        problem: as of `OptimalBrainSurgeon`.
        n_kept: entries to keep.
        price: about that at which so many stay.
    """
    surgeon = OptimalBrainSurgeon(problem)
    sweep = surgeon.sweep_keeping(n_kept, price)
    kept = top_k_by_saliency(sweep, n_kept)
    values = surgeon.refit(sweep, kept).double()
    return Sparse(values, kept, problem.loss(values))


def top_k_by_saliency(sweep: Sweep, k: int) -> Bool[Tensor, "d_out d_in"]:
    """So many of the entries that a sweep has kept: those that cost most to remove."""
    saliency = torch.where(sweep.kept, sweep.saliency, -1.0).flatten()
    kept = torch.zeros_like(saliency, dtype=torch.bool)
    kept[saliency.topk(k).indices] = True
    return kept.view_as(sweep.kept)


def refit(
    problem: Problem, start: Float[Tensor, "d_out d_in"], kept: Bool[Tensor, "d_out d_in"]
) -> Float64[Tensor, "d_out d_in"]:
    """Values of the entries that are there, towards those of least loss.

    L is quadratic in them; conjugate gradients, scaled by the diagonals of both moments, in
    float32, until a step saves next to nothing.

    Args:
        problem: with a moment of the inputs.
        start: Ŵ to go on from, zero where there is nothing.
        kept: where there is something.
    """
    weight, metric = problem.weight.float(), _Metric(problem)
    return _refit(metric, weight, start.float(), kept, CG_ROUNDS).double()


class _Metric:
    """G · C in float32, and the diagonal of G as a column; both are symmetric."""

    def __init__(self, problem: Problem) -> None:
        gradients = problem.gradients
        self._inputs = problem.input_moment.second.float()
        self._outputs = None if gradients is None else gradients.second.float()
        unit = torch.ones_like(self._inputs[:1, :1])
        self.rows = unit if self._outputs is None else self._outputs.diagonal()[:, None]

    def __call__(self, weight: Tensor) -> Tensor:
        weighted = weight if self._outputs is None else linear(self._outputs, weight.T)
        return linear(weighted, self._inputs)

    @property
    def diagonal(self) -> Tensor:
        """What one entry costs if all others stay: G_ii C_jj."""
        return self.rows * self._inputs.diagonal()


def _refit(metric: _Metric, weight: Tensor, start: Tensor, kept: Tensor, rounds: int) -> Tensor:
    scale = kept / metric.diagonal.clamp_min(torch.finfo(torch.float32).tiny)
    residual = metric(weight - start)
    loss = (residual * (weight - start)).sum()
    steps = conjugate_gradients(metric, lambda gradient: scale * gradient, start, residual)
    refitted = start
    for _ in range(rounds):
        before = loss
        for values, saved in islice(steps, CG_STEPS):
            refitted, loss = values, loss - saved
        if before - loss < CG_RTOL * loss:
            break
    return refitted


def _inverse_factor(inputs: Moment) -> Float64[Tensor, "d_in d_in"]:
    """U, upper triangular, with Uᵀ U the inverse of E[x xᵀ]: of its factor R Rᵀ, R⁻¹."""
    second = inputs.damped(RIDGE).second
    lower, failed = torch.linalg.cholesky_ex(second.flip(0, 1))
    if failed:
        raise CalibrationError(
            f"The moment of {inputs.site} has no inverse; raise fit.damping_inputs."
        )
    unit = torch.eye(len(second), dtype=second.dtype, device=second.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
