"""The factors of a compressed model as parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.compressed.index import CompressedGroup, CompressedIndex
from sharebasis.compressed.loader import linears_by_group
from sharebasis.errors import RecoveryError
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.linalg.low_rank import balance


@dataclass(frozen=True, slots=True)
class TrainableGroup:
    """Factors of a group as parameters, in plain form while they are trained."""

    group: CompressedGroup
    basis: nn.Parameter | None
    """(rank, d_in), or (d_out, rank) on the output side; None: a weight that lacks neurons or
    entries."""
    coefficients: Mapping[str, nn.Parameter]
    """(d_out, rank), or (rank, d_in), or that weight, by the names of their tensors."""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """Which entries a weight has that lacks others, likewise."""

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.group.basis is not None and self.basis is not None:
            yield self.group.basis, self.basis
        yield from self.coefficients.items()


def trainable(model: PreTrainedModel, index: CompressedIndex) -> Sequence[TrainableGroup]:
    """Make parameters of the factors of a compressed model, balanced and in float32.

    So are weights that lack neurons or entries: they are no longer the original's.

    Args:
        model: from `load_compressed`; nothing else of it is trained.
        index: of its directory.

    Raises:
        RecoveryError: it has no factors.
    """
    model.requires_grad_(False)
    narrowed = {name for mlp in index.mlps for name in (*mlp.reads, mlp.down)}
    groups = []
    for group, linears in linears_by_group(model, index):
        if group.basis is None:
            kept = _kept(linears)
            if kept or group.parts[0].sublayer in narrowed:
                groups.append(TrainableGroup(group, None, _weights(linears), kept))
            continue
        own = {name: linear.factors() for name, linear in linears.items()}
        if group.side == "output":  # the same problem, transposed
            own = {name: (outer.T, inner.T) for name, (inner, outer) in own.items()}
        stacked = torch.cat([coefficient for _, coefficient in own.values()]).double()
        basis = next(iter(own.values()))[0].double()
        lengths = [len(coefficient) for _, coefficient in own.values()]
        stacked, basis = balance(stacked, basis)
        shared = nn.Parameter(_stored(group, basis).float().contiguous())
        coefficients = {}
        for name, rows in zip(own, stacked.split(lengths), strict=True):
            coefficients[name] = nn.Parameter(_stored(group, rows).float().contiguous())
            linears[name].refactor(shared, coefficients[name])
        groups.append(TrainableGroup(group, shared, coefficients))
    if not groups:
        raise RecoveryError(
            "The compressed model has nothing to train: no sublayer lacks directions, entries or "
            "neurons. Raise fit.removed, or set recover=none."
        )
    return groups


def _kept(linears: Mapping[str, ShareLinear]) -> Mapping[str, Tensor]:
    """Which entries there are of weights that lack others."""
    every = {name: linear.kept for name, linear in linears.items()}
    return {name: kept for name, kept in every.items() if kept is not None}


def _weights(linears: Mapping[str, ShareLinear]) -> Mapping[str, nn.Parameter]:
    """Weights that are stored as they are, as parameters in float32."""
    found = {}
    for name, linear in linears.items():
        found[name] = linear.weight = nn.Parameter(linear.dense().detach().float())
    return found


def _stored(group: CompressedGroup, factor: Tensor) -> Tensor:
    """(rank, shared) or (own, rank) <-> what is stored of it."""
    return factor.T if group.side == "output" else factor
