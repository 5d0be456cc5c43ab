"""Points as figures; the same points give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sharebasis.architecture.sublayers import in_order
from sharebasis.stages.report.points import Cell, Point
from sharebasis.stages.report.series import at_one_budget, series

MARKERS = "os^Dv<>Pp*X"
N_COLUMNS = 4
NEURONS = "neurons of the MLP"
"""The panel of the widths."""
SPAN = 1000
"""How many times its lowest value an axis of the quality shows: what is far off hides the rest."""
DETERMINED: Mapping[str, dict[str, Any]] = {
    "pdf": {"metadata": {"CreationDate": None}},
    "png": {"dpi": 130, "metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None}},
}
"""What keeps the time of day out of a file."""


def figures(points: Sequence[Point]) -> dict[str, Figure]:
    """Every figure that the points give, by name."""
    budget, chosen = at_one_budget(points)
    drawn: dict[str, Figure] = {}
    if sum(_measured(point) for point in points) > 1:
        drawn["quality"] = quality(points)
    if chosen:
        title = f"At a removed fraction of {budget:g}"
        drawn["ranks"] = ranks(chosen, title)
        drawn["families"] = kept_by_family(chosen, title)
        drawn["depth"] = kept_by_layer(chosen, title)
    if any(point.spectrum for point in chosen.values()):
        drawn["spectrum"] = spectrum(chosen)
    for figure in drawn.values():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not for every format
    return drawn


def quality(points: Sequence[Point]) -> Figure:
    """Perplexity and KL against the removed fraction, a line for each method."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = (
        (left, "perplexity", "perplexity, evaluation text"),
        (right, "kl_mean", "KL(original ‖ compressed), nats a token"),
    )
    for axes, metric, title in shown:
        for i, (label, own) in enumerate(series(points).items()):
            _line(axes, own, "compressed", metric, i, label)
            _line(axes, own, "recovered", metric, i, f"{label}, recovered")
        _logarithmic(axes)
        axes.set(xlabel="removed fraction of the compressed weights", ylabel=title)
        axes.grid(alpha=0.3)
    dense = {point.metric("verify", "dense", "perplexity") for point in points} - {None}
    for value in sorted(dense):
        left.axhline(value, color="0.5", linestyle=":", label=f"dense, {value:.2f}")
    _legend_below(figure, [left])
    return figure


def ranks(chosen: Mapping[str, Point], title: str) -> Figure:
    """The rank of every layer as a fraction of the full one, a panel for each family.

    Where neurons are gone, ranks alone would not tell: then what every MLP has left is shown, too.
    What lacks entries has no rank to show.
    """
    cells = [cell for point in chosen.values() for cell in point.cells]
    narrowed = {cell.family for cell in cells if cell.width < 1}
    figure, panels = _panels({cell.family for cell in cells}, [NEURONS] if narrowed else [])
    said = "Rank by layer, as a fraction of the full rank"
    if narrowed:
        said += "; last, neurons as a fraction of all.\nRanks of an MLP are of what is left of it"
    if any(cell.sparse for cell in cells):
        said += "\nNone where weights lack entries"
    figure.suptitle(f"{said}. {title}")
    for i, (label, point) in enumerate(chosen.items()):
        of_panels = {
            **{family: _by_layer(_with_ranks(point), {family}, _rank) for family in panels},
            NEURONS: _by_layer(point.cells, narrowed, _width),
        }
        for panel, axes in panels.items():
            own = of_panels[panel]
            axes.plot(*zip(*own, strict=True), label=label, **_style(i)) if own else None
    for family, axes in panels.items():
        axes.set(title=family, ylim=(0, 1.04), xlabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
    figure.supylabel("fraction left", fontsize=10)
    _legend_below(figure, panels.values())
    return figure


def kept_by_family(chosen: Mapping[str, Point], title: str) -> Figure:
    """The fraction of its numbers that each family keeps, a row for each method."""
    families = in_order(cell.family for point in chosen.values() for cell in point.cells)
    kept = np.array([[_kept(point, {family}) for family in families] for point in chosen.values()])
    whole = np.array([[_kept(point, set(families))] for point in chosen.values()])
    table, columns = np.hstack([kept, whole]), [*families, "all"]
    width = 3.2 + 0.75 * len(columns)
    figure = Figure(figsize=(width, 1.5 + 0.42 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(chosen)), list(chosen))
    for (row, column), value in np.ndenumerate(table):
        color = "white" if value < 0.55 else "black"
        text = "–" if math.isnan(value) else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set_title(f"Fraction of its numbers that a family keeps. {title}", fontsize=10)
    figure.colorbar(image, ax=axes, label="kept")
    return figure


def kept_by_layer(chosen: Mapping[str, Point], title: str) -> Figure:
    """Where the numbers are, layer by layer: of one method by family, of several in all."""
    figure = Figure(figsize=(8.5, 3.8), layout="constrained")
    axes = figure.subplots()
    layers = sorted({cell.layer for point in chosen.values() for cell in point.cells})
    if len(chosen) == 1:
        _stacked(axes, next(iter(chosen.values())), layers)
    else:
        for i, (label, point) in enumerate(chosen.items()):
            kept = [_ratio([cell for cell in point.cells if cell.layer == x]) for x in layers]
            axes.plot(layers, kept, label=label, **_style(i))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("kept fraction of a layer's numbers")
        axes.grid(alpha=0.3)
    axes.set_xlabel("layer")
    axes.set_title(f"Where the numbers went. {title}", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def spectrum(chosen: Mapping[str, Point]) -> Figure:
    """What is left of the loss at a fraction of the full rank, by the method's own measure."""
    spectra = {label: point.spectrum for label, point in chosen.items() if point.spectrum}
    figure, panels = _panels(family for own in spectra.values() for family in own)
    figure.suptitle(
        "Loss spectrum: the loss left when every matrix of a family keeps a fraction of its full\n"
        "rank, relative to rank 0, each method by its own measure; mean over layers"
    )
    for i, (label, own) in enumerate(spectra.items()):
        for family, axes in panels.items():
            left = own.get(family, ())
            fractions = np.arange(len(left)) / max(len(left), 1)
            axes.plot(fractions, left, label=label, **_style(i))
    for family, axes in panels.items():
        axes.set_yscale("log")
        axes.set(title=family, xlim=(0, 1), xticks=(0, 0.25, 0.5, 0.75), xlabel="rank / full rank")
        axes.grid(alpha=0.3)
    figure.supylabel("relative loss", fontsize=10)
    _legend_below(figure, panels.values())
    return figure


def _line(axes: Axes, own: Sequence[Point], model: str, metric: str, i: int, label: str) -> None:
    """One method's values, without the missing ones."""
    xy = [(p.metric("fit", "removed_fraction"), p.metric("verify", model, metric)) for p in own]
    known = [(x, y) for x, y in xy if x is not None and y is not None]
    if known:
        style = _style(i) | ({"linestyle": "--"} if model == "recovered" else {})
        axes.plot(*zip(*known, strict=True), label=label, **{**style, "markersize": 5})


def _logarithmic(axes: Axes) -> None:
    """Logarithmic, with plain numbers, and cut off where a line would hide all others."""
    axes.set_yscale("log")
    heights = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    lowest = min((float(own.min()) for own in heights), default=0.0)
    near = [float(value) for own in heights for value in own if value <= SPAN * lowest]
    if len(near) < sum(map(len, heights)):
        axes.set_ylim(0.8 * lowest, 1.4 * max(near))
        for line, own in zip(axes.lines, heights, strict=True):
            if own.min() > SPAN * lowest:
                line.set_label(f"{line.get_label()} (above the axis)")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(plain if high < 20 * low else NullFormatter())


def _stacked(axes: Axes, point: Point, layers: Sequence[int]) -> None:
    """Stored numbers by family, and what was removed on top."""
    floor = np.zeros(len(layers))
    for i, family in enumerate(in_order(cell.family for cell in point.cells)):
        stored = [_sum(point, layer, {family})[0] for layer in layers]
        axes.bar(layers, stored, bottom=floor, width=0.85, color=f"C{i}", label=family)
        floor += stored
    every = {cell.family for cell in point.cells}
    original = np.array([_sum(point, layer, every)[1] for layer in layers])
    removed = original - floor
    axes.bar(layers, removed, bottom=floor, width=0.85, color="0.88", label="removed")
    axes.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))
    axes.set_ylabel("numbers, millions")


def _sum(point: Point, layer: int, families: set[str]) -> tuple[int, int]:
    own = [cell for cell in point.cells if cell.layer == layer and cell.family in families]
    return sum(cell.stored for cell in own), sum(cell.original for cell in own)


def _by_layer(
    cells: Iterable[Cell], families: set[str], value: Callable[[Cell], float]
) -> list[tuple[int, float]]:
    """A value of every layer that has some families: the least of these."""
    found: dict[int, float] = {}
    for cell in cells:
        if cell.family in families:
            found[cell.layer] = min(value(cell), found.get(cell.layer, math.inf))
    return sorted(found.items())


def _with_ranks(point: Point) -> Sequence[Cell]:
    return [cell for cell in point.cells if not cell.sparse]


def _rank(cell: Cell) -> float:
    return cell.rank / cell.full_rank


def _width(cell: Cell) -> float:
    return cell.width


def _kept(point: Point, families: set[str]) -> float:
    return _ratio([cell for cell in point.cells if cell.family in families])


def _ratio(cells: Sequence[Cell]) -> float:
    original = sum(cell.original for cell in cells)
    return sum(cell.stored for cell in cells) / original if original else math.nan


def _measured(point: Point) -> bool:
    return point.metric("verify", "compressed", "perplexity") is not None


def _style(i: int) -> dict[str, Any]:
    return {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "markersize": 3.5}


def _panels(families: Iterable[str], others: Sequence[str] = ()) -> tuple[Figure, dict[str, Axes]]:
    """A figure with a panel for each family, and some more."""
    names = [*in_order(families), *others]
    n_columns = min(N_COLUMNS, max(len(names), 1))
    n_rows = math.ceil(len(names) / n_columns)
    figure = Figure(figsize=(2.9 * n_columns + 0.6, 2.4 * n_rows + 1.1), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flatten()
    for unused in axes[len(names) :]:
        unused.remove()
    return figure, dict(zip(names, axes, strict=False))


def _legend_below(figure: Figure, panels: Iterable[Axes]) -> None:
    """One of all lines, though no panel may have all of them."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        n_columns = max(1, min(len(found), int(110 / (max(map(len, found)) + 8))))
        handles, names = [*found.values()], [*found]
        figure.legend(handles, names, loc="outside lower center", ncols=n_columns, fontsize=8)
