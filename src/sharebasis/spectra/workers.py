"""How many decompositions fit into memory at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sharebasis.architecture.groups import Group
from sharebasis.runtime.devices import workers_for

MATRICES_PER_GROUP, MATRICES_PER_PART = 18, 3
"""Matrices as large as the largest moment that a decomposition holds in memory: about so many for
a group, and so many more for each of its parts (measured with 1 to 64 parts)."""


def workers_of(groups: Sequence[Group], device: torch.device) -> int:
    """How many of some groups may be worked on at once."""
    sizes = (
        8
        * max(max(part.shape) for part in group.parts) ** 2
        * (MATRICES_PER_GROUP + MATRICES_PER_PART * len(group.parts))
        for group in groups
    )
    return workers_for(max(sizes, default=0), device)


def factor_bytes(group: Group) -> int:
    """Of the factors of full rank, as files hold them."""
    return 4 * group.full_rank * (group.d_out + group.d_in)
