"""Points as figures; the same points give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from sharebasis.architecture.sublayers import in_order
from sharebasis.stages.report.layer_figures import kept_by_family, kept_by_layer, ranks
from sharebasis.stages.report.panels import legend_below, panels, style
from sharebasis.stages.report.points import Point
from sharebasis.stages.report.series import at_one_budget, series

SPAN = 1000
"""How many times its lowest value an axis of the quality shows: what is far off hides the rest."""


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
    metrics = (
        (left, "perplexity", "perplexity, evaluation text"),
        (right, "kl_mean", "KL(original ‖ compressed), nats a token"),
    )
    for axes, metric, title in metrics:
        for i, (label, line) in enumerate(series(points).items()):
            _line(axes, line, "compressed", metric, i, label)
            _line(axes, line, "recovered", metric, i, f"{label}, recovered")
        _logarithmic(axes)
        axes.set(xlabel="removed fraction of the compressed weights", ylabel=title)
        axes.grid(alpha=0.3)
    dense = {point.metric("verify", "dense", "perplexity") for point in points} - {None}
    for value in sorted(dense):
        left.axhline(value, color="0.5", linestyle=":", label=f"dense, {value:.2f}")
    legend_below(figure, [left])
    return figure


def spectrum(chosen: Mapping[str, Point]) -> Figure:
    """What is left of the loss at a fraction of the full rank, by the method's own measure."""
    spectra = {label: point.spectrum for label, point in chosen.items() if point.spectrum}
    figure, axes = panels(in_order(family for losses in spectra.values() for family in losses))
    figure.suptitle(
        "Loss spectrum: the loss left when every matrix of a family keeps a fraction of its full\n"
        "rank, relative to rank 0, each method by its own measure; mean over layers"
    )
    for i, (label, of_family) in enumerate(spectra.items()):
        for family, panel in axes.items():
            losses = of_family.get(family, ())
            fractions = np.arange(len(losses)) / max(len(losses), 1)
            panel.plot(fractions, losses, label=label, **style(i))
    for family, panel in axes.items():
        panel.set_yscale("log")
        panel.set(title=family, xlim=(0, 1), xticks=(0, 0.25, 0.5, 0.75), xlabel="rank / full rank")
        panel.grid(alpha=0.3)
    figure.supylabel("relative loss", fontsize=10)
    legend_below(figure, axes.values())
    return figure


def _line(axes: Axes, line: Sequence[Point], model: str, metric: str, i: int, label: str) -> None:
    """One method's values, without the missing ones."""
    xy = [(p.metric("fit", "removed_fraction"), p.metric("verify", model, metric)) for p in line]
    known = [(x, y) for x, y in xy if x is not None and y is not None]
    if known:
        dashed = {"linestyle": "--"} if model == "recovered" else {}
        axes.plot(*zip(*known, strict=True), label=label, **style(i) | dashed | {"markersize": 5})


def _logarithmic(axes: Axes) -> None:
    """Logarithmic, with plain numbers, and cut off where a line would hide all others."""
    axes.set_yscale("log")
    heights = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    lowest = min((float(height.min()) for height in heights), default=0.0)
    near = [float(value) for height in heights for value in height if value <= SPAN * lowest]
    if len(near) < sum(map(len, heights)):
        axes.set_ylim(0.8 * lowest, 1.4 * max(near))
        for line, height in zip(axes.lines, heights, strict=True):
            if height.min() > SPAN * lowest:
                line.set_label(f"{line.get_label()} (above the axis)")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(plain if high < 20 * low else NullFormatter())


def _measured(point: Point) -> bool:
    return point.metric("verify", "compressed", "perplexity") is not None
