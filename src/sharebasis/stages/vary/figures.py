"""Pictures of the variation between layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sharebasis.architecture.sublayers import in_order
from sharebasis.stages.vary.variation import Variation

N_COLUMNS = 3
PANEL = (3.6, 3.0)
"""Width and height of a panel, in inches."""
DPI = 110
STYLES: Mapping[str, dict[str, Any]] = {
    "unaligned": {"color": "0.6", "label": "as stored"},
    "aligned": {"color": "C0", "label": "after alignment"},
    "random": {
        "color": "C3",
        "linestyle": "--",
        "label": "random weights (the numbers of each, shuffled), after alignment",
    },
}


def draw(variation: Variation, alignment: str, directory: Path) -> None:
    """Write `matrices.png`, a heat map for each family, and `depth.png`, a line for each.

    Args:
        variation: what to draw.
        alignment: what was removed, for the titles.
        directory: to write into; exists.
    """
    matrices(variation, alignment).savefig(directory / "matrices.png", dpi=DPI)
    over_depth(variation, alignment).savefig(directory / "depth.png", dpi=DPI)


def matrices(variation: Variation, alignment: str) -> Figure:
    """The distance of every two layers, a heat map for each family with a scale of its own."""
    figure, panels = _panels(variation.families)
    figure.suptitle(
        f"Distance of the weights of two layers, alignment: {alignment}\n"
        "Frobenius, weights scaled to norm 1 (0: equal, √2: orthogonal); "
        "each panel has its own scale; grey: not measured"
    )
    low, high = variation.layers[0] - 0.5, variation.layers[-1] + 0.5
    for family, axes in panels:
        values = variation.matrix(family)
        np.fill_diagonal(values, np.nan)  # a layer and itself would take up half of the scale
        image = axes.imshow(values, origin="lower", extent=(low, high, low, high))
        figure.colorbar(image, ax=axes, label="distance")
        axes.set_facecolor("0.85")
        axes.set(title=family, xlabel="layer", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def over_depth(variation: Variation, alignment: str) -> Figure:
    """The distance of every layer and the next, a panel for each family."""
    figure, panels = _panels(variation.families)
    figure.suptitle(
        f"Distance of the weights of a layer and the next, alignment: {alignment}\n"
        "Frobenius, weights scaled to norm 1 (0: equal, √2: orthogonal); "
        "each panel has its own scale"
    )
    firsts = [first for first, _ in variation.consecutive]
    for family, axes in panels:
        for name, values in variation.over_depth(family).items():
            axes.plot(firsts, values, marker=".", **STYLES[name])
        axes.set(title=family, xlabel="layer (and the next)", ylabel="distance")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _panels(families: Sequence[str]) -> tuple[Figure, Sequence[tuple[str, Axes]]]:
    """A figure with a panel for each family, the attention's and the MLP's first."""
    families = in_order(families)
    n_rows, n_columns = math.ceil(len(families) / N_COLUMNS), min(N_COLUMNS, len(families))
    size = (PANEL[0] * max(n_columns, 2), PANEL[1] * n_rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for unused in axes[len(families) :]:
        unused.remove()
    return figure, list(zip(families, axes, strict=False))
