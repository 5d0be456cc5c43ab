"""What an error of the logits costs, as directions in which components can be measured.

An original model says logits z, a compressed one ẑ = z + Δ. Each of the measures below is a
number that is linear in Δ once Δ has chosen the coefficients:

    KL(p ‖ p̂)    = ⟨∫₀¹ (p(s) - p) ds, Δ⟩                  p(s) = softmax(z + sΔ)
    loss̑ - loss   = ⟨∫₀¹ (p(s) - e_y) ds, Δ⟩                e_y: the token that comes next
    to first order: ⟨p - e_y, Δ⟩
    logit error  = ⟨Δ - mean Δ, Δ⟩ / d_vocab               what softmax does not see is left out

(the first two are the fundamental theorem of calculus along the straight line from z to ẑ, whose
gradient is p(s) less what it is compared with; Aumann and Shapley's way to divide a cost). Δ is
a sum over the components of the residual stream, so each measure is, and what every component has
to answer for is one product of its error with a direction of the stream.

Where logits are capped (Gemma 2: z = c tanh(r / c)), the line is drawn between the logits before
the cap, and dz/dr = 1 - (z / c)² goes into the integrand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sharebasis.runtime import matmul

Measure = Literal["kl", "loss", "loss_first_order", "logit_error"]
MEASURES: tuple[Measure, ...] = ("kl", "loss", "loss_first_order", "logit_error")
NODES = 5
"""Of the Gauss-Legendre rule along the line."""
CHUNK = 128
"""Predictions whose logits are looked at together."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What an error costs at every prediction, and along which directions; m measures."""

    total: Float[Tensor, "m predictions"]
    """The measures themselves: nats, nats, nats, squared logits."""
    linear: Float[Tensor, "m predictions"]
    """⟨coefficients, Δ⟩, which differs from `total` by the error of the quadrature."""
    of_compressed: Float[Tensor, "m predictions"]
    """⟨coefficients, compressed logits before the cap⟩."""
    of_bias: Float[Tensor, "m predictions"]
    """⟨coefficients, unembedding bias⟩."""
    directions: Float[Tensor, "m predictions d_model"]
    """W_U coefficients: of the stream behind the original's last norm."""


def costs(
    original: Float[Tensor, "predictions d_vocab"],
    compressed: Float[Tensor, "predictions d_vocab"],
    targets: Int64[Tensor, " predictions"],
    w_u: Float[Tensor, "d_model d_vocab"],
    bias: Float[Tensor, " d_vocab"] | None = None,
    multiplier: float = 1.0,
    cap: float | None = None,
) -> Costs:
    """Measure the error of a compressed model's logits.

    Args:
        original: x W_U + b_U.
        compressed: the other model's.
        targets: the tokens that come next.
        w_u: of the original.
        bias: of the original; None: none.
        multiplier: of both models' logits.
        cap: of the logits after that; None: none.
    """
    chunks = [
        _costs(z, z_hat, y, w_u, bias, multiplier, cap)
        for z, z_hat, y in zip(
            original.split(CHUNK), compressed.split(CHUNK), targets.split(CHUNK), strict=True
        )
    ]
    return Costs(*(torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True)))


def _costs(
    original: Tensor,
    compressed: Tensor,
    targets: Tensor,
    w_u: Tensor,
    bias: Tensor | None,
    multiplier: float,
    cap: float | None,
) -> tuple[Tensor, ...]:
    original, compressed = original.float() * multiplier, compressed.float() * multiplier
    difference = compressed - original
    path = _Path(original, difference, cap)
    there = targets[:, None]
    p, slope = path.at(0.0)
    along, slopes = path.integrals()
    d_vocab = difference.shape[-1]
    centred = (difference - difference.mean(-1, keepdim=True)) / d_vocab
    coefficients = torch.stack([along - p * slopes, along, p * slope, centred])
    coefficients[1].scatter_add_(-1, there, -slopes.expand_as(p).gather(-1, there))
    coefficients[2].scatter_add_(-1, there, -slope.expand_as(p).gather(-1, there))
    linear = torch.linalg.vecdot(coefficients, difference)
    log_p, log_q = (path.log_probabilities(s) for s in (0.0, 1.0))
    gain = log_p - log_q
    kl, loss = torch.linalg.vecdot(p, gain), gain.gather(-1, there)[:, 0]
    return (
        torch.stack([kl, loss, linear[2], linear[3]]),
        linear,
        torch.linalg.vecdot(coefficients, compressed),
        torch.zeros_like(linear) if bias is None else coefficients @ bias.float() * multiplier,
        matmul.linear(coefficients, w_u.float()) * multiplier,
    )


@dataclass(frozen=True, slots=True)
class _Path:
    """The straight line between two models' logits."""

    start: Tensor
    difference: Tensor
    cap: float | None

    def at(self, s: float) -> tuple[Tensor, Tensor]:
        """Probabilities, and the slope of the cap, which is 1 without one."""
        z = self._logits(s)
        slope = torch.ones(()) if self.cap is None else 1 - (z / self.cap).square()
        return z.softmax(-1), slope.to(z.device)

    def integrals(self) -> tuple[Tensor, Tensor]:
        """Over the whole line, of the probabilities times the slope, and of the slope."""
        total, slopes = torch.zeros_like(self.start), torch.zeros((), device=self.start.device)
        for s, weight in zip(*_gauss_legendre(), strict=True):
            p, slope = self.at(s)
            total.addcmul_(p, slope, value=weight)
            slopes = slopes + weight * slope
        return total, slopes

    def log_probabilities(self, s: float) -> Tensor:
        return self._logits(s).log_softmax(-1)

    def _logits(self, s: float) -> Tensor:
        z = self.start + s * self.difference
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)


def _gauss_legendre() -> tuple[list[float], list[float]]:
    """Nodes and weights for [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def depth_costs(
    logits: Float[Tensor, "predictions d_vocab"],
    final: Float[Tensor, "predictions d_vocab"],
    targets: Int64[Tensor, " predictions"],
) -> tuple[float, float]:
    """Sums of -log p of what comes next and of -log p in the mean of `final`, in nats.

    Args:
        logits: at some depth.
        final: probabilities; the second sum less their entropy is KL(final ‖ these).
        targets: the tokens that come next.
    """
    logits = logits.float()
    normalizer = logits.logsumexp(-1)
    loss = normalizer - logits.gather(-1, targets[:, None])[:, 0]
    cross = normalizer - torch.linalg.vecdot(final, logits)
    return loss.sum().item(), cross.sum().item()
