"""Values that are stored without some of their columns, and outputs that take these in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.linalg.value_gauge import (
    FixedValues,
    ValueOutput,
    fix_values,
    turned_bias,
    turned_output,
)
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.part_weights import read_part
from sharebasis.spectra.store import Spectra


@dataclass(frozen=True, slots=True)
class GaugeFixing:
    """The gauge of what `fit` writes."""

    source: Spectra
    dense: DenseWeights
    fixed: Mapping[int, ValueOutput]
    """By the number of the group of the values; they are stored dense."""
    device: torch.device

    @property
    def pairs(self) -> Sequence[tuple[Part, Part]]:
        """The parts of the values, and those of their outputs."""
        parts = {part.name: part for group in self.source.groups for part in group.parts}
        return [(parts[own.value], parts[own.output]) for own in self.fixed.values()]

    def values(self, i: int) -> FixedValues | None:
        """What there is to store of group `i`; None: all of it."""
        if (own := self.fixed.get(i)) is None:
            return None
        weight = read_part(self.dense, self._part(i)).to(self.device)
        return fix_values(weight, own.n_kv_heads)

    def bias(self, sublayer: str, bias: Tensor) -> Tensor:
        """Of a sublayer; what is added to values is in their gauge."""
        for i in self.fixed:
            part = self._part(i)
            if part.sublayer.name == sublayer and (values := self.values(i)):
                bias = turned_bias(bias, part.rows.numbers, values.turn)
        return bias

    def weight(self, part: Part, weight: Tensor) -> Tensor:
        """Of a part, or the factor of it that sees its inputs, in their gauge."""
        for i, own in self.fixed.items():
            if own.output == part.name and (values := self.values(i)):
                return turned_output(weight.to(self.device), values.turn)
        return weight

    def factors(self, group: Group, basis: Tensor, stacked: Tensor) -> tuple[Tensor, Tensor]:
        """(basis, coefficients stacked) of a group, in the gauge of what its parts read."""
        if group.side == "input":
            alone = len(group.parts) == 1
            return self.weight(group.parts[0], basis) if alone else basis, stacked
        lengths = [part.shape[1] for part in group.parts]
        pairs = zip(group.parts, stacked.split(lengths), strict=True)
        return basis, torch.cat([self.weight(part, own.T).T for part, own in pairs])

    def _part(self, i: int) -> Part:
        (part,) = self.source.groups[i].parts
        return part
