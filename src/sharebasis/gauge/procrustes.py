"""The best rotation within a group of them, and the best matching of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sharebasis.gauge.units import Rotations

WARM_START = 256
"""Rows from which on a matching starts from dual prices, which take longer than it otherwise."""
SCALINGS = 8
"""Of rows and columns in turn, to find those prices."""
TEMPERATURE = 0.1
"""Of the prices, in standard deviations of the scores (measured: 0.05 to 0.3 differ little)."""
MIN_DEMAND = 1e-30
"""What nobody asks for is taken to be asked for as much."""


def best_rotation(
    products: Float[Tensor, "*batch d d"],
    rotations: Rotations = "all",
    planes: Sequence[tuple[int, int]] = (),
) -> Float[Tensor, "*batch d d"]:
    """The R of a group that brings A nearest to B: least ‖R A − B‖ for products A Bᵀ.

    That R has the largest tr(R A Bᵀ). With A Bᵀ = U Σ Vᵀ the orthogonal one is V Uᵀ; U Vᵀ would
    rotate B to A. In a plane it is the angle of the sum of the diagonal and the difference of the
    other two.

    Args:
        products: A Bᵀ.
        rotations: all: orthogonal where no plane is; signs: of coordinates; none: the identity.
        planes: pairs of coordinates that may be rotated by an angle and not mixed with others.

    Source: Schönemann, A generalized solution of the orthogonal Procrustes problem (1966).
    """
    rotation = torch.zeros_like(products)
    d = products.shape[-1]
    in_planes = {x for plane in planes for x in plane}
    free = torch.tensor([x for x in range(d) if x not in in_planes], dtype=torch.long)
    first, second = (torch.tensor([p[i] for p in planes], dtype=torch.long) for i in (0, 1))
    both = products[..., first, first] + products[..., second, second]
    if rotations == "all":
        cross = products[..., first, second] - products[..., second, first]
        cosine, sine = _direction(both, cross)
        alone = _polar(products[..., free[:, None], free])
    elif rotations == "signs":
        cosine, sine = _signs(both), torch.zeros_like(both)
        alone = torch.diag_embed(_signs(products[..., free, free]))
    else:
        return rotation + torch.eye(d, dtype=products.dtype, device=products.device)
    rotation[..., first, first] = rotation[..., second, second] = cosine
    rotation[..., first, second], rotation[..., second, first] = -sine, sine
    rotation[..., free[:, None], free] = alone
    return rotation


def _polar(products: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch d d"]:
    """V Uᵀ of products U Σ Vᵀ."""
    u, _, vt = torch.linalg.svd(products.double())
    return (u @ vt).mT.to(products)


def _direction(
    x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Cosine and sine of the angle of (x, y); of 0 where both are."""
    wide = torch.complex(x.double(), y.double())
    unit = torch.where(wide.abs() > 0, wide / wide.abs(), 1)
    return unit.real.to(x), unit.imag.to(x)


def _signs(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 or -1; 1 of 0."""
    return torch.where(x < 0, -1, 1).to(x)


def best_matching(scores: Float[Tensor, "n n"]) -> Int[Tensor, " n"]:
    """The row for each column, each row once, with the largest sum of scores.

    The assignment is exact. A large one starts from prices of rows and columns, taken off the
    scores: that changes every matching's sum by the same number, and leaves scipy's shortest
    paths little to do. The prices are those of entropic transport (Sinkhorn's scaling).
    """
    costs = scores.to(torch.float64, copy=True).neg_()
    if len(scores) >= WARM_START and bool(scores.std() > 0):
        costs -= _prices(scores)
        costs -= costs.amin(1, keepdim=True)
    rows, columns = linear_sum_assignment(costs.cpu().numpy())
    order = torch.empty(len(scores), dtype=torch.long)
    order[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return order.to(scores.device)


def _prices(scores: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """What each column costs more than the others, so that all are asked for alike."""
    unit = TEMPERATURE * scores.std()
    wish = ((scores - scores.amax(1, keepdim=True)) / unit).exp_()
    columns = torch.ones_like(wish[0])
    for _ in range(SCALINGS):
        rows = 1 / (wish @ columns).clamp_min(MIN_DEMAND)
        columns = 1 / (rows @ wish).clamp_min(MIN_DEMAND)
    return columns.log() * unit
