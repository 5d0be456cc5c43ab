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
    """Rows of a sublayer and the tensor that holds their coefficient."""

    sublayer: str
    rows: Rows
    coefficient: str


@dataclass(frozen=True)
class CompressedGroup:
    """A basis and the parts that use it."""

    name: str
    family: Family
    rank: int
    basis: str
    parts: tuple[CompressedPart, ...]


@dataclass(frozen=True)
class CompressedIndex:
    """Which part uses which basis, and where the tensors are."""

    groups: tuple[CompressedGroup, ...]
    files: Mapping[str, str]
    """Tensor name -> file name."""
    format: int = 2
