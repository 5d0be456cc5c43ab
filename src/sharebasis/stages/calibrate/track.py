"""Which inputs and gradients are tracked."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Sublayer
from sharebasis.config.calibrate import EVERY_TOKEN, OutlierSettings
from sharebasis.forms.share_linear import State
from sharebasis.linalg.moments import MomentAccumulator
from sharebasis.linalg.rows import Rows
from sharebasis.model.blocks import run_blocks
from sharebasis.model.experts import unstack
from sharebasis.model.sites import Site, find_sites
from sharebasis.model.surgery import wrap
from sharebasis.moments.store import Accumulators, gradient_site
from sharebasis.runtime.devices import require_memory

ALL_COUNT = OutlierSettings(EVERY_TOKEN, EVERY_TOKEN)
"""Every token counts, however long it is."""


def start_calibrating(
    model: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    probe: Int64[Tensor, "windows window"],
    gradients: bool = False,
    outliers: OutlierSettings = ALL_COUNT,
) -> tuple[Sequence[Site], Accumulators]:
    """Wrap the sublayers and set every part to CALIBRATING.

    The first reader of a site feeds its accumulator; the others are given the same tensor
    in the same pass and have nothing to add.

    Args:
        model: its sublayers are wrapped in place.
        sublayers: whose inputs are tracked.
        probe: a few token ids, run once to see which sublayers read the same tensor.
        gradients: track the gradients of outputs, too; each output has a moment of its own.
        outliers: what becomes of tokens that are far longer than others.

    Raises:
        CalibrationError: a sublayer did not run.
        ResourceError: the moments do not fit into memory.
    """
    unstack(model)
    rows = {sublayer.name: [Rows(0, sublayer.shape[0])] for sublayer in sublayers}
    experts = {sublayer.name for sublayer in sublayers if sublayer.expert is not None}
    sites = find_sites(model, rows, lambda: run_blocks(model, probe), idle=experts)
    outputs = {
        sublayer.name: sublayer.shape[0]
        for sublayer in sublayers
        if gradients and not sublayer.tied_to
    }
    widths = [*(site.d for site in sites), *outputs.values()]
    require_memory(sum(8 * d**2 for d in widths), "The moments", model.device)
    modules = wrap(model, rows)
    accumulators = {
        site.name: MomentAccumulator(site.name, site.d, model.device, outliers.inputs)
        for site in sites
    }
    of_output = {
        name: MomentAccumulator(gradient_site(name), d, model.device, outliers.gradients)
        for name, d in outputs.items()
    }
    tied = {sublayer.name: sublayer.tied_to or sublayer.name for sublayer in sublayers}
    for site in sites:
        for reader in site.readers:
            (part,) = modules[reader].parts
            if part.state is State.CALIBRATING:  # a module of several names
                continue
            update = accumulators[site.name].update if reader == site.name else _already_counted
            gradient = of_output[tied[reader]].update if gradients else None
            part.calibrate(update, gradient)
    return sites, accumulators | {moment.site: moment for moment in of_output.values()}


def _already_counted(_: Tensor) -> None:
    """The tracker of a sublayer whose input another reader of the site counts."""
