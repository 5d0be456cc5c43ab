"""Where the artefacts of the pipeline lie."""

from __future__ import annotations

from pathlib import Path

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
METRICS = Path("metrics")
PLOTS = Path("plots")
RESULTS = Path("results")
REPORT = Path("report")
PROVENANCE = "provenance"
"""In a metrics file, what its numbers came from."""
