"""What experiments have measured, in one file each that outlives them.

Experiments are refs, which `dvc exp gc` and a fresh clone lose:

    python -m sharebasis.report.points NAME PATTERN...

writes those whose names match to results/NAME/points.json, and the stage `report` goes by that.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from sharebasis import store
from sharebasis.errors import StoreError
from sharebasis.git import known_to_git
from sharebasis.stage import METRICS, PLOTS, RESULTS, report_errors

FILE = "points.json"
PARAMS, LOCK = Path("params.yaml"), Path("dvc.lock")
RANKS, SPECTRUM = PLOTS / "fit" / "ranks.csv", PLOTS / "fit" / "spectrum.csv"
OWN = ("classify", "calibrate", "fit", "verify")
"""Stages whose metrics the workspace's own point has."""
EXPERIMENTS = "refs/exps/"
RUNNING = ("exec/", "stash", "celery/", "apply/")
"""Below EXPERIMENTS, what is no experiment that has ended."""
PLAIN = re.compile(r"[A-Za-z_.][\w./-]*")
"""Text that Hydra reads as itself, unless it is one of WORDS."""
WORDS = {"null", "true", "false", "nan", "inf"}


@dataclass(frozen=True)
class Cell:
    """A family of a layer, after `fit`."""

    family: str
    layer: int
    parts: int
    dense: int
    """Of the parts, those stored as they were."""
    rank: float
    """Mean over the parts."""
    full_rank: float
    stored: int
    original: int
    width: float = 1.0
    """Of an MLP, the fraction of its neurons that it has; the ranks are those of what is left."""
    sparse: int = 0
    """Of the parts, those that lack entries; their rank is the full one."""


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
    cells: tuple[Cell, ...] = ()
    spectrum: Mapping[str, tuple[float, ...]] | None = None
    """Family -> relative loss left at evenly spaced fractions of the full rank, from 0."""
    error: str | None = None
    """What stopped it."""

    def metric(self, stage: str, *keys: str) -> Any:
        """A number of a metrics file; None where there is none."""
        found: Any = self.metrics.get(stage)
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def parameter(self, key: str) -> Any:
        """The value at a dotted key; None where there is none."""
        found: Any = self.parameters
        for step in key.split("."):
            found = found.get(step) if isinstance(found, Mapping) else None
        return found


@dataclass(frozen=True)
class Points:
    """What results/NAME/points.json holds."""

    points: tuple[Point, ...]


_POINT = TypeAdapter(Point)


def collect(patterns: Sequence[str], repository: Path = Path()) -> list[Point]:
    """The experiments whose names match, in the order of their names.

    Of several with one name, which were run from different commits, it is the newest.

    Args:
        patterns: as in a shell.
        repository: where dvc.yaml is.

    Raises:
        StoreError: this is no git repository, or a pattern matches nothing.
    """
    experiments = {name: (commit, baseline) for name, commit, baseline in _experiments(repository)}
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in experiments):
            raise StoreError(
                f"No experiment is called {pattern}. Those that there are: dvc exp list --all"
            )
    return [
        experiment_point(name, *experiments[name], repository)
        for name in sorted(experiments, key=_natural)
        if any(fnmatch(name, pattern) for pattern in patterns)
    ]


def experiment_point(name: str, commit: str, baseline: str, repository: Path = Path()) -> Point:
    """What an experiment's commit holds.

    Args:
        name: of the experiment.
        commit: of the experiment.
        baseline: the commit that it was run from.
        repository: where dvc.yaml is.
    """

    def read(path: Path, at: str = commit) -> str:
        return known_to_git(repository, "show", f"{at}:./{path}") or ""

    files = known_to_git(repository, "ls-tree", "--name-only", commit, f"{METRICS}/") or ""
    parameters = yaml.safe_load(read(PARAMS)) or {}
    given = overrides(yaml.safe_load(read(PARAMS, baseline)) or {}, parameters)
    settings = [f"-S {shlex.quote(one)}" for one in given]
    return Point(
        name,
        commit,
        " ".join([f"git checkout {baseline} && dvc exp run", *settings]),
        parameters,
        {path.stem: _json(read(path)) for path in map(Path, files.split()) if _is_json(path)},
        _artefacts(read(LOCK)),
        _cells(read(RANKS)),
        _spectrum(read(SPECTRUM)),
    )


def workspace_point(stages: Sequence[str] = OWN) -> Point:
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
        {stage: _json(text) for stage in stages if (text := read(METRICS / f"{stage}.json"))},
        {},
        _cells(read(RANKS)),
        _spectrum(read(SPECTRUM)),
    )


def write_points(name: str, points: Sequence[Point], results: Path = RESULTS) -> Path:
    """Write results/NAME/points.json, a line for each point."""
    path = results / name / FILE
    lines = (json.dumps(_POINT.dump_python(point, mode="json")) for point in points)
    store.write_text(path, '{"points": [\n' + ",\n".join(lines) + "\n]}\n")
    return path


def read_points(path: Path) -> tuple[Point, ...]:
    """Read what `write_points` wrote.

    Raises:
        StoreError: the file is missing or was written by another version.
    """
    return store.load_record(path, Points).points


def overrides(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What Hydra has to be told to get from some parameters to others, as `key=value`."""
    told: list[str] = []
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            told += overrides(old, value, f"{prefix}{key}.")
        elif key not in before or old != value or type(old) is not type(value):
            told.append(f"{prefix}{key}={_hydra(value)}")
    return told


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    if isinstance(value, str):
        if PLAIN.fullmatch(value) and value.lower() not in WORDS:
            return value
        return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", value)) + "'"
    return json.dumps(value)


def _experiments(repository: Path) -> Iterator[tuple[str, str, str]]:
    """(name, commit, baseline) of every experiment that has ended, the newest last."""
    listing = "for-each-ref", "--sort=creatordate", "--format=%(refname) %(objectname)"
    if (refs := known_to_git(repository, *listing, EXPERIMENTS)) is None:
        raise StoreError(f"{repository.absolute()} is no git repository, so it has no experiments.")
    for line in refs.splitlines():
        reference, _, commit = line.partition(" ")
        below = reference.removeprefix(EXPERIMENTS)
        if not below.startswith(RUNNING):
            first, rest, name = below.split("/", 2)
            yield name, commit, first + rest


def _natural(name: str) -> list[Any]:
    """A key by which part 10 comes after part 9, and 0.5 after 0.25."""
    runs = re.split(r"(\d+(?:\.\d+)?)", name)
    return [float(run) if i % 2 else run for i, run in enumerate(runs)]


def _is_json(path: Path) -> bool:
    return path.suffix == ".json"


def _json(text: str) -> Any:
    try:
        return _finite(json.loads(text))
    except json.JSONDecodeError:
        return {}


def _finite(tree: Any) -> Any:
    """The same with None for what is no number."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _artefacts(lock: str) -> dict[str, str]:
    stages = (yaml.safe_load(lock) or {}).get("stages", {})
    outs = (out for stage in stages.values() for out in stage.get("outs", ()))
    return {out["path"]: out["md5"] for out in outs if "md5" in out}


def _cells(table: str) -> tuple[Cell, ...]:
    return tuple(
        Cell(
            row["family"],
            int(row["layer"]),
            int(row["parts"]),
            int(row["dense"]),
            float(row["rank"]),
            float(row["full_rank"]),
            int(row["stored"]),
            int(row["original"]),
            float(row.get("width", 1.0)),
            int(row.get("sparse", 0)),
        )
        for row in csv.DictReader(io.StringIO(table))
    )


def _spectrum(table: str) -> dict[str, tuple[float, ...]] | None:
    """The mean over layers, family by family."""
    losses: dict[str, dict[float, list[float]]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        steps = losses.setdefault(row["family"], {})
        steps.setdefault(float(row["rank_fraction"]), []).append(float(row["loss"]))
    return {
        family: tuple(float(f"{sum(own) / len(own):.4g}") for _, own in sorted(steps.items()))
        for family, steps in losses.items()
    } or None


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Keep what experiments have measured.")
    parser.add_argument("name", help="of the directory in results/")
    parser.add_argument("patterns", nargs="+", help="names of experiments, as in a shell")
    arguments = parser.parse_args()
    points = collect(arguments.patterns)
    print(f"{write_points(arguments.name, points)}: {len(points)} points")


if __name__ == "__main__":
    main()
