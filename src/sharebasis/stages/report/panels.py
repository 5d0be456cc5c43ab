"""How figures look: styles of lines, panels, legends, and what keeps files the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKERS = "os^Dv<>Pp*X"
N_COLUMNS = 4
DETERMINED: Mapping[str, dict[str, Any]] = {
    "pdf": {"metadata": {"CreationDate": None}},
    "png": {"dpi": 130, "metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None}},
}
"""What keeps the time of day out of a file."""


def style(i: int) -> dict[str, Any]:
    """Of line number `i`."""
    return {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "markersize": 3.5}


def panels(names: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel for each name; they share their vertical axis."""
    n_columns = min(N_COLUMNS, max(len(names), 1))
    n_rows = math.ceil(len(names) / n_columns)
    figure = Figure(figsize=(2.9 * n_columns + 0.6, 2.4 * n_rows + 1.1), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flatten()
    for unused in axes[len(names) :]:
        unused.remove()
    return figure, dict(zip(names, axes, strict=False))


def legend_below(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend of all lines, though no panel may have all of them."""
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        n_columns = max(1, min(len(handles), int(110 / (max(map(len, handles)) + 8))))
        figure.legend(
            [*handles.values()],
            [*handles],
            loc="outside lower center",
            ncols=n_columns,
            fontsize=8,
        )
