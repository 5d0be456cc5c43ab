"""none | qkv | heads: which rows of a weight are a part.

A part is what gets a coefficient of its own. Rows are those of the (d_out, d_in) weight;
the parts of a sublayer cover each of them once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.sublayers import Classification, Sublayer
from sharebasis.config.model import WeightTypeSettings
from sharebasis.config.types import Family
from sharebasis.errors import SplitError
from sharebasis.linalg.rows import Rows


@dataclass(frozen=True, slots=True)
class Projection:
    """Rows of a weight that are one of q, k, v, gate, up, or all of it; or those of one head."""

    label: str
    family: Family
    rows: Rows
    n_heads: int = 0
    """Heads in these rows; 0 where the rows are not made of heads."""

    def rows_in(self, sublayer: Sublayer, n_rows: int) -> Rows:
        """Where the projection lies in a weight that may lack neurons.

        Args:
            sublayer: that it is part of.
            n_rows: of the weight as it is now.
        """
        return self.rows if self.n_heads else self.rows.resized(sublayer.shape[0], n_rows)


def projections_of(
    sublayer: Sublayer, settings: WeightTypeSettings, dims: Dims
) -> Sequence[Projection]:
    """What a sublayer's weight is made of: one projection, or those of a fused weight.

    Args: as of `split_sublayer`.

    Raises:
        SplitError: the order is not a permutation of q, k and v, or the rows do not divide.
    """
    if settings.qkv_order:
        return _qkv(sublayer, settings, settings.qkv_order, dims)
    if settings.gate_up_order:
        return _gate_up(sublayer, settings, settings.gate_up_order)
    n_heads, n_kv_heads = _head_counts(settings, dims)
    heads = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads}.get(sublayer.family, 0)
    return [Projection("", sublayer.family, Rows(0, sublayer.shape[0]), heads)]


def projections_in(classification: Classification, sublayer: Sublayer) -> Sequence[Projection]:
    """`projections_of` a sublayer of a model."""
    return projections_of(sublayer, classification.settings_of(sublayer), classification.dims)


def _head_counts(settings: WeightTypeSettings, dims: Dims) -> tuple[int, int]:
    n_heads = settings.n_head or dims.n_heads
    return n_heads, settings.n_kv_head or settings.n_head or dims.n_kv_heads


def _qkv(
    sublayer: Sublayer, settings: WeightTypeSettings, order: str, dims: Dims
) -> Sequence[Projection]:
    """The q, k and v of a fused weight, in the order it stores them."""
    if sorted(order) not in (["k", "q", "v"], ["k", "v"]):
        raise SplitError(
            f"qkv_order {order!r} of weight type {sublayer.weight_type} is not a permutation of "
            "'qkv' or 'kv'."
        )
    n_heads, n_kv_heads = _head_counts(settings, dims)
    families: dict[str, Family] = {"q": "q", "k": "k", "v": "v"}
    counts = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads}
    heads = {x: counts[x] for x in order}
    d_head, d_v = _head_widths(sublayer, heads, dims)
    lengths = [heads[x] * (d_v if x == "v" else d_head) for x in order]
    n_turns = n_kv_heads if settings.interleave == "head" else settings.interleave
    rows = _laid_out(lengths, n_turns, sublayer)
    return [
        Projection(x, families[x], place, heads[x]) for x, place in zip(order, rows, strict=True)
    ]


def _head_widths(sublayer: Sublayer, heads: Mapping[str, int], dims: Dims) -> tuple[int, int]:
    """Rows of a head of q or k, and of one of v, in a fused weight."""
    d_out, n_all, n_v = sublayer.shape[0], sum(heads.values()), heads["v"]
    d_v = dims.d_v or d_out // n_all
    d_head, remainder = divmod(d_out - n_v * d_v, n_all - n_v)
    if remainder or d_head <= 0 or (dims.d_v is None and d_head != d_v):
        *counts, last = (f"{n} {x}" for x, n in heads.items())
        width = f" (v: of {d_v} rows)" if dims.d_v else ""
        raise SplitError(
            f"{sublayer.name} has {d_out} rows, which {', '.join(counts)} and {last} heads{width} "
            f"do not divide; set n_head and n_kv_head of weight type {sublayer.weight_type}."
        )
    return d_head, d_v


def _gate_up(
    sublayer: Sublayer, settings: WeightTypeSettings, order: Literal["gate_up", "up_gate"]
) -> Sequence[Projection]:
    d_out = sublayer.shape[0]
    if d_out % 2:
        raise SplitError(
            f"{sublayer.name} has {d_out} rows, which are not as many of gate as of up; remove "
            f"gate_up_order from weight type {sublayer.weight_type}."
        )
    names: tuple[Family, Family] = ("gate", "up") if order == "gate_up" else ("up", "gate")
    rows = _laid_out([d_out // 2] * 2, settings.interleave, sublayer)
    return [Projection(name, name, place) for name, place in zip(names, rows, strict=True)]


def gate_and_up(sublayer: Sublayer, settings: WeightTypeSettings) -> tuple[Rows, ...]:
    """The rows of each, if there are both, and they lie as the settings say."""
    if settings.gate_up_order is None:
        return ()
    try:
        return tuple(
            projection.rows for projection in _gate_up(sublayer, settings, settings.gate_up_order)
        )
    except SplitError:  # of no consequence to a weight that is not cut
        return ()


def _laid_out(
    lengths: Sequence[int], n_turns: int | Literal["head", "row"] | None, sublayer: Sublayer
) -> Sequence[Rows]:
    """Rows of projections of some lengths that take turns."""
    n_turns = min(lengths) if n_turns == "row" else n_turns or 1
    if isinstance(n_turns, str) or any(length % n_turns for length in lengths):
        raise SplitError(
            f"The blocks of {sublayer.name} have {', '.join(map(str, lengths))} rows and cannot "
            f"take {n_turns} turns; correct interleave of weight type {sublayer.weight_type}."
        )
    per_turn = [length // n_turns for length in lengths]
    starts, stride = accumulate(per_turn, initial=0), sum(per_turn) if n_turns > 1 else 0
    return [
        Rows(start, length, n_turns, stride)
        for start, length in zip(starts, per_turn, strict=False)
    ]


def heads_of(projection: Projection, sublayer: Sublayer) -> Sequence[Projection]:
    """The heads of a projection, in the order of its rows; itself where it is not made of several.

    Raises:
        SplitError: they do not divide its rows, or would be cut in two.
    """
    n_heads, rows, label = projection.n_heads, projection.rows, projection.label
    if n_heads <= 1:
        return [projection]
    if len(rows) % n_heads:
        raise SplitError(
            f"{sublayer.part_name(label)} has {len(rows)} rows, which {n_heads} heads do not "
            "divide; set n_head (or n_kv_head) of its weight type."
        )
    d_head, prefix = len(rows) // n_heads, f"{label}." if label else ""
    if rows.runs > 1 and rows.length % d_head and d_head % rows.length:
        raise SplitError(
            f"The groups of {sublayer.name} have {rows.length} rows of {label}, which cuts heads "
            f"of {d_head} in two; correct interleave of weight type {sublayer.weight_type}."
        )
    return [
        Projection(f"{prefix}head{i}", projection.family, rows.part(i * d_head, d_head))
        for i in range(n_heads)
    ]
