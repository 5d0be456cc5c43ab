"""What a structure is: it offers, the allocation picks, and it builds what was picked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.edits import Edit
from sharebasis.config.fit import FitSettings
from sharebasis.forms.form import Form
from sharebasis.io.tensor_files import TensorReader
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.part_weights import read_part
from sharebasis.moments.problems import Problems
from sharebasis.structures.curve import Curve
from sharebasis.structures.layer_distances import LayerDistances
from sharebasis.structures.limits import Limit

ALL = slice(None)
"""Rows or columns."""


@dataclass(frozen=True)
class ModelParts:
    """A model as structures see it when they say what they could apply to."""

    parts: Sequence[Part]
    """Of all selected sublayers whose weight is their own."""
    tied_names: Mapping[str, Sequence[str]]
    """Sublayer -> those that are tied to it."""
    classification: Classification
    dense: DenseWeights
    settings: FitSettings
    distances: LayerDistances | None = None
    """Between layers; None groups adjacent ones."""
    baseline: Sequence[Group] = ()
    """The groups that cover every part once; none while those are asked for."""
    offered: Sequence[Group] = ()
    """Further groups that share."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What `decompose` writes of a cell, for every budget."""

    tensors: Mapping[str, Tensor]
    """By names of the structure's own. `energies`, if there, is what each direction saves of the
    loss, the largest first."""
    seen: bool = True
    """Whether calibration saw the inputs; else the energies are in units of their own."""


@dataclass(frozen=True, slots=True)
class MeasuredCell:
    """A cell of artifacts/spectra: some parts of a model, and what a structure measured of them."""

    number: int
    structure: Structure
    cell: Any
    """Of the structure's `cell_type`."""
    seen: bool
    reader: TensorReader

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """A tensor that was measured, or some of its rows or columns."""
        return self.reader.read(f"{self.number}.{name}", rows, columns=columns)


@dataclass(frozen=True)
class Terms:
    """What the curves of offers depend on, beside what was measured."""

    settings: FitSettings
    limits: Mapping[str, Limit]
    """Of every part, by name."""
    energies: Mapping[int, NDArray[np.float64]]
    """Of cells that have any, by number, in one unit."""
    weight: Callable[[Sequence[Part]], float]
    """What a loss of some parts counts."""
    offers: list[Offer] = field(default_factory=list)
    """Of structures before."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A way to store some parts, with all that it may cost and lose."""

    parts: Sequence[Part]
    curve: Curve
    cell: MeasuredCell
    points: Sequence[Any]
    """For every entry of the curve, what `Structure.build` makes."""


@dataclass(frozen=True, slots=True)
class FittedEdit:
    """An edit, and what becomes of tensors that belong to no part."""

    edit: Edit
    changes: Mapping[str, Callable[[Tensor], Tensor]]
    """By the name of the tensor."""


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a group."""

    group: Group
    """In the sizes that it has now."""
    form: Form
    """In float64, or as it was; editable ones are packed as `fit.storage` says."""
    n_original: int
    """Numbers of the original weights."""
    loss: float
    """Predicted, quadratic."""
    energy: float
    """What the loss would be if nothing was left."""


@dataclass(frozen=True, slots=True)
class Task:
    """A point of a cell that was picked, to be built."""

    cell: MeasuredCell
    point: Any
    amend: Sequence[Callable[[Built], Built]] = ()
    """What other structures make of each group that is built."""
    edits: Sequence[FittedEdit] = ()
    """What is changed around the weights."""


@dataclass(frozen=True)
class Workshop:
    """What structures build with."""

    dense: DenseWeights
    problems: Problems
    settings: FitSettings
    device: torch.device
    cells: Sequence[MeasuredCell]
    energies: Mapping[int, NDArray[np.float64]]
    """As of `Terms`."""

    def weights(self, parts: Iterable[Part]) -> Sequence[Tensor]:
        """The original weights of parts, on the device."""
        return [read_part(self.dense, part).to(self.device) for part in parts]

    def energy(self, part: Part) -> float:
        """What would be lost without a part, of those that are a cell by themselves."""
        return float(self.energies[self._alone[part.name]].sum())

    @cached_property
    def _alone(self) -> Mapping[str, int]:
        groups = [cell for cell in self.cells if cell.structure.is_baseline]
        return {c.cell.parts[0].name: c.number for c in groups if len(c.cell.parts) == 1}


class Structure(ABC):
    """Something that may become of cells of a model.

    Args:
        specs: the entries of `fit.structures` that name it; none if it is always offered.
    """

    cell_type: ClassVar[type]
    """Of its cells: a frozen dataclass with `parts`, which artifacts/spectra holds as JSON."""
    side_by_side: ClassVar[bool] = True
    """Whether several cells may be built at once."""
    takes_in_inputs: ClassVar[bool] = False
    """Whether what it builds can have its inputs in another basis (`Form.change_inputs`)."""
    needs_moments: ClassVar[bool] = True
    """Whether it can do nothing without artifacts/moments; a baseline always can."""
    needs_weights: ClassVar[bool] = True
    """Whether `measure` is to be given the weights."""

    def __init__(self, specs: Sequence[str] = ()) -> None:
        self.specs = tuple(specs)

    @property
    def is_baseline(self) -> bool:
        """Whether its cells cover every part once, so that they are there without any choice."""
        return False

    @abstractmethod
    def cells(self, model: ModelParts) -> Iterable[Any]:
        """What it could apply to."""

    @abstractmethod
    def measure(self, cell: Any, weights: Sequence[Tensor], problems: Problems) -> Measured | None:
        """What is lost at any price, once for every budget; in a thread of its own.

        Args:
            cell: one of `cells`.
            weights: (d_out, d_in) of its parts.
            problems: the moments in which losses are measured.

        Returns:
            None: the cell is not offered.
        """

    @abstractmethod
    def offers(self, cells: Sequence[MeasuredCell], terms: Terms) -> Iterable[Offer]:
        """The curves of all of its cells.

        Raises:
            BudgetError: limits do not go with them.
        """

    def expand(self, cell: MeasuredCell, point: Any, workshop: Workshop) -> Sequence[Task]:
        """What is to be built for a point that was picked, and what is changed around it."""
        return [Task(cell, point)]

    @abstractmethod
    def build(
        self, cell: MeasuredCell, point: Any, workshop: Workshop
    ) -> Callable[[], Sequence[Built]]:
        """What is to be done for a point; it reads at once what it needs, and works when called.

        Args:
            cell: measured.
            point: of an offer of the cell.
            workshop: what there is to build with.
        """
