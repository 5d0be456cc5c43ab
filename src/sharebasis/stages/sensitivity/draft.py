"""What `fit` makes of the spectra, put into the original model for a while."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.groups import Group
from sharebasis.compressed.edits import edits_of, first_answer
from sharebasis.compressed.index import StoredPart, load_index
from sharebasis.config.fit import FitSettings
from sharebasis.forms.dense import DenseModule
from sharebasis.forms.form import FormModule
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.forms.table import FORMS
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
        fitted: its groups, as `fit` returned them.
    """

    def __init__(self, directory: Path, fitted: Sequence[FittedGroup]) -> None:
        index = load_index(directory)
        self._reader = TensorReader(directory, index.files)
        self._stored, self._fitted = index.groups, fitted
        self._edits = edits_of(index)

    @property
    def groups(self) -> Sequence[Group]:
        return [fitted.group for fitted in self._fitted]

    @property
    def losses(self) -> Sequence[float]:
        """Predicted, quadratic, of each group."""
        return [fitted.loss for fitted in self._fitted]

    def weights(self, i: int) -> Iterator[tuple[StoredPart, Tensor]]:
        """What group `i` makes of its parts: (d_out, d_in) each, or less of a pruned MLP; nothing
        where they are the original's."""
        group = self._stored[i]
        is_fitted = any(edit.is_fitted(group.parts[0].sublayer) for edit in self._edits)
        if FORMS[group.form].keeps_weights and not is_fitted:
            return
        shapes = [part.shape for part in self._fitted[i].group.parts]
        form = group.read(self._reader, shapes).map(Tensor.float)
        yield from zip(group.parts, form.dense(), strict=True)

    def original_start(self, part: StoredPart) -> int:
        """The first row that a part had in the original."""
        block = self._block(part)
        return part.rows.start if block is None else block.start

    def unpruned(self, part: StoredPart, weight: Tensor, original: Tensor) -> Tensor:
        """A part in the shape that it had; down multiplies pruned neurons by zero."""
        rows = first_answer(self._edits, lambda edit: edit.kept_rows(part.sublayer))
        if rows is not None:
            if (block := self._block(part)) is not None:
                rows = torch.searchsorted(block.numbers, rows[part.rows.numbers])
            return original.index_copy(0, rows.to(original.device), weight)
        columns = first_answer(self._edits, lambda edit: edit.kept_columns(part.sublayer))
        if columns is not None:
            zeros = torch.zeros_like(original)
            return zeros.index_copy(1, columns.to(original.device), weight)
        return weight

    def _block(self, part: StoredPart) -> Rows | None:
        return first_answer(self._edits, lambda edit: edit.original_block(part))


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
        # Parts are put into the original one by one, so they have to be in its gauge.
        in_original_gauge = replace(settings, value_gauge=False)
        fitted = fit(weights, spectra, in_original_gauge, scratch, device, moments)
        yield Draft(scratch, fitted.groups)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def wrap_parts(model: PreTrainedModel, spectra: Spectra) -> Linears:
    """Make every part a module, under all the names of its sublayer; the model is changed."""
    rows: dict[str, list[Rows]] = {}
    for group in spectra.baseline:
        for part in group.parts:
            for name in (part.sublayer.name, *spectra.tied_names[part.sublayer.name]):
                rows.setdefault(name, []).append(part.rows)
    ordered = {name: sorted(of_parts, key=attrgetter("start")) for name, of_parts in rows.items()}
    modules = wrap(model, ordered)
    return {
        (name, part_rows.start): linear
        for name, of_parts in ordered.items()
        for part_rows, linear in zip(of_parts, modules[name].parts, strict=True)
    }


@contextmanager
def compressed(linears: Linears, draft_model: Draft, groups: Iterable[int]) -> Iterator[None]:
    """Give some groups the weights of a draft for a while, and then the original ones back."""
    kept: dict[ShareLinear, FormModule] = {}  # a module may have several names
    try:
        for i in groups:
            for part, weight in draft_model.weights(i):
                for sublayer in part.sublayers:
                    linear = linears[sublayer, draft_model.original_start(part)]
                    original = kept.setdefault(linear, linear.form).dense().detach()
                    linear.form = DenseModule(
                        draft_model.unpruned(part, weight.to(original), original)
                    )
        yield
    finally:
        for linear, form in kept.items():
            linear.form = form
