"""A product of factors -> rows of its own as the basis, the others as combinations of them.

`A B = (A M)(M⁻¹ B)` for every invertible M: rank² numbers of two factors carry nothing. Here
they are not stored: some rows of the product are the basis, so their coefficients are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from scipy.linalg import qr
from torch import Tensor

MAX_COEFFICIENT = 2.0
"""No coefficient is larger in magnitude."""


@dataclass(frozen=True, slots=True)
class Interpolative:
    """Rows `pivots` of the product are `basis`; the others, in order, `coefficient @ basis`."""

    pivots: Int64[Tensor, " rank"]
    """Ascending."""
    basis: Float64[Tensor, "rank d_in"]
    coefficient: Float64[Tensor, "_ rank"]
    """(d_out - rank, rank)."""


def interpolate(
    coefficient: Float64[Tensor, "d_out rank"], basis: Float64[Tensor, "rank d_in"]
) -> Interpolative:
    """Write `coefficient @ basis` with rows of its own as the basis.

    The rows are chosen by a QR with column pivoting of the transposed product, then swapped
    one by one as long as a coefficient exceeds MAX_COEFFICIENT. Every swap makes the volume of the
    chosen rows larger by that coefficient, so this ends.

    Args:
        coefficient: rank <= d_out.
        basis: rank <= d_in.

    Source: Gu and Eisenstat, SIAM J. Sci. Comput. 17 (1996); that it saves rank² numbers:
        PIFA (ICML 2025).
    """
    rank = coefficient.shape[1]
    # The product in an orthonormal basis of its rows: the same rows span it, and it is small.
    small = coefficient @ torch.linalg.qr(basis.T).R.T
    order = torch.from_numpy(qr(small.T.cpu().numpy(), mode="r", pivoting=True)[-1]).long()
    chosen, others = order[:rank].to(small.device), order[rank:].to(small.device)
    table, singular = torch.linalg.solve_ex(small[chosen], small[others], left=False)
    if singular:  # fewer rows than `rank` already span the product
        table = small[others] @ torch.linalg.pinv(small[chosen])
    chosen, others, table = _bounded(chosen, others, table)
    pivots, rows, columns = chosen.sort().values, others.argsort(), chosen.argsort()
    return Interpolative(pivots, coefficient[pivots] @ basis, table[rows][:, columns])


def _bounded(chosen: Tensor, others: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Swap a chosen row for another one while a coefficient is too large."""
    chosen, others, table = chosen.clone(), others.clone(), table.clone()
    while table.numel():
        i, j = divmod(int(table.abs().argmax()), table.shape[1])
        pivot = table[i, j].clone()
        if pivot.abs() <= MAX_COEFFICIENT:
            break
        chosen[j], others[i] = others[i].clone(), chosen[j].clone()
        row, column = table[i].clone(), table[:, j].clone()
        row[j] -= 1
        column[i] += 1
        table -= torch.outer(column, row / pivot)
    return chosen, others, table
