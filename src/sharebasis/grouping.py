"""Which parts share a basis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sharebasis.settings import Family
from sharebasis.splitting import Part


@dataclass(frozen=True, slots=True)
class Group:
    """Parts that share one basis on their input side."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The common name of the parts, with the range of layers for the layer number."""
        first, last = self.parts[0].sublayer.layer, self.parts[-1].sublayer.layer
        layers = str(first) if first == last else f"{first}-{last}"
        label = self.parts[0].label
        return self.parts[0].sublayer.slot.replace("*", layers) + (f".{label}" if label else "")

    @property
    def family(self) -> Family:
        return self.parts[0].family

    @property
    def d_in(self) -> int:
        return self.parts[0].shape[1]

    @property
    def d_out(self) -> int:
        """Rows of all parts stacked."""
        return sum(part.shape[0] for part in self.parts)

    @property
    def n_weights(self) -> int:
        """Numbers in the original weights."""
        return self.d_out * self.d_in

    def n_stored(self, rank: int) -> int:
        """Numbers in one basis and a coefficient for each part."""
        return rank * (self.d_in + self.d_out)


def adjacent_groups(
    parts: Iterable[Part], group_size: int, shared: Collection[Family]
) -> Sequence[Group]:
    """Let the same part of `group_size` adjacent layers share; the last run may be shorter.

    Layers whose part reads inputs of another width share among themselves.

    Args:
        parts: of all selected sublayers.
        group_size: layers in a group.
        shared: families that share; every part of another family is a group of its own.
    """
    by_slot: dict[tuple[str, str, int], list[Part]] = {}
    for part in parts:
        by_slot.setdefault((part.sublayer.slot, part.label, part.shape[1]), []).append(part)
    groups = []
    for same in by_slot.values():
        same.sort(key=lambda part: part.sublayer.layer)
        size = group_size if same[0].family in shared else 1
        groups += [Group(run) for run in _runs(same, size)]
    return groups


def _runs(parts: list[Part], size: int) -> Iterable[tuple[Part, ...]]:
    for i in range(0, len(parts), size):
        yield tuple(parts[i : i + size])
