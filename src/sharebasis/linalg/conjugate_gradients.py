"""A x = b, for a symmetric positive definite A that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    start: Float[Tensor, "rows columns"],
    residual: Float[Tensor, "rows columns"],
) -> Iterator[tuple[Float[Tensor, "rows columns"], Float[Tensor, ""]]]:
    """Step towards the minimum of ⟨x, A x⟩ - 2 ⟨b, x⟩, as long as a step lowers it.

    Args:
        apply: x -> A x.
        precondition: of a residual, near A⁻¹ of it; symmetric and positive semidefinite.
        start: the first x, which is not yielded.
        residual: b - A x of it.

    Yields:
        x after every step, and what the step has taken off the minimand. Ends where there is
        nothing to save, or nothing that the precision can tell.

    Source: Hestenes and Stiefel 1952, preconditioned; as of scipy.sparse.linalg.cg.
    """
    x, direction = start, torch.zeros_like(start)
    size = torch.ones((), dtype=start.dtype, device=start.device)
    while True:
        steepest = precondition(residual)
        previous, size = size, (steepest * residual).sum()
        direction = steepest + (size / previous) * direction
        image = apply(direction)
        curvature = (direction * image).sum()
        if not (size > 0 and curvature > 0):
            return
        length = size / curvature
        x = x + length * direction
        residual = residual - length * image
        yield x, length * size
