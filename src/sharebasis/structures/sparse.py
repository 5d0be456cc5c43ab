"""Unstructured sparsity as a choice of the allocation."""

from __future__ import annotations

import numpy as np
import torch

from sharebasis.architecture.parts import Part
from sharebasis.forms.mask import n_stored
from sharebasis.linalg.sparsity_curve import SparsityCurve
from sharebasis.structures.curve import Curve

SPARSITIES = 256
"""Numbers of entries that a part may keep, evenly spaced; a fraction of 1/256 of a part is far
less than the budget has to be exact to."""


def curve_of_sparse(part: Part, points: SparsityCurve, weight: float = 1.0) -> Curve:
    """Numbers of entries as entries of a curve; the last one, which nobody may choose, is all.

    Args:
        part: that is offered without some of them.
        points: what it loses.
        weight: what its loss counts.
    """
    n = part.n_weights
    removed = torch.linspace(points.removed[-1], points.removed[0], SPARSITIES)
    kept = (n * (1 - removed)).int()
    stored = [n_stored(n_kept, n) for n_kept in kept.tolist()]
    losses = weight * points.loss_at(1 - kept.double() / n)
    return Curve(part.name, np.array([*stored, n]), np.array([*losses.tolist(), np.inf]))
