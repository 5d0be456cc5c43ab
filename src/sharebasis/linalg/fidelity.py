"""Logits against logits: what a compressed model has lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK = 64
"""Predictions compared at a time, so that what lies between stays small."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A compressed model against its original, over the predictions of some text."""

    dense_perplexity: float
    """exp of the mean negative log-likelihood of the next token, original model."""
    compressed_perplexity: float
    kl_mean: float
    """Mean over predictions of KL(original || compressed), in nats."""
    kl_p99: float
    """Its 99th percentile."""
    top1_agreement: float
    """Fraction of predictions for which both models rank the same token first."""
    max_abs_logit_diff: float
    n_predictions: int


class FidelityMeter:
    """Compares logits a window at a time; sums are kept in float64."""

    def __init__(self) -> None:
        self._nll = torch.zeros(2, dtype=torch.float64)
        self._kl: list[Tensor] = []
        self._agreed = 0
        self._max_diff = torch.zeros(())

    def update(
        self,
        original: Float[Tensor, "window d_vocab"],
        compressed: Float[Tensor, "window d_vocab"],
        tokens: Int64[Tensor, " window"],
    ) -> None:
        """Add one window; the last position predicts nothing and is left out."""
        predictions = original[:-1], compressed[:-1], tokens[1:]
        for p, q, targets in zip(*(tensor.split(CHUNK) for tensor in predictions), strict=True):
            self._add(p.float(), q.float(), targets)

    def _add(self, p: Tensor, q: Tensor, targets: Tensor) -> None:
        difference = p - q
        self._max_diff = self._max_diff.maximum(difference.abs().max().cpu())
        self._agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        normalizers = p.logsumexp(-1).double(), q.logsumexp(-1).double()
        for i, (logits, normalizer) in enumerate(zip((p, q), normalizers, strict=True)):
            of_target = logits.gather(-1, targets[:, None])[:, 0]
            self._nll[i] += (normalizer - of_target).sum().item()
        # KL(p || q) = Σ p_i (logit p_i - logit q_i) - log Z_p + log Z_q; rounding can take a
        # divergence that is zero to just below.
        kl = torch.linalg.vecdot(p.softmax(-1), difference) - normalizers[0] + normalizers[1]
        self._kl.append(kl.clamp_min(0).cpu())

    def result(self) -> Fidelity:
        """The comparison over everything added, at least one window."""
        kl = torch.cat(self._kl)
        dense, compressed = (self._nll / len(kl)).exp().tolist()
        return Fidelity(
            dense_perplexity=dense,
            compressed_perplexity=compressed,
            kl_mean=kl.mean().item(),
            kl_p99=float(np.quantile(kl.numpy(), 0.99)),  # torch's has a limit of 2^24
            top1_agreement=self._agreed / len(kl),
            max_abs_logit_diff=self._max_diff.item(),
            n_predictions=len(kl),
        )
