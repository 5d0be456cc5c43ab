"""What structures are worth to a whole model: the loss that `fit=auto` predicts with and without.

    python benchmarks/structures.py [--artifacts artifacts] [--removed 0.2 0.4]
        [--without sparse narrowed] [--offers 'shared:2=k,v' 'shared:2:inner=up,down']

Takes what the stages up to `decompose` and `vary` have written, measures the groups that each offer
adds to those in artifacts/spectra, and lets the allocation choose. An offer is
structures=families, both with commas. Losses are to second order, and before groups that are
chosen are refined for the moments of their parts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sharebasis.forms.mask import n_kept

from sharebasis.allocation.choose import choose
from sharebasis.allocation.sensitivity import UNWEIGHED
from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.fit import NARROWED, SPARSE, FitSettings
from sharebasis.io.records import load_record
from sharebasis.linalg.shared_basis import energies, pooled_basis
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
from sharebasis.structures.shared import offered_groups

Energies = np.ndarray


def measured(groups: Sequence[Group], dense: DenseWeights, problems: Problems) -> list[Energies]:
    found = []
    for group in groups:
        of_group = problems.of(group, [read_part(dense, part) for part in group.parts])
        assert of_group is not None  # calibration has seen it
        found.append(energies(of_group, pooled_basis(of_group)).numpy())
    return found


def row_of(source: Spectra, every: Sequence[Energies], settings: FitSettings) -> tuple[str, ...]:
    """The loss, and what was picked."""
    chosen = choose(source, every, settings, UNWEIGHED, offered=True)
    ranks, plans = chosen.ranks, chosen.plans
    loss = sum(float(every[i][rank:].sum()) for i, rank in ranks.items() if rank != DENSE)
    loss += sum(sum(plan.losses) for plan in plans.values())
    loss += sum(loss_without_entries(source, j, stored) for j, stored in chosen.sparse.items())
    picked = Counter(
        f"{source.groups[i].structure} {source.groups[i].family}"
        for i in ranks
        if i >= source.n_given
    )
    picked |= {NARROWED: len(plans), SPARSE: len(chosen.sparse)}
    return f"{loss:.4f}", ", ".join(f"{n} {what}" for what, n in picked.items() if n)


def loss_without_entries(source: Spectra, j: int, stored: int) -> float:
    n = source.sparse[j].shape[0] * source.sparse[j].shape[1]
    removed = torch.tensor([1 - n_kept(stored, n) / n], dtype=torch.float64)
    return source.sparsities(j).loss_at(removed).item()


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    parser.add_argument("--removed", nargs="+", type=float, default=[0.2, 0.4])
    offers = ["shared:2=k,v", "by_distance:2=k,v", "shared:2,by_distance:2=k,v"]
    parser.add_argument("--offers", nargs="*", default=[*offers, "shared:2:inner=up,down"])
    parser.add_argument("--without", nargs="*", choices=(NARROWED, SPARSE), default=[])
    arguments = parser.parse_args()
    weights, sublayers, moments, variation, spectra = (
        arguments.artifacts / path.name
        for path in (WEIGHTS, SUBLAYERS, MOMENTS, VARIATION, SPECTRA)
    )
    settings = compose_settings().fit
    parts = split_selected(load_record(sublayers, Classification), "none")
    distances, dense = read_table(variation)["aligned"], DenseWeights(weights)
    source = Spectra(spectra)
    if NARROWED in arguments.without:
        source.mlps = ()
    if SPARSE in arguments.without:
        source.sparse = ()
    problems = Problems(MomentStore(moments), source.twins, settings, torch.device("cpu"))
    given, known = source.groups, source.energies()
    print("| offered | removed | loss | picked |\n| --- | --- | --- | --- |")
    for offer in ("nothing", *arguments.offers):
        structures, _, families = offer.partition("=")
        own = replace(
            settings,
            structures=(*settings.structures, *structures.split(",")),
            shared=tuple(families.split(",")),
        )
        groups = offered_groups(parts, own, distances)
        source.groups = (*given, *groups)
        every = [*known, *measured(groups, dense, problems)]
        for removed in arguments.removed:
            loss, picked = row_of(source, every, replace(own, removed=removed))
            print(f"| `{offer}` | {removed} | {loss} | {picked} |", flush=True)


if __name__ == "__main__":
    main()
