"""artifacts/weights and artifacts/moments -> artifacts/spectra: losses of every rank, once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharebasis import sparsity, store, tensor_store
from sharebasis.grouping import Group, LayerDistances
from sharebasis.metric import Metric
from sharebasis.moment_store import MomentStore
from sharebasis.moments import Moment
from sharebasis.narrowing import Mlp, Widths, find_mlps, measure
from sharebasis.neurons_apart import neurons_are_apart
from sharebasis.parallel import in_parallel
from sharebasis.progress import progress
from sharebasis.resources import workers_for
from sharebasis.settings import NARROWED, SPARSE, FitSettings
from sharebasis.shared_basis import energies, pooled_basis
from sharebasis.sparsity import Sparsities
from sharebasis.splitting import Part
from sharebasis.structures import given_groups, offered_groups
from sharebasis.value_gauge import ValueOutput, fix_values
from sharebasis.weights import DenseWeights

log = logging.getLogger(__name__)

INDEX = "spectra.json"
SHARD_BYTES = 500 * 2**20

MATRICES, OF_A_PART = 18, 3
"""As large as the largest moment, that are in memory for one group, and more for each of its
parts, about (measured with 1 to 64 parts)."""


@dataclass(frozen=True)
class SpectraIndex:
    """What artifacts/spectra holds: for group i `i.energies`, and for a given one `i.basis` and
    `i.coefficient`, too."""

    groups: tuple[Group, ...]
    n_given: int
    """How many of them, from the first on, are given: they cover every part once. The others are
    offered in their place, and `fit` makes the factors of those that it takes."""
    twins: Mapping[str, tuple[str, ...]]
    """Sublayer -> those that use its weight, too."""
    unseen: tuple[int, ...]
    """Groups whose inputs calibration never saw; their energies are in units of their own."""
    files: Mapping[str, str]
    """Tensor name -> file name."""
    mlps: tuple[Mlp, ...] = ()
    """Offered with fewer neurons, too: of MLP j there is `mlpj.neurons`, `mlpj.losses` by width,
    and `mlpj.WIDTH.i` for the energies of its part i."""
    values: tuple[ValueOutput, ...] = ()
    """That may be stored without some of their columns."""
    sparse: tuple[Part, ...] = ()
    """Offered without some of their entries, too: of part j there is `sparsej`, by price how many
    are removed, what is lost and that price."""


class Spectra:
    """artifacts/spectra.

    Raises:
        StoreError: there is no such artefact.
    """

    def __init__(self, directory: Path) -> None:
        self._index = store.load_record(directory / INDEX, SpectraIndex)
        self._reader = tensor_store.TensorReader(directory, self._index.files)
        self.groups, self.twins = self._index.groups, self._index.twins
        self.n_given, self.mlps = self._index.n_given, self._index.mlps
        self.values, self.sparse = self._index.values, self._index.sparse

    def energies(self) -> Sequence[NDArray[np.float64]]:
        """What each direction of every group saves of the loss, the largest first.

        A group that calibration never saw is taken to matter as much as the average one of
        its family.
        """
        found = [self._reader.read(f"{i}.energies").numpy() for i in range(len(self.groups))]
        for i in self._index.unseen:
            peers = [
                own.sum()
                for j, own in enumerate(found[: self.n_given])
                if j not in self._index.unseen and self.groups[j].family == self.groups[i].family
            ]
            if peers and found[i].any():
                found[i] = found[i] * (np.mean(peers) / found[i].sum())
        return found

    def widths(self, j: int) -> Widths:
        """What MLP `j` loses at each of its widths."""
        mlp, stem = self.mlps[j], f"mlp{j}"
        energies = tuple(
            tuple(self._reader.read(f"{stem}.{width}.{i}").numpy() for i in range(len(mlp.parts)))
            for width in mlp.widths
        )
        losses = self._reader.read(f"{stem}.losses").tolist()
        return Widths(self.neurons(j), tuple(losses), energies)

    def neurons(self, j: int) -> Tensor:
        """Of MLP `j`: at every width, the first so many of these stay."""
        return self._reader.read(f"mlp{j}.neurons").long()

    def kept(self, j: int, width: int) -> Tensor:
        """The neurons of MLP `j` that stay at a width, ascending."""
        return self.neurons(j)[:width].sort().values

    def sparsities(self, j: int) -> Sparsities:
        """What the part `sparse[j]` loses as its entries go."""
        return Sparsities(*self._reader.read(f"sparse{j}").tolist())

    def factors(self, i: int, rank: int) -> tuple[Tensor, Tensor]:
        """(basis, coefficient) of a given group `i` and a rank, in float64."""
        basis = self._reader.read(f"{i}.basis", slice(0, rank))
        coefficient = self._reader.read(f"{i}.coefficient", columns=slice(0, rank))
        return basis.double(), coefficient.double()


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
    dense, metric = DenseWeights(weights), Metric(moments, twins, settings, device)
    mlps = _find_mlps(given, twins, dense) if NARROWED in settings.structures else ()
    fixed = _fixable(values, [*given, *offered], twins, dense)
    offered_sparse = own if SPARSE in settings.structures else []
    n_groups = len(given) + len(offered) + len(mlps) + len(offered_sparse)
    workers = workers_of(given, device)
    originals = partial(_originals, dense, device)
    with store.writing(target) as out, progress("decompose", n_groups, "groups") as advance:
        store.require_disk(out, sum(map(_factor_bytes, given)))
        writer, unseen = tensor_store.TensorWriter(out, "spectra", SHARD_BYTES), []
        tasks = (partial(metric.decompose, group, originals(group.parts)) for group in given)
        for i, (every, seen) in enumerate(in_parallel(tasks, workers)):
            if not seen:
                unseen.append(i)
            writer.add(f"{i}.energies", every.energies.cpu())
            writer.add(f"{i}.basis", every.basis.to("cpu", torch.float32))
            writer.add(f"{i}.coefficient", every.coefficient.to("cpu", torch.float32))
            advance()
        groups = [*given]
        offers = (partial(_saved, metric, group, originals(group.parts)) for group in offered)
        n_at_once = workers_of(offered, device)
        for group, saved in zip(offered, in_parallel(offers, n_at_once), strict=True):
            if saved is not None:
                writer.add(f"{len(groups)}.energies", saved.cpu())
                groups.append(group)
            advance()
        narrowed: list[Mlp] = []
        measures = (partial(_measured, metric, mlp, originals(mlp.parts)) for mlp in mlps)
        for mlp, found in zip(mlps, in_parallel(measures, workers), strict=True):
            if found is not None:
                _write_widths(writer, f"mlp{len(narrowed)}", mlp, found)
                narrowed.append(mlp)
            advance()
        sparse: list[Part] = []
        prices = (partial(_sparsities, metric, part, originals([part])) for part in offered_sparse)
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
        store.save_record(out / INDEX, index)


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


def workers_of(groups: Sequence[Group], device: torch.device) -> int:
    """How many of some groups may be worked on at once."""
    sizes = (
        8
        * max(max(part.shape) for part in group.parts) ** 2
        * (MATRICES + OF_A_PART * len(group.parts))
        for group in groups
    )
    return workers_for(max(sizes, default=0), device)


def _factor_bytes(group: Group) -> int:
    """Of the factors of full rank, as files hold them."""
    return 4 * group.full_rank * (group.d_out + group.d_in)


def member_of(
    part: Part, original: Tensor, metric: Metric
) -> tuple[Tensor, Moment, Moment | None] | None:
    """A weight, the moment of what it reads and that of its gradients; None where calibration has
    not seen what it reads."""
    members = metric.members(Group((part,)), [original])
    if members is None:
        return None
    (member,) = members
    assert member.shared is not None  # sparse weights are offered to methods that look at inputs
    return member.weight, member.shared, member.own


def _originals(
    dense: DenseWeights, device: torch.device, parts: Sequence[Part]
) -> Sequence[Tensor]:
    return [read_part(dense, part).to(device) for part in parts]


def _saved(metric: Metric, group: Group, originals: Sequence[Tensor]) -> Tensor | None:
    """What each direction of an offered group saves."""
    members = metric.members(group, originals)
    return energies(members, pooled_basis(members)) if members else None


def _measured(metric: Metric, mlp: Mlp, originals: Sequence[Tensor]) -> Widths | None:
    members = metric.members(Group(mlp.parts), originals)
    return measure(mlp, members) if members else None


def _sparsities(metric: Metric, part: Part, originals: Sequence[Tensor]) -> Sparsities | None:
    member = member_of(part, originals[0], metric)
    if member is None:
        return None
    weight, inputs, gradient = member
    return sparsity.measure(weight, inputs, gradient)


def _write_widths(writer: tensor_store.TensorWriter, stem: str, mlp: Mlp, found: Widths) -> None:
    writer.add(f"{stem}.neurons", found.neurons.to("cpu", torch.int32))
    writer.add(f"{stem}.losses", torch.tensor(found.losses, dtype=torch.float64))
    for width, of_parts in zip(mlp.widths, found.energies, strict=True):
        for i, own in enumerate(of_parts):
            writer.add(f"{stem}.{width}.{i}", torch.from_numpy(own.copy()))


def _by_layer(groups: Iterable[Group]) -> Sequence[Group]:
    """Groups of the same layers in turn: they read the same moments."""
    return sorted(groups, key=lambda group: group.parts[0].sublayer.layer)


def read_part(dense: DenseWeights, part: Part) -> Tensor:
    """The (d_out, d_in) weight of a part.

    Raises:
        WeightsError: the checkpoint does not hold it.
    """
    name, conv1d = part.sublayer.name, part.sublayer.type == "Conv1D"
    return dense.read(f"{name}.weight", part.rows, transposed=conv1d)


def _twins(parts: Iterable[Part]) -> Mapping[str, tuple[str, ...]]:
    twins: dict[str, dict[str, None]] = {}
    for part in parts:
        own = twins.setdefault(part.sublayer.tied_to or part.sublayer.name, {})
        if part.sublayer.tied_to:
            own[part.sublayer.name] = None
    return {name: tuple(own) for name, own in twins.items()}
