"""An attribution as tables and numbers: metrics/attribute.json, CSV, Markdown, terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from tabulate import tabulate

from sharebasis.io.tables import csv_text
from sharebasis.runtime.console import print_tables
from sharebasis.stages.attribute.attribution import (
    NORM,
    UNEMBEDDING,
    Attribution,
    Component,
    Depth,
)
from sharebasis.stages.attribute.error_split import MEASURES, Measure

ERRORS = ("own_error", "inherited_error")
DEPTHS = ("layer", "loss", "compressed_loss", "kl", "compressed_kl")
HEADINGS = ("component", "KL own", "inherited", "loss own", "inherited", "logits own", "inherited")
SHOWN: Mapping[Measure, tuple[float, int]] = {
    "kl": (1e3, 2),
    "loss": (1e3, 2),
    "logit_error": (1, 4),
}
"""Measure -> what it is multiplied by, and its decimals."""


def attribute_metrics(attribution: Attribution, top: int) -> dict[str, Any]:
    """metrics/attribute.json: every measure and its parts, a prediction.

    Args:
        attribution: of a compressed model.
        top: how many components are named.
    """
    ends = {
        part.label: part for part in attribution.components if part.label in (NORM, UNEMBEDDING)
    }
    inside = [part for part in attribution.components if part.label not in ends]
    return {
        measure: {
            "total": attribution.total[measure],
            "own_error": sum(part.own_error[measure] for part in inside),
            "inherited_error": sum(part.inherited_error[measure] for part in inside),
            "norm_scale": ends[NORM].total(measure),
            "unembedding": ends[UNEMBEDDING].total(measure),
            "quadrature": attribution.quadrature[measure],
        }
        for measure in MEASURES
    } | {
        "worst_own_kl": {
            part.label: part.own_error["kl"] for part in attribution.ranked("kl")[:top]
        },
        "n_predictions": attribution.n_predictions,
    }


def components_csv(attribution: Attribution) -> str:
    """Every component, the worst first: its own and its inherited error by every measure."""
    columns = [f"{error}_{measure}" for measure in MEASURES for error in ERRORS]
    rows = [
        [part.label, part.layer, part.head]
        + [getattr(part, error)[measure] for measure in MEASURES for error in ERRORS]
        for part in attribution.ranked("kl")
    ]
    return csv_text(["component", "layer", "head", *columns], rows)


def lens_csv(attribution: Attribution) -> str:
    """Loss and divergence at every depth, nats a prediction."""

    def row(depth: Depth) -> list[Any]:
        return [getattr(depth, column) for column in DEPTHS]

    return csv_text(DEPTHS, map(row, attribution.lens))


def markdown(attribution: Attribution, top: int) -> str:
    """The ranking as Markdown.

    Args:
        attribution: of a compressed model.
        top: how many components are named.
    """
    align = ["left", *["right"] * (len(HEADINGS) - 1)]
    rows = _ranking(attribution, top)
    table = tabulate(rows, HEADINGS, tablefmt="pipe", colalign=align, disable_numparse=True)
    return table + "\n"


def show(attribution: Attribution, top: int) -> None:
    """Print the ranking.

    Args: as of `markdown`.
    """
    table = Table(
        title=f"Who makes the error, over {attribution.n_predictions:,} predictions",
        caption="1/1000 nat a prediction; logits: squared logits a prediction",
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "component" else "right")
    *named, others, total, measured = _ranking(attribution, top)
    for row in named:
        table.add_row(*row)
    for row in (others, total, measured):
        table.add_row(*row, end_section=True)
    print_tables(table)


def _ranking(attribution: Attribution, top: int) -> list[list[str]]:
    """The worst components, the others, their sum, and what it should be: a row each."""
    ranked = attribution.ranked("kl")
    measured = [
        cell
        for measure, (scale, digits) in SHOWN.items()
        for cell in (f"{scale * attribution.total[measure]:.{digits}f}", "")
    ]
    return [
        *([part.label, *_summed([part])] for part in ranked[:top]),
        [f"{len(ranked[top:])} others", *_summed(ranked[top:])],
        ["sum", *_summed(ranked)],
        ["measured", *measured],
    ]


def _summed(components: Sequence[Component]) -> list[str]:
    return [
        f"{scale * sum(getattr(part, error)[measure] for part in components):.{digits}f}"
        for measure, (scale, digits) in SHOWN.items()
        for error in ERRORS
    ]
