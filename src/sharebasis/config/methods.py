"""What each method looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weighing = Literal["none", "diagonal", "full"]


@dataclass(frozen=True)
class Metric:
    """Which moments a method measures its loss in, and how much of each."""

    inputs: Weighing = "none"
    """C = E[x xᵀ], its diagonal, or the identity."""
    gradients: Weighing = "none"
    """G = E[g gᵀ] of the gradients of outputs, its diagonal, or the identity."""
    alpha: float = 1.0
    """Power of the diagonal of C."""
    either: bool = False
    """Whether `fit.two_sided` chooses if the gradients count; else it has to say what is so."""


METHODS: dict[str, Metric] = {
    "svd": Metric(),
    "asvd": Metric(inputs="diagonal", alpha=0.5),
    "svd_llm": Metric(inputs="full"),
    "fwsvd": Metric(gradients="diagonal"),
    "kfac": Metric(inputs="full", gradients="full"),
    "basis_sharing": Metric(inputs="full", gradients="full", either=True),
    "auto": Metric(inputs="full", gradients="full", either=True),
}
"""What `fit.method` may be: a line more is another method.

The loss of every method is tr(G (W - Ŵ) C (W - Ŵ)ᵀ), with a G and a C of its own.

asvd: ASVD (arXiv:2312.05821) scales channel j of the inputs by S_jj = (mean |x_j|)^alpha. Only
    second moments are kept, so here S_jj = E[x_j²]^(alpha / 2). For one shape of distribution
    the two are a constant factor apart, which changes no factorization; a channel with rarer
    and larger outliers than the others weighs more here.
fwsvd: FWSVD (arXiv:2207.00112) scales row i of the weight by the root of the row's sum of the
    Fisher information, Σ_j E[g_i² x_j²]. Rows are outputs, as in W x. Taking g_i² and x_j² for
    uncorrelated (K-FAC's assumption) that is E[g_i²] tr E[x xᵀ], so G = diag E[g_i²] up to a
    factor of each sublayer, which only `allocation=global` would see.
kfac: both moments whole; `auto` with the same fraction of every weight and plain storage.
"""
