"""artifacts/compressed and text -> artifacts/recovered: the factors, distilled for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharebasis import compressed_index, store
from sharebasis.checkpoint import Checkpoint, identity_of
from sharebasis.compressed import linears_by_group, load_compressed
from sharebasis.compressed_index import CompressedGroup, CompressedIndex
from sharebasis.compressed_writer import rewrite
from sharebasis.errors import RecoveryError
from sharebasis.factorize import balance
from sharebasis.hub import MANIFEST, load_model
from sharebasis.outcomes import RECOVERY, Recovery
from sharebasis.settings import DataSettings, RecoverSettings
from sharebasis.share_linear import ShareLinear
from sharebasis.texts import cut, read_windows
from sharebasis.training import distill


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


def recovery_identity(
    weights: Path, compressed: Path, windows: Tensor, settings: RecoverSettings, **others: object
) -> dict[str, object]:
    """All that the trained factors depend on, for `Checkpoint`.

    Args:
        weights: artifacts/weights, which its manifest stands for.
        compressed: artifacts/compressed.
        windows: token ids.
        settings: of the training.
        others: whatever else changes the numbers.
    """
    models = {"weights": weights / MANIFEST, "compressed": compressed}
    return {**identity_of(settings, windows, **models), **others}


def recovery_windows(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, settings: RecoverSettings, seed: int
) -> Int64[Tensor, "windows window"]:
    """The windows to train on and then those held out, all of the calibration text.

    Raises:
        TextError: there is too little of it.
    """
    own = cut(data, "calibration", settings.windows + settings.held_out, settings.window)
    return read_windows(tokenizer, own, "calibration", seed, "recover")


def recover(
    weights: Path,
    compressed: Path,
    windows: Int64[Tensor, "windows window"],
    settings: RecoverSettings,
    seed: int,
    checkpoint: Checkpoint,
    target: Path,
    shard_bytes: int,
    device: torch.device,
) -> Recovery:
    """Train the factors of a compressed model and write it anew; whole or not at all.

    Args:
        weights: artifacts/weights.
        compressed: artifacts/compressed.
        windows: from `recovery_windows`.
        settings: of the training; without a step, only that is written.
        seed: of the order of the windows.
        checkpoint: where a run that was killed goes on from.
        target: artifacts/recovered.
        shard_bytes: size at which a shard is closed.
        device: for the training.

    Raises:
        RecoveryError: there is nothing to train, or training went astray.
        WeightsError, StoreError, ResourceError: what is read is not usable, or does not fit.
    """
    index = store.load_record(compressed / compressed_index.FILE, CompressedIndex)
    model = load_compressed(compressed, torch.float32, device)
    groups = trainable(model, index)
    factors = {name: own for group in groups for name, own in group.named()}
    original = load_model(weights, settings.dtype, device)
    kept = {name: own for group in groups for name, own in group.kept.items()}
    found = distill(original, model, factors, windows, settings, seed, checkpoint, kept)
    write_recovered(target, compressed, index, groups, found, shard_bytes)
    checkpoint.remove()
    return found


def write_recovered(
    target: Path,
    source: Path,
    index: CompressedIndex,
    groups: Sequence[TrainableGroup],
    recovery: Recovery,
    shard_bytes: int,
) -> None:
    """Write a compressed directory with trained factors in the place of others.

    Args:
        target: artifacts/recovered.
        source: artifacts/compressed, whose other tensors go along.
        index: of `source`.
        groups: trained.
        recovery: how that went.
        shard_bytes: size at which a shard is closed.

    Raises:
        StoreError: the disk is full.
    """
    factors = {name: own for group in groups for name, own in group.named()}
    with store.writing(target) as out:
        rewrite(out, source, index, factors, shard_bytes)
        store.save_record(out / RECOVERY, recovery)
