"""artifacts/spectra: what cells of a model would lose, measured once for every budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from sharebasis.architecture.groups import Group
from sharebasis.io.artefact import TensorArtefact, TensorIndex
from sharebasis.structures.structure import MeasuredCell, Structure
from sharebasis.structures.table import structure


@dataclass(frozen=True)
class StoredStructure:
    """A structure, and the cells that it was measured on."""

    name: str
    """In the table of structures."""
    specs: tuple[str, ...]
    """The entries of `fit.structures` that name it."""
    cells: tuple[Mapping[str, Any], ...]
    """Records of its own type."""


@dataclass(frozen=True)
class SpectraIndex(TensorIndex):
    """What artifacts/spectra holds. Cells are numbered as they come, and the tensors of cell i are
    `i.NAME`."""

    structures: tuple[StoredStructure, ...]
    """The first one is the baseline, whose cells cover every part once."""
    tied_names: Mapping[str, tuple[str, ...]]
    """Sublayer -> those that are tied to it."""
    unseen: tuple[int, ...]
    """Cells whose inputs calibration never saw."""
    files: Mapping[str, str]
    """Tensor name -> file name."""


SPECTRA = TensorArtefact("spectra.json", SpectraIndex, "spectra")


class Spectra:
    """artifacts/spectra.

    Raises:
        StoreError: there is no such artefact.
    """

    def __init__(self, directory: Path) -> None:
        index, self._reader = SPECTRA.open(directory)
        self.tied_names = index.tied_names
        self.by_structure: list[tuple[Structure, Sequence[MeasuredCell]]] = []
        """The cells of every structure, those of the baseline first."""
        number = 0
        for stored in index.structures:
            kind = structure(stored.name, stored.specs)
            adapter: TypeAdapter[Any] = TypeAdapter(kind.cell_type)
            cells = []
            for record in stored.cells:
                cell, seen = adapter.validate_python(record), number not in index.unseen
                cells.append(MeasuredCell(number, kind, cell, seen, self._reader))
                number += 1
            self.by_structure.append((kind, cells))

    @property
    def cells(self) -> Sequence[MeasuredCell]:
        """All of them, by number."""
        return [cell for _, cells in self.by_structure for cell in cells]

    @property
    def baseline(self) -> Sequence[Group]:
        """The groups that cover every part once."""
        return [cell.cell for cell in self.by_structure[0][1]]

    @cached_property
    def energies(self) -> Mapping[int, NDArray[np.float64]]:
        """By the number of a cell, what each direction of it saves of the loss, the largest first.

        A group that calibration never saw is taken to matter as much as the average one of its
        family.
        """
        energies = {
            cell.number: cell.read("energies").numpy()
            for cell in self.cells
            if f"{cell.number}.energies" in self._reader.files
        }
        baseline = self.by_structure[0][1]
        seen = [cell for cell in baseline if cell.seen]
        for cell in baseline:
            family = cell.cell.family
            peers = [energies[c.number].sum() for c in seen if c.cell.family == family]
            of_cell = energies[cell.number]
            if not cell.seen and peers and of_cell.any():
                energies[cell.number] = of_cell * (np.mean(peers) / of_cell.sum())
        return energies
