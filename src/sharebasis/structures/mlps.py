"""MLPs whose neurons may be pruned: the sublayers between which neurons lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.linalg.rows import Rows

N_WIDTHS = 8
"""Widths that an MLP may have, evenly spaced; the largest of them is the original. The ranks of
the pruned weights fill the steps."""

READ_FAMILIES = ("gate_up", "gate", "up")
"""Of the sublayers that have rows for neurons."""


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
        fused = len({part.sublayer.name for part in self.reads}) == 1 < len(self.reads)
        return tuple(part.rows for part in self.reads) if fused else self.reads[0].gate_up

    @property
    def d_mlp(self) -> int:
        return self.down.shape[1]

    @property
    def n_weights(self) -> int:
        return sum(part.n_weights for part in self.parts)

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of neurons that it may have instead of all, the largest first."""
        widths = {round(self.d_mlp * i / N_WIDTHS) for i in range(1, N_WIDTHS)}
        return tuple(sorted(widths - {0, self.d_mlp}, reverse=True))

    def groups(self, width: int) -> tuple[Group, ...]:
        """One for each part, of the sizes that it has with so many neurons."""
        reads = (_pruned(part, self.d_mlp, width) for part in self.reads)
        shape = self.down.shape[0], width
        down = replace(self.down, sublayer=replace(self.down.sublayer, shape=shape))
        return tuple(Group((part,), structure="neurons") for part in (*reads, down))


def find_mlps(
    groups: Sequence[Group],
    tied_names: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Sequence[Mlp]:
    """The MLPs whose neurons may be pruned: one up, one down and at most one gate of them.

    Each is a group by itself and a whole sublayer, but for gate and up that are one sublayer, cut
    or not. There, the rows of each are a block, or rows of both take turns: groups of rows that do
    would not all lose as many. The module that they are in has nothing else that is as wide as the
    neurons: a norm of theirs would let them know of each other.

    Args:
        groups: that cover every part once.
        tied_names: sublayer -> those that are tied to it.
        shapes: of every tensor of the model.
    """
    by_module: dict[str, dict[str, Part]] = {}
    for group in groups:
        part, name = group.parts[0], group.parts[0].sublayer.name
        role = "write" if part.family == "down" else "read"
        alone = len(group.parts) == 1 and not tied_names[name]
        family = "gate_up" if part.gate_up else part.family
        if alone and family in (*READ_FAMILIES, "down") and part.sublayer.role == role:
            by_module.setdefault(name.rpartition(".")[0], {})[family] = part
    mlps = []
    for module, parts in by_module.items():
        reads = tuple(parts[family] for family in READ_FAMILIES if family in parts)
        if reads and {"up", "gate_up"} & set(parts) and "down" in parts:
            mlp = Mlp(reads, parts["down"])
            if _is_complete(mlp) and not _as_wide(mlp, module, shapes):
                mlps.append(mlp)
    return mlps


def _is_complete(mlp: Mlp) -> bool:
    """Whether its parts are all rows of their sublayers, one or two for each neuron."""
    d_model, gate_up = mlp.down.shape[0], mlp.gate_up
    names = {part.sublayer.name for part in mlp.reads}
    shapes = {part.sublayer.shape for part in mlp.reads}
    if gate_up:
        resizable = all(len(rows) == mlp.d_mlp and rows.resizable for rows in gate_up)
        complete = len(names) == 1 and len(gate_up) == 2 and resizable
    else:
        complete = len(names) == len(mlp.reads) and not any(part.label for part in mlp.reads)
    n_rows = len(gate_up or [0]) * mlp.d_mlp
    return bool(mlp.widths) and complete and shapes == {(n_rows, d_model)}


def _as_wide(mlp: Mlp, module: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What else there is under a module that is as wide as the neurons."""
    of_mlp = {f"{part.sublayer.name}.{last}" for part in mlp.parts for last in ("weight", "bias")}
    return [
        name
        for name, shape in shapes.items()
        if name.startswith(f"{module}.") and name not in of_mlp and mlp.d_mlp in shape
    ]


def _pruned(read: Part, d_mlp: int, width: int) -> Part:
    """A read with the rows of so many neurons."""
    before, d_model = read.sublayer.shape
    after = before // d_mlp * width
    resized, *gate_up = (rows.resized(before, after) for rows in (read.rows, *read.gate_up))
    sublayer = replace(read.sublayer, shape=(after, d_model))
    return replace(read, sublayer=sublayer, rows=resized, gate_up=tuple(gate_up))
