"""What experiments have measured, in one file each that outlives them.

Experiments are refs, which `dvc exp gc` and a fresh clone lose:

    python -m sharebasis.collect NAME PATTERN...

writes those whose names match to results/NAME/points.json, and the stage `report` goes by that.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import TypeAdapter

from sharebasis.io.atomic import write_text
from sharebasis.io.records import load_record
from sharebasis.pipeline.paths import METRICS, PLOTS, RESULTS

FILE = "points.json"
PARAMS, LOCK = Path("params.yaml"), Path("dvc.lock")
RANKS, SPECTRUM = PLOTS / "fit" / "ranks.csv", PLOTS / "fit" / "spectrum.csv"
STAGES = ("classify", "calibrate", "fit", "verify")
"""Those whose metrics the workspace's own point has."""


@dataclass(frozen=True)
class Point:
    """One run of the pipeline. What is missing or not finite is absent or None."""

    name: str
    commit: str | None
    """Of the experiment; None for what the workspace holds."""
    command: str
    """Does it again."""
    parameters: Mapping[str, Any]
    """params.yaml."""
    metrics: Mapping[str, Any]
    """By stage, with their provenance."""
    artefacts: Mapping[str, str]
    """Path -> the MD5 by which DVC keeps it."""
    cells: tuple[Mapping[str, Any], ...] = ()
    """The rows of plots/fit/ranks.csv: what each family of each layer keeps."""
    spectrum: Mapping[str, tuple[float, ...]] | None = None
    """Family -> relative loss left at evenly spaced fractions of the full rank, from 0."""
    error: str | None = None
    """What stopped it."""

    def metric(self, stage: str, *keys: str) -> Any:
        """A number of a metrics file; None where there is none."""
        return _value_at(self.metrics, stage, *keys)

    def parameter(self, key: str) -> Any:
        """The value at a dotted key; None where there is none."""
        return _value_at(self.parameters, *key.split("."))


def _value_at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


@dataclass(frozen=True)
class Points:
    """What results/NAME/points.json holds."""

    points: tuple[Point, ...]


_POINT = TypeAdapter(Point)


def workspace_point(stages: Sequence[str] = STAGES) -> Point:
    """What the files here say; not dvc.lock, which belongs to no stage.

    Args:
        stages: whose metrics are read.
    """

    def read(path: Path) -> str:
        return path.read_text(encoding="utf-8") if path.exists() else ""

    return Point(
        "workspace",
        None,
        "dvc repro",
        yaml.safe_load(read(PARAMS)) or {},
        {stage: as_json(text) for stage in stages if (text := read(METRICS / f"{stage}.json"))},
        {},
        family_cells(read(RANKS)),
        mean_spectrum(read(SPECTRUM)),
    )


def write_points(name: str, points: Sequence[Point], results: Path = RESULTS) -> Path:
    """Write results/NAME/points.json, a line for each point."""
    path = results / name / FILE
    lines = (json.dumps(_POINT.dump_python(point, mode="json")) for point in points)
    write_text(path, '{"points": [\n' + ",\n".join(lines) + "\n]}\n")
    return path


def read_points(path: Path) -> tuple[Point, ...]:
    """Read what `write_points` wrote.

    Raises:
        StoreError: the file is missing or was written by another version.
    """
    return load_record(path, Points).points


def as_json(text: str) -> Any:
    """JSON with None for what is no number; nothing, if it is no JSON."""
    try:
        return _finite(json.loads(text))
    except json.JSONDecodeError:
        return {}


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def artefact_hashes(lock: str) -> dict[str, str]:
    """Path -> MD5 of every output in a dvc.lock."""
    stages = (yaml.safe_load(lock) or {}).get("stages", {})
    outs = (out for stage in stages.values() for out in stage.get("outs", ()))
    return {out["path"]: out["md5"] for out in outs if "md5" in out}


def family_cells(table: str) -> tuple[dict[str, Any], ...]:
    """The rows of a CSV table, None for what is missing; none of no table."""
    if not table:
        return ()
    frame = pd.read_csv(io.StringIO(table)).astype(object)
    return tuple(frame.where(frame.notna(), None).to_dict("records"))


def mean_spectrum(table: str) -> dict[str, tuple[float, ...]] | None:
    """The mean over layers, family by family; None of no table."""
    if not table:
        return None
    frame = pd.read_csv(io.StringIO(table))
    means = frame.groupby(["family", "rank_fraction"])["loss"].mean()
    return {
        family: tuple(float(f"{loss:.4g}") for loss in losses)
        for family, losses in means.groupby("family")
    }
