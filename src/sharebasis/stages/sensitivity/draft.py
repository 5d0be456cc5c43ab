"""What `fit` makes of the spectra, put into the original model for a while."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.architecture.groups import Group
from sharebasis.compressed.index import INDEX_FILE, CompressedGroup, CompressedIndex, CompressedPart
from sharebasis.config.fit import FitSettings
from sharebasis.forms.mask import unpack, whole
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.io.records import load_record
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.rows import Rows
from sharebasis.model.surgery import wrap
from sharebasis.moments.store import MomentStore
from sharebasis.spectra.store import Spectra
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedGroup

Linears = Mapping[tuple[str, int], ShareLinear]
"""(Sublayer, first row of the part) -> the part in a wrapped model."""


class Draft:
    """A compressed model in a directory, group by group.

    Args:
        directory: written by `fit`.
        fitted: what that said of its groups.
    """

    def __init__(self, directory: Path, fitted: Sequence[FittedGroup]) -> None:
        index = load_record(directory / INDEX_FILE, CompressedIndex)
        self._reader = TensorReader(directory, index.files)
        self._entries, self._fitted, self._mlps = index.groups, fitted, index.mlps

    @property
    def groups(self) -> Sequence[Group]:
        return [one.group for one in self._fitted]

    @property
    def losses(self) -> Sequence[float]:
        """Predicted, quadratic, of each group."""
        return [one.loss for one in self._fitted]

    def weights(self, i: int) -> Iterator[tuple[CompressedPart, Tensor]]:
        """What a group makes of its parts, under all the names of their sublayers; (d_out, d_in)
        each, or less where an MLP lacks neurons. None if they are as they were. The rows of the
        parts are those of the original."""
        entry = self._entries[i]
        if entry.basis is None and not entry.parts[0].mask and not self._lacks_neurons(entry):
            return
        read = {name: self._reader.read(name) for name in entry.tensors}
        d_in = self._fitted[i].group.parts[0].shape[1]
        for part in entry.parts:
            rows = (mlp.original(part.rows) for mlp in self._mlps if part.sublayer in mlp.reads)
            original = replace(part, rows=next(rows, None) or part.rows)
            yield original, _dense(entry, part, d_in, read)

    def _lacks_neurons(self, entry: CompressedGroup) -> bool:
        names = {part.sublayer for part in entry.parts}
        return any(names & {*mlp.reads, mlp.down} for mlp in self._mlps)

    def whole(self, part: CompressedPart, weight: Tensor, original: Tensor) -> Tensor:
        """A part in the shape that it had: neurons that are not there are not heard by down."""
        for mlp in self._mlps:
            kept = torch.tensor(mlp.kept, device=original.device)
            if part.sublayer in mlp.reads:
                alone = part.rows in mlp.gate_up
                rows = kept if alone else torch.tensor(mlp.rows, device=original.device)
                return original.index_copy(0, rows, weight)
            if part.sublayer == mlp.down:
                return torch.zeros_like(original).index_copy(1, kept, weight)
        return weight


def _dense(
    entry: CompressedGroup, part: CompressedPart, d_in: int, read: Mapping[str, Tensor]
) -> Tensor:
    coefficient = read[part.coefficient]
    if part.mask:
        return whole(coefficient, unpack(read[part.mask], (len(part.rows), d_in)))
    if entry.basis is None:
        return coefficient
    basis = read[entry.basis]
    if entry.side == "output":  # where parts may be as wide as they like
        d_in = coefficient.shape[1]
    linear = ShareLinear(torch.empty(len(part.rows), d_in, device="meta"))
    pivots = read[part.pivots] if part.pivots else None
    linear.compress(basis.float(), coefficient.float(), pivots, part.first, entry.side)
    return linear.dense().detach()


@contextmanager
def draft(
    weights: Path,
    spectra: Path,
    moments: MomentStore | None,
    settings: FitSettings,
    scratch: Path,
    device: torch.device,
) -> Iterator[Draft]:
    """Fit with every weight 1, into a directory that is gone afterwards.

    Args: those of `fit`; `scratch` is its target.

    Raises:
        BudgetError, SelectionError, and what else `fit` raises.
    """
    try:
        # Parts are put into the original one by one, so their gauge has to be its own.
        own = replace(settings, value_gauge=False)
        fitted = fit(weights, spectra, own, scratch, device, moments)
        yield Draft(scratch, fitted.groups)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def wrap_parts(model: PreTrainedModel, spectra: Spectra) -> Linears:
    """Make every part a module, under all the names of its sublayer; the model is changed."""
    rows: dict[str, list[Rows]] = {}
    for group in spectra.groups[: spectra.n_given]:
        for part in group.parts:
            for name in (part.sublayer.name, *spectra.twins[part.sublayer.name]):
                rows.setdefault(name, []).append(part.rows)
    ordered = {name: sorted(own, key=lambda one: one.start) for name, own in rows.items()}
    modules = wrap(model, ordered)
    return {
        (name, one.start): linear
        for name, own in ordered.items()
        for one, linear in zip(own, modules[name].parts, strict=True)
    }


@contextmanager
def compressed(linears: Linears, plan: Draft, groups: Iterable[int]) -> Iterator[None]:
    """Give some groups the weights of a draft for a while, and then their own back."""
    kept: dict[ShareLinear, nn.Parameter] = {}  # a module may have several names
    try:
        for i in groups:
            for part, weight in plan.weights(i):
                linear = linears[part.sublayer, part.rows.start]
                assert linear.weight is not None
                own = kept.setdefault(linear, linear.weight)
                new = plan.whole(part, weight.to(own), own.detach())
                linear.weight = nn.Parameter(new, requires_grad=False)
        yield
    finally:
        for linear, weight in kept.items():
            linear.weight = weight
