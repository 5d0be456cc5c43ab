"""The report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from sharebasis.io.tables import counted
from sharebasis.pipeline.paths import PROVENANCE
from sharebasis.stages.report.panels import DETERMINED
from sharebasis.stages.report.points import Point
from sharebasis.stages.report.tables import PointTable, point_tables

TEMPLATE = "page.html"
ALT: Mapping[str, str] = {
    "quality": "Perplexity and KL against the removed fraction, a line for each method",
    "ranks": "Rank of every layer, a panel for each family, and what structures leave",
    "families": "The fraction of its numbers that each family keeps",
    "depth": "Where the numbers went, layer by layer",
    "spectrum": "Loss against the fraction of the full rank, a panel for each family",
}
"""For who cannot see a figure."""


@dataclass(frozen=True)
class Inlined:
    """A figure inside the page."""

    svg: str
    """In base64."""
    alt: str


@dataclass(frozen=True)
class Section:
    """Points that are shown together."""

    name: str
    points: Sequence[Point]
    figures: Sequence[Inlined]

    @property
    def tables(self) -> list[PointTable]:
        return point_tables(self.points)


def section(name: str, points: Sequence[Point], drawn: Mapping[str, Figure]) -> Section:
    """Points and their figures, by name, for `page`."""
    return Section(name, points, [Inlined(_svg(figure), ALT[key]) for key, figure in drawn.items()])


def page(sections: Sequence[Section]) -> str:
    """The whole report.

    Args:
        sections: in the order in which they are shown.
    """
    environment = Environment(
        loader=PackageLoader("sharebasis.stages.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    template = environment.get_template(TEMPLATE)
    return template.render(sections=sections, yaml=_yaml, numbers=_numbers, counted=counted)


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "sharebasis"}):  # ids are otherwise drawn anew
        figure.savefig(buffer, format="svg", **DETERMINED["svg"])
    return base64.b64encode(buffer.getvalue()).decode()


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without their provenance, which is shown by itself."""
    return {
        stage: {key: value for key, value in numbers.items() if key != PROVENANCE}
        for stage, numbers in metrics.items()
    }
