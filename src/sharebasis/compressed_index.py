"""What artifacts/compressed holds beside the files that every hub model has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sharebasis.rows import Rows
from sharebasis.settings import Family

FILE = "sharebasis.json"
"""The index, as JSON."""


@dataclass(frozen=True)
class CompressedPart:
    """Rows of a sublayer and the tensors that hold them."""

    sublayer: str
    rows: Rows
    coefficient: str
    """Of a group without a basis: the rows themselves."""
    pivots: str | None = None
    """Interpolative form: the rows of the part that are rows of the basis."""
    first: int = 0
    """The row of the basis that is the first of them."""


@dataclass(frozen=True)
class CompressedGroup:
    """A basis and the parts that use it."""

    name: str
    family: Family
    rank: int
    basis: str | None
    """None: the parts are stored as they are."""
    parts: tuple[CompressedPart, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all its tensors, that of the basis first."""
        own = (name for part in self.parts for name in (part.coefficient, part.pivots))
        return tuple(dict.fromkeys(name for name in (self.basis, *own) if name))


@dataclass(frozen=True)
class CompressedIndex:
    """Which part uses which basis, and where the tensors are."""

    groups: tuple[CompressedGroup, ...]
    files: Mapping[str, str]
    """Tensor name -> file name."""
    format: int = 2
