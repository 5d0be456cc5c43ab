"""artifacts/weights and artifacts/spectra -> artifacts/compressed, one group at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharebasis import store
from sharebasis.allocation import DENSE, allocate_structures, curve_of, uniform_ranks
from sharebasis.compressed_index import CompressedGroup, CompressedPart
from sharebasis.compressed_writer import CompressedWriter
from sharebasis.cover import Choice, Cover
from sharebasis.decomposition import Spectra, read_part
from sharebasis.errors import CalibrationError
from sharebasis.grouping import Group
from sharebasis.limits import limits_of
from sharebasis.metric import Metric
from sharebasis.moment_store import MomentStore
from sharebasis.progress import progress
from sharebasis.settings import FIXED, PRIVATE, FitSettings, Storage
from sharebasis.shared_basis import fit_shared_basis
from sharebasis.splitting import Part
from sharebasis.weights import DenseWeights


@dataclass(frozen=True, slots=True)
class FittedGroup:
    """What became of a group, for metrics."""

    group: Group
    rank: int
    n_stored: int
    loss: float
    energy: float
    dense: bool
    """Whether its weights are stored as they were."""


@dataclass(frozen=True, slots=True)
class FittedModel:
    """What became of a model."""

    groups: tuple[FittedGroup, ...]
    n_others: int
    """Numbers that are stored as they were: embeddings, norms, biases, what is not selected."""


def fit(
    weights: Path,
    spectra: Path,
    settings: FitSettings,
    target: Path,
    device: torch.device,
    moments: MomentStore | None = None,
) -> FittedModel:
    """Cut every group's factors to a rank and write the compressed model; whole or not at all.

    Memory holds one group, its moments where it shares by choice, and one shard of the output.

    Args:
        weights: artifacts/weights.
        spectra: artifacts/spectra, of the same weights.
        settings: budget and storage; what the spectra were made by is as it was then.
        target: artifacts/compressed.
        device: for the interpolative form, and for groups that share by choice.
        moments: that the spectra were made by, for those groups; without, given ones are taken.

    Raises:
        BudgetError: a group is too small for the budget, or limits do not go with it.
        SelectionError: a pattern of excluded or limited sublayers matches nothing.
        WeightsError, CalibrationError, StoreError: what is read is not usable.
    """
    source, dense = Spectra(spectra), DenseWeights(weights)
    energies = source.energies()
    n_usable = len(source.groups) if moments else source.n_given
    usable = source.groups[:n_usable]
    chosen = _chosen(usable, energies[:n_usable], source.n_given, source.twins, settings)
    metric = Metric(moments, source.twins, settings, device)
    fitted = []
    with store.writing(target) as out:
        writer = CompressedWriter(out, settings.shard_bytes)
        for name, tensor in dense.stream(without=_fitted_names(source)):
            writer.add(name, tensor)
        n_others = writer.n_numbers
        with progress("fit", len(chosen), "groups") as advance:
            for i, rank in chosen.items():
                group, before, own = source.groups[i], writer.n_numbers, energies[i]
                loss = 0.0 if rank == DENSE else float(own[rank:].sum())
                entry = _entry(group, rank, source.twins, settings.storage)
                if rank == DENSE:
                    originals = (read_part(dense, part) for part in group.parts)
                    names = (f"{_stem(part)}.dense" for part in group.parts)
                    writer.add_dense(entry, dict(zip(names, originals, strict=True)))
                else:
                    dtype = dense.dtype(f"{group.parts[0].sublayer.name}.weight")
                    if i < source.n_given:
                        basis, stacked = (one.to(device) for one in source.factors(i, rank))
                    else:
                        basis, stacked, lost = _shared(group, rank, dense, metric, device)
                        loss = lost * float(own.sum())
                    writer.add_factors(entry, basis, _by_part(group, stacked), dtype)
                n_stored, energy = writer.n_numbers - before, float(own.sum())
                fitted.append(FittedGroup(group, entry.rank, n_stored, loss, energy, rank == DENSE))
                advance()
        writer.finish(companions=weights)
    return FittedModel(tuple(fitted), n_others)


def _chosen(
    groups: Sequence[Group],
    energies: Sequence[NDArray[np.float64]],
    n_given: int,
    twins: Mapping[str, Sequence[str]],
    settings: FitSettings,
) -> Mapping[int, int]:
    """Number of every group that there will be, and its rank."""
    given = groups[:n_given]
    limits = limits_of(given, twins, settings)
    if settings.allocation == "uniform":
        return dict(enumerate(uniform_ranks(given, settings.removed, settings.storage, limits)))
    pairs = zip(given, limits, strict=True)
    of_part = {part.name: limit for group, limit in pairs for part in group.parts}
    curves = []
    for i, (group, own) in enumerate(zip(groups, energies, strict=True)):
        all_limits = {of_part[part.name] for part in group.parts}
        if i < n_given:
            curves.append(curve_of(group, own, settings.storage, limits[i]))
        else:
            curves.append(curve_of(group, own, settings.storage).offered(all_limits))
    cover = Cover(_choices(groups, n_given))
    entries = allocate_structures(curves, cover, n_given, settings.removed)
    return {i: curves[i].rank(entry) for i, entry in entries.items()}


def _choices(groups: Sequence[Group], n_given: int) -> Sequence[Choice]:
    names = (part.name for group in groups[:n_given] for part in group.parts)
    numbers = {name: i for i, name in enumerate(names)}
    return [
        Choice(
            number=i,
            parts=frozenset(numbers[part.name] for part in group.parts),
            structure=group.structure if i >= n_given else "",
        )
        for i, group in enumerate(groups)
    ]


def _shared(
    group: Group, rank: int, dense: DenseWeights, metric: Metric, device: torch.device
) -> tuple[Tensor, Tensor, float]:
    """(basis, coefficients stacked, fraction of the energy that is lost) of an offered group."""
    originals = [read_part(dense, part).to(device) for part in group.parts]
    members = metric.members(group, originals)
    if members is None:
        raise CalibrationError(
            f"There is no moment for all of {group.name}; run calibrate and decompose again."
        )
    found = fit_shared_basis(members, rank)
    return found.basis, torch.cat(found.coefficients), found.loss / found.energy


def _fitted_names(spectra: Spectra) -> set[str]:
    names = {part.sublayer.name for group in spectra.groups for part in group.parts}
    return {f"{name}.weight" for own in names for name in (own, *spectra.twins[own])}


def _entry(
    group: Group, rank: int, twins: Mapping[str, Sequence[str]], storage: Storage
) -> CompressedGroup:
    """What a group's tensors are called, each part under all the names of its sublayer."""
    parts = []
    for part in group.parts:
        stem = _stem(part)
        tensor = f"{stem}.dense" if rank == DENSE else f"{stem}.coefficient"
        owner = group.name if group.side == "output" else stem
        pivots = f"{owner}.pivots" if rank != DENSE and storage == "interpolative" else None
        for sublayer in (part.sublayer.name, *twins[part.sublayer.name]):
            parts.append(CompressedPart(sublayer, part.rows, tensor, pivots))
    basis = None if rank == DENSE else f"{group.name}.basis"
    rank = group.full_rank if rank == DENSE else rank
    return CompressedGroup(group.name, group.family, rank, basis, tuple(parts), group.side)


def _by_part(group: Group, stacked: Tensor) -> dict[str, Tensor]:
    """The coefficients of each part, by the name of their tensor."""
    own = 1 if group.side == "output" else 0
    parts = stacked.split([part.shape[own] for part in group.parts])
    names = (f"{_stem(part)}.coefficient" for part in group.parts)
    return dict(zip(names, parts, strict=True))


def _stem(part: Part) -> str:
    return part.sublayer.name + (f".{part.label}" if part.label else "")


def fit_metrics(fitted: FittedModel, settings: FitSettings) -> dict[str, Any]:
    """What was stored, in all and by family; counts are of the tensors as written.

    The top level is about the selected sublayers, `whole_model` about every tensor.
    """
    by_family: dict[str, list[FittedGroup]] = {}
    for one in fitted.groups:
        by_family.setdefault(one.group.family, []).append(one)
    selected = _counts(fitted.groups)
    return {
        "method": settings.method,
        **selected,
        "shared": [
            {"group": one.group.name, "structure": one.group.structure, "rank": one.rank}
            for one in fitted.groups
            if one.group.structure not in (FIXED, PRIVATE)
        ],
        "families": {family: _counts(own) for family, own in sorted(by_family.items())},
        "whole_model": _removed(
            selected["original_numbers"] + fitted.n_others,
            selected["stored_numbers"] + fitted.n_others,
        ),
    }


def _counts(fitted: Sequence[FittedGroup]) -> dict[str, Any]:
    original = sum(one.group.n_weights for one in fitted)
    stored = sum(one.n_stored for one in fitted)
    energy = sum(one.energy for one in fitted)
    return {
        **_removed(original, stored),
        "n_groups": len(fitted),
        "n_dense": sum(one.dense for one in fitted),
        "structures": dict(Counter(one.group.structure for one in fitted)),
        "min_rank": min(one.rank for one in fitted),
        "max_rank": max(one.rank for one in fitted),
        "relative_loss": sum(one.loss for one in fitted) / energy if energy else 0.0,
    }


def _removed(original: int, stored: int) -> dict[str, Any]:
    return {
        "removed_fraction": 1 - stored / original,
        "stored_numbers": stored,
        "original_numbers": original,
    }
