"""Neuron pruning: MLPs with fewer neurons, and perhaps low-rank factors of what remains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.compressed.edits import PrunedNeurons
from sharebasis.forms.dense import Dense
from sharebasis.forms.form import Form
from sharebasis.forms.low_rank import LowRank
from sharebasis.linalg.low_rank import decompose
from sharebasis.linalg.objective import Problem
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.neuron_independence import neurons_are_apart
from sharebasis.moments.problems import Problems
from sharebasis.structures.curve import DENSE
from sharebasis.structures.mlps import Mlp, find_mlps
from sharebasis.structures.pruning_points import PruningPoint, curve_of_points, pruning_points
from sharebasis.structures.structure import (
    Built,
    FittedEdit,
    Measured,
    MeasuredCell,
    ModelParts,
    Offer,
    Structure,
    Task,
    Terms,
    Workshop,
)
from sharebasis.structures.width_curve import WidthCurve, measure, pruned_problems

log = logging.getLogger(__name__)


class Neurons(Structure):
    """Prunes the neurons that are missed least; down is refitted to make up for them."""

    cell_type = Mlp

    def cells(self, model: ModelParts) -> Sequence[Mlp]:
        mlps = find_mlps(model.baseline, model.tied_names, model.dense.shapes)
        apart = [mlp for mlp in mlps if not mlp.gate_up or _are_apart(mlp, model.dense)]
        if n_others := len(mlps) - len(apart):
            log.warning(
                "%d MLPs keep all their neurons: by their own forward pass, a neuron is not made "
                "of the rows of gate and up that gate_up_order and interleave of their weight type "
                "say.",
                n_others,
            )
        return apart

    def measure(self, cell: Mlp, weights: Sequence[Tensor], problems: Problems) -> Measured | None:
        """`neurons`: at every width, the first so many stay; `losses` by width; and `WIDTH.i`, what
        every direction of part i saves at a width."""
        parts = problems.of(Group(cell.parts), weights)
        if parts is None:
            return None
        curve = measure(cell, parts)
        tensors = {
            "neurons": curve.neurons.to("cpu", torch.int32),
            "losses": torch.tensor(curve.losses, dtype=torch.float64),
        }
        for width, energies in zip(cell.widths, curve.energies, strict=True):
            for i, of_part in enumerate(energies):
                tensors[f"{width}.{i}"] = torch.from_numpy(of_part.copy())
        return Measured(tensors)

    def offers(self, cells: Sequence[MeasuredCell], terms: Terms) -> Iterator[Offer]:
        storage = terms.settings.storage
        for cell in cells:
            mlp: Mlp = cell.cell
            limits = [terms.limits[part.name] for part in mlp.parts]
            weights = [terms.weight([part]) for part in mlp.parts]
            points = pruning_points(mlp, _read(cell).weighed(weights), limits, storage)
            if points:
                offered = curve_of_points(mlp.down.name, mlp.n_weights, points)
                # The losses of a point are weighed; `build` divides by the weights.
                yield Offer(mlp.parts, offered, cell, [(point, weights) for point in points])

    def expand(
        self, cell: MeasuredCell, point: tuple[PruningPoint, Sequence[float]], workshop: Workshop
    ) -> Sequence[Task]:
        mlp: Mlp = cell.cell
        kept = tuple(_kept(cell, point[0].width).tolist())
        reads = tuple(dict.fromkeys(part.sublayer.name for part in mlp.reads))
        edit = PrunedNeurons(reads, mlp.down.sublayer.name, kept, mlp.gate_up)
        rows = edit.rows.tolist()
        biases = {f"{name}.bias": partial(_take, rows) for name in reads}
        return [Task(cell, point, edits=[FittedEdit(edit, biases)])]

    def build(
        self, cell: MeasuredCell, point: tuple[PruningPoint, Sequence[float]], workshop: Workshop
    ) -> Callable[[], Sequence[Built]]:
        weights = workshop.weights(cell.cell.parts)
        kept = _kept(cell, point[0].width).to(workshop.device)
        return partial(_build, cell.cell, *point, weights, kept, workshop)


def _build(
    mlp: Mlp,
    point: PruningPoint,
    loss_weights: Sequence[float],
    weights: Sequence[Tensor],
    kept: Tensor,
    workshop: Workshop,
) -> Sequence[Built]:
    parts = workshop.problems.of(Group(mlp.parts), weights)
    assert parts is not None  # it was measured
    pruned = pruned_problems(mlp, parts, kept)
    return [
        Built(group, _form(problem, rank), part.n_weights, loss / weight, workshop.energy(part))
        for part, group, problem, rank, loss, weight in zip(
            mlp.parts,
            mlp.groups(point.width),
            pruned,
            point.ranks,
            point.losses,
            loss_weights,
            strict=True,
        )
    ]


def _form(problem: Problem, rank: int) -> Form:
    if rank == DENSE:
        return Dense((problem.weight,))
    basis, coefficient = decompose([problem]).truncated(rank)
    return LowRank(basis, (coefficient,))


def _read(cell: MeasuredCell) -> WidthCurve:
    mlp: Mlp = cell.cell
    energies = tuple(
        tuple(cell.read(f"{width}.{i}").numpy() for i in range(len(mlp.parts)))
        for width in mlp.widths
    )
    losses = tuple(cell.read("losses").tolist())
    return WidthCurve(cell.read("neurons").long(), losses, energies)


def _kept(cell: MeasuredCell, width: int) -> Tensor:
    """The neurons that stay at a width, ascending."""
    return cell.read("neurons").long()[:width].sort().values


def _take(rows: Sequence[int], tensor: Tensor) -> Tensor:
    return tensor[list(rows)]


def _are_apart(mlp: Mlp, dense: DenseWeights) -> bool:
    names = mlp.reads[0].sublayer.name, mlp.down.sublayer.name
    (module, _, read), (_, _, down) = (name.rpartition(".") for name in names)
    return neurons_are_apart(dense.module(module), read, down, mlp.down.shape[0], mlp.gate_up)
