"""What artifacts/compressed holds beside the files that every hub model has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sharebasis.compressed.former_formats import upgraded
from sharebasis.config.types import Family, Side
from sharebasis.errors import StoreError
from sharebasis.forms.form import Form, RoleTensors
from sharebasis.forms.table import FORMS
from sharebasis.io.records import read_json, record_of
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.rows import Rows

INDEX_FILE = "sharebasis.json"

FORMAT = 6
"""Of the index and of the tensors that it names; earlier ones can be read."""


def present(models: Sequence[Path]) -> Sequence[Path]:
    """The first of some directories, and those others that hold a model.

    A stage that is left out writes none; if the first is missing, loading it says so.
    """
    return [*models[:1], *(model for model in models[1:] if (model / INDEX_FILE).exists())]


@dataclass(frozen=True)
class StoredPart:
    """Rows of a sublayer."""

    sublayers: tuple[str, ...]
    """The HF names of the sublayer: its own and those of sublayers that are tied to it."""
    rows: Rows
    tensors: Mapping[str, str]
    """What the part has for itself: role in the form -> name of the tensor."""

    @property
    def sublayer(self) -> str:
        """The first name."""
        return self.sublayers[0]


@dataclass(frozen=True)
class StoredGroup:
    """Parts that are stored together."""

    name: str
    family: Family
    form: str
    """The kind of their form."""
    parts: tuple[StoredPart, ...]
    tensors: Mapping[str, str]
    """What the parts share: role in the form -> name of the tensor."""
    rank: int | None = None
    """Of a form of factors."""
    side: Side = "input"
    """Where what they share lies."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of all its tensors, those that are shared first."""
        of_parts = (name for part in self.parts for name in part.tensors.values())
        return tuple(dict.fromkeys((*self.tensors.values(), *of_parts)))

    def named(self, tensors: RoleTensors) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a form, by the names that they have in files."""
        for role, tensor in tensors.shared.items():
            yield self.tensors[role], tensor
        for part, by_role in zip(self.parts, tensors.parts, strict=True):
            for role, tensor in by_role.items():
                yield part.tensors[role], tensor

    def read(self, reader: TensorReader, shapes: Sequence[tuple[int, int]] = ()) -> Form:
        """The form of what files hold; `shapes` as of `load`, for a form that asks for them."""
        return self.load({name: reader.read(name) for name in self.tensor_names}, shapes)

    def load(
        self,
        tensors: Mapping[str, Tensor],
        shapes: Sequence[tuple[int, int]],
        kind: type[Form] | None = None,
    ) -> Form:
        """The form of what files hold.

        Args:
            tensors: by name, and perhaps others.
            shapes: (d_out, d_in) of each part.
            kind: another form whose tensors have the same names; None: the group's own.
        """
        shared = {role: tensors[name] for role, name in self.tensors.items() if name in tensors}
        parts = (
            {role: tensors[name] for role, name in part.tensors.items() if name in tensors}
            for part in self.parts
        )
        by_role = RoleTensors(shared, tuple(parts), self.side)
        return (kind or FORMS[self.form]).load(by_role, shapes)


@dataclass(frozen=True)
class CompressedIndex:
    """Which part has which form, and where the tensors are."""

    groups: tuple[StoredGroup, ...]
    files: Mapping[str, str]
    """Tensor name -> file name."""
    edits: tuple[Mapping[str, Any], ...] = ()
    """What is changed around the weights, each with its `kind`: see `compressed.edits`."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format > FORMAT:
            raise ValueError(
                f"format {self.format} is of a later version of sharebasis, this one reads up to "
                f"{FORMAT}"
            )
        if unknown := {group.form for group in self.groups} - FORMS.keys():
            raise ValueError(
                f"there is no form {', '.join(sorted(unknown))}, only {', '.join(FORMS)}"
            )

    @property
    def group_tensors(self) -> frozenset[str]:
        """The names of the tensors of all groups."""
        return frozenset(name for group in self.groups for name in group.tensor_names)

    def group_of(self, sublayer: str) -> StoredGroup:
        """The (first) group that a part of a sublayer is in."""
        return next(g for g in self.groups if any(sublayer in p.sublayers for p in g.parts))

    def find_tensor(self, name: str) -> tuple[StoredGroup, StoredPart]:
        """The part that a tensor belongs to, and its group."""
        parts = ((group, part) for group in self.groups for part in group.parts)
        return next((group, part) for group, part in parts if name in part.tensors.values())


def load_index(directory: Path) -> CompressedIndex:
    """The index of a compressed model, of this or an older format.

    Raises:
        StoreError: it is missing, damaged, or of a later version.
    """
    path = directory / INDEX_FILE
    content = read_json(path)
    try:
        content = upgraded(content)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is no index of a compressed model ({type(error).__name__}: {error}); run dvc "
            "repro to write it again."
        ) from None
    return record_of(path, content, CompressedIndex)
