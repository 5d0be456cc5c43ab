"""What `propagate` and `recover` say of how they went, beside a model or instead of one.

It loads no torch: a stage that is left out has nothing else to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sharebasis import store

PROPAGATION = "propagation.json"
RECOVERY = "recovery.json"


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


@dataclass(frozen=True)
class Look:
    """What the held-out windows said."""

    step: int
    """Steps taken before it."""
    divergence: float
    """Mean KL(original || compressed) over their positions, in nats."""


@dataclass(frozen=True)
class Recovery:
    """How a training went. Without a step, nothing but this lies in its directory."""

    steps: int
    """Taken, until the end or the stop."""
    best: int
    """The step whose factors were kept."""
    tokens: int
    """Trained on, repeats included."""
    looks: tuple[Look, ...]


def write_unpropagated(target: Path) -> None:
    """Write that no block was passed."""
    with store.writing(target) as out:
        store.save_record(out / PROPAGATION, Propagation(0, 0, ()))


def write_unrecovered(target: Path) -> None:
    """Write that no step was taken."""
    with store.writing(target) as out:
        store.save_record(out / RECOVERY, Recovery(0, 0, 0, ()))
