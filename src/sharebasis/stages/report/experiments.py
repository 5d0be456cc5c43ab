"""DVC experiments -> points."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from sharebasis.errors import StoreError
from sharebasis.io.git import known_to_git
from sharebasis.pipeline.paths import METRICS
from sharebasis.stages.report.points import (
    LOCK,
    PARAMS,
    RANKS,
    SPECTRUM,
    Point,
    artefact_hashes,
    as_json,
    family_cells,
    mean_spectrum,
)

EXPERIMENTS = "refs/exps/"
RUNNING = ("exec/", "stash", "celery/", "apply/")
"""Below EXPERIMENTS, what is no experiment that has ended."""
PLAIN = re.compile(r"[A-Za-z_.][\w./-]*")
"""Text that Hydra reads as itself, unless it is one of WORDS."""
WORDS = {"null", "true", "false", "nan", "inf"}


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
    changes = overrides(yaml.safe_load(read(PARAMS, baseline)) or {}, parameters)
    settings = [f"-S {shlex.quote(change)}" for change in changes]
    return Point(
        name,
        commit,
        " ".join([f"git checkout {baseline} && dvc exp run", *settings]),
        parameters,
        {
            path.stem: as_json(read(path))
            for path in map(Path, files.split())
            if path.suffix == ".json"
        },
        artefact_hashes(read(LOCK)),
        family_cells(read(RANKS)),
        mean_spectrum(read(SPECTRUM)),
    )


def overrides(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What Hydra has to be told to get from some parameters to others, as `key=value`."""
    changes: list[str] = []
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            changes += overrides(old, value, f"{prefix}{key}.")
        elif key not in before or old != value or type(old) is not type(value):
            changes.append(f"{prefix}{key}={_hydra(value)}")
    return changes


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
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
