"""What every script has around it: logging, memory, and errors that a person can read."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from sharebasis.allocator import keep_freed_memory
from sharebasis.errors import ShareBasisError
from sharebasis.ledger import recorded

P = ParamSpec("P")

WEIGHTS = Path("artifacts/weights")
SUBLAYERS = Path("artifacts/sublayers.json")
MOMENTS = Path("artifacts/moments")
CHECKPOINTS = Path("artifacts/checkpoints")
CHECKPOINT = CHECKPOINTS / "calibrate"
SPECTRA = Path("artifacts/spectra")
CURVE = Path("artifacts/curve")
SENSITIVITY = Path("artifacts/sensitivity.json")
SENSITIVITY_DRAFT = CHECKPOINTS / "sensitivity"
VARIATION = Path("artifacts/variation.csv")
COMPRESSED = Path("artifacts/compressed")
PROPAGATION_CHECKPOINT = CHECKPOINTS / "propagate"
PROPAGATED = Path("artifacts/propagated")
RECOVERY_CHECKPOINT = CHECKPOINTS / "recover"
RECOVERED = Path("artifacts/recovered")
MODELS = (COMPRESSED, PROPAGATED, RECOVERED)
"""In the order in which one is made of the other; those of optional stages may hold none."""
ATTRIBUTION = Path("artifacts/attribution")
METRICS = Path("metrics")
PLOTS = Path("plots")
RESULTS = Path("results")
REPORT = Path("report")
PROVENANCE = "provenance"
"""In a metrics file, what its numbers came from."""


def report_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Let a script end with one line and status 1 where bad input or the machine stops it."""
    script = Path(main.__code__.co_filename).stem

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("sharebasis").setLevel(logging.INFO)
        keep_freed_memory()
        try:
            with recorded(script):
                main(*args, **kwargs)
        except ShareBasisError as error:
            sys.exit(f"{type(error).__name__}: {error}")

    return run
