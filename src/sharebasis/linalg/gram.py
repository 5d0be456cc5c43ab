"""Gram matrices: their Cholesky factors and their eigenvalues."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from sharebasis.errors import CalibrationError

SHIFT = 1e-10
"""Added to the diagonal of a Gram matrix whose diagonal is one: inputs may not reach all of it."""

NOISE = 1e-14
"""Fraction of the largest entry of a diagonal that rounding leaves where there should be zero."""


def cholesky(gram: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """The Cholesky factor of a Gram matrix that may be singular, SHIFT off or what it takes.

    Raises:
        CalibrationError: it is not finite.
    """
    if not gram.isfinite().all():
        raise CalibrationError("A Gram matrix holds NaN or infinite values.")
    diagonal = gram.diagonal()
    least = (NOISE * diagonal.max()).clamp_min(torch.finfo(gram.dtype).tiny)
    scale = diagonal.clamp_min(least).sqrt()
    unit = (gram / scale / scale[:, None]).fill_diagonal_(1)
    eye = torch.eye(len(gram)).to(gram)
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
