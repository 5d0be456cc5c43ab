"""What the losses of a group count in the allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.architecture.groups import Group


def group_weight(sensitivity: Sensitivity, group: Group) -> float:
    """The geometric mean over the parts of a group; 1 for what is not named."""
    logs = [math.log(sensitivity.parts.get(part.name, 1.0)) for part in group.parts]
    return math.exp(sum(logs) / len(logs))


def weigh(
    sensitivity: Sensitivity, groups: Sequence[Group], energies: Sequence[NDArray[np.float64]]
) -> Sequence[NDArray[np.float64]]:
    """The energies of every group, times its weight."""
    return [
        group_weight(sensitivity, group) * own for group, own in zip(groups, energies, strict=True)
    ]
