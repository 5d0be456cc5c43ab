"""What a sublayer should do with inputs that errors before it have changed.

Once the sublayers before it are compressed, a sublayer W is given x̂ in the place of x. What it
put out is regressed onto what it is given now: W' = W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹ is the weight that says
W x with the least squared error. It is no more than a direction to go in: a regression onto noisy
inputs says too little wherever it is in doubt, and what comes after is used to more. So the target
lies between W and W'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sharebasis import kernels
from sharebasis.errors import CalibrationError
from sharebasis.moments import Moment


@dataclass(frozen=True, slots=True, eq=False)
class PairedMoment:
    """Sums over tokens, of x in the original and x̂ in the compressed model."""

    original: Moment
    """Of x."""
    compressed: Moment
    """Of x̂."""
    cross: Float64[Tensor, "d d"]
    """Of x x̂ᵀ."""
    drift: Float64[Tensor, "d_out d"] | None = None
    """Of δ x̂ᵀ, where δ = h - ĥ of the residual streams that the sublayer writes to."""

    def damped(self, fraction: float) -> PairedMoment:
        """With the mean diagonal of E[x̂ x̂ᵀ], times `fraction`, added to all three diagonals.

        As if every input had some noise that both models see: a regression does then nothing
        where there is nothing to learn from, rather than shrink it to zero.
        """
        extra = fraction * self.compressed.total.diagonal().mean()
        noise = extra * torch.eye(len(self.cross), dtype=torch.float64, device=self.cross.device)
        return PairedMoment(
            replace(self.original, total=self.original.total + noise),
            replace(self.compressed, total=self.compressed.total + noise),
            self.cross + noise,
            self.drift,
        )


class PairAccumulator:
    """Gathers a `PairedMoment` from batches of tokens that both models were given.

    Products are of float32, sums of float64.
    """

    def __init__(self, site: str, d: int, device: torch.device | str = "cpu") -> None:
        self.site, self.n_tokens = site, 0
        self._weight = 0.0
        self._drift: Tensor | None = None
        zeros = torch.zeros(d, d, dtype=torch.float64, device=device)
        self._totals = [zeros, zeros.clone(), zeros.clone()]
        self._sums = [zeros[0].clone(), zeros[0].clone()]

    def update(
        self,
        original: Float[Tensor, "*batch d"],
        compressed: Float[Tensor, "*others d"],
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
        if original.shape != compressed.shape:
            raise CalibrationError(
                f"{self.site} is given {tuple(original.shape)} in the original and "
                f"{tuple(compressed.shape)} in the compressed model; rows must be pairs."
            )
        x, y = (one.detach().flatten(0, -2).float() for one in (original, compressed))
        own = weights.flatten().float()[:, None]
        self._sums[0] += (x * own).sum(0, dtype=torch.float64)
        self._sums[1] += (y * own).sum(0, dtype=torch.float64)
        rows, columns = ((one * own.sqrt()).T.contiguous() for one in (x, y))
        self._totals[0] += kernels.linear(rows, rows)
        self._totals[1] += kernels.linear(columns, columns)
        self._totals[2] += kernels.linear(rows, columns)
        if drift is not None:
            product = kernels.linear((drift.flatten(0, -2).float() * own.sqrt()).T, columns)
            self._drift = product.double() if self._drift is None else self._drift + product
        self.n_tokens += len(x)
        self._weight += own.sum(dtype=torch.float64).item()

    def moment(self) -> PairedMoment:
        """Everything gathered so far, with weights that are one on average.

        Raises:
            CalibrationError: an input was not finite, or no token counted.
        """
        if not self._weight > 0:
            raise CalibrationError(f"{self.site} has seen no token that counts.")
        if not all(total.isfinite().all() for total in self._totals):
            raise CalibrationError(
                f"The inputs of {self.site} hold NaN or infinite values. The compressed model "
                "overflows in this dtype; try model.dtype=float32."
            )
        scale = self.n_tokens / self._weight
        first, second = (
            Moment((total + total.T) * (scale / 2), own * scale, self.n_tokens, self.site)
            for total, own in zip(self._totals[:2], self._sums, strict=True)
        )
        drift = None if self._drift is None else self._drift * scale
        return PairedMoment(first, second, self._totals[2] * scale, drift)


def regressed(
    weight: Float[Tensor, "d_out d_in"],
    pair: PairedMoment,
    amount: float,
    drift: Float64[Tensor, "d_out d_in"] | None = None,
) -> Float64[Tensor, "d_out d_in"]:
    """The target (1 - amount) W + amount W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹, and E[δ x̂ᵀ] E[x̂ x̂ᵀ]⁻¹ if given.

    The last term lets what writes to the residual stream make up for what the stream lacks by
    then: all of W x + δ, regressed.

    Args:
        weight: W.
        pair: damped, so that there is an inverse.
        amount: in [0, 1]; 0 leaves the weight, 1 is the least-squares regression.
        drift: Σ δ x̂ᵀ over the tokens of `pair`, or what is to be made up for of it.

    Raises:
        CalibrationError: E[x̂ x̂ᵀ] has no inverse.

    Source: AA-SVD, arXiv:2604.02119 (amount 1, no drift).
    """
    own = weight.double()
    if amount == 0 and drift is None:
        return own
    factor, failed = torch.linalg.cholesky_ex(pair.compressed.total)
    if failed:
        raise CalibrationError(
            f"The inputs of {pair.compressed.site} do not span their space; raise "
            "propagate.damping."
        )
    wanted = amount * own @ pair.cross
    if drift is not None:
        wanted = wanted + drift
    return (1 - amount) * own + torch.cholesky_solve(wanted.T, factor).T


def drift_loss(
    weight: Float[Tensor, "d_out d_in"],
    fitted: Float[Tensor, "d_out d_in"],
    pair: PairedMoment,
    gradient: Moment | None = None,
) -> float:
    """E‖G^{1/2} (W x - Ŵ x̂)‖², G = E[g gᵀ] or the identity.

    Args:
        weight: W, the original one.
        fitted: Ŵ.
        pair: of the inputs.
        gradient: of the outputs.
    """
    own, other = weight.double(), fitted.double()
    mixed = other @ pair.cross.T @ own.T
    outer = own @ pair.original.total @ own.T - mixed - mixed.T
    outer = outer + other @ pair.compressed.total @ other.T
    metric = outer if gradient is None else gradient.second @ outer
    return metric.trace().item() / pair.original.n_tokens


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
