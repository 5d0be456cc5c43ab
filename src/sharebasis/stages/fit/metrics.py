"""What was stored, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sharebasis.architecture.groups import Group
from sharebasis.config.analyse import Sensing
from sharebasis.config.fit import SPARSE, FitSettings
from sharebasis.config.types import Storage


@dataclass(frozen=True, slots=True)
class FittedGroup:
    """What became of a group, for metrics."""

    group: Group
    n_original: int
    """Numbers in the original weights, of all their neurons."""
    rank: int
    n_stored: int
    loss: float
    energy: float
    dense: bool
    """Whether its weights are stored as they were, or in another gauge."""
    weight: float = 1.0
    """What its loss counted in the allocation."""
    gauge_fixed: bool = False
    """Whether it is values without the columns that their output has taken in."""

    @property
    def sparse(self) -> bool:
        """Whether it lacks entries; its rank is the full one, for want of another."""
        return self.group.structure == SPARSE


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
    all that does not lack entries, dense weights too; null where everything does. A relative
    loss is the quadratic one as predicted; that of `sensitivity`, which the allocation minimised,
    counts every group by its weight.
    """
    by_family: dict[str, list[FittedGroup]] = {}
    for one in fitted.groups:
        by_family.setdefault(one.group.family, []).append(one)
    selected = _counts(fitted.groups, settings.storage)
    return {
        "method": settings.method,
        **selected,
        "sensitivity": _weighed(fitted),
        "shared": [
            {"group": one.group.name, "structure": one.group.structure, "rank": one.rank}
            for one in fitted.groups
            if len(one.group.parts) > 1
        ],
        "families": {
            family: _counts(groups, settings.storage)
            for family, groups in sorted(by_family.items())
        },
        "whole_model": _removed(
            selected["original_numbers"] + fitted.n_others,
            selected["stored_numbers"] + fitted.n_others_stored,
        ),
    }


def _weighed(fitted: FittedModel) -> dict[str, Any]:
    weights = [one.weight for one in fitted.groups]
    energy = sum(one.weight * one.energy for one in fitted.groups)
    loss = sum(one.weight * one.loss for one in fitted.groups)
    return {
        "by": fitted.weighed_by,
        "min_weight": min(weights),
        "max_weight": max(weights),
        "relative_weighed_loss": loss / energy if energy else 0.0,
    }


def _form(fitted: FittedGroup, storage: Storage) -> str:
    """In what form a group is stored."""
    if fitted.gauge_fixed:
        return "fixed_columns"
    if fitted.dense:
        return "dense"
    return "masked" if fitted.sparse else storage


def _counts(fitted: Sequence[FittedGroup], storage: Storage) -> dict[str, Any]:
    original = sum(one.n_original for one in fitted)
    stored = sum(one.n_stored for one in fitted)
    energy = sum(one.energy for one in fitted)
    ranks = [one.rank for one in fitted if not one.sparse]
    return {
        **_removed(original, stored),
        "n_groups": len(fitted),
        "forms": dict(Counter(_form(one, storage) for one in fitted)),
        "structures": dict(Counter(one.group.structure for one in fitted)),
        "min_rank": min(ranks, default=None),
        "max_rank": max(ranks, default=None),
        "relative_loss": sum(one.loss for one in fitted) / energy if energy else 0.0,
    }


def _removed(original: int, stored: int) -> dict[str, Any]:
    return {
        "removed_fraction": 1 - stored / original,
        "stored_numbers": stored,
        "original_numbers": original,
    }
