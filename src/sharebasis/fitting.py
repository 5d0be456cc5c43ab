"""artifacts/weights and artifacts/spectra -> artifacts/compressed, one group at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharebasis import store
from sharebasis.allocation import DENSE, allocate_structures, curve_of, uniform_ranks
from sharebasis.compressed_index import (
    CompressedGroup,
    CompressedPart,
    NarrowedMlp,
    TurnedOutput,
)
from sharebasis.compressed_writer import CompressedWriter
from sharebasis.cover import Choice, Cover
from sharebasis.decomposition import Spectra, members_of, read_part, workers_of
from sharebasis.errors import CalibrationError
from sharebasis.factorize import decompose_reads
from sharebasis.gauge_fixing import GaugeFixing, fixable
from sharebasis.grouping import Group
from sharebasis.limits import limits_of
from sharebasis.metric import Metric
from sharebasis.moment_store import MomentStore
from sharebasis.narrowing import Mlp, Plan, curve_of_plans, narrowed_members, plans_of
from sharebasis.parallel import in_parallel
from sharebasis.progress import progress
from sharebasis.sensitivity.corrections import group_weight, weigh
from sharebasis.sensitivity.outcome import UNWEIGHED, Sensitivity
from sharebasis.settings import FIXED, NARROWED, PRIVATE, FitSettings, Sensing
from sharebasis.shared_basis import fit_shared_basis
from sharebasis.splitting import Part
from sharebasis.value_gauge import FixedValues
from sharebasis.weights import DenseWeights


@dataclass(frozen=True, slots=True)
class FittedGroup:
    """What became of a group, for metrics."""

    group: Group
    n_original: int
    """Numbers in the original weights, of all their neurons."""
    rank: int
    n_stored: int
    loss: float
    energy: float
    dense: bool
    """Whether its weights are stored as they were, or in another gauge."""
    weight: float = 1.0
    """What its loss counted in the allocation."""
    gauge_fixed: bool = False
    """Whether it is values without the columns that their output has taken in."""


@dataclass(frozen=True, slots=True)
class FittedModel:
    """What became of a model."""

    groups: tuple[FittedGroup, ...]
    n_others: int
    """Numbers that are not selected: embeddings, norms, biases."""
    n_others_stored: int
    """Of them, those that are stored: biases go with their neurons."""
    weighed_by: Sensing = "none"


def fit(
    weights: Path,
    spectra: Path,
    settings: FitSettings,
    target: Path,
    device: torch.device,
    moments: MomentStore | None,
    sensitivity: Sensitivity = UNWEIGHED,
) -> FittedModel:
    """Cut every group's factors to a rank and write the compressed model; whole or not at all.

    Memory holds one group, its moments where it shares by choice, and one shard of the output; of
    MLPs that lack neurons one for each core.

    Args:
        weights: artifacts/weights.
        spectra: artifacts/spectra, of the same weights.
        settings: budget and storage; what the spectra were made by is as it was then.
        target: artifacts/compressed.
        device: for the interpolative form, and for groups that share by choice.
        moments: that the spectra were made by, for what is offered; None leaves that out.
        sensitivity: what the losses of every part count in the allocation.

    Raises:
        BudgetError: a group is too small for the budget, or limits do not go with it.
        SelectionError: a pattern of excluded or limited sublayers matches nothing.
        WeightsError, CalibrationError, StoreError: what is read is not usable.
    """
    source = Spectra(spectra)
    energies = source.energies()
    ranks, plans = choose(source, energies, settings, sensitivity, offered=moments is not None)
    metric, dense = Metric(moments, source.twins, settings, device), DenseWeights(weights)
    with store.writing(target) as out:
        writer = CompressedWriter(out, settings.shard_bytes)
        fixed = {i: own for i, own in fixable(source, settings).items() if ranks.get(i) == DENSE}
        gauge = GaugeFixing(source, dense, fixed, device)
        one = _Fit(source, energies, dense, gauge, metric, settings, sensitivity, writer, device)
        mlps = {j: _index_of(source, j, plan) for j, plan in plans.items()}
        n_others = one.add_others(mlps.values())
        n_stored = writer.n_numbers
        fitted = []
        with progress("fit", len(ranks) + len(plans), "groups") as advance:
            for i, rank in ranks.items():
                fitted.append(one.add_group(i, rank))
                advance()
            workers = workers_of(source.groups, device)
            made_of = in_parallel((one.narrowing(j, plan) for j, plan in plans.items()), workers)
            for (j, plan), own in zip(plans.items(), made_of, strict=True):
                fitted += one.add_mlp(source.mlps[j], plan, own)
                advance()
        turned = [TurnedOutput(_dense_tensor(v), o.sublayer.name) for v, o in gauge.pairs]
        writer.finish(weights, list(mlps.values()), turned)
    return FittedModel(tuple(fitted), n_others, n_stored, sensitivity.by)


MadeOf = Tensor | tuple[Tensor, Tensor]
"""A weight, or (basis, coefficient)."""


@dataclass(frozen=True, slots=True)
class _Fit:
    """What is read and written for one group after the other."""

    source: Spectra
    energies: Sequence[NDArray[np.float64]]
    dense: DenseWeights
    gauge: GaugeFixing
    metric: Metric
    settings: FitSettings
    sensitivity: Sensitivity
    writer: CompressedWriter
    device: torch.device

    def add_others(self, mlps: Iterable[NarrowedMlp]) -> int:
        """Write what is not selected, and return how many numbers the original has of it."""
        neurons = {f"{name}.bias": list(mlp.rows) for mlp in mlps for name in mlp.reads}
        n_numbers = 0
        for name, tensor in self.dense.stream(without=_fitted_names(self.source)):
            n_numbers += tensor.numel()
            if name in neurons:
                tensor = tensor[neurons[name]]
            elif name.endswith(".bias"):
                tensor = self.gauge.bias(name.removesuffix(".bias"), tensor)
            self.writer.add(name, tensor)
        return n_numbers

    def add_group(self, i: int, rank: int) -> FittedGroup:
        """A given or an offered group."""
        group, energy = self.source.groups[i], float(self.energies[i].sum())
        if rank == DENSE:
            if (values := self.gauge.values(i)) is not None:
                return self._add(group, rank, group.n_weights, 0.0, energy, values=values)
            pairs = ((part, read_part(self.dense, part)) for part in group.parts)
            weights = [self.gauge.weight(part, own).to("cpu", own.dtype) for part, own in pairs]
            return self._add(group, rank, group.n_weights, 0.0, energy, weights=weights)
        loss = float(self.energies[i][rank:].sum())
        if i < self.source.n_given:
            basis, stacked = (own.to(self.device) for own in self.source.factors(i, rank))
        else:
            basis, stacked, lost = _shared(group, rank, self.dense, self.metric, self.device)
            loss = lost * energy
        factors = self.gauge.factors(group, basis, stacked)
        return self._add(group, rank, group.n_weights, loss, energy, factors=factors)

    def narrowing(self, j: int, plan: Plan) -> Callable[[], Sequence[MadeOf]]:
        """What is to be done for an MLP that lacks neurons; its weights are read at once."""
        mlp, kept = self.source.mlps[j], self.source.kept(j, plan.width)
        originals = [read_part(self.dense, part).to(self.device) for part in mlp.parts]
        return partial(_narrowed, mlp, originals, self.metric, plan, kept.to(self.device))

    def add_mlp(self, mlp: Mlp, plan: Plan, made_of: Sequence[MadeOf]) -> Iterator[FittedGroup]:
        """An MLP that lacks neurons, of what `narrowing` found."""
        numbers = {group.parts[0].name: i for i, group in enumerate(self.source.groups)}
        groups = mlp.groups(plan.width)
        for part, group, own, rank, loss in zip(
            mlp.parts, groups, made_of, plan.ranks, plan.losses, strict=True
        ):
            energy = float(self.energies[numbers[part.name]].sum())
            n_original = part.shape[0] * part.shape[1]
            loss /= group_weight(self.sensitivity, group)  # plans are made of weighed ones
            if isinstance(own, Tensor):
                weights = [own.to("cpu", self._dtype(group))]
                yield self._add(group, rank, n_original, loss, energy, weights=weights)
            else:
                yield self._add(group, rank, n_original, loss, energy, factors=own)

    def _add(
        self,
        group: Group,
        rank: int,
        n_original: int,
        loss: float,
        energy: float,
        weights: Sequence[Tensor] = (),
        factors: tuple[Tensor, Tensor] | None = None,
        values: FixedValues | None = None,
    ) -> FittedGroup:
        before = self.writer.n_numbers
        interpolative = rank != DENSE and self.settings.storage == "interpolative"
        has_pivots = interpolative or values is not None
        entry = _entry(group, rank, self.source.twins, has_pivots)
        if values is not None:
            self.writer.add_values(entry, values, self._dtype(group))
        elif factors is None:
            names = map(_dense_tensor, group.parts)
            self.writer.add_dense(entry, dict(zip(names, weights, strict=True)))
        else:
            basis, stacked = factors
            self.writer.add_factors(entry, basis, _by_part(group, stacked), self._dtype(group))
        n_stored = self.writer.n_numbers - before
        weight = group_weight(self.sensitivity, group)
        is_dense = factors is None
        return FittedGroup(
            group,
            n_original,
            entry.rank,
            n_stored,
            loss,
            energy,
            is_dense,
            weight,
            values is not None,
        )

    def _dtype(self, group: Group) -> torch.dtype:
        return self.dense.dtype(f"{group.parts[0].sublayer.name}.weight")


def _index_of(source: Spectra, j: int, plan: Plan) -> NarrowedMlp:
    mlp = source.mlps[j]
    reads = tuple(dict.fromkeys(part.sublayer.name for part in mlp.reads))
    kept = tuple(source.kept(j, plan.width).tolist())
    return NarrowedMlp(reads, mlp.down.sublayer.name, kept, mlp.gate_up)


def _narrowed(
    mlp: Mlp, originals: Sequence[Tensor], metric: Metric, plan: Plan, kept: Tensor
) -> Sequence[MadeOf]:
    """What each part of an MLP becomes without some neurons."""
    members = members_of(mlp, originals, metric)
    assert members is not None  # it was measured
    found: list[MadeOf] = []
    for member, rank in zip(narrowed_members(mlp, members, kept), plan.ranks, strict=True):
        if rank == DENSE:
            found.append(member.weight)
            continue
        gradients = None if member.own is None else [member.own]
        every = decompose_reads([member.weight], member.shared, gradients)
        found.append((every.basis[:rank], every.coefficient[:, :rank]))
    return found


def choose(
    source: Spectra,
    energies: Sequence[NDArray[np.float64]],
    settings: FitSettings,
    sensitivity: Sensitivity,
    offered: bool,
) -> tuple[Mapping[int, int], Mapping[int, Plan]]:
    """Pick the groups that there will be, and what each keeps, for the least loss in the budget.

    Args:
        source: the groups and MLPs to choose from.
        energies: of `source.groups`: what each direction saves of the loss, the largest first.
        settings: budget, storage, limits, and whether there is a choice at all.
        sensitivity: what the losses of every part count.
        offered: whether offered groups and MLPs that lack neurons may be picked, too.

    Returns:
        Number of every group that there will be -> its rank, or `DENSE`; number of every MLP that
        lacks neurons -> its plan.

    Raises:
        BudgetError: a group is too small for the budget, or limits do not go with it.
        SelectionError: a pattern of excluded or limited sublayers matches nothing.
    """
    n_given = source.n_given
    given = source.groups[:n_given]
    limits = limits_of(given, source.twins, settings)
    if settings.allocation == "uniform":
        ranks = uniform_ranks(given, settings.removed, settings.storage, limits)
        return dict(enumerate(ranks)), {}
    pairs = zip(given, limits, strict=True)
    of_part = {part.name: limit for group, limit in pairs for part in group.parts}
    groups = source.groups if offered else given
    energies = weigh(sensitivity, groups, energies[: len(groups)])
    curves = []
    for i, group in enumerate(groups):
        curve = curve_of(group, energies[i], settings.storage)
        all_limits = {of_part[part.name] for part in group.parts}
        curves.append(curve.within(limits[i]) if i < n_given else curve.offered(all_limits))
    for i, values in fixable(source, settings).items():
        curves[i] = curves[i].without(values.saved(groups[i].parts[0].shape[0]))
    mlps = source.mlps if offered else ()
    plans = []
    for j, mlp in enumerate(mlps):
        own = [of_part[part.name] for part in mlp.parts]
        weights = [group_weight(sensitivity, Group((part,))) for part in mlp.parts]
        plans.append(plans_of(mlp, source.widths(j).weighed(weights), own, settings.storage))
        curves.append(curve_of_plans(mlp.down.name, mlp.n_weights, plans[j]))
    cover = Cover(_choices(groups, n_given, mlps))
    entries = allocate_structures(curves, cover, n_given, settings.removed)
    n = len(groups)
    return (
        {i: curves[i].rank(entry) for i, entry in entries.items() if i < n},
        {i - n: plans[i - n][entry] for i, entry in entries.items() if i >= n},
    )


def _choices(groups: Sequence[Group], n_given: int, mlps: Sequence[Mlp]) -> Sequence[Choice]:
    names = (part.name for group in groups[:n_given] for part in group.parts)
    numbers = {name: i for i, name in enumerate(names)}
    structures = [group.structure if i >= n_given else "" for i, group in enumerate(groups)]
    structures += [NARROWED] * len(mlps)
    every: Sequence[Group | Mlp] = [*groups, *mlps]
    choices = []
    for number, (one, structure) in enumerate(zip(every, structures, strict=True)):
        parts = frozenset(numbers[part.name] for part in one.parts)
        choices.append(Choice(number, parts, structure))
    return choices


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
    group: Group, rank: int, twins: Mapping[str, Sequence[str]], has_pivots: bool
) -> CompressedGroup:
    """What a group's tensors are called, each part under all the names of its sublayer."""
    parts = []
    for part in group.parts:
        stem = _stem(part)
        tensor = _dense_tensor(part) if rank == DENSE else f"{stem}.coefficient"
        owner = group.name if group.side == "output" else stem
        pivots = f"{owner}.pivots" if has_pivots else None
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


def _dense_tensor(part: Part) -> str:
    """What its tensor is called where there is no basis."""
    return f"{_stem(part)}.dense"


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
        "shared": [
            {"group": one.group.name, "structure": one.group.structure, "rank": one.rank}
            for one in fitted.groups
            if one.group.structure not in (FIXED, PRIVATE)
        ],
        "families": {family: _counts(own) for family, own in sorted(by_family.items())},
        "whole_model": _removed(
            selected["original_numbers"] + fitted.n_others,
            selected["stored_numbers"] + fitted.n_others_stored,
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
    original = sum(one.n_original for one in fitted)
    stored = sum(one.n_stored for one in fitted)
    energy = sum(one.energy for one in fitted)
    return {
        **_removed(original, stored),
        "n_groups": len(fitted),
        "n_dense": sum(one.dense for one in fitted),
        "n_gauge_fixed": sum(one.gauge_fixed for one in fitted),
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
