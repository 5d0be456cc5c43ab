"""What structures are worth to a whole model: the loss that `fit=auto` predicts with and without.

    python benchmarks/structures.py [--artifacts artifacts] [--removed 0.2 0.4]
        [--without sparse neurons] [--offers 'shared:2=k,v' 'shared:2:inner=up,down']

Takes what the stages up to `decompose` and `vary` have written, measures the groups that each offer
adds to those in artifacts/spectra, and lets the allocation choose. An offer is
structures=families, both with commas. Losses are to second order, and before groups that are
chosen are refined for the moments of their parts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sharebasis.allocation.choose import choose
from sharebasis.allocation.sensitivity import UNWEIGHED
from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.fit import FitSettings
from sharebasis.io.records import load_record
from sharebasis.linalg.shared_basis import energies, pooled_basis
from sharebasis.linalg.sparsity_curve import SparsityCurve
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.part_weights import read_part
from sharebasis.moments.problems import Problems
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.compose import compose_settings
from sharebasis.pipeline.paths import MOMENTS, SPECTRA, SUBLAYERS, VARIATION, WEIGHTS
from sharebasis.pipeline.stage import report_errors
from sharebasis.spectra.store import Spectra
from sharebasis.structures.curve import DENSE
from sharebasis.structures.layer_distances import read_table
from sharebasis.structures.neurons import Neurons
from sharebasis.structures.sparse import Sparse
from sharebasis.structures.structure import MeasuredCell, ModelParts, Structure
from sharebasis.structures.table import structure
from sharebasis.structures.value_gauge import GaugePoint

Energies = Mapping[int, NDArray[np.float64]]
"""By the number of a cell."""
OFFERED = {"neurons": Neurons, "sparse": Sparse}
"""What can be left out."""


class Extended(Spectra):
    """artifacts/spectra without some structures, and with further groups that share."""

    def __init__(self, directory: Path, without: Sequence[str]) -> None:
        super().__init__(directory)
        left_out = tuple(OFFERED[name] for name in without)
        self._n_cells = len(self.cells)
        self._measured = [pair for pair in self.by_structure if not isinstance(pair[0], left_out)]
        self.by_structure = list(self._measured)
        self._energies: dict[int, NDArray[np.float64]] = {}

    def offer(
        self, structure: Structure, groups: Sequence[Group], energies: Sequence[NDArray[np.float64]]
    ) -> None:
        """Let these be the further groups."""
        (_, (first, *_)), *_ = self._measured
        numbers = range(self._n_cells, self._n_cells + len(groups))
        cells = [
            MeasuredCell(number, structure, group, True, first.reader)
            for number, group in zip(numbers, groups, strict=True)
        ]
        # Behind the baseline: later structures see the groups of those before.
        self.by_structure = [self._measured[0], (structure, cells), *self._measured[1:]]
        self._energies = dict(zip(numbers, energies, strict=True))

    @property
    def energies(self) -> Energies:  # type: ignore[override]
        return {**super().energies, **self._energies}

    def is_further(self, cell: MeasuredCell) -> bool:
        return cell.number in self._energies


def measured(
    groups: Sequence[Group], dense: DenseWeights, problems: Problems
) -> list[NDArray[np.float64]]:
    of_groups = []
    for group in groups:
        members = problems.of(group, [read_part(dense, part) for part in group.parts])
        assert members is not None  # calibration has seen it
        of_groups.append(energies(members, pooled_basis(members)).numpy())
    return of_groups


def row_of(source: Extended, settings: FitSettings) -> tuple[str, str]:
    """The loss, and what was picked."""
    picks, of_cells = choose(source, settings, UNWEIGHED, has_moments=True), source.energies
    loss = sum(loss_of(cell, point, of_cells) for cell, point in picks)
    picked: Counter[str] = Counter()
    for cell, _ in picks:
        if source.is_further(cell):
            picked[f"{cell.cell.structure} {cell.cell.family}"] += 1
        picked.update(name for name, kind in OFFERED.items() if isinstance(cell.structure, kind))
    return f"{loss:.4f}", ", ".join(f"{n} {name}" for name, n in picked.items())


def loss_of(cell: MeasuredCell, point: Any, of_cells: Energies) -> float:
    """What a point of a structure loses, as its curve says."""
    if isinstance(point, GaugePoint):  # the values are dense
        outputs = point.outputs
        return loss_of(outputs.cell, outputs.points[point.entry], of_cells)
    if isinstance(cell.structure, Neurons):
        pruned, _ = point
        return sum(pruned.losses)
    if isinstance(cell.structure, Sparse):
        removed = torch.tensor([1 - point / cell.cell.n_weights], dtype=torch.float64)
        return SparsityCurve(*cell.read("curve").tolist()).loss_at(removed).item()
    return 0.0 if point == DENSE else float(of_cells[cell.number][point:].sum())


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--removed", nargs="+", type=float, default=[0.2, 0.4])
    offers = ["shared:2=k,v", "by_distance:2=k,v", "shared:2,by_distance:2=k,v"]
    parser.add_argument("--offers", nargs="*", default=[*offers, "shared:2:inner=up,down"])
    parser.add_argument("--without", nargs="*", choices=OFFERED, default=[])
    arguments = parser.parse_args()
    weights, sublayers, moments, variation, spectra = (
        arguments.artifacts / path.name
        for path in (WEIGHTS, SUBLAYERS, MOMENTS, VARIATION, SPECTRA)
    )
    settings = compose_settings().fit
    classification = load_record(sublayers, Classification)
    parts = [p for p in split_selected(classification, "none") if p.sublayer.tied_to is None]
    distances, dense = read_table(variation)["aligned"], DenseWeights(weights)
    source = Extended(spectra, arguments.without)
    problems = Problems(MomentStore(moments), source.tied_names, settings, torch.device("cpu"))
    print("| offered | removed | loss | picked |\n| --- | --- | --- | --- |")
    for offer in ("nothing", *arguments.offers):
        names, _, families = offer.partition("=")
        own = replace(settings, shared=tuple(families.split(",")))
        shared = structure("shared", names.split(","))
        model = ModelParts(parts, source.tied_names, classification, dense, own, distances)
        groups = list(shared.cells(model))
        source.offer(shared, groups, measured(groups, dense, problems))
        for removed in arguments.removed:
            loss, picked = row_of(source, replace(own, removed=removed))
            print(f"| `{offer}` | {removed} | {loss} | {picked} |", flush=True)


if __name__ == "__main__":
    main()
