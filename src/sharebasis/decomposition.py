"""artifacts/weights and artifacts/moments -> artifacts/spectra: factors of every rank, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharebasis import store
from sharebasis.factorize import Decomposition, decompose_reads
from sharebasis.grouping import Group, groups_of
from sharebasis.moment_store import MomentStore
from sharebasis.moments import Moment
from sharebasis.progress import progress
from sharebasis.settings import METHODS, FitSettings
from sharebasis.splitting import Part
from sharebasis.weights import DenseWeights

INDEX = "spectra.json"
SHARD_BYTES = 500 * 2**20


@dataclass(frozen=True)
class SpectraIndex:
    """What artifacts/spectra holds: for group i `i.energies`, `i.basis`, `i.coefficient`."""

    groups: tuple[Group, ...]
    twins: Mapping[str, tuple[str, ...]]
    """Sublayer -> those that use its weight, too."""
    unseen: tuple[int, ...]
    """Groups whose inputs calibration never saw; their energies are in units of their own."""
    files: Mapping[str, str]
    """Tensor name -> file name."""


class Spectra:
    """artifacts/spectra.

    Raises:
        StoreError: there is no such artefact.
    """

    def __init__(self, directory: Path) -> None:
        self._index = store.load_record(directory / INDEX, SpectraIndex)
        self._reader = store.TensorReader(directory, self._index.files)
        self.groups, self.twins = self._index.groups, self._index.twins

    def energies(self) -> Sequence[NDArray[np.float64]]:
        """What each direction of every group saves of the loss, the largest first.

        A group that calibration never saw is taken to matter as much as the average one of
        its family.
        """
        found = [self._reader.read(f"{i}.energies").numpy() for i in range(len(self.groups))]
        for i in self._index.unseen:
            peers = [
                own.sum()
                for j, own in enumerate(found)
                if j not in self._index.unseen and self.groups[j].family == self.groups[i].family
            ]
            if peers:
                found[i] = found[i] * (np.mean(peers) / found[i].sum())
        return found

    def factors(self, i: int, rank: int) -> tuple[Tensor, Tensor]:
        """(basis, coefficient) of group `i` and a rank, in float64."""
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
) -> None:
    """Decompose every group and write its factors; whole or not at all.

    Memory holds one group, its moments and one shard of the output.

    Args:
        weights: artifacts/weights.
        parts: of its selected sublayers.
        moments: of its inputs and gradients; not read by plain SVD.
        settings: method and groups; the budget plays no part.
        target: artifacts/spectra.
        device: for the decompositions.

    Raises:
        WeightsError, CalibrationError, StoreError: what is read is not usable.
    """
    twins = _twins(parts)
    own = [part for part in parts if part.sublayer.tied_to is None]
    groups = groups_of(own, settings.group_size, settings.shared, settings.share_experts)
    # Groups of the same layers in turn: they read the same moments.
    groups = sorted(groups, key=lambda group: group.parts[0].sublayer.layer)
    dense, metric = DenseWeights(weights), _Metric(moments, twins, settings, device)
    with store.writing(target) as out, progress("decompose", len(groups), "groups") as advance:
        writer, unseen = store.TensorWriter(out, "spectra", SHARD_BYTES), []
        for i, group in enumerate(groups):
            originals = [read_part(dense, part).to(device) for part in group.parts]
            every, seen = metric.decompose(group, originals)
            if not seen:
                unseen.append(i)
            writer.add(f"{i}.energies", every.energies.cpu())
            writer.add(f"{i}.basis", every.basis.to("cpu", torch.float32))
            writer.add(f"{i}.coefficient", every.coefficient.to("cpu", torch.float32))
            advance()
        writer.flush()
        index = SpectraIndex(tuple(groups), twins, tuple(unseen), writer.files)
        store.save_record(out / INDEX, index)


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


class _Metric:
    """The moments in which a group's loss is measured."""

    def __init__(
        self,
        moments: MomentStore | None,
        twins: Mapping[str, tuple[str, ...]],
        settings: FitSettings,
        device: torch.device,
    ) -> None:
        self._twins, self._settings, self._device = twins, settings, device
        self._own = METHODS[settings.method]
        self._moments = None if settings.method == "svd" else moments
        self._pool = lru_cache(maxsize=1)(self._read_pool)

    def decompose(self, group: Group, originals: Sequence[Tensor]) -> tuple[Decomposition, bool]:
        """The factors, and whether calibration has seen what the group reads."""
        if self._moments is None:
            return decompose_reads(originals, None), True
        inputs, gradients = self._inputs(group), None
        if inputs is None:
            return decompose_reads(originals, None), False
        if self._settings.two_sided:
            gradients = [self._gradient(part) for part in group.parts]
        counted = None if self._own.inputs == "none" else inputs
        return decompose_reads(originals, counted, gradients), True

    def _inputs(self, group: Group) -> Moment | None:
        """Of all that a group reads; None where there was nothing."""
        assert self._moments is not None
        site = self._moments.site
        names = (name for part in group.parts for name in self._users(part))
        moment = self._pool(tuple(dict.fromkeys(map(site, names))))
        return moment if moment.n_tokens else None  # experts that no token went to

    def _read_pool(self, sites: tuple[str, ...]) -> Moment:
        assert self._moments is not None
        moment = reduce(add, map(self._moments.read, sites)).to(self._device)
        if not moment.n_tokens:
            return moment
        damped = moment.damped(self._settings.damping_inputs)
        return damped.diagonal(self._own.alpha) if self._own.inputs == "diagonal" else damped

    def _gradient(self, part: Part) -> Moment:
        """Of what a part puts out, weighed by how often it runs."""
        assert self._moments is not None
        moments = self._moments
        whole = reduce(add, (moments.gradient(name) for name in self._users(part)))
        rows = torch.tensor(list(part.rows))
        own = Moment(whole.total[rows][:, rows], whole.sum[rows], moments.n_tokens, whole.site)
        damped = own.to(self._device).damped(self._settings.damping_gradients)
        return damped.diagonal() if self._own.gradients == "diagonal" else damped

    def _users(self, part: Part) -> Iterator[str]:
        return iter((part.sublayer.name, *self._twins[part.sublayer.name]))
