"""What a structure changes around its weights: pruned neurons, the value gauge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Int64
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from sharebasis.compressed.index import CompressedIndex, StoredPart
from sharebasis.errors import StoreError
from sharebasis.forms.dense import Dense
from sharebasis.forms.fixed_columns import FixedColumns
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.rows import Rows, rows_at
from sharebasis.linalg.value_gauge import (
    bias_in_gauge,
    fix_values,
    output_in_gauge,
    values_at,
    values_in_gauge,
)
from sharebasis.model.surgery import narrow, weight_of

if TYPE_CHECKING:
    from sharebasis.compressed.rewrite import Rewriting


class Edit:
    """A change of a model beside the forms of its weights; a record of the index."""

    kind: ClassVar[str]
    """Its name in `sharebasis.json`."""

    def shape(self, model: nn.Module) -> None:
        """Give the modules of a model the sizes that they have; their values do not matter."""

    def kept_rows(self, sublayer: str) -> Int64[Tensor, " rows"] | None:
        """The original numbers of the rows that a sublayer has; None: it has all of them."""
        return None

    def kept_columns(self, sublayer: str) -> Int64[Tensor, " columns"] | None:
        """The same of columns."""
        return None

    def original_block(self, part: StoredPart) -> Rows | None:
        """Where a block of a fused weight lay before pruning, if a part is what is left of it."""
        return None

    def is_fitted(self, sublayer: str) -> bool:
        """Whether a weight is another than the original's where it is stored dense, too."""
        return False

    def follow(self, original: nn.Module, index: CompressedIndex, reader: TensorReader) -> None:
        """Put the original into the gauge of the compressed model; it computes what it did.

        Args:
            original: dense, changed in place.
            index: of the compressed model.
            reader: of its tensors.
        """

    def settle(self, rewriting: Rewriting) -> None:
        """After weights were refitted or trained, see to it that the edit still holds."""


@dataclass(frozen=True)
class PrunedNeurons(Edit):
    """A pruned MLP."""

    kind: ClassVar[str] = "pruned_neurons"
    reads: tuple[str, ...]
    """Sublayers whose rows were pruned: up, and gate if there is one; or the one that is both."""
    down: str
    """The sublayer whose columns were pruned."""
    kept: tuple[int, ...]
    """The original numbers of the neurons that are there, ascending."""
    gate_up: tuple[Rows, ...] = ()
    """Of the one sublayer that is gate and up: the original rows of each."""

    @property
    def rows(self) -> Int64[Tensor, " rows"]:
        """The original numbers of the rows that each of `reads` has, in their order."""
        kept = torch.tensor(self.kept)
        return rows_at(kept, self.gate_up) if self.gate_up else kept

    def shape(self, model: nn.Module) -> None:
        narrow(model, self.reads, self.down, len(self.rows), len(self.kept))

    def kept_rows(self, sublayer: str) -> Int64[Tensor, " rows"] | None:
        return self.rows if sublayer in self.reads else None

    def kept_columns(self, sublayer: str) -> Int64[Tensor, " columns"] | None:
        return torch.tensor(self.kept) if sublayer == self.down else None

    def original_block(self, part: StoredPart) -> Rows | None:
        if part.sublayer not in self.reads:
            return None
        before, after = sum(map(len, self.gate_up)), len(self.gate_up) * len(self.kept)
        blocks = (rows for rows in self.gate_up if rows.resized(before, after) == part.rows)
        return next(blocks, None)

    def is_fitted(self, sublayer: str) -> bool:
        return sublayer in (*self.reads, self.down)


@dataclass(frozen=True)
class ValueGauge(Edit):
    """Values with columns fixed to the identity; the output has taken in what these were."""

    kind: ClassVar[str] = "value_gauge"
    value: str
    """The tensor of the other columns."""
    output: str
    """A sublayer."""

    @torch.no_grad()
    def follow(self, original: nn.Module, index: CompressedIndex, reader: TensorReader) -> None:
        _, part = index.find_tensor(self.value)
        values, outputs = (original.get_submodule(name) for name in (part.sublayer, self.output))
        rows = part.rows.numbers.to(weight_of(values).device)
        basis_change = values_at(weight_of(values)[rows], reader.read(part.tensors["pivots"]))
        biases = [values.bias] if isinstance(values.bias, Tensor) else []
        for tensor in (weight_of(values), *biases):
            tensor[rows] = values_in_gauge(tensor[rows], basis_change).to(tensor)
        weight_of(outputs).copy_(output_in_gauge(weight_of(outputs), basis_change))

    def settle(self, rewriting: Rewriting) -> None:
        """New values have no fixed columns: choose anew, and let the output take these in."""
        value_group, part = rewriting.index.find_tensor(self.value)
        edited = rewriting.forms.get(value_group.name)
        if edited is None:
            return
        assert isinstance(edited, Dense)
        n_kv_heads = rewriting.reader.shape(part.tensors["pivots"])[0]
        values = fix_values(edited.weights[0].detach(), n_kv_heads)
        rewriting.forms[value_group.name] = FixedColumns(values.pivots, values.coefficient)
        output_group = rewriting.index.group_of(self.output)
        (place,) = (
            i for i, other in enumerate(output_group.parts) if self.output in other.sublayers
        )
        outputs = rewriting.form(output_group)
        rewriting.forms[output_group.name] = outputs.change_inputs(
            place, lambda weight: output_in_gauge(weight.detach(), values.basis_change)
        )
        name = f"{part.sublayer}.bias"
        if name in rewriting.index.files:
            bias = rewriting.tensor(name)
            rewriting.tensors[name] = bias_in_gauge(bias, part.rows.numbers, values.basis_change)


EDITS: dict[str, type[Edit]] = {
    PrunedNeurons.kind: PrunedNeurons,
    ValueGauge.kind: ValueGauge,
}
"""By what `sharebasis.json` calls them."""


Answer = TypeVar("Answer")


def first_answer(edits: Iterable[Edit], question: Callable[[Edit], Answer | None]) -> Answer | None:
    """The answer of the first edit that has one; None: no edit has."""
    answers = map(question, edits)
    return next((answer for answer in answers if answer is not None), None)


def edits_of(index: CompressedIndex) -> Sequence[Edit]:
    """The edits of a compressed model.

    Raises:
        StoreError: there is one that this version does not know.
    """
    return [_edit(record) for record in index.edits]


def _edit(record: Mapping[str, Any]) -> Edit:
    fields = dict(record)
    kind = fields.pop("kind", None)
    try:
        edit: Edit = TypeAdapter(EDITS[kind]).validate_python(fields)
    except (KeyError, ValidationError) as error:
        raise StoreError(
            f"The index of the compressed model has an edit of the kind {kind!r} that this version "
            f"cannot read (it knows {', '.join(EDITS)}): {error}. Write the model again (dvc repro "
            "fit)."
        ) from None
    return edit


def edit_record(edit: Edit) -> dict[str, Any]:
    """What the index holds of an edit."""
    return {"kind": edit.kind, **TypeAdapter(type(edit)).dump_python(edit, mode="json")}
