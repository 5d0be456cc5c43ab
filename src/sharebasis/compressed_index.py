"""What artifacts/compressed holds beside the files that every hub model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharebasis.rows import Rows
from sharebasis.settings import Family

FILE = "sharebasis.json"
"""The index, as JSON."""


def present(models: Sequence[Path]) -> Sequence[Path]:
    """The first of some directories, and those others that hold a model.

    A stage that is left out writes none; if the first is missing, loading it says so.
    """
    return [*models[:1], *(one for one in models[1:] if (one / FILE).exists())]


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


@dataclass(frozen=True)
class CompressedIndex:
    """Which part uses which basis, and where the tensors are."""

    groups: tuple[CompressedGroup, ...]
    files: Mapping[str, str]
    """Tensor name -> file name."""
    format: int = 2
