"""artifacts/weights and artifacts/moments -> artifacts/spectra: what every cell would lose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.fit import FitSettings
from sharebasis.io.atomic import require_disk
from sharebasis.io.tensor_files import TensorWriter
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.part_weights import read_parts
from sharebasis.moments.problems import Problems
from sharebasis.moments.store import MomentStore
from sharebasis.runtime.progress import progress
from sharebasis.runtime.threads import in_parallel
from sharebasis.spectra.store import SPECTRA, SpectraIndex, StoredStructure
from sharebasis.spectra.workers import factor_bytes, workers_of
from sharebasis.structures.layer_distances import LayerDistances
from sharebasis.structures.structure import Measured, ModelParts, Structure
from sharebasis.structures.table import structures_of

SHARD_BYTES = 500 * 2**20
"""Of a file of artifacts/spectra."""


def decompose(
    weights: Path,
    classification: Classification,
    parts: Sequence[Part],
    moments: MomentStore | None,
    settings: FitSettings,
    target: Path,
    device: torch.device,
    distances: LayerDistances | None = None,
) -> None:
    """Measure what every structure would lose where it could apply; whole or not at all.

    Memory holds a cell and its moments for every core, fewer where that is too much, and one
    shard of the output.

    Args:
        weights: artifacts/weights.
        classification: of its sublayers.
        parts: of its selected sublayers.
        moments: of its inputs and gradients; not read by plain SVD.
        settings: method and structures; the budget plays no part.
        target: artifacts/spectra.
        device: for the decompositions.
        distances: by which layers are grouped; None groups adjacent ones.

    Raises:
        SelectionError: a distance is missing.
        WeightsError, CalibrationError, StoreError: what is read is not usable.
    """
    tied_names = _tied_names(parts)
    untied = [part for part in parts if part.sublayer.tied_to is None]
    dense = DenseWeights(weights)
    model = ModelParts(untied, tied_names, classification, dense, settings, distances)
    cells_of = _cells(model)
    problems = Problems(moments, tied_names, settings, device)
    n_cells = sum(len(cells) for _, _, cells in cells_of)
    (_, _, baseline), *_ = cells_of
    with (
        SPECTRA.writing(target, SHARD_BYTES) as spectra,
        progress("decompose", n_cells, "cells") as advance,
    ):
        require_disk(spectra.directory, sum(map(factor_bytes, baseline)))
        stored: list[StoredStructure] = []
        unseen: list[int] = []
        number = 0
        for name, structure, cells in cells_of:
            read = partial(read_parts, dense, device) if structure.needs_weights else _no_weights
            tasks = (partial(structure.measure, cell, read(cell.parts), problems) for cell in cells)
            records = []
            n_workers = workers_of([Group(tuple(cell.parts)) for cell in cells], device)
            for cell, measured in zip(cells, in_parallel(tasks, n_workers), strict=True):
                if measured is not None:
                    _write(spectra, number, measured)
                    unseen += [] if measured.seen else [number]
                    records.append(_record(structure, cell))
                    number += 1
                advance()
            stored.append(StoredStructure(name, structure.specs, tuple(records)))
        spectra.finish(lambda files: SpectraIndex(tuple(stored), tied_names, tuple(unseen), files))


def _no_weights(_: Sequence[Part]) -> Sequence[Tensor]:
    return []


def _cells(model: ModelParts) -> Sequence[tuple[str, Structure, Sequence[Any]]]:
    """What every structure could apply to; later ones see the groups of those before."""
    (name, first), *others = structures_of(model.settings.structures)
    baseline = list(first.cells(model))
    model = replace(model, baseline=baseline)
    cells_of: list[tuple[str, Structure, Sequence[Any]]] = [(name, first, baseline)]
    for name, structure in others:
        cells = list(structure.cells(model))
        cells_of.append((name, structure, cells))
        if structure.takes_in_inputs:
            model = replace(model, offered=[*model.offered, *cells])
    return cells_of


def _write(writer: TensorWriter, number: int, measured: Measured) -> None:
    for name, tensor in measured.tensors.items():
        writer.add(f"{number}.{name}", tensor)


def _record(structure: Structure, cell: Any) -> Mapping[str, Any]:
    record: Mapping[str, Any] = TypeAdapter(structure.cell_type).dump_python(cell, mode="json")
    return record


def _tied_names(parts: Iterable[Part]) -> Mapping[str, tuple[str, ...]]:
    """Sublayer -> those that are tied to it."""
    names: dict[str, dict[str, None]] = {}
    for part in parts:
        tied = names.setdefault(part.sublayer.tied_to or part.sublayer.name, {})
        if part.sublayer.tied_to:
            tied[part.sublayer.name] = None
    return {name: tuple(tied) for name, tied in names.items()}
