"""An attribution as tables and numbers: metrics/attribute.json, CSV, Markdown, terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sharebasis.io.tables import csv_text
from sharebasis.runtime.console import print_tables
from sharebasis.stages.attribute.error_attribution import NORM, UNEMBEDDING, Attribution, Component
from sharebasis.stages.attribute.error_split import MEASURES


def attribute_metrics(found: Attribution, top: int) -> dict[str, Any]:
    """metrics/attribute.json: every measure and its parts, a prediction."""
    ends = {one.label: one for one in found.components if one.label in (NORM, UNEMBEDDING)}
    inside = [one for one in found.components if one.label not in ends]
    return {
        measure: {
            "whole": found.whole[measure],
            "made": sum(one.made[measure] for one in inside),
            "passed_on": sum(one.passed_on[measure] for one in inside),
            "norm_scale": ends[NORM].total(measure),
            "unembedding": ends[UNEMBEDDING].total(measure),
            "quadrature": found.quadrature[measure],
        }
        for measure in MEASURES
    } | {
        "worst_made_kl": {one.label: one.made["kl"] for one in found.ranked("kl")[:top]},
        "n_predictions": found.n_predictions,
    }


def components_csv(found: Attribution) -> str:
    """Every component, the worst first: what it makes and passes on by every measure."""
    columns = [f"{part}_{measure}" for measure in MEASURES for part in ("made", "passed_on")]
    rows = [
        [one.label, one.layer, one.head]
        + [part[measure] for measure in MEASURES for part in (one.made, one.passed_on)]
        for one in found.ranked("kl")
    ]
    return csv_text(["component", "layer", "head", *columns], rows)


def lens_csv(found: Attribution) -> str:
    """Loss and divergence at every depth, nats a prediction."""
    columns = ("layer", "loss", "compressed_loss", "kl", "compressed_kl")
    return csv_text(columns, [[getattr(depth, name) for name in columns] for depth in found.lens])


def ranking(found: Attribution, top: int, markdown: bool = False) -> Table:
    """The worst components, and what all of them sum to."""
    table = Table(
        title=None
        if markdown
        else f"Who makes the error, over {found.n_predictions:,} predictions",
        box=box.MARKDOWN if markdown else box.HEAVY_HEAD,
        caption=None
        if markdown
        else "1/1000 nat a prediction; logits: squared logits a prediction",
    )
    for column in ("component", "KL made", "passed on", "loss made", "passed on", "logits made"):
        table.add_column(column, justify="left" if column == "component" else "right")
    table.add_column("passed on", justify="right")
    best = found.ranked("kl")
    for one in best[:top]:
        table.add_row(one.label, *_cells(one.made, one.passed_on))
    rest = best[top:]
    table.add_row(f"{len(rest)} others", *_summed(rest), end_section=not markdown)
    table.add_row("sum", *_summed(best), end_section=not markdown)
    whole = found.whole
    table.add_row(
        "measured", f"{1e3 * whole['kl']:.2f}", "", f"{1e3 * whole['loss']:.2f}", "",
        f"{whole['logit_error']:.4f}", "",
    )  # fmt: skip
    return table


def markdown(found: Attribution, top: int) -> str:
    """The ranking as Markdown."""
    console = Console(width=120, file=io.StringIO())
    console.print(ranking(found, top, markdown=True))
    assert isinstance(console.file, io.StringIO)
    lines = (line.strip() for line in console.file.getvalue().splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def show(found: Attribution, top: int) -> None:
    """Print the ranking."""
    print_tables(ranking(found, top))


def _cells(made: Any, passed_on: Any) -> list[str]:
    scaled = (("kl", 1e3, 2), ("loss", 1e3, 2), ("logit_error", 1, 4))
    return [
        f"{scale * part[measure]:.{digits}f}"
        for measure, scale, digits in scaled
        for part in (made, passed_on)
    ]


def _summed(components: Sequence[Component]) -> list[str]:
    return _cells(
        {measure: sum(one.made[measure] for one in components) for measure in MEASURES},
        {measure: sum(one.passed_on[measure] for one in components) for measure in MEASURES},
    )
