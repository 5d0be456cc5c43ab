"""Every part by itself: a basis and a coefficient of its own, or dense."""

from __future__ import annotations

from collections.abc import Sequence

from sharebasis.architecture.groups import Group
from sharebasis.structures.factors import FactorStructure, by_layer
from sharebasis.structures.groups import adjacent_groups
from sharebasis.structures.structure import ModelParts


class Private(FactorStructure):
    """The baseline where no other structure is one."""

    @property
    def is_baseline(self) -> bool:
        return True

    def cells(self, model: ModelParts) -> Sequence[Group]:
        return by_layer(adjacent_groups(model.parts, 1, (), "private"))
