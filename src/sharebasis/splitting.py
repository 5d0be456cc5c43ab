"""none | qkv | heads: which rows of a weight are a part.

A part is what gets a coefficient of its own. Rows are those of the (d_out, d_in)
weight, and the parts of a sublayer are in row order, so their outputs concatenate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sharebasis.architecture import Dims
from sharebasis.errors import SplitError
from sharebasis.settings import Family, SplitStrategy, WeightTypeSettings
from sharebasis.sublayer import Classification, Sublayer


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one sublayer's weight."""

    sublayer: Sublayer
    label: str
    """What the part is within its sublayer: '' (all of it), 'q', 'head3', 'q.head3'."""
    family: Family
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the part."""
        return self.stop - self.start, self.sublayer.shape[1]

    @property
    def name(self) -> str:
        return f"{self.sublayer.name}[{self.label}]" if self.label else self.sublayer.name


def split_selected(model: Classification, strategy: SplitStrategy) -> tuple[Part, ...]:
    """Cut every selected sublayer of a model; see `split_sublayer`."""
    weight_types = model.architecture.weight_types
    return tuple(
        part
        for sublayer in model.selected
        if sublayer.weight_type is not None
        for part in split_sublayer(
            sublayer, weight_types[sublayer.weight_type], strategy, model.dims
        )
    )


def split_sublayer(
    sublayer: Sublayer, settings: WeightTypeSettings, strategy: SplitStrategy, dims: Dims
) -> tuple[Part, ...]:
    """Cut one sublayer into parts, in row order.

    Args:
        sublayer: of the weight type that `settings` describes.
        settings: its own `split` goes before `strategy`; its head counts before `dims`.
        strategy: for all weight types that do not name their own.
        dims: of the model.

    Raises:
        SplitError: the order is not a permutation of q, k and v, or the rows do not divide.
    """
    strategy = settings.split or strategy
    blocks = _blocks(sublayer, settings, strategy, dims)
    if strategy == "heads":
        blocks = [head for block in blocks for head in _heads(block)]
    parts, start = [], 0
    for block in blocks:
        parts.append(Part(sublayer, block.label, block.family, start, start + block.rows))
        start += block.rows
    if start != sublayer.shape[0]:  # a defect of this file, never of the input
        raise AssertionError(f"{sublayer.name}: parts cover {start} of {sublayer.shape[0]} rows")
    return tuple(parts)


def rows_by_sublayer(parts: Iterable[Part]) -> Mapping[str, Sequence[tuple[int, int]]]:
    """HF name -> the (start, stop) rows of its parts, in their order."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for part in parts:
        rows.setdefault(part.sublayer.name, []).append((part.start, part.stop))
    return rows


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive rows that are one of q, k, v, or the whole weight."""

    label: str
    family: Family
    rows: int
    n_heads: int
    """Heads in these rows; 1 where the rows are not made of heads."""
    where: str


def _blocks(
    sublayer: Sublayer, settings: WeightTypeSettings, strategy: SplitStrategy, dims: Dims
) -> Sequence[_Block]:
    n_heads = settings.n_head or dims.n_heads
    n_kv_heads = settings.n_kv_head or settings.n_head or dims.n_kv_heads
    heads = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads}
    if strategy == "none" or not (settings.qkv_order or sublayer.family in heads):
        if settings.split not in (None, "none"):
            raise SplitError(
                f"weight_types.{sublayer.weight_type} asks for split {settings.split!r}, but "
                f"{sublayer.name} (family {sublayer.family}) is neither q, k or v nor fused; "
                "for a fused weight give its qkv_order."
            )
        return [_Block("", sublayer.family, sublayer.shape[0], 1, sublayer.name)]
    if not settings.qkv_order:
        n = heads[sublayer.family]
        return [_Block("", sublayer.family, sublayer.shape[0], n, sublayer.name)]
    return _fused(sublayer, settings.qkv_order, heads)


def _fused(sublayer: Sublayer, order: str, heads: dict[str, int]) -> Sequence[_Block]:
    """The q, k and v blocks of a fused weight, in the order it stores them."""
    if sorted(order) != ["k", "q", "v"]:
        raise SplitError(
            f"qkv_order {order!r} of weight type {sublayer.weight_type} is not a permutation of "
            "'qkv'."
        )
    n_all, d_out = sum(heads.values()), sublayer.shape[0]
    if d_out % n_all:
        raise SplitError(
            f"{sublayer.name} has {d_out} rows, which {heads['q']} q, {heads['k']} k and "
            f"{heads['v']} v heads do not divide; set n_head and n_kv_head of weight type "
            f"{sublayer.weight_type}."
        )
    d_head = d_out // n_all
    families: dict[str, Family] = {"q": "q", "k": "k", "v": "v"}
    return [
        _Block(x, families[x], heads[x] * d_head, heads[x], f"{sublayer.name}[{x}]") for x in order
    ]


def _heads(block: _Block) -> Sequence[_Block]:
    if block.n_heads == 1:
        return [block]
    if block.rows % block.n_heads:
        raise SplitError(
            f"{block.where} has {block.rows} rows, which {block.n_heads} heads do not divide; "
            "set n_head (or n_kv_head) of its weight type."
        )
    rows, dot = block.rows // block.n_heads, "." if block.label else ""
    return [
        _Block(f"{block.label}{dot}head{i}", block.family, rows, 1, block.where)
        for i in range(block.n_heads)
    ]
