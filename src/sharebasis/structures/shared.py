"""Groups of parts that share a basis: as settings say, or as the allocation picks.

Residual reads share on the input side and writes on the output side, that of the residual stream;
where a structure says `inner`, on the other one, that of heads and neurons. A part that neither
reads nor writes stays alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.architecture.roles import expert_slot
from sharebasis.config.types import Family, Side
from sharebasis.errors import SelectionError
from sharebasis.structures.factors import FactorStructure, by_layer
from sharebasis.structures.groups import groups_of, nearest
from sharebasis.structures.layer_distances import LayerDistances
from sharebasis.structures.structure import ModelParts

JOINT_FAMILIES: Sequence[Collection[Family]] = (("q", "k", "v"), ("gate", "up"), ("o", "down"))
"""Families that may share within a layer: the first two read one input, the last write."""


class Shared(FactorStructure):
    """`fixed`: the groups of `fit.group_size`, `fit.shared` and `fit.share_experts`, which cover
    every part; others overlap, and may take the place of groups of the baseline."""

    @property
    def is_baseline(self) -> bool:
        return self.specs == ("fixed",)

    def cells(self, model: ModelParts) -> Sequence[Group]:
        """Raises:
        SelectionError: a distance is missing.
        """
        parts, settings, distances = model.parts, model.settings, model.distances
        if self.is_baseline:
            size, shared, experts = settings.group_size, settings.shared, settings.share_experts
            return by_layer(groups_of(parts, size, shared, experts, distances))
        groups: dict[Hashable, Group] = {}
        for spec in self.specs:
            for group in _of_spec(spec, parts, settings.shared, distances):
                key = group.side, frozenset(part.name for part in group.parts)
                groups.setdefault(key, group)
        return by_layer(groups.values())


def _of_spec(
    spec: str,
    parts: Sequence[Part],
    shared: Collection[Family],
    distances: LayerDistances | None,
) -> Iterator[Group]:
    if spec == "joint":
        return _joint(parts)
    if spec == "experts":
        return _experts(parts)
    over_layers = [part for part in parts if part.family in shared]
    if spec.startswith("shared:"):
        return _runs(spec, over_layers)
    if spec.startswith("by_distance:"):
        return _nearest(spec, over_layers, distances)
    return iter(())


def _joint(parts: Iterable[Part]) -> Iterator[Group]:
    """q, k and v of a layer; gate and up; o and down."""

    def cell(part: Part) -> Hashable:
        together = next((families for families in JOINT_FAMILIES if part.family in families), None)
        return part.sublayer.layer, part.sublayer.expert, together or part.name

    return _groups("joint", _cells(parts, cell))


def _experts(parts: Iterable[Part]) -> Iterator[Group]:
    """The same part of all experts of a layer."""

    def cell(part: Part) -> Hashable:
        return part.sublayer.layer, expert_slot(part.sublayer.slot), part.label

    of_experts = [part for part in parts if part.sublayer.expert is not None]
    return _groups("experts", _cells(of_experts, cell))


def _runs(structure: str, parts: Iterable[Part]) -> Iterator[Group]:
    """The same part of so many adjacent layers, wherever such a run may begin."""
    size = structure.split(":")[1]
    for line in _lines(structure, parts):
        n = len(line) if size == "all" else int(size)
        yield from _groups(structure, (line[i : i + n] for i in range(len(line) - n + 1)))


def _nearest(
    structure: str, parts: Iterable[Part], distances: LayerDistances | None
) -> Iterator[Group]:
    """The same part of so many layers that are near each other."""
    if distances is None:
        raise SelectionError(
            f"fit.structures offers {structure}, but there are no distances between layers; set "
            "grouping=by_distance, which takes those of the stage vary."
        )
    size = int(structure.split(":")[1])
    for line in _lines(structure, parts):
        yield from _groups(structure, nearest(line, size, distances))


def _lines(structure: str, parts: Iterable[Part]) -> Iterator[list[Part]]:
    """The same part of all layers, in their order."""
    for line in _cells(parts, lambda part: (part.sublayer.slot, part.label), _inner(structure)):
        yield sorted(line, key=lambda part: part.sublayer.layer)


def _cells(
    parts: Iterable[Part], key: Callable[[Part], Hashable], inner: bool = False
) -> Iterable[list[Part]]:
    """Parts that have a key in common, and a side and a width on which they can share."""
    cells: dict[Hashable, list[Part]] = {}
    for part in parts:
        if part.sublayer.role in ("read", "write"):
            side = side_of(part, inner)
            width = part.shape[1] if side == "input" else part.shape[0]
            cells.setdefault((side, width, key(part)), []).append(part)
    return cells.values()


def _groups(structure: str, cells: Iterable[Sequence[Part]]) -> Iterator[Group]:
    for cell in cells:
        if len(cell) > 1:
            yield Group(tuple(cell), side_of(cell[0], _inner(structure)), structure)


def side_of(part: Part, inner: bool) -> Side:
    """The side of the residual stream, on which a part can share a basis; or the inner one."""
    return "input" if (part.sublayer.role == "read") != inner else "output"


def _inner(structure: str) -> bool:
    return structure.endswith(":inner")
