"""What `propagate` says of how it went, beside a model or instead of one.

It loads no torch: a stage that is left out has nothing else to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sharebasis.io.atomic import writing
from sharebasis.io.records import save_record

PROPAGATION = "propagation.json"


@dataclass(frozen=True)
class Propagation:
    """How it went. If it was left out, nothing but this lies in its directory."""

    refitted: int
    """Groups; none where the model was better without."""
    left: int
    """Groups that stayed as they were."""
    distances: tuple[float, ...]
    """After every block, the median over tokens of ‖h - ĥ‖² / ‖h‖²; of an update, none."""
    before: float | None = None
    """Mean KL(original || compressed) over the held-out windows, in nats; None: there were none."""
    after: float | None = None
    """The same of the refitted model, whether it was kept or not."""


def write_unpropagated(target: Path) -> None:
    """Write that no block was passed."""
    with writing(target) as out:
        save_record(out / PROPAGATION, Propagation(0, 0, ()))
