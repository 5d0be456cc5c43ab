"""Parts: rows of a sublayer that are compressed as one weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.fused import gate_and_up, heads_of, projections_of
from sharebasis.architecture.sublayers import Classification, Sublayer
from sharebasis.config.model import WeightTypeSettings
from sharebasis.config.types import Family, SplitStrategy
from sharebasis.errors import SplitError
from sharebasis.linalg.rows import Rows


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one sublayer's weight."""

    sublayer: Sublayer
    label: str
    """What the part is within its sublayer: '' (all of it), 'q', 'head3', 'q.head3'."""
    family: Family
    rows: Rows
    gate_up: tuple[Rows, ...] = ()
    """Of a whole weight that is gate and up in one: the rows of each."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the part."""
        return len(self.rows), self.sublayer.shape[1]

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        return self.sublayer.part_name(self.label)

    @property
    def stem(self) -> str:
        """What the names of its tensors begin with."""
        return self.sublayer.name + (f".{self.label}" if self.label else "")


def split_selected(model: Classification, strategy: SplitStrategy) -> tuple[Part, ...]:
    """Cut every selected sublayer of a model; see `split_sublayer`."""
    return tuple(
        part
        for sublayer in model.selected
        for part in split_sublayer(sublayer, model.settings_of(sublayer), strategy, model.dims)
    )


def split_sublayer(
    sublayer: Sublayer, settings: WeightTypeSettings, strategy: SplitStrategy, dims: Dims
) -> tuple[Part, ...]:
    """Cut one sublayer into parts that cover every row once, in the order of its rows.

    Args:
        sublayer: of the weight type that `settings` describes.
        settings: its own `split` goes before `strategy`; its head counts before `dims`.
        strategy: for all weight types that do not name their own.
        dims: of the model.

    Raises:
        SplitError: the order is not a permutation of q, k and v, or the rows do not divide.
    """
    strategy = settings.split or strategy
    if strategy == "none":
        rows = Rows(0, sublayer.shape[0])
        return (Part(sublayer, "", sublayer.family, rows, gate_and_up(sublayer, settings)),)
    projections = projections_of(sublayer, settings, dims)
    if settings.split and not (settings.fused or projections[0].n_heads):
        raise SplitError(
            f"weight_types.{sublayer.weight_type} asks for split {settings.split!r}, but "
            f"{sublayer.name} (family {sublayer.family}) is neither q, k or v nor fused; "
            "for a fused weight give its qkv_order or gate_up_order."
        )
    if strategy == "heads":
        projections = [head for x in projections for head in heads_of(x, sublayer)]
    return tuple(Part(sublayer, x.label, x.family, x.rows) for x in projections)


def rows_by_sublayer(parts: Iterable[Part]) -> Mapping[str, Sequence[Rows]]:
    """HF name -> the rows of its parts, in their order."""
    rows: dict[str, list[Rows]] = {}
    for part in parts:
        rows.setdefault(part.sublayer.name, []).append(part.rows)
    return rows
