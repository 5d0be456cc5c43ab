"""Every knob, as plain dataclasses that mirror params.yaml; no framework in here.

`sharebasis.pipeline.settings` reads params.yaml into these and enforces the annotations:
unknown keys, wrong types and values out of range stop a run before it loads a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from sharebasis.config.analyse import (
    AttributeSettings,
    CurveSettings,
    SensitivitySettings,
    VarySettings,
    VerifySettings,
)
from sharebasis.config.calibrate import CalibrateSettings
from sharebasis.config.data import DataSettings
from sharebasis.config.fit import FitSettings, GroupingSettings
from sharebasis.config.model import ModelSettings, SplitSettings
from sharebasis.config.refine import PropagateSettings, RecoverSettings


@dataclass(frozen=True)
class Settings:
    """The whole of params.yaml."""

    model: ModelSettings
    data: DataSettings
    calibrate: CalibrateSettings
    split: SplitSettings
    sensitivity: SensitivitySettings
    grouping: GroupingSettings
    fit: FitSettings
    propagate: PropagateSettings
    recover: RecoverSettings
    curve: CurveSettings
    vary: VarySettings
    verify: VerifySettings
    attribute: AttributeSettings
    device: str
    """torch device, or auto: a GPU where there is one."""
    onednn: bool
    """Multiply float32 matrices by oneDNN on a CPU, without gradients: the same up to rounding, and
    faster than what torch calls by itself on some (`benchmarks/arithmetic.py`)."""
    seed: int
    """Of everything random: the order of the speeches of the default corpus, the tokens that the
    model draws in calibrate, the order of windows in recover, vary's random weights."""
