"""What a weight loses as its entries go: measured at a few prices, and between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from sharebasis.linalg.objective import Problem
from sharebasis.linalg.optimal_brain_surgeon import OptimalBrainSurgeon, top_k_by_saliency

REMOVED_FRACTIONS = (0.06, 0.2, 0.45, 0.8)
"""That `measure` lets go, about, of the entries that cost something."""

NEAR_ZERO_FRACTIONS = (0.0, 0.005, 0.02)
"""Further ones, where others cost nothing: near those, a loss is no power of what is removed."""

MIN_ZERO_FRACTION = 0.004
"""Of the entries; if fewer cost nothing, losses are powers all the same, nearly."""

NEGLIGIBLE_LOSS = 1e-12
"""Of what all entries are worth: entries that are zero may go for so much, too."""

REFITTED = -3
"""Of the fractions, that at which `measure` refits values, too, once (measured: with twice the
steps, a model of half the numbers loses 0.3 % less)."""

MAX_SAMPLE = 2**16
"""Entries that `measure` finds its prices by."""

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Its multiples leave no large gaps between 0 and 1, wherever they stop."""


@dataclass(frozen=True, slots=True)
class SparsityCurve:
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
        return _interpolated(removed, self.removed, self.losses)

    def price_at(self, removed: float) -> float:
        """The same of the price."""
        fraction = torch.tensor([removed], dtype=torch.float64)
        return _interpolated(fraction, self.removed, self.prices).item()


def measure(problem: Problem) -> SparsityCurve | None:
    """Let entries of a weight go at several prices.

    Args:
        problem: as of `OptimalBrainSurgeon`.

    Returns:
        None if there are not two prices at which it loses something, and not everything.
    """
    surgeon = OptimalBrainSurgeon(problem)
    saliency = surgeon.saliency.flatten()
    sample = _sample(saliency)
    negligible = NEGLIGIBLE_LOSS * surgeon.loss(
        torch.zeros_like(problem.weight, dtype=torch.float32)
    )
    least_price = negligible / surgeon.size
    fractions = _fractions((saliency < least_price).double().mean().item())
    points = [(0.0, 0.0, 0.0)]
    refitted_ratio = 1.0  # of the losses, once values are refitted
    for fraction in fractions:
        at_price = sample.kthvalue(1 + int(fraction * len(sample))).values.item()
        price = max(at_price, least_price)
        if fractions is REMOVED_FRACTIONS:
            sweep = surgeon.sweep(price)
            kept = sweep.kept
        else:
            # Those that are zero take in what others leave, and are zero no more: a price says
            # little of how many there will be.
            n_kept = round((1 - fraction) * surgeon.size)
            sweep = surgeon.sweep_keeping(n_kept, price)
            kept = top_k_by_saliency(sweep, n_kept)
            price = max(sweep.price, least_price)
        loss = max(surgeon.loss(torch.where(kept, sweep.weight, 0.0)), negligible)
        if fraction == fractions[REFITTED] and loss > negligible:
            # Where C hardly has an inverse, float32 may see a loss below zero.
            refitted = surgeon.refit(sweep, kept, rounds=1)
            refitted_ratio = max(surgeon.loss(refitted), negligible) / loss
        removed = 1 - kept.double().mean().item()
        if removed > points[-1][0] and loss > points[-1][1]:
            points.append((removed, loss, price))
    if len(points) < 3:
        return None
    removed_fractions, losses, prices = zip(*points[1:], strict=True)
    return SparsityCurve(removed_fractions, [refitted_ratio * loss for loss in losses], prices)


def _fractions(zeros: float) -> Sequence[float]:
    """What to let go, where a fraction `zeros` of the entries costs nothing."""
    if zeros < MIN_ZERO_FRACTION:
        return REMOVED_FRACTIONS
    fractions = (*NEAR_ZERO_FRACTIONS, *REMOVED_FRACTIONS)
    return [zeros + (1 - zeros) * fraction for fraction in fractions] if zeros < 1 else []


def _sample(values: Tensor) -> Tensor:
    """Some of them, evenly, but not so that they would all be of a few columns."""
    places = torch.arange(min(MAX_SAMPLE, len(values)), dtype=torch.float64) * GOLDEN_RATIO % 1
    return values[(places * len(values)).long().to(values.device)]


def _interpolated(at: Tensor, measured: Sequence[float], values: Sequence[float]) -> Tensor:
    """Powers between points, as straight lines of logarithms."""
    logs = (np.log(np.asarray(numbers)) for numbers in (at, measured, values))
    return torch.from_numpy(np.exp(np.interp(*logs)))
