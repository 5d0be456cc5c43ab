"""What `recover` says of how it went, beside a model or instead of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sharebasis.io.atomic import writing
from sharebasis.io.records import save_record

RECOVERY = "recovery.json"


@dataclass(frozen=True)
class Evaluation:
    """The divergence on the held-out windows."""

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
    looks: tuple[Evaluation, ...]
    """The evaluations, in order."""


def write_unrecovered(target: Path) -> None:
    """Write that no step was taken."""
    with writing(target) as out:
        save_record(out / RECOVERY, Recovery(0, 0, 0, ()))
