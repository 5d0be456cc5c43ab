"""Which points belong to one line of a figure, and what the line is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sharebasis.pipeline.settings import flatten
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
    settings = [flatten(point.parameters) for point in points]
    methods = [str(point.parameter("fit.method") or point.name) for point in points]
    varying: dict[str, list[str]] = {}
    for method in dict.fromkeys(methods):
        peers = [flat for flat, other in zip(settings, methods, strict=True) if other == method]
        keys = dict.fromkeys(key for flat in peers for key in flat if key not in INCIDENTAL)
        varying[method] = [
            key for key in keys if len({repr(flat[key]) for flat in peers if key in flat}) > 1
        ]
    return [
        ", ".join([method, *(_setting(key, flat[key]) for key in varying[method] if key in flat)])
        for method, flat in zip(methods, settings, strict=True)
    ]


def series(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of every label, by what they remove."""
    by_label: dict[str, list[Point]] = {}
    for label, point in zip(labels(points), points, strict=True):
        by_label.setdefault(label, []).append(point)
    return {label: sorted(line, key=_removed) for label, line in by_label.items()}


def at_one_budget(points: Sequence[Point]) -> tuple[Any, dict[str, Point]]:
    """A point of every label at the budget that most labels have, the smallest of such."""
    all_series = series(points)
    budgets = Counter(
        budget
        for line in all_series.values()
        for budget in {point.parameter(BUDGET) for point in line if point.cells}
    )
    if not budgets:
        return None, {}
    common = max(budgets, key=lambda budget: (budgets[budget], -float(budget or 0)))
    chosen = {
        label: next((p for p in line if p.cells and p.parameter(BUDGET) == common), None)
        for label, line in all_series.items()
    }
    return common, {label: point for label, point in chosen.items() if point}


def _removed(point: Point) -> float:
    return float(point.metric("fit", "removed_fraction") or point.parameter(BUDGET) or 0)


def _setting(key: str, value: Any) -> str:
    if isinstance(value, list):
        value = "+".join(map(str, value)) or "none"
    return f"{key.removeprefix('fit.')}={value}"
