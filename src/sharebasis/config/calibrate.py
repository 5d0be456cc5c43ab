"""Settings of the stage `calibrate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from sharebasis.config.types import Labels

Treatment = Literal["none", "clip", "trim"]


@dataclass(frozen=True)
class Outliers:
    """What becomes of a token in a moment whose vector is far longer than those of its window."""

    treatment: Treatment
    """none: it counts like the others; clip: as if it were as long as the limit; trim: not at
    all."""
    limit: Annotated[float, Gt(1)]
    """Of the length, times the median of the window's vectors that are not zero."""


EVERY_TOKEN = Outliers("none", math.inf)
"""All count."""


@dataclass(frozen=True)
class OutlierSettings:
    """What becomes of them on each side."""

    inputs: Outliers
    """By the length of what a sublayer reads."""
    gradients: Outliers
    """By that of the gradient of what it puts out."""


@dataclass(frozen=True)
class CalibrateSettings:
    """How the moments are gathered."""

    checkpoint_seconds: Annotated[float, Gt(0)]
    """Longest time between two checkpoints; what a kill can cost."""
    gradients: Labels | None
    """Whether the gradients of outputs are tracked, too, by a backward pass: of the loss on
    the next token of the text, or on one that the model itself has drawn."""
    outliers: OutlierSettings
    """What becomes of tokens that are far longer than others, in moments of inputs and of
    gradients."""
