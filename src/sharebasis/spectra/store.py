"""artifacts/spectra: what each part or group would lose, for every budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.io.records import load_record
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.sparsity_curve import SparsityCurve
from sharebasis.linalg.value_gauge import ValueOutput
from sharebasis.structures.neurons import Mlp, Widths

SPECTRA_INDEX = "spectra.json"

SHARD_BYTES = 500 * 2**20


@dataclass(frozen=True)
class SpectraIndex:
    """What artifacts/spectra holds: for group i `i.energies`, and for a given one `i.basis` and
    `i.coefficient`, too."""

    groups: tuple[Group, ...]
    n_given: int
    """How many of them, from the first on, are given: they cover every part once. The others are
    offered in their place, and `fit` makes the factors of those that it takes."""
    twins: Mapping[str, tuple[str, ...]]
    """Sublayer -> those that use its weight, too."""
    unseen: tuple[int, ...]
    """Groups whose inputs calibration never saw; their energies are in units of their own."""
    files: Mapping[str, str]
    """Tensor name -> file name."""
    mlps: tuple[Mlp, ...] = ()
    """Offered with fewer neurons, too: of MLP j there is `mlpj.neurons`, `mlpj.losses` by width,
    and `mlpj.WIDTH.i` for the energies of its part i."""
    values: tuple[ValueOutput, ...] = ()
    """That may be stored without some of their columns."""
    sparse: tuple[Part, ...] = ()
    """Offered without some of their entries, too: of part j there is `sparsej`, by price how many
    are removed, what is lost and that price."""


class Spectra:
    """artifacts/spectra.

    Raises:
        StoreError: there is no such artefact.
    """

    def __init__(self, directory: Path) -> None:
        self._index = load_record(directory / SPECTRA_INDEX, SpectraIndex)
        self._reader = TensorReader(directory, self._index.files)
        self.groups, self.twins = self._index.groups, self._index.twins
        self.n_given, self.mlps = self._index.n_given, self._index.mlps
        self.values, self.sparse = self._index.values, self._index.sparse

    def energies(self) -> Sequence[NDArray[np.float64]]:
        """What each direction of every group saves of the loss, the largest first.

        A group that calibration never saw is taken to matter as much as the average one of
        its family.
        """
        found = [self._reader.read(f"{i}.energies").numpy() for i in range(len(self.groups))]
        for i in self._index.unseen:
            peers = [
                own.sum()
                for j, own in enumerate(found[: self.n_given])
                if j not in self._index.unseen and self.groups[j].family == self.groups[i].family
            ]
            if peers and found[i].any():
                found[i] = found[i] * (np.mean(peers) / found[i].sum())
        return found

    def widths(self, j: int) -> Widths:
        """What MLP `j` loses at each of its widths."""
        mlp, stem = self.mlps[j], f"mlp{j}"
        energies = tuple(
            tuple(self._reader.read(f"{stem}.{width}.{i}").numpy() for i in range(len(mlp.parts)))
            for width in mlp.widths
        )
        losses = self._reader.read(f"{stem}.losses").tolist()
        return Widths(self.neurons(j), tuple(losses), energies)

    def neurons(self, j: int) -> Tensor:
        """Of MLP `j`: at every width, the first so many of these stay."""
        return self._reader.read(f"mlp{j}.neurons").long()

    def kept(self, j: int, width: int) -> Tensor:
        """The neurons of MLP `j` that stay at a width, ascending."""
        return self.neurons(j)[:width].sort().values

    def sparsities(self, j: int) -> SparsityCurve:
        """What the part `sparse[j]` loses as its entries go."""
        return SparsityCurve(*self._reader.read(f"sparse{j}").tolist())

    def factors(self, i: int, rank: int) -> tuple[Tensor, Tensor]:
        """(basis, coefficient) of a given group `i` and a rank, in float64."""
        basis = self._reader.read(f"{i}.basis", slice(0, rank))
        coefficient = self._reader.read(f"{i}.coefficient", columns=slice(0, rank))
        return basis.double(), coefficient.double()
