"""Which parts share a basis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sharebasis.settings import Family, Side, Storage
from sharebasis.splitting import Part
from sharebasis.sublayer import expert_slot


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that share one basis."""

    parts: tuple[Part, ...]
    side: Side = "input"
    """Where the basis lies: input, Ŵ_i = A_i B, of a residual read, or of one part of any kind;
    output, Ŵ_i = B A_i, of a residual write. The parts are as wide there as each other."""
    structure: str = "fixed"
    """By which of `fit.structures` the parts are together."""

    @property
    def name(self) -> str:
        """The common name of the parts, with ranges for the numbers of layers and experts."""
        first, last = self.parts[0], self.parts[-1]
        if self.structure == "joint":
            return self._joint_name
        slot, label = first.sublayer.slot, f".{first.label}" if first.label else ""
        if first.sublayer.expert != last.sublayer.expert:
            experts = f"{first.sublayer.expert}-{last.sublayer.expert}"
            slot = expert_slot(slot, experts)
        return slot.replace("*", _range(first.sublayer.layer, last.sublayer.layer)) + label

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

    def n_stored(self, rank: int, storage: Storage = "plain") -> int:
        """Numbers in one basis and a coefficient for each part; the index of a pivot is one."""
        if storage == "plain":
            return rank * (self.d_in + self.d_out)
        return rank * (self.d_in + self.d_out - rank) + rank


def groups_of(
    parts: Sequence[Part], group_size: int, shared: Collection[Family], share_experts: bool
) -> Sequence[Group]:
    """Say which parts share, as `fit` is told to: by layers, or experts of a layer.

    Args: as of `adjacent_groups` and `expert_groups`.
    """
    if not share_experts:
        return adjacent_groups(parts, group_size, shared)
    of_experts = [part for part in parts if part.sublayer.expert is not None]
    others = [part for part in parts if part.sublayer.expert is None]
    return [*adjacent_groups(others, group_size, shared), *expert_groups(of_experts)]


def expert_groups(parts: Iterable[Part]) -> Sequence[Group]:
    """Let the same part of all experts of a layer share.

    Args:
        parts: of sublayers of experts.
    """
    by_layer: dict[tuple[int, str, str, int], list[Part]] = {}
    for part in parts:
        slot = expert_slot(part.sublayer.slot)
        key = part.sublayer.layer, slot, part.label, part.shape[1]
        by_layer.setdefault(key, []).append(part)
    return [Group(tuple(same)) for same in by_layer.values()]


def adjacent_groups(
    parts: Iterable[Part], group_size: int, shared: Collection[Family], structure: str = "fixed"
) -> Sequence[Group]:
    """Let the same part of `group_size` adjacent layers share; the last run may be shorter.

    Layers whose part reads inputs of another width share among themselves.

    Args:
        parts: of all selected sublayers.
        group_size: layers in a group.
        shared: families that share; every part of another family is a group of its own.
        structure: what to call it.
    """
    by_slot: dict[tuple[str, str, int], list[Part]] = {}
    for part in parts:
        by_slot.setdefault((part.sublayer.slot, part.label, part.shape[1]), []).append(part)
    groups = []
    for same in by_slot.values():
        same.sort(key=lambda part: part.sublayer.layer)
        size = group_size if same[0].family in shared else 1
        groups += [Group(run, structure=structure) for run in _runs(same, size)]
    return groups


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _runs(parts: list[Part], size: int) -> Iterable[tuple[Part, ...]]:
    for i in range(0, len(parts), size):
        yield tuple(parts[i : i + size])
