"""Points as tables: CSV with all there is, Markdown and LaTeX with what one reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharebasis.architecture.sublayers import in_order
from sharebasis.io.tables import csv_text
from sharebasis.stages.report.points import Point

MISSING = "–"
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    MISSING: "--",
    "Δ": r"$\Delta$",
}


@dataclass(frozen=True)
class Column:
    """One column, from a point to what is shown of it."""

    title: str
    value: Callable[[Point], Any]
    shown: str = ""
    """Format of a number."""
    always: bool = False
    """Whether it is there even if no point has a value."""

    def cell(self, point: Point) -> str:
        return shown(self.value(point), self.shown)


def shown(value: Any, form: str = "") -> str:
    """A value as text; what is missing as a dash."""
    if value is None:
        return MISSING
    return format(value, form) if isinstance(value, int | float) else str(value)


def _metric(title: str, form: str, *keys: str, always: bool = False) -> Column:
    return Column(title, lambda point: point.metric(*keys), form, always)


POINT = Column("point", lambda point: point.name, always=True)
MEASURED: tuple[Column, ...] = (
    Column("method", lambda point: point.parameter("fit.method"), always=True),
    Column("split", lambda point: point.parameter("split.strategy")),
    _metric("removed", ".4f", "fit", "removed_fraction", always=True),
    _metric("of the model", ".4f", "fit", "whole_model", "removed_fraction"),
    _metric("stored", ",", "fit", "stored_numbers"),
    _metric("perplexity, dense", ",.2f", "verify", "dense", "perplexity"),
    _metric("perplexity", ",.2f", "verify", "compressed", "perplexity", always=True),
    _metric("KL, nats", ".4f", "verify", "compressed", "kl_mean", always=True),
    _metric("KL, p99", ".3f", "verify", "compressed", "kl_p99"),
    _metric("top-1", ".3f", "verify", "compressed", "top1_agreement"),
    _metric("Δ logit, largest", ".2f", "verify", "compressed", "max_abs_logit_diff"),
    _metric("perplexity, recovered", ",.2f", "verify", "recovered", "perplexity"),
    _metric("KL, recovered", ".4f", "verify", "recovered", "kl_mean"),
    _metric("predictions", ",", "verify", "n_predictions"),
    Column("error", lambda point: point.error),
)


def measured_columns(points: Sequence[Point]) -> list[Column]:
    """The name, and what at least one of the points has a value for."""
    return [POINT, *(own for own in MEASURED if own.always or _any(own, points))]


def family_columns(points: Sequence[Point]) -> list[Column]:
    """The name, and the fraction of its numbers that each family keeps."""
    families = in_order(
        family for point in points for family in (point.metric("fit", "families") or {})
    )
    return [POINT, *map(kept, families), Column("all", _kept_in_all, ".3f", always=True)]


def kept(family: str) -> Column:
    """The fraction of its numbers that a family keeps."""

    def value(point: Point) -> Any:
        removed = point.metric("fit", "families", family, "removed_fraction")
        return None if removed is None else 1 - removed

    return Column(family, value, ".3f")


def points_csv(points: Sequence[Point]) -> str:
    """Every point with every parameter, metric and hash, in full precision; missing is empty."""
    rows = [_everything(point) for point in points]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text(columns, ([row.get(column, "") for column in columns] for row in rows))


def markdown(columns: Sequence[Column], points: Sequence[Point]) -> str:
    """A Markdown table."""
    lines = [
        [column.title for column in columns],
        ["---" if column.shown == "" else "---:" for column in columns],
        *([column.cell(point) for column in columns] for point in points),
    ]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def latex(columns: Sequence[Column], points: Sequence[Point]) -> str:
    """A tabular for a document with the package booktabs."""
    shape = "".join("l" if column.shown == "" else "r" for column in columns)
    rows = [[column.cell(point) for column in columns] for point in points]
    head, *body = (
        " & ".join(map(escaped, row)) + r" \\"
        for row in [[column.title for column in columns], *rows]
    )
    lines = [rf"\begin{{tabular}}{{{shape}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escaped(text: str) -> str:
    """Text as LaTeX sets it literally."""
    return "".join(LATEX.get(character, character) for character in text.replace("\n", " "))


def _kept_in_all(point: Point) -> Any:
    removed = point.metric("fit", "removed_fraction")
    return None if removed is None else 1 - removed


def _any(column: Column, points: Sequence[Point]) -> bool:
    return any(column.value(point) is not None for point in points)


def _everything(point: Point) -> dict[str, Any]:
    own = {"point": point.name, "commit": point.commit, "command": point.command}
    own |= {"error": point.error}
    own |= _flat(point.metrics, "")
    own |= _flat(point.parameters, "params.")
    return own | {f"md5.{path}": md5 for path, md5 in point.artefacts.items()}


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Dotted key -> value; a list of mappings (of provenance) is numbered only from the second."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            for i, one in enumerate(value):
                flat |= _flat(one, f"{prefix}{key}{i or ''}.")
        elif isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
