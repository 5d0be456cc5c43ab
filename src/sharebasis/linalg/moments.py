"""Streaming second moments of the inputs of a sublayer, and the whitening they give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sharebasis.config.calibrate import EVERY_TOKEN, Outliers
from sharebasis.errors import CalibrationError
from sharebasis.linalg.outliers import clip_or_trim

NULL_SPACE = 1e-12
"""Eigenvalues below this fraction of the largest are rounding noise of the accumulation."""

RIDGE = 1e-10
"""Damping that does no more than make a moment invertible, whose inputs may not all vary."""

PANEL = 192
"""Columns of a moment that are updated by one product (measured: 128 to 288 differ little)."""


@dataclass(frozen=True, slots=True, eq=False)  # hashed by identity, for the cache of `whitening`
class Moment:
    """Sums over `n_tokens` inputs x: of x xᵀ (neither centred nor averaged) and of x."""

    total: Float64[Tensor, "d d"]
    sum: Float64[Tensor, " d"]
    n_tokens: int
    site: str
    """HF name of the first sublayer that reads this input, for messages."""

    def __add__(self, other: Moment) -> Moment:
        """Pool two moments, as if both had been gathered at one site."""
        return Moment(
            self.total + other.total,
            self.sum + other.sum,
            self.n_tokens + other.n_tokens,
            self.site if self.site == other.site else f"{self.site} + {other.site}",
        )

    def damped(self, fraction: float) -> Moment:
        """With `fraction` of the mean diagonal added to the diagonal."""
        extra = fraction * self.total.diagonal().mean()
        eye = torch.eye(len(self.sum), dtype=torch.float64, device=self.total.device)
        return replace(self, total=self.total + extra * eye)

    def diagonal(self, power: float = 1.0) -> Moment:
        """With E[x_j²]^power on the diagonal, and nothing beside it.

        Raises:
            CalibrationError: there were no tokens.
        """
        powers = self.second.diagonal() ** power
        return replace(self, total=torch.diag(powers * self.n_tokens))

    def at(self, coordinates: Int64[Tensor, " some"]) -> Moment:
        """Of some coordinates of the inputs alone."""
        total = self.total[coordinates][:, coordinates]
        return replace(self, total=total, sum=self.sum[coordinates])

    def to(self, device: torch.device | str) -> Moment:
        return Moment(self.total.to(device), self.sum.to(device), self.n_tokens, self.site)

    @property
    def mean(self) -> Float64[Tensor, " d"]:
        """E[x].

        Raises:
            CalibrationError: there were no tokens.
        """
        return self.sum / self._some_tokens()

    @property
    def second(self) -> Float64[Tensor, "d d"]:
        """E[x xᵀ].

        Raises:
            CalibrationError: there were no tokens.
        """
        return self.total / self._some_tokens()

    def _some_tokens(self) -> int:
        if self.n_tokens == 0:
            raise CalibrationError(f"{self.site} has seen no tokens; its moment is empty.")
        return self.n_tokens


class MomentAccumulator:
    """Gathers a `Moment` from batches of inputs.

    A product of two float32 numbers is exact in float64 and sums are kept in float64,
    so how the tokens are cut into batches changes the result by float64 rounding only.
    """

    def __init__(
        self,
        site: str,
        d: int,
        device: torch.device | str = "cpu",
        outliers: Outliers = EVERY_TOKEN,
    ) -> None:
        self.site = site
        self.outliers = outliers
        self.total = torch.zeros(d, d, dtype=torch.float64, device=device)
        """Whole panels down to the diagonal; `moment` mirrors the upper triangle."""
        self.sum = torch.zeros(d, dtype=torch.float64, device=device)
        self.n_tokens = 0
        self.n_trimmed = 0
        """Tokens that were left out."""

    def update(self, inputs: Float[Tensor, "*batch d"]) -> None:
        """Add every row of `inputs`, but for what `outliers` says.

        Args:
            inputs: the last but one dimension is a window, see `outliers.clip_or_trim`.

        Raises:
            CalibrationError: the rows have another width than the site.
        """
        if inputs.shape[-1] != self.sum.shape[0]:
            raise CalibrationError(
                f"{self.site} has inputs of width {self.sum.shape[0]}, not {inputs.shape[-1]}."
            )
        counted = clip_or_trim(inputs.detach().to(self.total), self.outliers)
        rows = counted.reshape(-1, inputs.shape[-1])
        # Panels of the upper triangle: barely more than half the multiply-adds of the whole. A
        # BLAS symmetric update would do, but only in threads that fight torch's for the cores.
        for start in range(0, len(self.total), PANEL):
            panel = self.total[start : start + PANEL, start:]
            panel.addmm_(rows[:, start : start + PANEL].T, rows[:, start:])
        self.sum += rows.sum(0)
        self.n_tokens += rows.shape[0]
        self.n_trimmed += inputs.shape[:-1].numel() - rows.shape[0]

    def load(self, moment: Moment, n_trimmed: int = 0) -> None:
        """Go on from a moment gathered earlier."""
        self.total.copy_(moment.total)
        self.sum.copy_(moment.sum)
        self.n_tokens = moment.n_tokens
        self.n_trimmed = n_trimmed

    def moment(self) -> Moment:
        """Everything gathered so far.

        Raises:
            CalibrationError: an input was not finite.
        """
        upper = self.total.triu()
        total = upper + upper.triu(1).T
        if not (total.isfinite().all() and self.sum.isfinite().all()):
            raise CalibrationError(
                f"The inputs of {self.site} hold NaN or infinite values after {self.n_tokens} "
                "tokens. The model overflows in this dtype, or its weights are damaged; try "
                "model.dtype=float32."
            )
        return Moment(total, self.sum.clone(), self.n_tokens, self.site)


@lru_cache(maxsize=1)  # gate and up of a layer ask for the same one in turn
def whitening(
    moment: Moment,
) -> tuple[Float64[Tensor, "d d"], Float64[Tensor, "d d"]]:
    """The symmetric root S of E[x xᵀ] and its inverse.

    By eigendecomposition: fewer tokens than dimensions give a singular moment, which a
    Cholesky factorization would break on. Eigenvalues of the null space are raised to
    NULL_SPACE of the largest: what calibration never saw weighs next to nothing, but a
    fit does not forget it either.

    Raises:
        CalibrationError: no eigenvalue is positive.
    """
    values, vectors = torch.linalg.eigh(moment.second)
    largest = values[-1].item()
    if not largest > 0:
        raise CalibrationError(f"The moment of {moment.site} has no positive eigenvalue.")
    root = values.clamp_min(NULL_SPACE * largest).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
