"""artifacts/weights and artifacts/spectra -> artifacts/compressed, one group at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from sharebasis.allocation.choose import choose
from sharebasis.allocation.loss_weights import part_weight
from sharebasis.allocation.sensitivity import UNWEIGHED, Sensitivity
from sharebasis.architecture.groups import Group
from sharebasis.compressed.index import StoredGroup, StoredPart
from sharebasis.compressed.writer import CompressedWriter
from sharebasis.config.fit import FitSettings
from sharebasis.forms.form import Form
from sharebasis.forms.table import packed
from sharebasis.io.atomic import writing
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.moments.problems import Problems
from sharebasis.moments.store import MomentStore
from sharebasis.runtime.progress import progress
from sharebasis.runtime.threads import in_parallel
from sharebasis.spectra.store import Spectra
from sharebasis.spectra.workers import workers_of
from sharebasis.stages.fit.metrics import FittedGroup, FittedModel
from sharebasis.structures.structure import Built, FittedEdit, Task, Workshop


def fit(
    weights: Path,
    spectra: Path,
    settings: FitSettings,
    target: Path,
    device: torch.device,
    moments: MomentStore | None,
    sensitivity: Sensitivity = UNWEIGHED,
) -> FittedModel:
    """Build what the allocation picks and write the compressed model; whole or not at all.

    Memory holds one group, its moments where it shares by choice, and one shard of the output; of
    structures that are built side by side, one cell for each core with its moments.

    Args:
        weights: artifacts/weights.
        spectra: artifacts/spectra, of the same weights.
        settings: budget and storage; what the spectra were made by is as it was then.
        target: artifacts/compressed.
        device: for what is computed.
        moments: that the spectra were made by, for what is offered; None leaves that out.
        sensitivity: what the losses of every part count in the allocation.

    Raises:
        BudgetError: a group is too small for the budget, or limits do not go with it.
        SelectionError: a pattern of excluded or limited sublayers matches nothing.
        WeightsError, CalibrationError, StoreError: what is read is not usable.
    """
    source, dense = Spectra(spectra), DenseWeights(weights)
    picks = choose(source, settings, sensitivity, moments is not None)
    problems = Problems(moments, source.tied_names, settings, device)
    energies = source.energies
    workshop = Workshop(dense, problems, settings, device, source.cells, energies)
    tasks = sorted(
        (t for cell, point in picks for t in cell.structure.expand(cell, point, workshop)),
        key=lambda task: task.cell.number,
    )
    edits = [edit for task in tasks for edit in task.edits]
    with writing(target) as out:
        writer = CompressedWriter(out, settings.shard_bytes)
        n_others = _add_others(writer, dense, source, edits)
        n_others_stored = writer.n_numbers
        groups: list[FittedGroup] = []
        with progress("fit", len(tasks), "cells") as advance:
            for built_cell in _built(tasks, workshop):
                for built in built_cell:
                    weight = part_weight(sensitivity, built.group.parts)
                    groups.append(_add(writer, built, workshop, source.tied_names, weight))
                advance()
        writer.finish(weights, [edit.edit for edit in edits])
    return FittedModel(tuple(groups), n_others, n_others_stored, sensitivity.by)


def _add_others(
    writer: CompressedWriter, dense: DenseWeights, spectra: Spectra, edits: Sequence[FittedEdit]
) -> int:
    """Write what is not selected, and return how many numbers the original has of it."""
    names = {part.sublayer.name for group in spectra.baseline for part in group.parts}
    tied = (alias for name in names for alias in (name, *spectra.tied_names[name]))
    selected = {f"{alias}.weight" for alias in tied}
    changes = [named for edit in edits for named in edit.changes.items()]
    n_numbers = 0
    for name, tensor in dense.stream(without=selected):
        n_numbers += tensor.numel()
        for changed, change in changes:
            if changed == name:
                tensor = change(tensor)
        writer.add(name, tensor)
    return n_numbers


def _built(tasks: Sequence[Task], workshop: Workshop) -> Iterator[Sequence[Built]]:
    """What becomes of every cell, one structure after the other."""
    for structure, of_structure in groupby(tasks, key=lambda task: task.cell.structure):
        structure_tasks = list(of_structure)
        thunks = (partial(_amended, task, _thunk(task, workshop)) for task in structure_tasks)
        if structure.side_by_side:
            groups = [Group(tuple(task.cell.cell.parts)) for task in structure_tasks]
            yield from in_parallel(thunks, workers_of(groups, workshop.device))
        else:
            yield from (thunk() for thunk in thunks)


def _thunk(task: Task, workshop: Workshop) -> Callable[[], Sequence[Built]]:
    return task.cell.structure.build(task.cell, task.point, workshop)


def _amended(task: Task, thunk: Callable[[], Sequence[Built]]) -> Sequence[Built]:
    built = list(thunk())
    for amend in task.amend:
        built = [amend(group) for group in built]
    return built


def _add(
    writer: CompressedWriter,
    built: Built,
    workshop: Workshop,
    tied_names: Mapping[str, Sequence[str]],
    weight: float,
) -> FittedGroup:
    """Write what became of a group."""
    n_before, group = writer.n_numbers, built.group
    form = packed(built.form, workshop.settings.storage)
    dtype = workshop.dense.dtype(f"{group.parts[0].sublayer.name}.weight")
    writer.add_group(_stored_group(group, form, tied_names), form, dtype)
    return FittedGroup(
        group,
        form.kind,
        built.n_original,
        form.rank,
        writer.n_numbers - n_before,
        built.loss,
        built.energy,
        weight,
    )


def _stored_group(group: Group, form: Form, tied_names: Mapping[str, Sequence[str]]) -> StoredGroup:
    """What a group's tensors are called: by its parts, and by the group where those share them."""
    tensors = form.tensors()
    parts = []
    for part, of_part in zip(group.parts, tensors.parts, strict=True):
        names = {role: f"{part.stem}.{role}" for role in of_part}
        sublayers = part.sublayer.name, *tied_names[part.sublayer.name]
        parts.append(StoredPart(sublayers, part.rows, names))
    shared = {role: f"{group.name}.{role}" for role in tensors.shared}
    return StoredGroup(
        group.name, group.family, form.kind, tuple(parts), shared, form.rank, tensors.side
    )
