"""Tokens that are far longer than the others of their window, and what becomes of them in a moment.

A second moment is a sum of squares, which a few extreme tokens can make on their own. How long is
extreme is measured window by window, against the median: that takes no second pass and no memory,
and neither the batch size nor a killed run changes it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sharebasis.config.calibrate import Outliers


def clip_or_trim(
    inputs: Float64[Tensor, "*windows window d"], outliers: Outliers
) -> Float64[Tensor, "*kept d"]:
    """Clip or trim the rows that are longer than a multiple of their window's median.

    Rows of zeros are no part of the median (the last token of a window has no gradient), nor are
    rows that are not finite extreme: they stay, for the moment to refuse them.

    Args:
        inputs: one token a row. Rows that a model has put together from several windows (tokens on
            their way to an expert) count as one window.
        outliers: what to do, and from which length on.
    """
    if outliers.treatment == "none" or not inputs.numel():
        return inputs
    norms = inputs.norm(dim=-1)
    longest = outliers.limit * _median_norm(norms)
    extreme = norms.isfinite() & (norms > longest)
    if outliers.treatment == "trim":
        return inputs[~extreme]
    return inputs * torch.where(extreme, longest / norms, 1.0)[..., None]


def _median_norm(norms: Float[Tensor, "*windows window"]) -> Float[Tensor, "*windows 1"]:
    """The median of those above zero; NaN, which is less than nothing is longer than, of none."""
    return norms.where(norms > 0, torch.nan).nanmedian(dim=-1, keepdim=True).values
