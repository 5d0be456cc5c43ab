"""artifacts/weights and artifacts/spectra -> artifacts/compressed, one group at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharebasis import compressed_index, store
from sharebasis.allocation import DENSE, allocate, curve_of, uniform_ranks
from sharebasis.compressed_index import CompressedGroup, CompressedIndex, CompressedPart
from sharebasis.decomposition import Spectra, read_part
from sharebasis.grouping import Group
from sharebasis.hub import MANIFEST
from sharebasis.interpolative import interpolate
from sharebasis.progress import progress
from sharebasis.settings import FitSettings, Storage
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
    weights: Path, spectra: Path, settings: FitSettings, target: Path, device: torch.device
) -> FittedModel:
    """Cut every group's factors to a rank and write the compressed model; whole or not at all.

    Memory holds one group and one shard of the output.

    Args:
        weights: artifacts/weights.
        spectra: artifacts/spectra, of the same weights.
        settings: budget and storage.
        target: artifacts/compressed.
        device: for the interpolative form.

    Raises:
        BudgetError: a group is too small for the budget.
        WeightsError, StoreError: what is read is not usable.
    """
    source, dense = Spectra(spectra), DenseWeights(weights)
    energies = source.energies()
    ranks = _ranks(source.groups, energies, settings)
    fitted, index = [], []
    with store.writing(target) as out:
        writer = store.TensorWriter(out, "sharebasis", settings.shard_bytes)
        for name, tensor in dense.stream(without=_fitted_names(source)):
            writer.add(name, tensor)
        n_others = writer.n_numbers
        with progress("fit", len(ranks), "groups") as advance:
            for i, (group, rank) in enumerate(zip(source.groups, ranks, strict=True)):
                before = writer.n_numbers
                if rank == DENSE:
                    tensors = [read_part(dense, part) for part in group.parts]
                    index.append(_write_dense(writer, group, tensors, source.twins))
                else:
                    dtype = dense.dtype(f"{group.parts[0].sublayer.name}.weight")
                    factors = _factors(source.factors(i, rank), group, settings.storage, device)
                    index.append(_write(writer, group, factors, dtype, source.twins))
                loss = 0.0 if rank == DENSE else float(energies[i][rank:].sum())
                n_stored, energy = writer.n_numbers - before, float(energies[i].sum())
                one = FittedGroup(group, index[-1].rank, n_stored, loss, energy, rank == DENSE)
                fitted.append(one)
                advance()
        writer.flush()
        _copy_companions(weights, out)
        store.save_record(out / compressed_index.FILE, CompressedIndex(tuple(index), writer.files))
    return FittedModel(tuple(fitted), n_others)


def _ranks(
    groups: Sequence[Group], energies: Sequence[NDArray[np.float64]], settings: FitSettings
) -> Sequence[int]:
    if settings.allocation == "uniform":
        return uniform_ranks(groups, settings.removed, settings.storage)
    pairs = zip(groups, energies, strict=True)
    curves = [curve_of(group, own, settings.storage) for group, own in pairs]
    entries = allocate(curves, settings.removed)
    return [curve.rank(entry) for curve, entry in zip(curves, entries, strict=True)]


def _fitted_names(spectra: Spectra) -> set[str]:
    names = {part.sublayer.name for group in spectra.groups for part in group.parts}
    return {f"{name}.weight" for own in names for name in (own, *spectra.twins[own])}


@dataclass(frozen=True, slots=True)
class _PartFactors:
    """What a part stores beside the basis."""

    coefficient: Tensor
    pivots: Tensor | None = None
    first: int = 0


def _factors(
    factors: tuple[Tensor, Tensor], group: Group, storage: Storage, device: torch.device
) -> tuple[Tensor, Sequence[_PartFactors]]:
    """The basis, and what each part stores, in a form."""
    basis, coefficient = (factor.to(device) for factor in factors)
    lengths = [part.shape[0] for part in group.parts]
    if storage == "plain":
        return basis, [_PartFactors(own) for own in coefficient.split(lengths)]
    form = interpolate(coefficient, basis)
    parts, start, first, row = [], 0, 0, 0
    for length in lengths:
        inside = (form.pivots >= start) & (form.pivots < start + length)
        n_pivots = int(inside.sum())
        n_rest = length - n_pivots
        own = form.coefficient[row : row + n_rest]
        parts.append(_PartFactors(own, form.pivots[inside] - start, first))
        start, first, row = start + length, first + n_pivots, row + n_rest
    return form.basis, parts


def _write(
    writer: store.TensorWriter,
    group: Group,
    factors: tuple[Tensor, Sequence[_PartFactors]],
    dtype: torch.dtype,
    twins: Mapping[str, Sequence[str]],
) -> CompressedGroup:
    """Store a basis once and what every part adds, in the dtype of the original."""
    basis, of_parts = factors
    name = f"{group.name}.basis"
    writer.add(name, basis.to("cpu", dtype))
    parts: list[CompressedPart] = []
    for part, own in zip(group.parts, of_parts, strict=True):
        stem = _stem(part)
        writer.add(f"{stem}.coefficient", own.coefficient.to("cpu", dtype))
        if own.pivots is not None:
            writer.add(f"{stem}.pivots", own.pivots.to("cpu", torch.int32))
        for sublayer in (part.sublayer.name, *twins[part.sublayer.name]):
            pivots = None if own.pivots is None else f"{stem}.pivots"
            coefficient = f"{stem}.coefficient"
            parts.append(CompressedPart(sublayer, part.rows, coefficient, pivots, own.first))
    return CompressedGroup(group.name, group.family, len(basis), name, tuple(parts))


def _write_dense(
    writer: store.TensorWriter,
    group: Group,
    weights: Sequence[Tensor],
    twins: Mapping[str, Sequence[str]],
) -> CompressedGroup:
    """Store the parts of a group as they were."""
    parts = []
    for part, weight in zip(group.parts, weights, strict=True):
        name = f"{_stem(part)}.dense"
        writer.add(name, weight)
        for sublayer in (part.sublayer.name, *twins[part.sublayer.name]):
            parts.append(CompressedPart(sublayer, part.rows, name))
    return CompressedGroup(group.name, group.family, group.full_rank, None, tuple(parts))


def _stem(part: Part) -> str:
    return part.sublayer.name + (f".{part.label}" if part.label else "")


def _copy_companions(weights: Path, out: Path) -> None:
    """Config, tokenizer and the like; whatever is not weights."""
    for path in weights.iterdir():
        if ".safetensors" not in path.name and path.name != MANIFEST:
            shutil.copyfile(path, out / path.name)


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
