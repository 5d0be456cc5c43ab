"""Which points belong to one line of a figure, and what the line is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sharebasis.stages.report.points import Point

BUDGET = "fit.removed"
INCIDENTAL = {
    BUDGET,
    "device",
    "fit.shard_bytes",
    "calibrate.checkpoint_seconds",
    "recover.checkpoint_seconds",
}
"""Parameters that do not make another method of a point."""


def labels(points: Sequence[Point]) -> list[str]:
    """The method of every point, with the settings in which points of its method differ."""
    flat = [_leaves(point.parameters) for point in points]
    methods = [str(point.parameter("fit.method") or point.name) for point in points]
    varying: dict[str, list[str]] = {}
    for method in dict.fromkeys(methods):
        own = [leaves for leaves, other in zip(flat, methods, strict=True) if other == method]
        keys = dict.fromkeys(key for leaves in own for key in leaves if key not in INCIDENTAL)
        varying[method] = [
            key for key in keys if len({repr(one[key]) for one in own if key in one}) > 1
        ]
    return [
        ", ".join([method, *(_said(key, leaves[key]) for key in varying[method] if key in leaves)])
        for method, leaves in zip(methods, flat, strict=True)
    ]


def series(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of every label, by what they remove."""
    found: dict[str, list[Point]] = {}
    for label, point in zip(labels(points), points, strict=True):
        found.setdefault(label, []).append(point)
    return {label: sorted(own, key=_removed) for label, own in found.items()}


def at_one_budget(points: Sequence[Point]) -> tuple[Any, dict[str, Point]]:
    """A point of every label at the budget that most labels have, the smallest of such."""
    all_series = series(points)
    budgets = Counter(
        budget
        for own in all_series.values()
        for budget in {point.parameter(BUDGET) for point in own if point.cells}
    )
    if not budgets:
        return None, {}
    common = max(budgets, key=lambda budget: (budgets[budget], -float(budget or 0)))
    chosen = {
        label: next((one for one in own if one.cells and one.parameter(BUDGET) == common), None)
        for label, own in all_series.items()
    }
    return common, {label: point for label, point in chosen.items() if point}


def _removed(point: Point) -> float:
    return float(point.metric("fit", "removed_fraction") or point.parameter(BUDGET) or 0)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _said(key: str, value: Any) -> str:
    if isinstance(value, list):
        value = "+".join(map(str, value)) or "none"
    return f"{key.removeprefix('fit.')}={value}"
