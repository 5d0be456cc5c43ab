"""artifacts/weights and artifacts/spectra -> artifacts/compressed, one group at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharebasis import store
from sharebasis.allocation import DENSE, allocate, curve_of, uniform_ranks
from sharebasis.compressed_index import CompressedGroup, CompressedPart
from sharebasis.compressed_writer import CompressedWriter
from sharebasis.decomposition import Spectra, read_part
from sharebasis.grouping import Group
from sharebasis.limits import limits_of
from sharebasis.progress import progress
from sharebasis.sensitivity.corrections import UNWEIGHED, Sensitivity
from sharebasis.settings import FitSettings, Sensing, Storage
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
    weight: float = 1.0
    """What its loss counted in the allocation."""


@dataclass(frozen=True, slots=True)
class FittedModel:
    """What became of a model."""

    groups: tuple[FittedGroup, ...]
    n_others: int
    """Numbers that are stored as they were: embeddings, norms, biases, what is not selected."""
    weighed_by: Sensing = "none"


def fit(
    weights: Path,
    spectra: Path,
    settings: FitSettings,
    target: Path,
    device: torch.device,
    sensitivity: Sensitivity = UNWEIGHED,
) -> FittedModel:
    """Cut every group's factors to a rank and write the compressed model; whole or not at all.

    Memory holds one group and one shard of the output.

    Args:
        weights: artifacts/weights.
        spectra: artifacts/spectra, of the same weights.
        settings: budget and storage.
        target: artifacts/compressed.
        device: for the interpolative form.
        sensitivity: what the losses of every part count in the allocation.

    Raises:
        BudgetError: a group is too small for the budget, or limits do not go with it.
        SelectionError: a pattern of excluded or limited sublayers matches nothing.
        WeightsError, StoreError: what is read is not usable.
    """
    source, dense = Spectra(spectra), DenseWeights(weights)
    energies = source.energies()
    ranks = choose_ranks(source, sensitivity.weigh(source.groups, energies), settings)
    fitted = []
    with store.writing(target) as out:
        writer = CompressedWriter(out, settings.shard_bytes)
        for name, tensor in dense.stream(without=_fitted_names(source)):
            writer.add(name, tensor)
        n_others = writer.n_numbers
        with progress("fit", len(ranks), "groups") as advance:
            for i, (group, rank) in enumerate(zip(source.groups, ranks, strict=True)):
                before, own = writer.n_numbers, energies[i]
                entry = _entry(group, rank, source.twins, settings.storage)
                if rank == DENSE:
                    originals = (read_part(dense, part) for part in group.parts)
                    names = (f"{_stem(part)}.dense" for part in group.parts)
                    writer.add_dense(entry, dict(zip(names, originals, strict=True)))
                else:
                    dtype = dense.dtype(f"{group.parts[0].sublayer.name}.weight")
                    basis, stacked = (one.to(device) for one in source.factors(i, rank))
                    writer.add_factors(entry, basis, _by_part(group, stacked), dtype)
                loss = 0.0 if rank == DENSE else float(own[rank:].sum())
                n_stored, energy = writer.n_numbers - before, float(own.sum())
                weight, kept = sensitivity.weight(group), rank == DENSE
                fitted.append(FittedGroup(group, entry.rank, n_stored, loss, energy, kept, weight))
                advance()
        writer.finish(companions=weights)
    return FittedModel(tuple(fitted), n_others, sensitivity.by)


def choose_ranks(
    spectra: Spectra, energies: Sequence[NDArray[np.float64]], settings: FitSettings
) -> Sequence[int]:
    limits = limits_of(spectra.groups, spectra.twins, settings)
    if settings.allocation == "uniform":
        return uniform_ranks(spectra.groups, settings.removed, settings.storage, limits)
    of_each = zip(spectra.groups, energies, limits, strict=True)
    curves = [curve_of(group, own, settings.storage, limit) for group, own, limit in of_each]
    entries = allocate(curves, settings.removed)
    return [curve.rank(entry) for curve, entry in zip(curves, entries, strict=True)]


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
        pivots = f"{stem}.pivots" if rank != DENSE and storage == "interpolative" else None
        for sublayer in (part.sublayer.name, *twins[part.sublayer.name]):
            parts.append(CompressedPart(sublayer, part.rows, tensor, pivots))
    basis = None if rank == DENSE else f"{group.name}.basis"
    rank = group.full_rank if rank == DENSE else rank
    return CompressedGroup(group.name, group.family, rank, basis, tuple(parts))


def _by_part(group: Group, stacked: Tensor) -> dict[str, Tensor]:
    """The coefficients of each part, by the name of their tensor."""
    parts = stacked.split([part.shape[0] for part in group.parts])
    names = (f"{_stem(part)}.coefficient" for part in group.parts)
    return dict(zip(names, parts, strict=True))


def _stem(part: Part) -> str:
    return part.sublayer.name + (f".{part.label}" if part.label else "")


def fit_metrics(fitted: FittedModel, settings: FitSettings) -> dict[str, Any]:
    """What was stored, in all and by family; counts are of the tensors as written.

    The top level is about the selected sublayers, `whole_model` about every tensor. A relative
    loss is the quadratic one as predicted; that of `sensitivity`, which the allocation minimised,
    counts every group by its weight.
    """
    by_family: dict[str, list[FittedGroup]] = {}
    for one in fitted.groups:
        by_family.setdefault(one.group.family, []).append(one)
    selected = _counts(fitted.groups)
    return {
        "method": settings.method,
        **selected,
        "sensitivity": _weighed(fitted),
        "families": {family: _counts(own) for family, own in sorted(by_family.items())},
        "whole_model": _removed(
            selected["original_numbers"] + fitted.n_others,
            selected["stored_numbers"] + fitted.n_others,
        ),
    }


def _weighed(fitted: FittedModel) -> dict[str, Any]:
    weights = [one.weight for one in fitted.groups]
    energy = sum(one.weight * one.energy for one in fitted.groups)
    loss = sum(one.weight * one.loss for one in fitted.groups)
    return {
        "by": fitted.weighed_by,
        "min_weight": min(weights),
        "max_weight": max(weights),
        "relative_weighed_loss": loss / energy if energy else 0.0,
    }


def _counts(fitted: Sequence[FittedGroup]) -> dict[str, Any]:
    original = sum(one.group.n_weights for one in fitted)
    stored = sum(one.n_stored for one in fitted)
    energy = sum(one.energy for one in fitted)
    return {
        **_removed(original, stored),
        "n_groups": len(fitted),
        "n_dense": sum(one.dense for one in fitted),
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
