"""Run text through a model and gather the moments of what its sublayers read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.capture import find_sites
from sharebasis.checkpoint import Checkpoint
from sharebasis.experts import unstack
from sharebasis.hub import MANIFEST
from sharebasis.moment_store import Accumulators
from sharebasis.moments import MomentAccumulator, Site
from sharebasis.progress import progress
from sharebasis.resources import require_memory
from sharebasis.rows import Rows
from sharebasis.share_linear import State
from sharebasis.sublayer import Sublayer
from sharebasis.surgery import wrap

log = logging.getLogger(__name__)

PROBE_TOKENS = 4
"""Enough to see which sublayers read the same tensor."""


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    windows: Int64[Tensor, "windows window"],
    batch: int,
    checkpoint: Checkpoint,
) -> tuple[Sequence[Site], Accumulators]:
    """Gather the moment of every distinct input of the selected sublayers.

    Args:
        model: dense, in eval mode; its sublayers are wrapped in place.
        sublayers: whose inputs are tracked.
        windows: token ids, one sequence a row.
        batch: windows a forward pass.
        checkpoint: where a run that was killed goes on from.

    Raises:
        CalibrationError: a sublayer never ran.
        ResourceError: the moments do not fit into memory.
    """
    windows = windows.to(model.device)
    sites, accumulators = start_calibrating(model, sublayers, windows[:1, :PROBE_TOKENS])
    done = checkpoint.resume(accumulators)
    tokens = windows.shape[1]
    with progress("calibrate", windows.numel(), "tokens", done * tokens) as advance:
        for start in range(done, len(windows), batch):
            chunk = windows[start : start + batch]
            run_blocks(model, chunk)
            advance(chunk.numel())
            checkpoint.save_if_due(accumulators, start + len(chunk))
    unseen = [name for name, own in accumulators.items() if own.n_tokens == 0]
    if unseen:
        log.warning(
            "No token of the calibration text went to %d of %d inputs, %s among them; what reads "
            "them will be fitted without whitening. More text may reach them.",
            len(unseen),
            len(sites),
            unseen[0],
        )
    return sites, accumulators


def run_identity(
    weights: Path,
    sublayers: Iterable[Sublayer],
    windows: Int64[Tensor, "windows window"],
    **settings: object,
) -> dict[str, object]:
    """All that the moments depend on, for `Checkpoint`.

    Args:
        weights: artifacts/weights, which its manifest stands for.
        sublayers: whose inputs are tracked.
        windows: token ids.
        settings: whatever else changes the numbers.
    """
    return {
        "weights": hashlib.sha256((weights / MANIFEST).read_bytes()).hexdigest(),
        "sublayers": [sublayer.name for sublayer in sublayers],
        "windows": [*windows.shape, hashlib.sha256(windows.numpy().tobytes()).hexdigest()],
        **settings,
    }


def start_calibrating(
    model: PreTrainedModel, sublayers: Iterable[Sublayer], probe: Int64[Tensor, "windows window"]
) -> tuple[Sequence[Site], Accumulators]:
    """Wrap the sublayers and set every part to CALIBRATING.

    The first reader of a site feeds its accumulator; the others are given the same tensor
    in the same pass and have nothing to add.

    Args:
        model: its sublayers are wrapped in place.
        sublayers: whose inputs are tracked.
        probe: a few token ids, run once to see which sublayers read the same tensor.

    Raises:
        CalibrationError: a sublayer did not run.
        ResourceError: the moments do not fit into memory.
    """
    unstack(model)
    rows = {sublayer.name: [Rows(0, sublayer.shape[0])] for sublayer in sublayers}
    experts = {sublayer.name for sublayer in sublayers if sublayer.expert is not None}
    sites = find_sites(model, rows, lambda: run_blocks(model, probe), idle=experts)
    require_memory(sum(8 * site.d**2 for site in sites), "The moments", model.device)
    modules = wrap(model, rows)
    accumulators = {}
    for site in sites:
        accumulator = MomentAccumulator(site.name, site.d, model.device)
        for reader in site.readers:
            (part,) = modules[reader].parts
            if part.state is State.CALIBRATING:  # a module of several names
                continue
            part.calibrate(accumulator.update if reader == site.name else _already_counted)
        accumulators[site.name] = accumulator
    return sites, accumulators


def run_blocks(model: PreTrainedModel, windows: Int64[Tensor, "windows window"]) -> None:
    """Run all but the head, whose logits nobody reads and which are the largest product."""
    model.base_model(input_ids=windows, use_cache=False)


def _already_counted(_: Tensor) -> None:
    """The tracker of a sublayer whose input another reader of the site counts."""
