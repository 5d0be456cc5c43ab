"""What artifacts/compressed holds beside the files that every hub model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sharebasis.config.types import Family, Side
from sharebasis.linalg.rows import Rows, rows_at

INDEX_FILE = "sharebasis.json"
"""The index, as JSON."""

FORMAT = 5
"""Of the index and what it says of tensors; older ones lack fields, and can be read."""


def present(models: Sequence[Path]) -> Sequence[Path]:
    """The first of some directories, and those others that hold a model.

    A stage that is left out writes none; if the first is missing, loading it says so.
    """
    return [*models[:1], *(one for one in models[1:] if (one / INDEX_FILE).exists())]


@dataclass(frozen=True)
class CompressedPart:
    """Rows of a sublayer and the tensors that hold them."""

    sublayer: str
    rows: Rows
    coefficient: str
    """Of a group without a basis: the rows themselves."""
    pivots: str | None = None
    """Interpolative form: the rows of the part that are rows of the basis. Of a group that shares
    on the output side, one tensor of all parts: the rows that are those of the coefficients. Of
    values without a basis: the columns of every head that are the identity."""
    first: int = 0
    """The row of the basis that is the first of them."""
    mask: str | None = None
    """Of a weight that lacks entries: a bit for each of them that says whether it is there. The
    coefficient holds those alone, row by row."""


@dataclass(frozen=True)
class CompressedGroup:
    """A basis and the parts that use it."""

    name: str
    family: Family
    rank: int
    basis: str | None
    """None: the parts are stored as they are."""
    parts: tuple[CompressedPart, ...]
    side: Side = "input"
    """input: a part is coefficient @ basis; output: basis @ coefficient."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all its tensors, that of the basis first."""
        own = (name for part in self.parts for name in (part.coefficient, part.pivots, part.mask))
        return tuple(dict.fromkeys(name for name in (self.basis, *own) if name))


@dataclass(frozen=True)
class NarrowedMlp:
    """An MLP without some of its neurons."""

    reads: tuple[str, ...]
    """Sublayers that lack their rows: up, and gate where there is one; or the one that is both."""
    down: str
    """The sublayer that lacks their columns."""
    kept: tuple[int, ...]
    """The original numbers of the neurons that are there, in their order."""
    gate_up: tuple[Rows, ...] = ()
    """Of the one sublayer that is gate and up: the original rows of each."""

    @property
    def rows(self) -> tuple[int, ...]:
        """The original numbers of the rows that each of `reads` has, in their order."""
        if not self.gate_up:
            return self.kept
        return tuple(rows_at(torch.tensor(self.kept), self.gate_up).tolist())

    def original(self, part: Rows) -> Rows | None:
        """Where gate or up lay, if `part` is what is left of it alone; None: it is all there is."""
        before, after = sum(map(len, self.gate_up)), len(self.gate_up) * len(self.kept)
        return next((own for own in self.gate_up if own.resized(before, after) == part), None)


@dataclass(frozen=True)
class TurnedOutput:
    """Values that lack the columns which the output of their heads has taken in."""

    value: str
    """The tensor of their coefficient."""
    output: str
    """A sublayer."""


@dataclass(frozen=True)
class CompressedIndex:
    """Which part uses which basis, and where the tensors are."""

    groups: tuple[CompressedGroup, ...]
    files: Mapping[str, str]
    """Tensor name -> file name."""
    mlps: tuple[NarrowedMlp, ...] = ()
    """Those that are narrower than the model's config says."""
    values: tuple[TurnedOutput, ...] = ()
    """In another gauge than the original's."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format > FORMAT:
            raise ValueError(
                f"format {self.format} is of a later version of sharebasis, this one reads up to "
                f"{FORMAT}"
            )

    def part(self, coefficient: str) -> CompressedPart:
        """The (first) part of a tensor."""
        parts = (part for group in self.groups for part in group.parts)
        return next(part for part in parts if part.coefficient == coefficient)

    def group_of(self, sublayer: str) -> CompressedGroup:
        """The (first) group that a part of a sublayer is in."""
        return next(g for g in self.groups if any(p.sublayer == sublayer for p in g.parts))
