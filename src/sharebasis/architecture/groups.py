"""Groups of parts that are stored together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sharebasis.architecture.parts import Part
from sharebasis.architecture.roles import expert_slot
from sharebasis.config.types import Family, Side


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that share one basis."""

    parts: tuple[Part, ...]
    side: Side = "input"
    """Where the basis lies: input, Ŵ_i = A_i B, as of residual reads on the stream's side, or of
    one part of any kind; output, Ŵ_i = B A_i, as of residual writes on the stream's side. The
    parts are as wide there as each other."""
    structure: str = "fixed"
    """By which of `fit.structures` the parts are together."""

    @property
    def name(self) -> str:
        """The common name of the parts, with ranges for the numbers of layers and experts."""
        first, last = self.parts[0], self.parts[-1]
        if len({part.family for part in self.parts}) > 1:
            return self._joint_name
        slot, label = first.sublayer.slot, f".{first.label}" if first.label else ""
        if first.sublayer.expert != last.sublayer.expert:
            experts = f"{first.sublayer.expert}-{last.sublayer.expert}"
            slot = expert_slot(slot, experts)
        return slot.replace("*", _numbers([part.sublayer.layer for part in self.parts])) + label

    @property
    def _joint_name(self) -> str:
        """Of parts of one layer: what their names begin with, and their families."""
        first = self.parts[0].sublayer
        block = first.slot[: first.slot.index("*")] + str(first.layer)
        families = "+".join(dict.fromkeys(part.family for part in self.parts))
        expert = "" if first.expert is None else f".experts.{first.expert}"
        return f"{block}{expert}.{families}"

    @property
    def family(self) -> Family:
        """That of its parts; `fused` where they have several."""
        families = {part.family for part in self.parts}
        return families.pop() if len(families) == 1 else "fused"

    @property
    def d_in(self) -> int:
        """Columns of all parts, put side by side where they share on the output side."""
        if self.side == "output":
            return sum(part.shape[1] for part in self.parts)
        return self.parts[0].shape[1]

    @property
    def d_out(self) -> int:
        """Rows of all parts, stacked where they share on the input side."""
        if self.side == "output":
            return self.parts[0].shape[0]
        return sum(part.shape[0] for part in self.parts)

    @property
    def n_weights(self) -> int:
        """Numbers in the original weights."""
        return self.d_out * self.d_in

    @property
    def full_rank(self) -> int:
        return min(self.d_in, self.d_out)


def _numbers(layers: Sequence[int]) -> str:
    """`3`, `3-5`, `0-1+7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer - runs[-1][-1] in (0, 1):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "+".join(str(x[0]) if x[0] == x[-1] else f"{x[0]}-{x[-1]}" for x in runs)
