"""The value gauge: columns of W_V fixed to the identity, which need not be stored.

It belongs to offers of others: an output of attention may take in what columns of the values that
stay dense were (`linalg.value_gauge`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from sharebasis.architecture.parts import Part
from sharebasis.compressed.edits import ValueGauge
from sharebasis.forms.fixed_columns import FixedColumns
from sharebasis.gauge.layers import Layers
from sharebasis.linalg.value_gauge import FixedValues, bias_in_gauge, fix_values, output_in_gauge
from sharebasis.model.part_weights import read_part
from sharebasis.moments.problems import Problems
from sharebasis.structures.structure import (
    Built,
    FittedEdit,
    Measured,
    MeasuredCell,
    ModelParts,
    Offer,
    Structure,
    Task,
    Terms,
    Workshop,
)


@dataclass(frozen=True, slots=True)
class ValueCell:
    """Values, and the output of their heads."""

    value: Part
    output: Part
    n_kv_heads: int

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.value, self.output

    @property
    def n_saved(self) -> int:
        """Numbers fewer that the values store; the index of a column is one."""
        n_rows = self.value.shape[0]
        return n_rows * (n_rows // self.n_kv_heads) - n_rows


class ValueGauges(Structure):
    """Offers the groups that an output is in anew, together with its values."""

    cell_type = ValueCell
    needs_moments = False
    needs_weights = False

    def cells(self, model: ModelParts) -> Iterator[ValueCell]:
        """Where values are a group of their own, outputs share on the other side than that of
        heads if at all, and columns are far enough from dependent."""
        layers = Layers(model.dense, model.classification, model.dense.config)
        groups = [*model.baseline, *model.offered]
        alone = {g.parts[0].name: g.parts[0] for g in groups if len(g.parts) == 1}
        shared = [g for g in groups if len(g.parts) > 1 and g.side == "input"]
        bound = {p.name for g in shared for p in g.parts if p.sublayer.role == "write"}
        for candidate in layers.value_outputs:
            value, output = alone.get(candidate.value), alone.get(candidate.output)
            if value is None or output is None or output.name in bound:
                continue
            if any(model.tied_names[part.sublayer.name] for part in (value, output)):
                continue
            cell = ValueCell(value, output, candidate.n_kv_heads)
            if value.shape[0] // cell.n_kv_heads < value.shape[1]:
                weight = read_part(model.dense, value)
                if weight.isfinite().all() and fix_values(weight, cell.n_kv_heads).bounded:
                    yield cell

    def measure(
        self, cell: ValueCell, weights: Sequence[Tensor], problems: Problems
    ) -> Measured | None:
        return Measured({})  # nothing is lost

    def offers(self, cells: Sequence[MeasuredCell], terms: Terms) -> Iterator[Offer]:
        if not terms.settings.value_gauge:
            return
        by_output: dict[str, MeasuredCell] = {}
        for cell in cells:
            gauge: ValueCell = cell.cell
            if not any(terms.limits[part.name].dense for part in gauge.parts):
                by_output[gauge.output.name] = cell
        candidates = [o for o in terms.offers if o.cell.structure.takes_in_inputs]
        alone = {offer.parts[0].name: offer for offer in candidates if len(offer.parts) == 1}
        for offer in candidates:
            gauges = [by_output[part.name] for part in offer.parts if part.name in by_output]
            if gauges:
                yield _with_values(offer, gauges, [alone[cell.cell.value.name] for cell in gauges])

    def expand(self, cell: MeasuredCell, point: GaugePoint, workshop: Workshop) -> Sequence[Task]:
        gauges = [gauge.cell for gauge in point.cells]
        amend = [partial(_take_in, gauge, workshop) for gauge in gauges]
        edits = [_edit(gauge, workshop) for gauge in gauges]
        outputs = Task(point.outputs.cell, point.outputs.points[point.entry], amend, edits)
        dense = [
            Task(offer.cell, offer.points[-1], [partial(_fix, gauge, workshop)])
            for offer, gauge in zip(point.values, gauges, strict=True)
        ]
        return [outputs, *dense]

    def build(
        self, cell: MeasuredCell, point: GaugePoint, workshop: Workshop
    ) -> Callable[[], Sequence[Built]]:
        raise NotImplementedError("What it offers is built by the structures of its parts.")


@dataclass(frozen=True, slots=True)
class GaugePoint:
    """A point of an offer of outputs, and the values that stay dense with it."""

    outputs: Offer
    entry: int
    cells: Sequence[MeasuredCell]
    values: Sequence[Offer]
    """Of every cell."""


def _with_values(offer: Offer, cells: Sequence[MeasuredCell], values: Sequence[Offer]) -> Offer:
    """An offer of outputs, with their values, of which the fixed columns are not stored."""
    curve, parts = offer.curve, [*offer.parts]
    for cell, value in zip(cells, values, strict=True):
        curve = curve.beside(value.curve, cell.cell.n_saved)
        parts.append(cell.cell.value)
    points = [GaugePoint(offer, entry, cells, values) for entry in range(len(offer.points))]
    return Offer(parts, curve, cells[0], points)


def _fixed(cell: ValueCell, workshop: Workshop) -> FixedValues:
    """Made anew wherever it is asked for, since it is as large as the values."""
    (weight,) = workshop.weights([cell.value])
    return fix_values(weight, cell.n_kv_heads)


def _take_in(cell: ValueCell, workshop: Workshop, built: Built) -> Built:
    """Outputs in the gauge: they have taken in what the fixed columns of the values were."""
    place = [part.name for part in built.group.parts].index(cell.output.name)
    basis_change = _fixed(cell, workshop).basis_change

    def change(weight: Tensor) -> Tensor:
        return output_in_gauge(weight.to(basis_change.device), basis_change)

    return replace(built, form=built.form.change_inputs(place, change))


def _fix(cell: ValueCell, workshop: Workshop, built: Built) -> Built:
    """The values in the gauge, of which the fixed columns are not stored."""
    (weight,) = built.form.dense()
    values = fix_values(weight.to(workshop.device), cell.n_kv_heads)
    return replace(built, form=FixedColumns(values.pivots, values.coefficient))


def _edit(cell: ValueCell, workshop: Workshop) -> FittedEdit:
    """The edit; the bias of values is put into their gauge, too."""
    rows, sublayer = cell.value.rows.numbers, cell.value.sublayer.name
    edit = ValueGauge(f"{cell.value.stem}.dense", cell.output.sublayer.name)

    def change(bias: Tensor) -> Tensor:
        return bias_in_gauge(bias, rows, _fixed(cell, workshop).basis_change)

    return FittedEdit(edit, {f"{sublayer}.bias": change})
