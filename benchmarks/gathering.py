"""Moments that a benchmark gathers once, however often it is run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from sharebasis.calibration import calibrate, run_identity
from sharebasis.checkpoint import Checkpoint
from sharebasis.hub import load_model
from sharebasis.moment_store import MomentStore, write_moments
from sharebasis.resources import pick_device
from sharebasis.settings import Settings
from sharebasis.sublayer import Classification


def gather(
    weights: Path,
    work: Path,
    settings: Settings,
    model: Classification,
    windows: Int64[Tensor, "windows window"],
) -> MomentStore:
    """Calibrate into `work`, unless that is done, or go on where an earlier run was stopped."""
    batch, own = settings.data.batch, settings.calibrate
    chosen = {"gradients": own.gradients, "outliers": own.outliers, "seed": settings.seed}
    others = {**chosen, "outliers": asdict(own.outliers)}
    identity = run_identity(weights, model.selected, windows, batch=batch, **others)
    checkpoint = Checkpoint(work / "checkpoint", identity, 60)
    key = work / "moments.key"
    if not (key.exists() and key.read_text() == checkpoint.key):
        dense = load_model(weights, settings.model.dtype, pick_device(settings.device))
        found = calibrate(dense, model.selected, windows, batch, checkpoint, **chosen)
        write_moments(work / "moments", *found)
        key.write_text(checkpoint.key)
        checkpoint.remove()
    return MomentStore(work / "moments")
