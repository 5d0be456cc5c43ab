"""artifacts/weights and artifacts/moments -> artifacts/spectra: losses of every rank, once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharebasis import store, tensor_store
from sharebasis.grouping import Group
from sharebasis.metric import Metric
from sharebasis.moment_store import MomentStore
from sharebasis.narrowing import Mlp, Widths, find_mlps, measure
from sharebasis.progress import progress
from sharebasis.settings import NARROWED, FitSettings
from sharebasis.shared_basis import Member, energies, pooled_basis
from sharebasis.splitting import Part
from sharebasis.structures import given_groups, offered_groups
from sharebasis.weights import DenseWeights

INDEX = "spectra.json"
SHARD_BYTES = 500 * 2**20


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
            if peers:
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
) -> None:
    """Decompose every given group and write its factors, and what those that are offered in their
    place would lose; whole or not at all.

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
    given, offered = (
        _by_layer(groups) for groups in (given_groups(own, settings), offered_groups(own, settings))
    )
    dense, metric = DenseWeights(weights), Metric(moments, twins, settings, device)
    mlps = find_mlps(given, twins, dense.shapes) if NARROWED in settings.structures else ()
    n_groups = len(given) + len(offered) + len(mlps)
    with store.writing(target) as out, progress("decompose", n_groups, "groups") as advance:
        writer, unseen = tensor_store.TensorWriter(out, "spectra", SHARD_BYTES), []
        for i, group in enumerate(given):
            originals = [read_part(dense, part).to(device) for part in group.parts]
            every, seen = metric.decompose(group, originals)
            if not seen:
                unseen.append(i)
            writer.add(f"{i}.energies", every.energies.cpu())
            writer.add(f"{i}.basis", every.basis.to("cpu", torch.float32))
            writer.add(f"{i}.coefficient", every.coefficient.to("cpu", torch.float32))
            advance()
        groups = [*given]
        for group in offered:
            originals = [read_part(dense, part).to(device) for part in group.parts]
            if members := metric.members(group, originals):
                saved = energies(members, pooled_basis(members))
                writer.add(f"{len(groups)}.energies", saved.cpu())
                groups.append(group)
            advance()
        narrowed: list[Mlp] = []
        for mlp in mlps:
            if found := _measured(mlp, dense, metric, device):
                _write_widths(writer, f"mlp{len(narrowed)}", mlp, found)
                narrowed.append(mlp)
            advance()
        writer.flush()
        index = SpectraIndex(
            tuple(groups), len(given), twins, tuple(unseen), writer.files, tuple(narrowed)
        )
        store.save_record(out / INDEX, index)


def members_of(
    mlp: Mlp, dense: DenseWeights, metric: Metric, device: torch.device
) -> Sequence[Member] | None:
    """The parts of an MLP; None where calibration has not seen what one of them reads."""
    found: list[Member] = []
    for part in mlp.parts:
        members = metric.members(Group((part,)), [read_part(dense, part).to(device)])
        if members is None:
            return None
        found += members
    return found


def _measured(mlp: Mlp, dense: DenseWeights, metric: Metric, device: torch.device) -> Widths | None:
    members = members_of(mlp, dense, metric, device)
    return measure(mlp, members) if members else None


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
