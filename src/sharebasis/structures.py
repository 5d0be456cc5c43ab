"""Which groups the parts of a model may form: what the allocation chooses from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence

from sharebasis.grouping import Group, adjacent_groups, groups_of
from sharebasis.settings import FIXED, PRIVATE, Family, FitSettings, Side
from sharebasis.splitting import Part
from sharebasis.sublayer import expert_slot

JOINT: Sequence[Collection[Family]] = (("q", "k", "v"), ("gate", "up"), ("o", "down"))
"""Families that may share within a layer: the first two read one input, the last write."""


def given_groups(parts: Sequence[Part], settings: FitSettings) -> Sequence[Group]:
    """Groups that cover every part once: what there is to choose if nothing else is offered.

    Args:
        parts: of all selected sublayers.
        settings: its `structures`, and what says how the fixed ones are made.
    """
    if FIXED in settings.structures:
        return groups_of(parts, settings.group_size, settings.shared, settings.share_experts)
    return adjacent_groups(parts, 1, (), PRIVATE)


def offered_groups(parts: Sequence[Part], settings: FitSettings) -> Sequence[Group]:
    """Groups of several parts that may take the place of given ones; they overlap.

    Residual reads share on the input side and writes on the output side; a part that is neither
    stays alone.

    Args: as of `given_groups`.
    """
    found: dict[frozenset[str], Group] = {}
    for structure in settings.structures:
        for group in _of_structure(structure, parts, settings.shared):
            found.setdefault(frozenset(part.name for part in group.parts), group)
    return list(found.values())


def _of_structure(
    structure: str, parts: Sequence[Part], shared: Collection[Family]
) -> Iterator[Group]:
    if structure == "joint":
        return _joint(parts)
    if structure == "experts":
        return _experts(parts)
    if structure.startswith("shared:"):
        return _runs(structure, [part for part in parts if part.family in shared])
    return iter(())


def _joint(parts: Iterable[Part]) -> Iterator[Group]:
    """q, k and v of a layer; gate and up; o and down."""

    def cell(part: Part) -> Hashable:
        together = next((own for own in JOINT if part.family in own), None)
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
    size = structure.removeprefix("shared:")
    for line in _cells(parts, lambda part: (part.sublayer.slot, part.label)):
        line.sort(key=lambda part: part.sublayer.layer)
        n = len(line) if size == "all" else int(size)
        yield from _groups(structure, (line[i : i + n] for i in range(len(line) - n + 1)))


def _cells(parts: Iterable[Part], key: Callable[[Part], Hashable]) -> Iterable[list[Part]]:
    """Parts that have a key in common, and a side and a width on which they can share."""
    cells: dict[Hashable, list[Part]] = {}
    for part in parts:
        if part.sublayer.role == "read":
            cells.setdefault(("input", part.shape[1], key(part)), []).append(part)
        elif part.sublayer.role == "write":
            cells.setdefault(("output", part.shape[0], key(part)), []).append(part)
    return cells.values()


def _groups(structure: str, cells: Iterable[Sequence[Part]]) -> Iterator[Group]:
    for cell in cells:
        if len(cell) > 1:
            side: Side = "input" if cell[0].sublayer.role == "read" else "output"
            yield Group(tuple(cell), side, structure)
