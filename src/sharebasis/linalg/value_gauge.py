"""The value gauge: columns of W_V fixed to the identity, the others in terms of these.

What a head puts out is linear in its values: `W_O W_V = (W_O B)(B⁻¹ W_V)` for every invertible B,
so d_value² numbers of a key-value head carry nothing. With columns of W_V itself as B, those
columns become the identity and need not be stored; outputs of every query head take B in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from sharebasis.linalg.interpolative import interpolate

MAX_CONDITION = 1e3
"""Of the columns that become the identity; rounding errors grow by as much at most."""


@dataclass(frozen=True, slots=True)
class ValueOutput:
    """Values and the output that takes them in, in a block where nothing comes in between."""

    value: str
    """The name of the part."""
    output: str
    """The same."""
    n_kv_heads: int


@dataclass(frozen=True, slots=True)
class FixedValues:
    """W_V of head h is B_h [I C_h], its columns in another order."""

    pivots: Int64[Tensor, "n_kv_heads d_value"]
    """The columns that are the identity, ascending."""
    coefficient: Float64[Tensor, "n_rows others"]
    """C of every head, one below the other; the other columns in their order."""
    basis_change: Float64[Tensor, "n_kv_heads d_value d_value"]
    """B."""

    @property
    def bounded(self) -> bool:
        """Whether B can be divided by."""
        return bool((torch.linalg.cond(self.basis_change) <= MAX_CONDITION).all())


def fix_values(weight: Float[Tensor, "n_rows d_in"], n_kv_heads: int) -> FixedValues:
    """Choose columns of every head so that no coefficient is larger than `MAX_COEFFICIENT`.

    Args:
        weight: W_V, head by head; d_value < d_in.
        n_kv_heads: by which its rows divide.
    """
    heads = [interpolate(head.T, _unit(head)) for head in weight.double().chunk(n_kv_heads)]
    return FixedValues(
        torch.stack([head.pivots for head in heads]),
        torch.cat([head.coefficient.T for head in heads]).contiguous(),
        torch.stack([head.basis.T for head in heads]),
    )


def values_at(
    weight: Float[Tensor, "n_rows d_in"], pivots: Int[Tensor, "n_kv_heads d_value"]
) -> Float64[Tensor, "n_kv_heads d_value d_value"]:
    """Those columns of every head: B, if the values are as they were.

    Args:
        weight: W_V.
        pivots: of `FixedValues`.
    """
    heads = weight.double().view(len(pivots), -1, weight.shape[1])
    index = pivots.long().to(weight.device)[:, None, :].expand(-1, heads.shape[1], -1)
    return heads.gather(2, index)


def values_in_gauge(
    values: Float[Tensor, "n_rows ..."], basis_change: Float64[Tensor, "n_kv_heads d_value d_value"]
) -> Float64[Tensor, "n_rows ..."]:
    """B⁻¹ W_V, or B⁻¹ b of the bias of values.

    Args:
        values: rows head by head.
        basis_change: B.
    """
    by_head = values.double().unflatten(0, basis_change.shape[:2])
    return torch.linalg.solve(basis_change, by_head).flatten(0, 1)


def bias_in_gauge(
    bias: Float[Tensor, " d_out"],
    rows: Int64[Tensor, " n_rows"],
    basis_change: Float64[Tensor, "n_kv_heads d_value d_value"],
) -> Float[Tensor, " d_out"]:
    """The bias of a sublayer whose rows that are values are in the gauge.

    Args:
        bias: of the sublayer.
        rows: of the values, head by head.
        basis_change: B.
    """
    values = values_in_gauge(bias[rows].to(basis_change.device), basis_change)
    return bias.index_copy(0, rows, values.to(bias))


def dense_values(
    pivots: Int[Tensor, "n_kv_heads d_value"], coefficient: Float[Tensor, "n_rows others"]
) -> Float[Tensor, "n_rows d_in"]:
    """W_V in the gauge: [I C] of every head, its columns where they belong."""
    d_value, others = pivots.shape[1], coefficient.shape[1]
    unit, heads = _unit(coefficient[:d_value]), []
    for columns, of_head in zip(pivots.long(), coefficient.chunk(len(pivots)), strict=True):
        is_other = torch.ones(d_value + others, dtype=torch.bool, device=coefficient.device)
        is_other[columns] = False
        order = torch.cat([columns.to(is_other.device), is_other.nonzero().flatten()])
        heads.append(torch.cat([unit, of_head], dim=1)[:, order.argsort()])
    return torch.cat(heads)


def output_in_gauge(
    weight: Float[Tensor, "n d_in"], basis_change: Float64[Tensor, "n_kv_heads d_value d_value"]
) -> Float64[Tensor, "n d_in"]:
    """W_O B, or the same of the factor of W_O that sees its inputs.

    Args:
        weight: columns head by head; query head h reads key-value head h // (queries of one).
        basis_change: B.
    """
    n_kv_heads, d_value, _ = basis_change.shape
    by_head = weight.double().unflatten(1, (n_kv_heads, -1, d_value))
    return torch.einsum("nkqd,kde->nkqe", by_head, basis_change).flatten(1)


def _unit(head: Tensor) -> Tensor:
    return torch.eye(len(head), dtype=head.dtype, device=head.device)
