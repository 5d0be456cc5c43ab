"""Text that a change of a compressed model has not seen says whether the change is kept."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.linalg.divergence import divergence

log = logging.getLogger(__name__)


@torch.no_grad()
def divergence_on(
    windows: Int64[Tensor, "windows window"], original: PreTrainedModel, compressed: PreTrainedModel
) -> float | None:
    """Mean KL(original || compressed) over all positions, in nats; None without a window."""
    if not len(windows):
        return None
    divergences = []
    for window in windows.split(1):
        logits = (
            model(input_ids=window, use_cache=False).logits for model in (original, compressed)
        )
        divergences.append(divergence(*logits).item())
    return sum(divergences) / len(divergences)


def is_better(before: float | None, after: float | None) -> bool:
    """Whether to keep a change, by `divergence_on` before and after; without text it is kept."""
    if before is None or after is None:
        return True
    better = after < before
    log.info(
        "propagate: held-out divergence %.4f nats before, %.4f after; %s.",
        before,
        after,
        "kept" if better else "the factors stay as they were (more propagate.windows may help)",
    )
    return better
