"""MLPs that may lose neurons: the sublayers between which neurons lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.linalg.rows import Rows

WIDTHS = 8
"""Widths that an MLP may have, evenly spaced; the largest of them is the original. The ranks of
what is left fill the steps."""

READS = ("gate_up", "gate", "up")
"""What neurons are read by."""


@dataclass(frozen=True, slots=True)
class Mlp:
    """The sublayers between which neurons lie."""

    reads: tuple[Part, ...]
    """gate where there is one, and up: a row for each neuron; or both in one: two rows."""
    down: Part
    """A column for each neuron."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.reads, self.down)

    @property
    def gate_up(self) -> tuple[Rows, ...]:
        """The rows of gate and of up in the one sublayer that is both; none where there is none."""
        one = len({part.sublayer.name for part in self.reads}) == 1 < len(self.reads)
        return tuple(part.rows for part in self.reads) if one else self.reads[0].gate_up

    @property
    def d_mlp(self) -> int:
        return self.down.shape[1]

    @property
    def n_weights(self) -> int:
        return sum(part.n_weights for part in self.parts)

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of neurons that it may have instead of all, the largest first."""
        widths = {round(self.d_mlp * i / WIDTHS) for i in range(1, WIDTHS)}
        return tuple(sorted(widths - {0, self.d_mlp}, reverse=True))

    def groups(self, width: int) -> tuple[Group, ...]:
        """One for each part, of the sizes that it has with so many neurons."""
        reads = (_narrower(part, self.d_mlp, width) for part in self.reads)
        shape = self.down.shape[0], width
        down = replace(self.down, sublayer=replace(self.down.sublayer, shape=shape))
        return tuple(Group((part,), structure="neurons") for part in (*reads, down))


def find_mlps(
    groups: Sequence[Group],
    twins: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Sequence[Mlp]:
    """The MLPs that may lose neurons: one up, one down and at most one gate of the same neurons.

    Each is a group of its own and a whole sublayer, but for gate and up that are one sublayer, cut
    or not. There, the rows of each are a block, or rows of both take turns: groups of rows that do
    would not all lose as many. The module that they are in has nothing else that is as wide as the
    neurons: a norm of theirs would let them know of each other.

    Args:
        groups: that cover every part once.
        twins: sublayer -> those that use its weight, too.
        shapes: of every tensor of the model.
    """
    found: dict[str, dict[str, Part]] = {}
    for group in groups:
        part, name = group.parts[0], group.parts[0].sublayer.name
        role = "write" if part.family == "down" else "read"
        alone = len(group.parts) == 1 and not twins[name]
        family = "gate_up" if part.gate_up else part.family
        if alone and family in (*READS, "down") and part.sublayer.role == role:
            found.setdefault(name.rpartition(".")[0], {})[family] = part
    mlps = []
    for module, parts in found.items():
        reads = tuple(parts[family] for family in READS if family in parts)
        if reads and {"up", "gate_up"} & set(parts) and "down" in parts:
            mlp = Mlp(reads, parts["down"])
            if _is_whole(mlp) and not _as_wide(mlp, module, shapes):
                mlps.append(mlp)
    return mlps


def _is_whole(mlp: Mlp) -> bool:
    d_model, gate_up = mlp.down.shape[0], mlp.gate_up
    names = {part.sublayer.name for part in mlp.reads}
    shapes = {part.sublayer.shape for part in mlp.reads}
    if gate_up:
        placed = all(len(own) == mlp.d_mlp and own.resizable for own in gate_up)
        whole = len(names) == 1 and len(gate_up) == 2 and placed
    else:
        whole = len(names) == len(mlp.reads) and not any(part.label for part in mlp.reads)
    n_rows = len(gate_up or [0]) * mlp.d_mlp
    return bool(mlp.widths) and whole and shapes == {(n_rows, d_model)}


def _as_wide(mlp: Mlp, module: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What else there is under a module that is as wide as the neurons."""
    own = {f"{part.sublayer.name}.{last}" for part in mlp.parts for last in ("weight", "bias")}
    return [
        name
        for name, shape in shapes.items()
        if name.startswith(f"{module}.") and name not in own and mlp.d_mlp in shape
    ]


def _narrower(read: Part, d_mlp: int, width: int) -> Part:
    """What reads for so many neurons of all."""
    before, d_model = read.sublayer.shape
    after = before // d_mlp * width
    rows, *gate_up = (own.resized(before, after) for own in (read.rows, *read.gate_up))
    sublayer = replace(read.sublayer, shape=(after, d_model))
    return replace(read, sublayer=sublayer, rows=rows, gate_up=tuple(gate_up))
