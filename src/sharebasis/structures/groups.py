"""Which parts share a basis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import combinations

import numpy as np

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.architecture.roles import expert_slot
from sharebasis.config.types import Family
from sharebasis.errors import SelectionError
from sharebasis.linalg.matching import partition
from sharebasis.structures.layer_distances import LayerDistances


def groups_of(
    parts: Sequence[Part],
    group_size: int,
    shared: Collection[Family],
    share_experts: bool,
    distances: LayerDistances | None = None,
) -> Sequence[Group]:
    """Say which parts share, as `fit` is told to: by layers, or experts of a layer.

    Args: as of `adjacent_groups`, or `nearest_groups` if there are distances, and `expert_groups`.
    """
    of_experts = [part for part in parts if share_experts and part.sublayer.expert is not None]
    others = [part for part in parts if not share_experts or part.sublayer.expert is None]
    if distances is None:
        over_layers = adjacent_groups(others, group_size, shared)
    else:
        over_layers = nearest_groups(others, group_size, shared, distances)
    return [*over_layers, *expert_groups(of_experts)]


def expert_groups(parts: Iterable[Part]) -> Sequence[Group]:
    """Let the same part of all experts of a layer share.

    Args:
        parts: of sublayers of experts.
    """
    by_layer: dict[tuple[int, str, str, int], list[Part]] = {}
    for part in parts:
        slot = expert_slot(part.sublayer.slot)
        key = part.sublayer.layer, slot, part.label, part.shape[1]
        by_layer.setdefault(key, []).append(part)
    return [Group(tuple(same)) for same in by_layer.values()]


def adjacent_groups(
    parts: Iterable[Part], group_size: int, shared: Collection[Family], structure: str = "fixed"
) -> Sequence[Group]:
    """Let the same part of `group_size` adjacent layers share; the last run may be shorter.

    Layers whose part reads inputs of another width share among themselves.

    Args:
        parts: of all selected sublayers.
        group_size: layers in a group.
        shared: families that share; every part of another family is a group of its own.
        structure: what to call it.
    """
    return _over_layers(parts, shared, structure, lambda same: _runs(same, group_size))


def nearest_groups(
    parts: Iterable[Part], group_size: int, shared: Collection[Family], distances: LayerDistances
) -> Sequence[Group]:
    """Let the same part of `group_size` layers share that are near each other in its family.

    Args:
        distances: of every two layers, for the families that share; see `nearest`.

    The others are as of `adjacent_groups`.
    """
    return _over_layers(parts, shared, "fixed", lambda same: nearest(same, group_size, distances))


def nearest(
    parts: Sequence[Part], size: int, distances: LayerDistances
) -> Sequence[tuple[Part, ...]]:
    """Cut the same part of several layers into groups of `size`: see `partition`.

    Raises:
        SelectionError: a distance is missing.
    """
    family = parts[0].family
    if len(parts) > 1 and family not in distances:
        raise SelectionError(
            f"There are no distances of {family} ({parts[0].name} and others), by which its layers "
            f"are to be grouped; there are those of {', '.join(distances) or 'nothing'}. Take "
            f"{family} out of fit.shared, or cut a fused weight by split=qkv."
        )
    matrix = np.zeros((len(parts), len(parts)))
    for i, j in combinations(range(len(parts)), 2):
        layers = parts[i].sublayer.layer, parts[j].sublayer.layer
        if layers not in distances[family]:
            raise SelectionError(
                f"There is no distance between {family} of layers {layers[0]} and {layers[1]}. To "
                "be grouped by distance, every two layers have to be measured: set vary.pairs=all "
                "and vary.layers=null."
            )
        matrix[i, j] = matrix[j, i] = distances[family][layers]
    return [tuple(parts[i] for i in group) for group in partition(matrix, size)]


def _over_layers(
    parts: Iterable[Part],
    shared: Collection[Family],
    structure: str,
    cut: Callable[[Sequence[Part]], Iterable[Sequence[Part]]],
) -> Sequence[Group]:
    """Cut the same part of all layers, in their order, where its family shares."""
    by_slot: dict[tuple[str, str, int], list[Part]] = {}
    for part in parts:
        by_slot.setdefault((part.sublayer.slot, part.label, part.shape[1]), []).append(part)
    groups: list[Group] = []
    for same in by_slot.values():
        same.sort(key=lambda part: part.sublayer.layer)
        runs = cut(same) if same[0].family in shared else _runs(same, 1)
        groups += [Group(tuple(run), structure=structure) for run in runs]
    return groups


def _runs(parts: Sequence[Part], size: int) -> Iterable[tuple[Part, ...]]:
    for i in range(0, len(parts), size):
        yield tuple(parts[i : i + size])
