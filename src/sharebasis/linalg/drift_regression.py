"""What a sublayer should do with inputs that errors before it have changed.

Once the sublayers before it are compressed, a sublayer W is given x̂ in the place of x. What it
put out is regressed onto what it is given now: W' = W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹ is the weight that says
W x with the least squared error. It is no more than a direction to go in: a regression onto noisy
inputs says too little wherever it is in doubt, and what comes after is used to more. So the target
lies between W and W'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sharebasis.errors import CalibrationError
from sharebasis.linalg.moments import Moment
from sharebasis.runtime import matmul


@dataclass(frozen=True, slots=True, eq=False)
class PairedMoment:
    """Sums over tokens, of x in the original and x̂ in the compressed model, which may be of
    fewer coordinates."""

    mean: Float64[Tensor, " d"]
    """E[x]."""
    compressed: Moment
    """Of x̂."""
    cross: Float64[Tensor, "d d_left"]
    """Of x x̂ᵀ."""
    drift: Float64[Tensor, "d_out d_left"] | None = None
    """Of δ x̂ᵀ, where δ = h - ĥ of the residual streams that the sublayer writes to."""
    same: Float64[Tensor, "d d_left"] | None = None
    """Of x x_Sᵀ, where x̂ stands for the coordinates S of x alone."""
    kept: Int64[Tensor, " d_left"] | None = None
    """S; None: all of them."""


class PairAccumulator:
    """Gathers a `PairedMoment` from batches of tokens that both models were given.

    Products are of float32, sums of float64.
    """

    def __init__(
        self,
        site: str,
        d: int,
        kept: Int64[Tensor, " d_left"] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Args:
        site: HF name of the first sublayer that reads this input, for messages.
        d: width of x.
        kept: coordinates of x that x̂ stands for; None: all of them.
        device: where inputs are.
        """
        self.site, self.n_tokens = site, 0
        self._kept = None if kept is None else kept.to(device)
        self._weight = 0.0
        self._drift: Tensor | None = None
        d_left = d if kept is None else len(kept)
        like: Any = {"dtype": torch.float64, "device": device}
        self._sums = torch.zeros(d, **like), torch.zeros(d_left, **like)
        self._cross = torch.zeros(d, d_left, **like)
        self._compressed = torch.zeros(d_left, d_left, **like)
        self._same = None if kept is None else torch.zeros_like(self._cross)

    def update(
        self,
        original: Float[Tensor, "*batch d"],
        compressed: Float[Tensor, "*others d_left"],
        weights: Float[Tensor, "*batch"],
        drift: Float[Tensor, "*batch d_out"] | None = None,
    ) -> None:
        """Add every pair of rows.

        Args:
            original: x.
            compressed: x̂.
            weights: how much each token counts.
            drift: δ, in every batch or in none.

        Raises:
            CalibrationError: the two models were not given the same tokens.
        """
        widths = tuple(map(len, self._sums))
        if (original.shape[-1], compressed.shape[-1]) != widths or (
            original.shape[:-1] != compressed.shape[:-1]
        ):
            raise CalibrationError(
                f"{self.site} is given {tuple(original.shape)} in the original and "
                f"{tuple(compressed.shape)} in the compressed model; rows must be pairs."
            )
        x, y = (tokens.detach().flatten(0, -2).float() for tokens in (original, compressed))
        weight = weights.flatten().float()[:, None]
        for total, tokens in zip(self._sums, (x, y), strict=True):
            total += (tokens * weight).sum(0, dtype=torch.float64)
        rows, columns = ((tokens * weight.sqrt()).T.contiguous() for tokens in (x, y))
        self._compressed += matmul.linear(columns, columns)
        self._cross += matmul.linear(rows, columns)
        if self._same is not None:
            self._same += matmul.linear(rows, rows[self._kept])
        if drift is not None:
            product = matmul.linear((drift.flatten(0, -2).float() * weight.sqrt()).T, columns)
            self._drift = product.double() if self._drift is None else self._drift + product
        self.n_tokens += len(x)
        self._weight += weight.sum(dtype=torch.float64).item()

    def moment(self) -> PairedMoment:
        """Everything gathered so far, with weights that are one on average.

        Raises:
            CalibrationError: an input was not finite, or no token counted.
        """
        if not self._weight > 0:
            raise CalibrationError(f"{self.site} has seen no token that counts.")
        if not all(total.isfinite().all() for total in (self._compressed, self._cross)):
            raise CalibrationError(
                f"The inputs of {self.site} hold NaN or infinite values. The compressed model "
                "overflows in this dtype; try model.dtype=float32."
            )
        scale = self.n_tokens / self._weight
        total = (self._compressed + self._compressed.T) * (scale / 2)
        compressed = Moment(total, self._sums[1] * scale, self.n_tokens, self.site)
        drift = None if self._drift is None else self._drift * scale
        mean = self._sums[0] / self._weight
        same = None if self._same is None else self._same * scale
        return PairedMoment(mean, compressed, self._cross * scale, drift, same, self._kept)


def regressed(
    weight: Float[Tensor, "d_out d"],
    pair: PairedMoment,
    amount: float,
    drift: Float64[Tensor, "d_out d_left"] | None = None,
    start: Float[Tensor, "d_out d_left"] | None = None,
    damping: float = 0.0,
) -> Float64[Tensor, "d_out d_left"]:
    """The target (1 - amount) W₀ + amount W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹, and E[δ x̂ᵀ] E[x̂ x̂ᵀ]⁻¹ if given.

    The last term lets what writes to the residual stream make up for what the stream lacks by
    then: all of W x + δ, regressed.

    Args:
        weight: W.
        pair: of its inputs.
        amount: in [0, 1]; 0 leaves W₀, 1 is the least-squares regression.
        drift: Σ δ x̂ᵀ over the tokens of `pair`, or what is to be made up for of it.
        start: W₀, the weight that there would be without drift; None: W. Where x̂ lacks coordinates,
            the regression W x ~ W₀ x_S of what it has, on text that this one is taken to be like.
        damping: of the mean diagonal of E[x̂ x̂ᵀ], added to it: where there is nothing to learn
            from, the target stays at W₀.

    Raises:
        CalibrationError: E[x̂ x̂ᵀ] has no inverse.

    Source: AA-SVD, arXiv:2604.02119 (amount 1, no drift).
    """
    original = weight.double()
    first = original if start is None else start.double()
    if amount == 0 and drift is None:
        return first
    factor, failed = torch.linalg.cholesky_ex(pair.compressed.damped(damping).total)
    if failed:
        raise CalibrationError(
            f"The inputs of {pair.compressed.site} do not span their space; raise "
            "propagate.damping."
        )
    lacking = amount * (_outputs_by_inputs(original, first, pair) - first @ pair.compressed.total)
    if drift is not None:
        lacking = lacking + drift
    return first + torch.cholesky_solve(lacking.T, factor).T


def _outputs_by_inputs(weight: Tensor, start: Tensor, pair: PairedMoment) -> Tensor:
    """Σ W x x̂ᵀ.

    Where x̂ lacks coordinates, W₀ is the regression W x ~ W₀ x_S on more text than this: what is
    left of it has nothing to do with x_S, and what it seems to have in this text is taken off.
    """
    if pair.same is None or pair.kept is None:
        return weight @ pair.cross
    return weight @ (pair.cross - pair.same) + start @ pair.same[pair.kept]


def token_weights(
    inputs: Float[Tensor, "batch window d"], skip: int, clip: float | None
) -> Float[Tensor, "batch window"]:
    """How much each token counts in a regression: Huber's weights, by the length of its input.

    A few tokens have inputs many times as long as the others', the first of a window above all;
    a sum of squares hears nobody else.

    Args:
        inputs: x.
        skip: tokens at the start of a window that do not count.
        clip: longer inputs than `clip` times the batch's median count as if they were as long as
            that; None: all count in full.

    Source: Huber, Ann. Math. Statist. 35 (1964).
    """
    norms = inputs.float().norm(dim=-1)
    weights = torch.ones_like(norms)
    if clip is not None:
        longest = clip * norms.median()
        weights = (longest / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1).square()
    weights[:, :skip] = 0
    return weights
