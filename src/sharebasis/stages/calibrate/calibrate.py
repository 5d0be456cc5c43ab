"""Run text through a model and gather the moments of what its sublayers read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Sublayer
from sharebasis.config.calibrate import OutlierSettings
from sharebasis.config.types import Labels
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.identity import digest_of
from sharebasis.io.manifest import MANIFEST
from sharebasis.model.blocks import PROBE_TOKENS, run_blocks
from sharebasis.model.sites import Site
from sharebasis.moments.gather import gather
from sharebasis.moments.store import Accumulators
from sharebasis.stages.calibrate.backward import SEEDS_APART, run_backward
from sharebasis.stages.calibrate.track import ALL_COUNT, start_calibrating

log = logging.getLogger(__name__)


def calibrate(
    model: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    windows: Int64[Tensor, "windows window"],
    batch: int,
    checkpoint: Checkpoint,
    gradients: Labels | None = None,
    outliers: OutlierSettings = ALL_COUNT,
    seed: int = 0,
) -> tuple[Sequence[Site], Accumulators]:
    """Gather the moment of every distinct input of the selected sublayers.

    Args:
        model: dense, in eval mode; its sublayers are wrapped in place.
        sublayers: whose inputs are tracked.
        windows: token ids, one sequence a row.
        batch: windows a forward pass.
        checkpoint: where a run that was killed goes on from.
        gradients: gather those of the gradients of outputs, too (`run_backward`).
        outliers: what becomes of tokens that are far longer than others.
        seed: of the tokens that the model draws; which ones, the batch and the device say, too.

    Raises:
        CalibrationError: a sublayer never ran.
        ResourceError: the moments do not fit into memory.
    """
    windows = windows.to(model.device)
    probe = windows[:1, :PROBE_TOKENS]
    wanted = gradients is not None
    sites, accumulators = start_calibrating(model, sublayers, probe, wanted, outliers)

    def run(chunk: Tensor, start: int) -> None:
        if gradients is None:
            run_blocks(model, chunk)
        else:
            run_backward(model, chunk, gradients, (seed * SEEDS_APART + start) % 2**32)

    gather(run, accumulators, windows, batch, checkpoint, "calibrate")
    unseen = [site.name for site in sites if accumulators[site.name].n_tokens == 0]
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
        "weights": digest_of(weights / MANIFEST),
        "sublayers": [sublayer.name for sublayer in sublayers],
        "windows": digest_of(windows),
        **settings,
    }
