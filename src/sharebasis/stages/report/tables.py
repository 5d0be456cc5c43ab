"""Points as tables: CSV with all there is, Markdown and LaTeX with what one reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import LATEX_ESCAPE_RULES, tabulate

from sharebasis.architecture.sublayers import in_order
from sharebasis.io.tables import counted, csv_text
from sharebasis.pipeline.paths import PROVENANCE
from sharebasis.pipeline.settings import flatten
from sharebasis.stages.report.points import Point

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column, from a point to what is shown of it."""

    title: str
    value: Callable[[Point], Any]
    shown: str = ""
    """Format of a number."""
    always: bool = False
    """Whether it is there even if no point has a value."""

    @property
    def align(self) -> str:
        return "right" if self.shown else "left"

    def cell(self, point: Point) -> str:
        """The value as text, in one line; what is missing as a dash."""
        value = self.value(point)
        if value is None:
            return MISSING
        text = format(value, self.shown) if isinstance(value, int | float) else str(value)
        return text.replace("\n", " ")


@dataclass(frozen=True)
class PointTable:
    """A table with a row for each point."""

    name: str
    """Of its files."""
    title: str
    columns: Sequence[Column]
    points: Sequence[Point]

    def markdown(self) -> str:
        """The table below its title."""
        table = self._as_text("pipe", lambda cell: cell.replace("|", "\\|"))
        return f"**{self.title}**\n\n{table}\n"

    def latex(self) -> str:
        """For a document with the package booktabs."""
        caption = self.title.translate(str.maketrans(LATEX_ESCAPE_RULES))
        lines = (r"\begin{table}", rf"\caption{{{caption}}}", self._as_text("latex_booktabs"))
        return "\n".join([*lines, r"\end{table}"]) + "\n"

    def _as_text(self, form: str, escaped: Callable[[str], str] = str) -> str:
        return tabulate(
            [[escaped(column.cell(point)) for column in self.columns] for point in self.points],
            [escaped(column.title) for column in self.columns],
            tablefmt=form,
            colalign=[column.align for column in self.columns],
            disable_numparse=True,
        )


def point_tables(points: Sequence[Point]) -> list[PointTable]:
    """The tables that are shown of some points; their titles name the models."""
    sources = dict.fromkeys(point.parameter("model.source") for point in points)
    models = ", ".join(source for source in sources if source) or "an unnamed model"
    kept = f"Fraction of its numbers that each family of {models} keeps"
    return [
        PointTable("points", f"Every point of {models}", measured_columns(points), points),
        PointTable("families", kept, family_columns(points), points),
    ]


def _metric(title: str, form: str, *keys: str, always: bool = False) -> Column:
    return Column(title, lambda point: point.metric(*keys), form, always)


def _counts(title: str, *keys: str) -> Column:
    return Column(title, lambda point: counted(point.metric(*keys) or {}) or None)


POINT = Column("point", lambda point: point.name, always=True)
MEASURED: tuple[Column, ...] = (
    Column("method", lambda point: point.parameter("fit.method"), always=True),
    Column("split", lambda point: point.parameter("split.strategy")),
    _metric("removed", ".4f", "fit", "removed_fraction", always=True),
    _metric("of the model", ".4f", "fit", "whole_model", "removed_fraction"),
    _metric("stored", ",", "fit", "stored_numbers"),
    _counts("forms", "fit", "forms"),
    _counts("structures", "fit", "structures"),
    _metric("perplexity, dense", ",.2f", "verify", "dense", "perplexity"),
    _metric("perplexity", ",.2f", "verify", "compressed", "perplexity", always=True),
    _metric("KL, nats", ".4f", "verify", "compressed", "kl_mean", always=True),
    _metric("KL, p99", ".3f", "verify", "compressed", "kl_p99"),
    _metric("top-1", ".3f", "verify", "compressed", "top1_agreement"),
    _metric("logit difference, largest", ".2f", "verify", "compressed", "max_abs_logit_diff"),
    _metric("perplexity, recovered", ",.2f", "verify", "recovered", "perplexity"),
    _metric("KL, recovered", ".4f", "verify", "recovered", "kl_mean"),
    _metric("predictions", ",", "verify", "n_predictions"),
    Column("error", lambda point: point.error),
)


def measured_columns(points: Sequence[Point]) -> list[Column]:
    """The name, and what at least one of the points has a value for."""
    return [
        POINT,
        *(
            column
            for column in MEASURED
            if column.always or any(column.value(point) is not None for point in points)
        ),
    ]


def family_columns(points: Sequence[Point]) -> list[Column]:
    """The name, and the fraction of its numbers that each family keeps."""
    families = in_order(
        family for point in points for family in (point.metric("fit", "families") or {})
    )
    return [
        POINT,
        *(_kept(family, "families", family) for family in families),
        _kept("all", always=True),
    ]


def _kept(title: str, *keys: str, always: bool = False) -> Column:
    """The fraction of the numbers that stay; `keys` lead to what is meant in the metrics of fit."""

    def value(point: Point) -> Any:
        removed = point.metric("fit", *keys, "removed_fraction")
        return None if removed is None else 1 - removed

    return Column(title, value, ".3f", always)


def points_csv(points: Sequence[Point]) -> str:
    """Every point with every parameter, metric and hash, in full precision; missing is empty."""
    rows = [_all_values(point) for point in points]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text(columns, ([row.get(column, "") for column in columns] for row in rows))


def _all_values(point: Point) -> dict[str, Any]:
    metrics = {stage: _without_list(numbers) for stage, numbers in point.metrics.items()}
    return {
        "point": point.name,
        "commit": point.commit,
        "command": point.command,
        "error": point.error,
        **(flatten(metrics) if metrics else {}),
        **(flatten(point.parameters, "params") if point.parameters else {}),
        **{f"md5.{path}": md5 for path, md5 in point.artefacts.items()},
    }


def _without_list(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics with their provenance itself, in place of a list of one."""
    provenance = metrics.get(PROVENANCE)
    return {**metrics, PROVENANCE: provenance[0]} if provenance else dict(metrics)
