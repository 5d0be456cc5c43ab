"""artifacts/weights and artifacts/spectra -> artifacts/compressed, one group at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharebasis.allocation.choose import choose
from sharebasis.allocation.loss_weights import group_weight
from sharebasis.allocation.sensitivity import UNWEIGHED, Sensitivity
from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.compressed.index import CompressedGroup, CompressedPart, NarrowedMlp, TurnedOutput
from sharebasis.compressed.writer import CompressedWriter
from sharebasis.config.fit import SPARSE, FitSettings
from sharebasis.errors import CalibrationError
from sharebasis.forms.mask import n_kept
from sharebasis.io.atomic import writing
from sharebasis.linalg import optimal_brain_surgeon
from sharebasis.linalg.low_rank import decompose
from sharebasis.linalg.optimal_brain_surgeon import Sparse
from sharebasis.linalg.shared_basis import fit_shared_basis
from sharebasis.linalg.value_gauge import FixedValues
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.part_weights import read_part
from sharebasis.moments.problems import Problems
from sharebasis.moments.store import MomentStore
from sharebasis.runtime.progress import progress
from sharebasis.runtime.threads import in_parallel
from sharebasis.spectra.store import Spectra
from sharebasis.spectra.workers import workers_of
from sharebasis.stages.fit.gauge_fixing import GaugeFixing
from sharebasis.stages.fit.metrics import FittedGroup, FittedModel
from sharebasis.structures.curve import DENSE
from sharebasis.structures.neuron_plans import Plan
from sharebasis.structures.neurons import Mlp, narrowed_problems


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
    MLPs that lack neurons, and of parts that lack entries, one for each core with its moments.

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
    chosen = choose(source, energies, settings, sensitivity, offered=moments is not None)
    problems, dense = Problems(moments, source.twins, settings, device), DenseWeights(weights)
    with writing(target) as out:
        writer = CompressedWriter(out, settings.shard_bytes)
        gauge = GaugeFixing(source, dense, chosen.fixed, device)
        one = _Fit(source, energies, dense, gauge, problems, settings, sensitivity, writer, device)
        mlps = {j: _index_of(source, j, plan) for j, plan in chosen.plans.items()}
        n_others = one.add_others(mlps.values())
        n_stored = writer.n_numbers
        workers = workers_of(source.groups, device)
        fitted: list[FittedGroup] = []
        n_all = len(chosen.ranks) + len(chosen.plans) + len(chosen.sparse)
        with progress("fit", n_all, "groups") as advance:
            for i, rank in chosen.ranks.items():
                fitted.append(one.add_group(i, rank))
                advance()
            plans = chosen.plans.items()
            made_of = in_parallel((one.narrowing(j, plan) for j, plan in plans), workers)
            for (j, plan), own in zip(plans, made_of, strict=True):
                fitted += one.add_mlp(source.mlps[j], plan, own)
                advance()
            sparse = chosen.sparse.items()
            left = in_parallel((one.sparsifying(j, stored) for j, stored in sparse), workers)
            for (j, _), weight in zip(sparse, left, strict=True):
                fitted.append(one.add_sparse(source.sparse[j], weight))
                advance()
        turned = [TurnedOutput(_dense_tensor(v), o.sublayer.name) for v, o in gauge.pairs]
        writer.finish(weights, list(mlps.values()), turned)
    return FittedModel(tuple(fitted), n_others, n_stored, sensitivity.by)


MadeOf = Tensor | tuple[Tensor, Tensor]
"""A weight, or (basis, coefficient)."""

Stored = list[Tensor] | tuple[Tensor, Tensor] | FixedValues | Sparse
"""Weights of parts, (basis, coefficients stacked), or what else there is of a part."""


@dataclass(frozen=True)
class _Fit:
    """What is read and written for one group after the other."""

    source: Spectra
    energies: Sequence[NDArray[np.float64]]
    dense: DenseWeights
    gauge: GaugeFixing
    problems: Problems
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
                return self._add(group, rank, group.n_weights, 0.0, energy, values)
            pairs = ((part, read_part(self.dense, part)) for part in group.parts)
            weights = [self.gauge.weight(part, own).to("cpu", own.dtype) for part, own in pairs]
            return self._add(group, rank, group.n_weights, 0.0, energy, weights)
        loss = float(self.energies[i][rank:].sum())
        if i < self.source.n_given:
            basis, stacked = (own.to(self.device) for own in self.source.factors(i, rank))
        else:
            basis, stacked, lost = _shared(group, rank, self.dense, self.problems, self.device)
            loss = lost * energy
        factors = self.gauge.factors(group, basis, stacked)
        return self._add(group, rank, group.n_weights, loss, energy, factors)

    def narrowing(self, j: int, plan: Plan) -> Callable[[], Sequence[MadeOf]]:
        """What is to be done for an MLP that lacks neurons; its weights are read at once."""
        mlp, kept = self.source.mlps[j], self.source.kept(j, plan.width)
        originals = [read_part(self.dense, part).to(self.device) for part in mlp.parts]
        return partial(_narrowed, mlp, originals, self.problems, plan, kept.to(self.device))

    def add_mlp(self, mlp: Mlp, plan: Plan, made_of: Sequence[MadeOf]) -> Iterator[FittedGroup]:
        """An MLP that lacks neurons, of what `narrowing` found."""
        groups = mlp.groups(plan.width)
        for part, group, own, rank, loss in zip(
            mlp.parts, groups, made_of, plan.ranks, plan.losses, strict=True
        ):
            energy = self._energy(part)
            n_original = part.n_weights
            loss /= group_weight(self.sensitivity, group)  # plans are made of weighed ones
            what = [own.to("cpu", self._dtype(group))] if isinstance(own, Tensor) else own
            yield self._add(group, rank, n_original, loss, energy, what)

    def sparsifying(self, j: int, stored: int) -> Callable[[], Sparse]:
        """What is to be done for a part that lacks entries; its weight is read at once."""
        part = self.source.sparse[j]
        original = read_part(self.dense, part).to(self.device)
        n = original.numel()
        left = n_kept(stored, n)
        price = self.source.sparsities(j).price_at(1 - left / n)

        def work() -> Sparse:
            problem = self.problems.of_part(part, original)
            assert problem is not None  # it was measured
            return optimal_brain_surgeon.sparsify(problem, left, price)

        return work

    def add_sparse(self, part: Part, left: Sparse) -> FittedGroup:
        """A part that lacks entries, of what `sparsifying` found."""
        group = Group((part,), structure=SPARSE)
        return self._add(group, DENSE, group.n_weights, left.loss, self._energy(part), left)

    def _energy(self, part: Part) -> float:
        return float(self.energies[self._alone[part.name]].sum())

    @cached_property
    def _alone(self) -> Mapping[str, int]:
        """Part -> the number of its group, of those that are one by themselves."""
        groups = enumerate(self.source.groups)
        return {group.parts[0].name: i for i, group in groups if len(group.parts) == 1}

    def _add(
        self,
        group: Group,
        rank: int,
        n_original: int,
        loss: float,
        energy: float,
        what: Stored,
    ) -> FittedGroup:
        before, dtype = self.writer.n_numbers, self._dtype(group)
        interpolative = rank != DENSE and self.settings.storage == "interpolative"
        entry = _entry(group, rank, self.source.twins, interpolative, what)
        match what:
            case Sparse():
                self.writer.add_sparse(entry, what, dtype)
            case FixedValues():
                self.writer.add_values(entry, what, dtype)
            case list():
                names = map(_dense_tensor, group.parts)
                self.writer.add_dense(entry, dict(zip(names, what, strict=True)))
            case basis, stacked:
                self.writer.add_factors(entry, basis, _by_part(group, stacked), dtype)
        return FittedGroup(
            group,
            n_original,
            entry.rank,
            self.writer.n_numbers - before,
            loss,
            energy,
            dense=isinstance(what, list | FixedValues),
            weight=group_weight(self.sensitivity, group),
            gauge_fixed=isinstance(what, FixedValues),
        )

    def _dtype(self, group: Group) -> torch.dtype:
        return self.dense.dtype(f"{group.parts[0].sublayer.name}.weight")


def _index_of(source: Spectra, j: int, plan: Plan) -> NarrowedMlp:
    mlp = source.mlps[j]
    reads = tuple(dict.fromkeys(part.sublayer.name for part in mlp.reads))
    kept = tuple(source.kept(j, plan.width).tolist())
    return NarrowedMlp(reads, mlp.down.sublayer.name, kept, mlp.gate_up)


def _narrowed(
    mlp: Mlp, originals: Sequence[Tensor], problems: Problems, plan: Plan, kept: Tensor
) -> Sequence[MadeOf]:
    """What each part of an MLP becomes without some neurons."""
    of_mlp = problems.of(Group(mlp.parts), originals)
    assert of_mlp is not None  # it was measured
    found: list[MadeOf] = []
    for problem, rank in zip(narrowed_problems(mlp, of_mlp, kept), plan.ranks, strict=True):
        dense = rank == DENSE
        found.append(problem.weight if dense else decompose([problem]).truncated(rank))
    return found


def _shared(
    group: Group, rank: int, dense: DenseWeights, problems: Problems, device: torch.device
) -> tuple[Tensor, Tensor, float]:
    """(basis, coefficients stacked, fraction of the energy that is lost) of an offered group."""
    originals = [read_part(dense, part).to(device) for part in group.parts]
    of_group = problems.of(group, originals)
    if of_group is None:
        raise CalibrationError(
            f"There is no moment for all of {group.name}; run calibrate and decompose again."
        )
    found = fit_shared_basis(of_group, rank)
    lost = found.loss / found.energy if found.energy else 0.0  # weights that are zero lose nothing
    return found.basis, torch.cat(found.coefficients), lost


def _fitted_names(spectra: Spectra) -> set[str]:
    names = {part.sublayer.name for group in spectra.groups for part in group.parts}
    return {f"{name}.weight" for own in names for name in (own, *spectra.twins[own])}


def _entry(
    group: Group,
    rank: int,
    twins: Mapping[str, Sequence[str]],
    interpolative: bool,
    what: Stored,
) -> CompressedGroup:
    """What a group's tensors are called, each part under all the names of its sublayer."""
    parts = []
    for part in group.parts:
        stem = _stem(part)
        tensor = _dense_tensor(part) if rank == DENSE else f"{stem}.coefficient"
        owner = group.name if group.side == "output" else stem
        pivots = f"{owner}.pivots" if interpolative or isinstance(what, FixedValues) else None
        mask = f"{stem}.mask" if isinstance(what, Sparse) else None
        for sublayer in (part.sublayer.name, *twins[part.sublayer.name]):
            parts.append(CompressedPart(sublayer, part.rows, tensor, pivots, mask=mask))
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
