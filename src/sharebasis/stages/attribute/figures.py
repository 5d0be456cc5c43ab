"""An attribution as pictures."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from sharebasis.stages.attribute.attribution import Attribution

_TITLES = {
    "own_error": "own error\n(original's inputs)",
    "inherited_error": "inherited error\n(inputs had changed already)",
}


def components_figure(attribution: Attribution, model: str = "compressed") -> Figure:
    """A heat map, layer by head and MLP, of the divergence that each makes and inherits.

    Heads and MLPs have a colour scale each, as an MLP is worth many heads.

    Args:
        attribution: to be drawn.
        model: what the one with the error is called.
    """
    parts = attribution.components
    n_layers = 1 + max(part.layer for part in parts if part.layer is not None)
    n_heads = 1 + max((part.head for part in parts if part.head is not None), default=0)
    width = 3.0 + 2 * max(2.4, 0.26 * n_heads)
    figure = Figure(figsize=(width, 2.4 + max(2.5, 0.2 * n_layers)), layout="constrained")
    figure.suptitle(
        f"Who is to blame for KL(original ‖ {model}) = {attribution.total['kl']:.4f} nats\n"
        f"mean over {attribution.n_predictions:,} predictions; red: adds to it, blue: takes off",
        fontsize=11,
    )
    head_width = max(4, n_heads)
    grid = figure.subplots(
        1, 4, sharey=True, width_ratios=[head_width, 1.3, head_width, 1.3], squeeze=True
    )
    heads = {kind: np.full((n_layers, n_heads), np.nan) for kind in _TITLES}
    mlps = {kind: np.full((n_layers, 1), np.nan) for kind in _TITLES}
    for part in parts:
        for kind in _TITLES:
            value = 1e3 * getattr(part, kind)["kl"]
            if part.layer is not None and part.head is not None:
                heads[kind][part.layer, part.head] = value
            elif part.layer is not None and part.label.endswith("MLP"):
                mlps[kind][part.layer, 0] = value
    for i, (kind, title) in enumerate(_TITLES.items()):
        image = _map(grid[2 * i], heads[kind], heads)
        _map(grid[2 * i + 1], mlps[kind], mlps)
        grid[2 * i].set_title(title, fontsize=10)
        grid[2 * i].set_xlabel("head")
        grid[2 * i].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        grid[2 * i + 1].set_xticks([0], ["MLP"])
    grid[0].set_ylabel("layer")
    grid[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    label = "heads: 1/1000 nat a prediction"
    figure.colorbar(image, ax=grid, location="bottom", label=label, shrink=0.6, aspect=40, pad=0.02)
    label = "MLPs: 1/1000 nat a prediction"
    figure.colorbar(grid[3].images[0], ax=grid, location="right", label=label, shrink=0.8)
    return figure


def _map(axes: Axes, values: np.ndarray, all_values: dict[str, np.ndarray]) -> AxesImage:
    largest = max(float(np.nanmax(np.abs(x), initial=0)) for x in all_values.values()) or 1.0
    return axes.imshow(
        values,
        cmap="RdBu_r",
        vmin=-largest,
        vmax=largest,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )


def lens_figure(attribution: Attribution, model: str = "compressed") -> Figure:
    """The logit lens over depth, of both models: loss, and divergence from the end.

    Args: as of `components_figure`.
    """
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    figure.suptitle(
        f"Logit lens of the {model} model and the original: last norm and unembedding, at a depth\n"
        f"mean over {attribution.n_lens_predictions:,} predictions",
        fontsize=11,
    )
    loss, kl = figure.subplots(1, 2)
    layers = [depth.layer for depth in attribution.lens]
    loss.plot(layers, [depth.loss for depth in attribution.lens], "o-", ms=3, label="original")
    loss.plot(
        layers, [depth.compressed_loss for depth in attribution.lens], "s--", ms=3, label=model
    )
    loss.set_title("loss of the next token", fontsize=10)
    kl.plot(
        layers[:-1], [depth.kl for depth in attribution.lens[:-1]], "o-", ms=3, label="original"
    )
    kl.plot(layers, [depth.compressed_kl for depth in attribution.lens], "s--", ms=3, label=model)
    kl.set_title("KL(original's end ‖ here); the original itself ends at 0", fontsize=10)
    for axes in (loss, kl):
        axes.set_yscale("log")
        axes.set_xlabel("blocks passed")
        axes.set_ylabel("nats a prediction")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    return figure
