"""artifacts/weights and artifacts/moments -> artifacts/compressed, one group at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharebasis import compressed_index, store
from sharebasis.allocation import uniform_ranks
from sharebasis.compressed_index import CompressedGroup, CompressedIndex, CompressedPart
from sharebasis.factorize import ReadFactors, fit_read_basis
from sharebasis.grouping import Group, groups_of
from sharebasis.hub import MANIFEST
from sharebasis.moment_store import MomentStore
from sharebasis.moments import Moment
from sharebasis.progress import progress
from sharebasis.settings import FitSettings, Method
from sharebasis.splitting import Part
from sharebasis.weights import DenseWeights

WHITENED: dict[Method, bool] = {"svd": False, "svd_llm": True, "basis_sharing": True}
"""Whether a method minimises the error of the outputs (or that of the weights)."""


@dataclass(frozen=True, slots=True)
class FittedGroup:
    """What became of a group, for metrics."""

    group: Group
    rank: int
    n_stored: int
    loss: float
    energy: float


@dataclass(frozen=True, slots=True)
class FittedModel:
    """What became of a model."""

    groups: tuple[FittedGroup, ...]
    n_others: int
    """Numbers that are stored as they were: embeddings, norms, biases, what is not selected."""


def fit(
    weights: Path,
    parts: Sequence[Part],
    moments: MomentStore,
    settings: FitSettings,
    target: Path,
    device: torch.device,
) -> FittedModel:
    """Fit every group and write the compressed model; whole or not at all.

    Memory holds one group, its moments and one shard of the output.

    Args:
        weights: artifacts/weights.
        parts: of its selected sublayers.
        moments: of its inputs; not read by a method that does not whiten.
        settings: method and budget.
        target: artifacts/compressed.
        device: for the decompositions.

    Raises:
        BudgetError: a group is too small for the budget.
        WeightsError, CalibrationError, StoreError: what is read is not usable.
    """
    twins = _twins(parts)
    parts = [part for part in parts if part.sublayer.tied_to is None]
    groups = groups_of(parts, settings.group_size, settings.shared, settings.share_experts)
    # Groups of the same layers in turn: they read the same moments.
    groups = sorted(groups, key=lambda group: group.parts[0].sublayer.layer)
    ranks = uniform_ranks(groups, settings.removed)
    dense, pool = DenseWeights(weights), _pooled(moments, twins, device)
    fitted, index = [], []
    with store.writing(target) as out:
        writer = store.TensorWriter(out, "sharebasis", settings.shard_bytes)
        fitted_names = {*(part.sublayer.name for part in parts), *chain(*twins.values())}
        for name, tensor in dense.stream(without={f"{name}.weight" for name in fitted_names}):
            writer.add(name, tensor)
        n_others = writer.n_numbers
        with progress("fit", len(groups), "groups") as advance:
            for group, rank in zip(groups, ranks, strict=True):
                originals = [_read(dense, part).to(device) for part in group.parts]
                moment = pool(group) if WHITENED[settings.method] else None
                if moment is not None and moment.n_tokens == 0:
                    moment = None  # experts that no token went to
                factors = fit_read_basis(originals, moment, rank)
                before = writer.n_numbers
                index.append(_write(writer, group, factors, originals[0].dtype, twins))
                n_stored = writer.n_numbers - before
                fitted.append(FittedGroup(group, rank, n_stored, factors.loss, factors.energy))
                advance()
        writer.flush()
        _copy_companions(weights, out)
        store.save_record(out / compressed_index.FILE, CompressedIndex(tuple(index), writer.files))
    return FittedModel(tuple(fitted), n_others)


def _twins(parts: Iterable[Part]) -> Mapping[str, Sequence[str]]:
    """Sublayer -> those that use its weight, too."""
    twins: dict[str, list[str]] = {}
    for part in parts:
        own = twins.setdefault(part.sublayer.tied_to or part.sublayer.name, [])
        if part.sublayer.tied_to and part.sublayer.name not in own:
            own.append(part.sublayer.name)
    return twins


def _read(dense: DenseWeights, part: Part) -> Tensor:
    name, conv1d = part.sublayer.name, part.sublayer.type == "Conv1D"
    return dense.read(f"{name}.weight", part.rows, transposed=conv1d)


def _pooled(
    moments: MomentStore, twins: Mapping[str, Sequence[str]], device: torch.device
) -> Callable[[Group], Moment]:
    """The moment of all that a group reads; that of the group before is kept at hand."""

    @lru_cache(maxsize=1)
    def pool(sites: tuple[str, ...]) -> Moment:
        return reduce(add, (moments.read(site) for site in sites)).to(device)

    def sites(group: Group) -> Iterator[str]:
        for part in group.parts:
            for name in (part.sublayer.name, *twins[part.sublayer.name]):
                yield moments.site(name)

    return lambda group: pool(tuple(dict.fromkeys(sites(group))))


def _write(
    writer: store.TensorWriter,
    group: Group,
    factors: ReadFactors,
    dtype: torch.dtype,
    twins: Mapping[str, Sequence[str]],
) -> CompressedGroup:
    """Store a basis once and the coefficient of every part, in the dtype of the original."""
    basis = f"{group.name}.basis"
    writer.add(basis, factors.basis.to("cpu", dtype))
    parts = []
    for part, coefficient in zip(group.parts, factors.coefficients, strict=True):
        label = f".{part.label}" if part.label else ""
        name = f"{part.sublayer.name}{label}.coefficient"
        writer.add(name, coefficient.to("cpu", dtype))
        for sublayer in (part.sublayer.name, *twins[part.sublayer.name]):
            parts.append(CompressedPart(sublayer, part.rows, name))
    rank = factors.basis.shape[0]
    return CompressedGroup(group.name, group.family, rank, basis, tuple(parts))


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
