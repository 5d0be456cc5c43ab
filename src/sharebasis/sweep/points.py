"""The points of a sweep, and which stages they have in common."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from sharebasis.io.hashing import digest
from sharebasis.pipeline.compose import compose_params
from sharebasis.pipeline.settings import parse_settings
from sharebasis.sweep.pipeline import Pipeline

TARGET = "verify"
"""What a point runs up to."""
LABEL_CHARACTERS = 60


@dataclass(frozen=True)
class Point:
    """One run of the pipeline."""

    name: str
    """Of the DVC experiment; it ends with the key, so that other code or settings have another."""
    overrides: tuple[str, ...]
    """Of conf/, in Hydra's grammar."""
    keys: Mapping[str, str]
    """Of every stage up to the target."""
    paths: tuple[str, ...]
    """Of the user's own texts and models."""
    shared: tuple[str, ...] = ()
    """Stages that other points of the sweep need, too, with the same key."""

    @property
    def key(self) -> str:
        return self.keys[TARGET]

    @property
    def common(self) -> dict[str, str]:
        """Shared stage -> its key."""
        return {stage: self.keys[stage] for stage in self.shared}

    @property
    def unit(self) -> str:
        """A name for the shared stages; points with the same one share all that they share."""
        last = self.shared[-1] if self.shared else "nothing"
        return f"common-{last}-{digest(''.join(self.common.values()))[:8]}"


def expand(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides with sweeps in them -> those of every point, in the order of Hydra's sweeper."""
    choices: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key = override.get_key_element()
        if override.is_sweep_override():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
    return list(itertools.product(*choices.values()))


def find_points(pipeline: Pipeline, sweep: str, grid: Sequence[Sequence[str]]) -> list[Point]:
    """The distinct points of a grid.

    Raises:
        SettingsError: one of them cannot be composed, or is not valid.
    """
    fixed = set(grid[0]).intersection(*grid) if grid else set()
    points: dict[str, Point] = {}
    for overrides in grid:
        point = find_point(pipeline, sweep, overrides, fixed if len(grid) > 1 else ())
        points[point.key] = point
    counts = Counter(key for point in points.values() for key in point.keys.values())
    return [
        Point(
            point.name,
            point.overrides,
            point.keys,
            point.paths,
            tuple(stage for stage, key in point.keys.items() if counts[key] > 1),
        )
        for point in points.values()
    ]


def find_point(
    pipeline: Pipeline, sweep: str, overrides: Sequence[str], fixed: Iterable[str] = ()
) -> Point:
    """One point; what is fixed for all points is left out of its name."""
    with _no_hydra():
        params = yaml.safe_load(compose_params(pipeline.root / "conf", overrides))
    parse_settings(params, f"The point {' '.join(overrides)}")
    keys = pipeline.keys(TARGET, params)
    values = [override.partition("=")[2] for override in overrides if override not in fixed]
    label = re.sub(r"[^\w.+-]+|\.(?=\.)", "_", "-".join(values))[:LABEL_CHARACTERS]
    name = "-".join(part for part in (sweep, label.strip("._-"), keys[TARGET][:8]) if part)
    return Point(name, tuple(overrides), keys, tuple(pipeline.outside(TARGET, params)))


@contextmanager
def _no_hydra() -> Iterator[None]:
    """Put the Hydra that runs aside: another one refuses to compose beside it."""
    instance = GlobalHydra.instance()
    running, instance.hydra = instance.hydra, None
    try:
        yield
    finally:
        instance.hydra = running
