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
from sharebasis.architecture.sublayers import Sublayer
from sharebasis.config.model import WeightTypeSettings
from sharebasis.config.types import Family
from sharebasis.errors import SplitError
from sharebasis.linalg.rows import Rows


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that are one of q, k, v, gate, up, or the whole weight."""

    label: str
    family: Family
    rows: Rows
    n_heads: int = 0
    """Heads in these rows; 0 where the rows are not made of heads."""

    def left(self, sublayer: Sublayer, n_rows: int) -> Rows:
        """Where the block lies in a weight that may lack neurons.

        Args:
            sublayer: that it is a block of.
            n_rows: of the weight as it is now.
        """
        return self.rows if self.n_heads else self.rows.resized(sublayer.shape[0], n_rows)


def blocks_of(sublayer: Sublayer, settings: WeightTypeSettings, dims: Dims) -> Sequence[Block]:
    """What a sublayer's weight is made of: one block, or those of a fused weight.

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
    return [Block("", sublayer.family, Rows(0, sublayer.shape[0]), heads)]


def _head_counts(settings: WeightTypeSettings, dims: Dims) -> tuple[int, int]:
    n_heads = settings.n_head or dims.n_heads
    return n_heads, settings.n_kv_head or settings.n_head or dims.n_kv_heads


def _qkv(
    sublayer: Sublayer, settings: WeightTypeSettings, order: str, dims: Dims
) -> Sequence[Block]:
    """The q, k and v blocks of a fused weight, in the order it stores them."""
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
    turns = n_kv_heads if settings.interleave == "head" else settings.interleave
    rows = _laid_out(lengths, turns, sublayer)
    return [Block(x, families[x], own, heads[x]) for x, own in zip(order, rows, strict=True)]


def _head_widths(sublayer: Sublayer, heads: Mapping[str, int], dims: Dims) -> tuple[int, int]:
    """Rows of a head of q or k, and of one of v, in a fused weight."""
    d_out, n_all, n_v = sublayer.shape[0], sum(heads.values()), heads["v"]
    d_v = dims.d_v or d_out // n_all
    d_head, left = divmod(d_out - n_v * d_v, n_all - n_v)
    if left or d_head <= 0 or (dims.d_v is None and d_head != d_v):
        *counts, last = (f"{n} {x}" for x, n in heads.items())
        width = f" (v: of {d_v} rows)" if dims.d_v else ""
        raise SplitError(
            f"{sublayer.name} has {d_out} rows, which {', '.join(counts)} and {last} heads{width} "
            f"do not divide; set n_head and n_kv_head of weight type {sublayer.weight_type}."
        )
    return d_head, d_v


def _gate_up(
    sublayer: Sublayer, settings: WeightTypeSettings, order: Literal["gate_up", "up_gate"]
) -> Sequence[Block]:
    d_out = sublayer.shape[0]
    if d_out % 2:
        raise SplitError(
            f"{sublayer.name} has {d_out} rows, which are not as many of gate as of up; remove "
            f"gate_up_order from weight type {sublayer.weight_type}."
        )
    names: tuple[Family, Family] = ("gate", "up") if order == "gate_up" else ("up", "gate")
    rows = _laid_out([d_out // 2] * 2, settings.interleave, sublayer)
    return [Block(name, name, own) for name, own in zip(names, rows, strict=True)]


def gate_and_up(sublayer: Sublayer, settings: WeightTypeSettings) -> tuple[Rows, ...]:
    """The rows of each, if there are both, and they lie as the settings say."""
    if settings.gate_up_order is None:
        return ()
    try:
        return tuple(own.rows for own in _gate_up(sublayer, settings, settings.gate_up_order))
    except SplitError:  # of no consequence to a weight that is not cut
        return ()


def _laid_out(
    lengths: Sequence[int], turns: int | Literal["head", "row"] | None, sublayer: Sublayer
) -> Sequence[Rows]:
    """Rows of blocks of some lengths that take turns."""
    turns = min(lengths) if turns == "row" else turns or 1
    if isinstance(turns, str) or any(length % turns for length in lengths):
        raise SplitError(
            f"The blocks of {sublayer.name} have {', '.join(map(str, lengths))} rows and cannot "
            f"take {turns} turns; correct interleave of weight type {sublayer.weight_type}."
        )
    per_turn = [length // turns for length in lengths]
    starts, stride = accumulate(per_turn, initial=0), sum(per_turn) if turns > 1 else 0
    return [
        Rows(start, length, turns, stride) for start, length in zip(starts, per_turn, strict=False)
    ]


def heads_of_block(block: Block, sublayer: Sublayer) -> Sequence[Block]:
    if block.n_heads <= 1:
        return [block]
    if len(block.rows) % block.n_heads:
        raise SplitError(
            f"{sublayer.part_name(block.label)} has {len(block.rows)} rows, which {block.n_heads} "
            "heads do not divide; set n_head (or n_kv_head) of its weight type."
        )
    d_head, dot = len(block.rows) // block.n_heads, "." if block.label else ""
    if block.rows.runs > 1 and block.rows.length % d_head and d_head % block.rows.length:
        raise SplitError(
            f"The groups of {sublayer.name} have {block.rows.length} rows of {block.label}, which "
            f"cuts heads of {d_head} in two; correct interleave of weight type "
            f"{sublayer.weight_type}."
        )
    return [
        Block(f"{block.label}{dot}head{i}", block.family, block.rows.part(i * d_head, d_head))
        for i in range(block.n_heads)
    ]
