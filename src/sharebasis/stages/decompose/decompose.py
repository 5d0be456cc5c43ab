"""artifacts/weights and artifacts/moments -> artifacts/spectra: losses of every rank, once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.config.fit import NARROWED, SPARSE, FitSettings
from sharebasis.io.atomic import require_disk, writing
from sharebasis.io.records import save_record
from sharebasis.io.tensor_files import TensorWriter
from sharebasis.linalg import sparsity_curve
from sharebasis.linalg.shared_basis import energies, pooled_basis
from sharebasis.linalg.sparsity_curve import SparsityCurve
from sharebasis.linalg.value_gauge import ValueOutput, fix_values
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.neuron_independence import neurons_are_apart
from sharebasis.model.part_weights import read_part, read_parts
from sharebasis.moments.problems import Problems
from sharebasis.moments.store import MomentStore
from sharebasis.runtime.progress import progress
from sharebasis.runtime.threads import in_parallel
from sharebasis.spectra.store import SHARD_BYTES, SPECTRA_INDEX, SpectraIndex
from sharebasis.spectra.workers import factor_bytes, workers_of
from sharebasis.structures.layer_distances import LayerDistances
from sharebasis.structures.neurons import Mlp, Widths, find_mlps, measure
from sharebasis.structures.shared import given_groups, offered_groups

log = logging.getLogger(__name__)


def decompose(
    weights: Path,
    parts: Sequence[Part],
    moments: MomentStore | None,
    settings: FitSettings,
    target: Path,
    device: torch.device,
    distances: LayerDistances | None = None,
    values: Sequence[ValueOutput] = (),
) -> None:
    """Decompose every given group and write its factors, and what those that are offered in their
    place would lose; whole or not at all.

    Memory holds a group and its moments for every core, fewer where that is too much, and one
    shard of the output.

    Args:
        weights: artifacts/weights.
        parts: of its selected sublayers.
        moments: of its inputs and gradients; not read by plain SVD.
        settings: method and groups; the budget plays no part.
        target: artifacts/spectra.
        device: for the decompositions.
        distances: by which layers are grouped; None groups adjacent ones.
        values: from `value_outputs.value_outputs`; none: all of them are stored whole.

    Raises:
        SelectionError: a distance is missing.
        WeightsError, CalibrationError, StoreError: what is read is not usable.
    """
    twins = _twins(parts)
    own = [part for part in parts if part.sublayer.tied_to is None]
    given = _by_layer(given_groups(own, settings, distances))
    offered = _by_layer(offered_groups(own, settings, distances))
    dense, problems = DenseWeights(weights), Problems(moments, twins, settings, device)
    mlps = _find_mlps(given, twins, dense) if NARROWED in settings.structures else ()
    fixed = _fixable(values, [*given, *offered], twins, dense)
    offered_sparse = own if SPARSE in settings.structures else []
    n_groups = len(given) + len(offered) + len(mlps) + len(offered_sparse)
    workers = workers_of(given, device)
    originals = partial(read_parts, dense, device)
    with writing(target) as out, progress("decompose", n_groups, "groups") as advance:
        require_disk(out, sum(map(factor_bytes, given)))
        writer, unseen = TensorWriter(out, "spectra", SHARD_BYTES), []
        tasks = (partial(problems.decompose, group, originals(group.parts)) for group in given)
        for i, (every, seen) in enumerate(in_parallel(tasks, workers)):
            if not seen:
                unseen.append(i)
            writer.add(f"{i}.energies", every.energies.cpu())
            writer.add(f"{i}.basis", every.basis.to("cpu", torch.float32))
            writer.add(f"{i}.coefficient", every.coefficient.to("cpu", torch.float32))
            advance()
        groups = [*given]
        offers = (partial(_saved, problems, group, originals(group.parts)) for group in offered)
        n_at_once = workers_of(offered, device)
        for group, saved in zip(offered, in_parallel(offers, n_at_once), strict=True):
            if saved is not None:
                writer.add(f"{len(groups)}.energies", saved.cpu())
                groups.append(group)
            advance()
        narrowed: list[Mlp] = []
        measures = (partial(_measured, problems, mlp, originals(mlp.parts)) for mlp in mlps)
        for mlp, found in zip(mlps, in_parallel(measures, workers), strict=True):
            if found is not None:
                _write_widths(writer, f"mlp{len(narrowed)}", mlp, found)
                narrowed.append(mlp)
            advance()
        sparse: list[Part] = []
        prices = (
            partial(_sparsities, problems, part, originals([part])) for part in offered_sparse
        )
        for part, points in zip(offered_sparse, in_parallel(prices, workers), strict=True):
            if points is not None:
                rows = points.removed, points.losses, points.prices
                writer.add(f"sparse{len(sparse)}", torch.tensor(rows, dtype=torch.float64))
                sparse.append(part)
            advance()
        writer.flush()
        index = SpectraIndex(
            groups=tuple(groups),
            n_given=len(given),
            twins=twins,
            unseen=tuple(unseen),
            files=writer.files,
            mlps=tuple(narrowed),
            values=fixed,
            sparse=tuple(sparse),
        )
        save_record(out / SPECTRA_INDEX, index)


def _find_mlps(
    given: Sequence[Group], twins: Mapping[str, Sequence[str]], dense: DenseWeights
) -> Sequence[Mlp]:
    """Those of `find_mlps` whose own code takes fewer neurons as they are laid out."""
    found = find_mlps(given, twins, dense.shapes)
    apart = [mlp for mlp in found if not mlp.gate_up or _are_apart(mlp, dense)]
    if left := len(found) - len(apart):
        log.warning(
            "%d MLPs keep all their neurons: by their own forward pass, a neuron is not made of "
            "the rows of gate and up that gate_up_order and interleave of their weight type say.",
            left,
        )
    return apart


def _are_apart(mlp: Mlp, dense: DenseWeights) -> bool:
    names = mlp.reads[0].sublayer.name, mlp.down.sublayer.name
    (module, _, read), (_, _, down) = (name.rpartition(".") for name in names)
    return neurons_are_apart(dense.module(module), read, down, mlp.down.shape[0], mlp.gate_up)


def _fixable(
    values: Sequence[ValueOutput],
    groups: Sequence[Group],
    twins: Mapping[str, Sequence[str]],
    dense: DenseWeights,
) -> tuple[ValueOutput, ...]:
    """Those whose values are a group of their own, whose outputs share on the other side than that
    of heads if at all, and whose columns are far enough from dependent."""
    alone = {group.parts[0].name: group.parts[0] for group in groups if len(group.parts) == 1}
    shared = [group for group in groups if len(group.parts) > 1 and group.side == "input"]
    bound = {part.name for group in shared for part in group.parts if part.sublayer.role == "write"}
    found = []
    for own in values:
        parts = [alone.get(own.value), alone.get(own.output)]
        if own.output in bound or any(p is None or twins[p.sublayer.name] for p in parts):
            continue
        value = parts[0]
        assert value is not None
        if value.shape[0] // own.n_kv_heads < value.shape[1]:
            weight = read_part(dense, value)
            if weight.isfinite().all() and fix_values(weight, own.n_kv_heads).bounded:
                found.append(own)
    return tuple(found)


def _saved(problems: Problems, group: Group, originals: Sequence[Tensor]) -> Tensor | None:
    """What each direction of an offered group saves."""
    of_group = problems.of(group, originals)
    return energies(of_group, pooled_basis(of_group)) if of_group else None


def _measured(problems: Problems, mlp: Mlp, originals: Sequence[Tensor]) -> Widths | None:
    of_mlp = problems.of(Group(mlp.parts), originals)
    return measure(mlp, of_mlp) if of_mlp else None


def _sparsities(
    problems: Problems, part: Part, originals: Sequence[Tensor]
) -> SparsityCurve | None:
    problem = problems.of_part(part, originals[0])
    return sparsity_curve.measure(problem) if problem else None


def _write_widths(writer: TensorWriter, stem: str, mlp: Mlp, found: Widths) -> None:
    writer.add(f"{stem}.neurons", found.neurons.to("cpu", torch.int32))
    writer.add(f"{stem}.losses", torch.tensor(found.losses, dtype=torch.float64))
    for width, of_parts in zip(mlp.widths, found.energies, strict=True):
        for i, own in enumerate(of_parts):
            writer.add(f"{stem}.{width}.{i}", torch.from_numpy(own.copy()))


def _by_layer(groups: Iterable[Group]) -> Sequence[Group]:
    """Groups of the same layers in turn: they read the same moments."""
    return sorted(groups, key=lambda group: group.parts[0].sublayer.layer)


def _twins(parts: Iterable[Part]) -> Mapping[str, tuple[str, ...]]:
    twins: dict[str, dict[str, None]] = {}
    for part in parts:
        own = twins.setdefault(part.sublayer.tied_to or part.sublayer.name, {})
        if part.sublayer.tied_to:
            own[part.sublayer.name] = None
    return {name: tuple(own) for name, own in twins.items()}
