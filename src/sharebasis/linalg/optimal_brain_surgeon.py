"""Fewer entries of a weight: which ones stay, and what they become.

A weight W without some of its entries is a weight Ŵ that is zero there, and loses

    L = tr(G (W - Ŵ) C (W - Ŵ)ᵀ)

with C = E[x xᵀ] of its inputs and G = E[g gᵀ] of the gradients of its outputs. Row by row, what an
entry takes along can be made up for by the entries right of it: with C⁻¹ = Uᵀ U and U upper
triangular, letting entry (i, j) go costs G_ii w_ij² / U_jj² once the columns left of j are settled.
That is the price at which it goes. Which entries are there being settled, their values are the
best ones of L as a whole: rows make up for each other, too, as far as G says they can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from sharebasis.errors import CalibrationError
from sharebasis.linalg.moments import RIDGE, Moment
from sharebasis.runtime.matmul import linear

PANEL = 64
"""Columns that are settled one by one before the others hear of them, by one product."""

REMOVED = (0.06, 0.2, 0.45, 0.8)
"""Fractions that `measure` lets go, about, of the entries that cost something."""

NEAR = (0.0, 0.005, 0.02)
"""Further ones, where others cost nothing: near those, a loss is no power of what is removed."""

MANY = 0.004
"""A fraction of the entries; if fewer cost nothing, losses are powers all the same, nearly."""

LEAST = 1e-12
"""Of what all entries are worth: entries that are zero may go for so much, too."""

STEPS = 8
"""Of conjugate gradients for the values at once."""

TIMES = 8
"""Most times that there are so many."""

ENOUGH = 0.01
"""Fraction of the loss that so many steps have to save for there to be more."""

REFITTED = -3
"""Of the fractions, that at which `measure` refits values, too, once (measured: with twice the
steps, a model of half the numbers loses 0.3 % less)."""

SAMPLE = 2**16
"""Most entries that `measure` finds its prices by."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples leave no large gaps between 0 and 1, wherever they stop."""

TRIES = 20
"""Most sweeps that `sparsify` looks for a price with; of large weights it takes two or three."""

SPARE = 0.002
"""Fraction of the entries that a sweep may keep too many of; the least of them go, then."""


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
    worth: Float[Tensor, "d_out d_in"]
    """What it would have cost to let an entry go."""


class Eliminator:
    """Lets entries of one weight go at any price.

    Args:
        weight: W.
        inputs: C.
        gradient: G; None stands for the identity.

    Raises:
        CalibrationError: C has no inverse.

    Source: the sweep over columns is that of SparseGPT (Frantar and Alistarh, arXiv:2301.00774),
        after Optimal Brain Surgeon (Hassibi and Stork 1993), with a price of its own for every row.
    """

    def __init__(
        self, weight: Float[Tensor, "d_out d_in"], inputs: Moment, gradient: Moment | None
    ) -> None:
        self._weight = weight.float()
        self._metric = _Metric(inputs, gradient)
        self._inverse = _inverse_factor(inputs).float()

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self._weight.numel()

    @property
    def typical(self) -> Float[Tensor, "d_out d_in"]:
        """What it costs to let an entry go if it is the only one, and those right of it make up
        for it."""
        return self._metric.rows * (self._weight / self._inverse.diagonal()).square()

    def at(self, price: float) -> Sweep:
        """Let go what costs less than a price, column by column, in float32."""
        left, root, rows = self._weight.clone(), self._inverse, self._metric.rows[:, 0]
        least = (price / rows).sqrt()  # of what an entry is times the root of its price, to stay
        found = torch.empty_like(left)
        for start in range(0, left.shape[1], PANEL):
            own = slice(start, min(start + PANEL, left.shape[1]))
            panel, factor = left[:, own].T.contiguous(), root[own, own]
            errors, diagonal = torch.empty_like(panel), factor.diagonal().tolist()
            for j, column in enumerate(panel):
                errors[j] = column / diagonal[j]
                errors[j] *= errors[j].abs() < least
                panel[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
            found[:, own] = panel.T
            left[:, own.stop :] -= errors.T @ root[own, own.stop :]
        scaled = found / root.diagonal()
        kept = ~(scaled.abs() < least[:, None])
        worth = self._metric.rows * scaled.square()
        return Sweep(price, torch.where(kept, found, 0.0), kept, worth)

    def loss(self, weight: Float[Tensor, "d_out d_in"]) -> float:
        """L of another weight, in float32."""
        lacking = self._weight - weight
        return (self._metric(lacking) * lacking).sum(dtype=torch.float64).item()

    def refit(
        self, sweep: Sweep, kept: Bool[Tensor, "d_out d_in"], times: int = TIMES
    ) -> Float[Tensor, "d_out d_in"]:
        """Better values for some of the entries that a sweep has kept, in float32."""
        start = torch.where(kept, sweep.weight, 0.0)
        return _refit(self._metric, self._weight, start, kept, times)


class _Metric:
    """G · C in float32, and the diagonal of G as a column; both are symmetric."""

    def __init__(self, inputs: Moment, gradient: Moment | None) -> None:
        self.inputs = inputs.second.float()
        self._outputs = None if gradient is None else gradient.second.float()
        one = torch.ones_like(self.inputs[:1, :1])
        self.rows = one if self._outputs is None else self._outputs.diagonal()[:, None]

    def __call__(self, weight: Tensor) -> Tensor:
        weighed = weight if self._outputs is None else linear(self._outputs, weight.T)
        return linear(weighed, self.inputs)


def loss_of(
    weight: Float[Tensor, "d_out d_in"],
    other: Float[Tensor, "d_out d_in"],
    inputs: Moment,
    gradient: Moment | None,
) -> float:
    """tr(G (W - Ŵ) C (W - Ŵ)ᵀ), in float64."""
    lacking = weight.double() - other.double()
    weighed = lacking if gradient is None else gradient.second @ lacking
    return (weighed * (lacking @ inputs.second)).sum().item()


@dataclass(frozen=True, slots=True)
class Sparsities:
    """What a weight loses as its entries go, at a few prices; the losses are near those of the best
    values (0.6 to 1.5 times where it was tried, and up to 5 times the least of them)."""

    removed: Sequence[float]
    """Fractions of the entries, ascending."""
    losses: Sequence[float]
    prices: Sequence[float]

    def loss_at(self, removed: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """Between the fractions that were measured; a loss is close to a power of what is removed.

        Args:
            removed: between the first and the last fraction.
        """
        return _between(removed, self.removed, self.losses)

    def price_at(self, removed: float) -> float:
        """The same of the price."""
        wanted = torch.tensor([removed], dtype=torch.float64)
        return _between(wanted, self.removed, self.prices).item()


def measure(
    weight: Float[Tensor, "d_out d_in"], inputs: Moment, gradient: Moment | None
) -> Sparsities | None:
    """Let entries of a weight go at several prices.

    Args: as of `Eliminator`.

    Returns:
        None if there are not two prices at which it loses something, and not everything.
    """
    eliminator = Eliminator(weight, inputs, gradient)
    every = eliminator.typical.flatten()
    typical = _sample(every)
    least = LEAST * eliminator.loss(torch.zeros_like(weight, dtype=torch.float32))
    nothing = least / weight.numel()
    free = (every < nothing).double().mean().item()
    fractions = _fractions(free)
    found = [(0.0, 0.0, 0.0)]
    left = 1.0  # of the losses, once values are refitted
    for fraction in fractions:
        at_price = typical.kthvalue(1 + int(fraction * len(typical))).values.item()
        price = max(at_price, nothing)
        if fractions is REMOVED:
            sweep = eliminator.at(price)
            kept = sweep.kept
        else:
            # Those that are zero take in what others leave, and are zero no more: a price says
            # little of how many there will be.
            n_kept = round((1 - fraction) * weight.numel())
            sweep = _sweep_for(eliminator, n_kept, price)
            kept = _dearest(sweep, n_kept)
            price = max(sweep.price, nothing)
        loss = max(eliminator.loss(torch.where(kept, sweep.weight, 0.0)), least)
        if fraction == fractions[REFITTED] and loss > least:
            # Where C hardly has an inverse, float32 may see a loss below zero.
            refitted = max(eliminator.loss(eliminator.refit(sweep, kept, times=1)), least)
            left = refitted / loss
        removed = 1 - kept.double().mean().item()
        if removed > found[-1][0] and loss > found[-1][1]:
            found.append((removed, loss, price))
    if len(found) < 3:
        return None
    gone, losses, prices = zip(*found[1:], strict=True)
    return Sparsities(gone, [left * loss for loss in losses], prices)


def _fractions(free: float) -> Sequence[float]:
    """What to let go, where a fraction `free` of the entries costs nothing."""
    if free < MANY:
        return REMOVED
    return [free + (1 - free) * own for own in (*NEAR, *REMOVED)] if free < 1 else []


def sparsify(
    weight: Float[Tensor, "d_out d_in"],
    inputs: Moment,
    gradient: Moment | None,
    n_kept: int,
    price: float,
) -> Sparse:
    """Keep so many entries of a weight, those that cost most to lose, and refit their values.

    Args:
        weight, inputs, gradient: as of `Eliminator`.
        n_kept: entries to keep.
        price: about that at which so many stay.
    """
    eliminator = Eliminator(weight, inputs, gradient)
    sweep = _sweep_for(eliminator, n_kept, price)
    kept = _dearest(sweep, n_kept)
    values = eliminator.refit(sweep, kept).double()
    return Sparse(values, kept, loss_of(weight, values, inputs, gradient))


def _dearest(sweep: Sweep, n_kept: int) -> Bool[Tensor, "d_out d_in"]:
    """So many of the entries that a sweep has kept: those that cost most to lose."""
    worth = torch.where(sweep.kept, sweep.worth, -1.0).flatten()
    kept = torch.zeros_like(worth, dtype=torch.bool)
    kept[worth.topk(n_kept).indices] = True
    return kept.view_as(sweep.kept)


def _sweep_for(eliminator: Eliminator, n_kept: int, price: float) -> Sweep:
    """One that keeps so many entries at least, and hardly more."""
    best: Sweep | None = None
    n = eliminator.size
    low, high = 0.0, math.inf  # prices at which enough stay, and too few
    most, least = n - n_kept, n - n_kept - SPARE * n  # entries to go
    for _ in range(TRIES):
        sweep = eliminator.at(price)
        gone = n - int(sweep.kept.sum())
        if gone > most:
            high = price
        else:
            best, low = sweep, price
            if gone >= least:
                break
        # What goes is close to the square root of the price.
        price *= (((most + least) / 2) / max(gone, 1)) ** 2
        if not low < price < high:
            price = math.sqrt(low * high) if low else high / 2
    return best or eliminator.at(0.0)


def refit(
    weight: Float[Tensor, "d_out d_in"],
    start: Float[Tensor, "d_out d_in"],
    kept: Bool[Tensor, "d_out d_in"],
    inputs: Moment,
    gradient: Moment | None,
) -> Float64[Tensor, "d_out d_in"]:
    """Values of the entries that are there, towards those of least loss.

    L is quadratic in them; conjugate gradients, scaled by the diagonals of both moments, in
    float32, until a step saves next to nothing.

    Args:
        weight: W.
        start: Ŵ to go on from, zero where there is nothing.
        kept: where there is something.
        inputs: C.
        gradient: G; None stands for the identity.
    """
    return _refit(_Metric(inputs, gradient), weight.float(), start.float(), kept, TIMES).double()


def _refit(metric: _Metric, weight: Tensor, start: Tensor, kept: Tensor, times: int) -> Tensor:
    diagonal = metric.rows * metric.inputs.diagonal()
    scale = kept / diagonal.clamp_min(torch.finfo(torch.float32).tiny)
    found, lacking = start, metric(weight - start)
    loss = left = (lacking * (weight - start)).sum()
    direction, size = torch.zeros_like(found), torch.ones((), device=found.device)
    for step in range(STEPS * times):
        if step and step % STEPS == 0:
            if loss - left < ENOUGH * left:
                break
            loss = left
        steepest = scale * lacking
        before, size = size, (steepest * lacking).sum()
        direction = steepest + (size / before) * direction
        answer = metric(direction)
        curvature = (direction * answer).sum()
        if not (size > 0 and curvature > 0):  # nothing to save, or nothing that float32 can tell
            break
        length = size / curvature
        found = found + length * direction
        lacking = lacking - length * answer
        left = left - length * size
    return found


def _sample(values: Tensor) -> Tensor:
    """Some of them, evenly, but not so that they would all be of a few columns."""
    places = torch.arange(min(SAMPLE, len(values)), dtype=torch.float64) * GOLDEN % 1
    return values[(places * len(values)).long().to(values.device)]


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


def _between(wanted: Tensor, at: Sequence[float], values: Sequence[float]) -> Tensor:
    """Powers between points, as straight lines of logarithms."""
    logs = (np.log(np.asarray(own)) for own in (wanted, at, values))
    return torch.from_numpy(np.exp(np.interp(*logs)))
