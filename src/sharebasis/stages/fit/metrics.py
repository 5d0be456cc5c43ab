"""What was stored, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sharebasis.architecture.groups import Group
from sharebasis.config.analyse import Sensing
from sharebasis.config.fit import FitSettings


@dataclass(frozen=True, slots=True)
class FittedGroup:
    """What became of a group, for metrics."""

    group: Group
    form: str
    """The kind of its form."""
    n_original: int
    """Numbers in the original weights, of all their neurons."""
    rank: int | None
    """Of a form of factors."""
    n_stored: int
    loss: float
    energy: float
    weight: float = 1.0
    """What its loss counted in the allocation."""


@dataclass(frozen=True, slots=True)
class FittedModel:
    """What became of a model."""

    groups: tuple[FittedGroup, ...]
    n_others: int
    """Numbers that are not selected: embeddings, norms, biases."""
    n_others_stored: int
    """Of them, those that are stored: biases go with their neurons."""
    weighed_by: Sensing = "none"


def fit_metrics(fitted: FittedModel, settings: FitSettings) -> dict[str, Any]:
    """What was stored, in all and by family; counts are of the tensors as written.

    The top level is about the selected sublayers, `whole_model` about every tensor. Ranks are of
    groups that are stored as factors; null where there are none. A relative loss is the quadratic
    one as predicted; that of `sensitivity`, which the allocation minimised, counts every group by
    its weight.
    """
    by_family: dict[str, list[FittedGroup]] = {}
    for group in fitted.groups:
        by_family.setdefault(group.group.family, []).append(group)
    selected = _counts(fitted.groups)
    return {
        "method": settings.method,
        **selected,
        "sensitivity": _weighed(fitted),
        "shared": [
            {"group": group.group.name, "structure": group.group.structure, "rank": group.rank}
            for group in fitted.groups
            if len(group.group.parts) > 1
        ],
        "families": {family: _counts(groups) for family, groups in sorted(by_family.items())},
        "whole_model": _removed(
            selected["original_numbers"] + fitted.n_others,
            selected["stored_numbers"] + fitted.n_others_stored,
        ),
    }


def _weighed(fitted: FittedModel) -> dict[str, Any]:
    weights = [group.weight for group in fitted.groups]
    energy = sum(group.weight * group.energy for group in fitted.groups)
    loss = sum(group.weight * group.loss for group in fitted.groups)
    return {
        "by": fitted.weighed_by,
        "min_weight": min(weights),
        "max_weight": max(weights),
        "relative_weighed_loss": loss / energy if energy else 0.0,
    }


def _counts(groups: Sequence[FittedGroup]) -> dict[str, Any]:
    original = sum(group.n_original for group in groups)
    stored = sum(group.n_stored for group in groups)
    energy = sum(group.energy for group in groups)
    ranks = [group.rank for group in groups if group.rank is not None]
    return {
        **_removed(original, stored),
        "n_groups": len(groups),
        "forms": dict(Counter(group.form for group in groups)),
        "structures": dict(Counter(group.group.structure for group in groups)),
        "min_rank": min(ranks, default=None),
        "max_rank": max(ranks, default=None),
        "relative_loss": sum(group.loss for group in groups) / energy if energy else 0.0,
    }


def _removed(original: int, stored: int) -> dict[str, Any]:
    return {
        "removed_fraction": 1 - stored / original,
        "stored_numbers": stored,
        "original_numbers": original,
    }
