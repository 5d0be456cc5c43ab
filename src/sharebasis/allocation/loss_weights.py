"""What the losses of parts count in the allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.architecture.parts import Part


def part_weight(sensitivity: Sensitivity, parts: Sequence[Part]) -> float:
    """The geometric mean over some parts; 1 for what is not named."""
    logs = [math.log(sensitivity.parts.get(part.name, 1.0)) for part in parts]
    return math.exp(sum(logs) / len(logs))
