"""What takes minutes, and a benchmark makes once, however often it is run.

Code is not among what it depends on: after a change of it, begin in an empty directory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from sharebasis.architecture.sublayers import Classification
from sharebasis.config.schema import Settings
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.model.hub import load_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.runtime.devices import pick_device
from sharebasis.stages.calibrate.calibrate import calibrate, run_identity


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
    target = work / "moments"

    def make() -> None:
        dense = load_model(weights, settings.model.dtype, pick_device(settings.device))
        found = calibrate(dense, model.selected, windows, batch, checkpoint, **chosen)
        write_moments(target, *found)
        checkpoint.remove()

    make_once(target, checkpoint, make)
    return MomentStore(target)


def make_once(target: Path, checkpoint: Checkpoint, make: Callable[[], object]) -> None:
    """Call `make`, unless what it makes lies in `target`, and of the checkpoint's identity."""
    key = target.parent / f"{target.name}.key"
    if target.exists() and key.exists() and key.read_text() == checkpoint.key:
        return
    make()
    key.write_text(checkpoint.key)
