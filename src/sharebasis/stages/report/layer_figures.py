"""Where a fit put its numbers: plots/fit/ranks.csv of several methods as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sharebasis.architecture.sublayers import in_order
from sharebasis.stages.report.panels import legend_below, panels, style
from sharebasis.stages.report.points import Point

KEPT = ["stored", "original"]
"""Columns of numbers."""
LABELS = ["family", "layer", "forms"]
KNOWN = [*LABELS, "parts", "rank", "full_rank", *KEPT]
"""Every other column is a fraction of what a weight had before a structure took some of it."""


def cells_of(point: Point) -> pd.DataFrame:
    """Its cells, a row for each family of each layer; a rank is missing where there is none."""
    cells = pd.DataFrame([dict(cell) for cell in point.cells])
    columns = list(dict.fromkeys([*KNOWN, *cells.columns]))
    numbers = [column for column in columns if column not in LABELS]
    return cells.reindex(columns=columns).astype(dict.fromkeys(numbers, float))


def kept(cells: pd.DataFrame, by: str) -> pd.Series:
    """The fraction of the numbers that stay, by family or by layer."""
    sums = cells.groupby(by)[KEPT].sum()
    return sums["stored"] / sums["original"]


def ranks(chosen: Mapping[str, Point], title: str) -> Figure:
    """The rank of every layer as a fraction of the full one, a panel for each family.

    Where a structure takes something of the weights, neurons for example, ranks alone would not
    tell: what is left has a panel, too. A form without a rank has no point.

    Args:
        chosen: a point by the label of its line.
        title: goes on where the figure's own title ends.
    """
    cells = {label: cells_of(point) for label, point in chosen.items()}
    together = pd.concat(cells.values())
    reduced = [
        column
        for column in together.columns
        if column not in KNOWN and (together[column] < 1).any()
    ]
    figure, axes = panels([*in_order(together["family"]), *reduced])
    heading = "Rank by layer, as a fraction of the full rank"
    if reduced:
        heading += f"; last, {' and '.join(reduced)}.\nRanks are of what is left of a weight"
    if together["rank"].isna().any():
        heading += "\nNone where what is stored has no rank"
    figure.suptitle(f"{heading}. {title}")
    for i, (label, table) in enumerate(cells.items()):
        for panel, panel_axes in axes.items():
            if panel in reduced:
                affected = together["family"][together[panel] < 1]
                fraction = table[panel][table["family"].isin(affected)]
            else:
                fraction = (table["rank"] / table["full_rank"])[table["family"] == panel]
            smallest = fraction.groupby(table["layer"]).min().dropna()
            if len(smallest):
                panel_axes.plot(smallest.index, smallest, label=label, **style(i))
    for panel, panel_axes in axes.items():
        panel_axes.set(title=panel, ylim=(0, 1.04), xlabel="layer")
        panel_axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel_axes.grid(alpha=0.3)
    figure.supylabel("fraction left", fontsize=10)
    legend_below(figure, axes.values())
    return figure


def kept_by_family(chosen: Mapping[str, Point], title: str) -> Figure:
    """The fraction of its numbers that each family keeps, a row for each method."""
    rows = {}
    for label, point in chosen.items():
        cells = cells_of(point)
        rows[label] = {
            **kept(cells, "family"),
            "all": cells["stored"].sum() / cells["original"].sum(),
        }
    table = pd.DataFrame(rows).T
    table = table[[*in_order(set(table) - {"all"}), "all"]]
    width = 3.2 + 0.75 * len(table.columns)
    figure = Figure(figsize=(width, 1.5 + 0.42 * len(table)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(table.columns)), list(table.columns))
    axes.set_yticks(range(len(table)), list(table.index))
    for (row, column), fraction in np.ndenumerate(table):
        color = "white" if fraction < 0.55 else "black"
        text = "–" if np.isnan(fraction) else f"{fraction:.2f}"
        axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set_title(f"Fraction of its numbers that a family keeps. {title}", fontsize=10)
    figure.colorbar(image, ax=axes, label="kept")
    return figure


def kept_by_layer(chosen: Mapping[str, Point], title: str) -> Figure:
    """Where the numbers are, layer by layer: of one method by family, of several in all."""
    figure = Figure(figsize=(8.5, 3.8), layout="constrained")
    axes = figure.subplots()
    if len(chosen) == 1:
        (point,) = chosen.values()
        _stacked(axes, cells_of(point))
    else:
        for i, (label, point) in enumerate(chosen.items()):
            fractions = kept(cells_of(point), "layer")
            axes.plot(fractions.index, fractions, label=label, **style(i))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("kept fraction of a layer's numbers")
        axes.grid(alpha=0.3)
    axes.set_xlabel("layer")
    axes.set_title(f"Where the numbers went. {title}", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _stacked(axes: Axes, cells: pd.DataFrame) -> None:
    """Stored numbers by family, and what was removed on top."""
    stored = cells.pivot_table(
        index="layer", columns="family", values="stored", aggfunc="sum", fill_value=0
    )
    original = cells.groupby("layer")["original"].sum()
    layers: Sequence[int] = stored.index
    floor = np.zeros(len(layers))
    for i, family in enumerate(in_order(stored.columns)):
        color = f"C{i}"
        axes.bar(layers, stored[family], bottom=floor, width=0.85, color=color, label=family)
        floor += stored[family].to_numpy()
    axes.bar(layers, original - floor, bottom=floor, width=0.85, color="0.88", label="removed")
    axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
    axes.set_ylabel("numbers, millions")
