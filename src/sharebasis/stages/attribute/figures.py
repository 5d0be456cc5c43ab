"""An attribution as pictures."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from sharebasis.stages.attribute.error_attribution import Attribution

_TITLES = {
    "made": "made\n(own weights, original's inputs)",
    "passed_on": "passed on\n(inputs had changed already)",
}


def components_figure(found: Attribution, model: str = "compressed") -> Figure:
    """A heat map, layer by head and MLP, of the divergence that each makes and passes on.

    Heads and MLPs have a colour scale each, as an MLP is worth many heads.

    Args:
        found: to be drawn.
        model: what the one with the error is called.
    """
    n_layers = 1 + max(one.layer for one in found.components if one.layer is not None)
    n_heads = 1 + max((one.head for one in found.components if one.head is not None), default=0)
    width = 3.0 + 2 * max(2.4, 0.26 * n_heads)
    figure = Figure(figsize=(width, 2.4 + max(2.5, 0.2 * n_layers)), layout="constrained")
    figure.suptitle(
        f"Who is to blame for KL(original ‖ {model}) = {found.whole['kl']:.4f} nats\n"
        f"mean over {found.n_predictions:,} predictions; red: adds to it, blue: takes off",
        fontsize=11,
    )
    head_width = max(4, n_heads)
    grid = figure.subplots(
        1, 4, sharey=True, width_ratios=[head_width, 1.3, head_width, 1.3], squeeze=True
    )
    heads = {part: np.full((n_layers, n_heads), np.nan) for part in _TITLES}
    mlps = {part: np.full((n_layers, 1), np.nan) for part in _TITLES}
    for one in found.components:
        for part in _TITLES:
            value = 1e3 * getattr(one, part)["kl"]
            if one.layer is not None and one.head is not None:
                heads[part][one.layer, one.head] = value
            elif one.layer is not None and one.label.endswith("MLP"):
                mlps[part][one.layer, 0] = value
    for i, part in enumerate(_TITLES):
        image = _map(grid[2 * i], heads[part], heads)
        _map(grid[2 * i + 1], mlps[part], mlps)
        grid[2 * i].set_title(_TITLES[part], fontsize=10)
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


def lens_figure(found: Attribution, model: str = "compressed") -> Figure:
    """The logit lens over depth, of both models: loss, and divergence from the end.

    Args: as of `components_figure`.
    """
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    figure.suptitle(
        f"Logit lens of the {model} model and the original: last norm and unembedding, at a depth\n"
        f"mean over {found.n_lens_predictions:,} predictions",
        fontsize=11,
    )
    loss, kl = figure.subplots(1, 2)
    layers = [depth.layer for depth in found.lens]
    loss.plot(layers, [depth.loss for depth in found.lens], "o-", ms=3, label="original")
    loss.plot(layers, [depth.compressed_loss for depth in found.lens], "s--", ms=3, label=model)
    loss.set_title("loss of the next token", fontsize=10)
    kl.plot(layers[:-1], [depth.kl for depth in found.lens[:-1]], "o-", ms=3, label="original")
    kl.plot(layers, [depth.compressed_kl for depth in found.lens], "s--", ms=3, label=model)
    kl.set_title("KL(original's end ‖ here); the original itself ends at 0", fontsize=10)
    for axes in (loss, kl):
        axes.set_yscale("log")
        axes.set_xlabel("blocks passed")
        axes.set_ylabel("nats a prediction")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    return figure
