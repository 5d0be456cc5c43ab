"""Gram matrices: their Cholesky factors and their eigenvalues."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

SHIFT = 1e-10
"""Added to the diagonal of a Gram matrix whose diagonal is one: inputs may not reach all of it."""


def cholesky(gram: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """The Cholesky factor of a Gram matrix that may be singular, SHIFT off or what it takes."""
    scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    unit, eye = gram / scale / scale[:, None], torch.eye(len(gram)).to(gram)
    shift, info = SHIFT, 1
    while info:
        factor, info = torch.linalg.cholesky_ex(unit + shift * eye)
        shift *= 100
    return scale[:, None] * factor


def spectrum(gram: Float64[Tensor, "n n"], full: int) -> Float64[Tensor, " full"]:
    """The eigenvalues of a Gram matrix that may be more than zero, the largest first.

    Args:
        gram: what the directions of a weight save of its loss, turned in whatever way.
        full: the weight has no more directions than that.
    """
    return torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)[:full]
