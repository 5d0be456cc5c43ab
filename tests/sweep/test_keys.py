"""What points a grid has, and what the keys of their stages depend on; nothing runs here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from sharebasis.errors import SettingsError
from sharebasis.sweep.pipeline import Pipeline
from sharebasis.sweep.points import expand, find_point, find_points
from sharebasis.sweep.watch import Account

COMMON = ("extract", "classify", "calibrate")
AFTER_FIT = ("propagate", "recover", "verify")


def test_a_grid_is_what_hydras_own_sweeper_makes_of_it() -> None:
    arguments = [
        "split=none,heads",
        "fit.exclude=[a,b]",
        "fit.group_size=range(1,4,2)",
        "seed=1",
    ]
    overrides = OverridesParser.create().parse_overrides(arguments)
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    assert [list(point) for point in expand(arguments)] == batch
    assert len(batch) == 4


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("model.revision=other", "extract"),
        ("model.block_pattern=other", "classify"),
        ("data.calibration.windows=5", "calibrate"),
        ("split=heads", "decompose"),
        ("fit.removed=0.3", "sensitivity"),
        ("verify.new_tokens=3", "verify"),
        ("vary.pairs=consecutive", None),
    ],
)
def test_a_setting_changes_the_keys_from_the_stage_on_that_reads_it(
    override: str, first: str | None
) -> None:
    pipeline = Pipeline(REPOSITORY)
    before = find_point(pipeline, "sweep", []).keys
    after = find_point(pipeline, "sweep", [override]).keys
    assert list(before) == [*COMMON, "decompose", "sensitivity", "fit", *AFTER_FIT]
    same = [stage for stage in before if before[stage] == after[stage]]
    assert same == list(before)[: list(before).index(first) if first else len(before)]


def test_layers_are_measured_first_only_where_their_distances_make_the_groups() -> None:
    pipeline = Pipeline(REPOSITORY)
    adjacent, by_distance = "grouping=adjacent", "grouping=by_distance"
    for grouping in (adjacent, by_distance):
        points = [
            find_point(pipeline, "sweep", ["fit=basis_sharing", grouping, f"vary.alignment={one}"])
            for one in ("exact", "none")
        ]
        differ = {name for name in points[0].keys if points[0].keys[name] != points[1].keys[name]}
        assert ("vary" in points[0].keys) == ("decompose" in differ) == (grouping == by_distance)
        assert "artifacts/variation.csv" not in points[0].paths


def test_an_edit_of_the_code_changes_the_keys_of_the_stages_that_run_it(tmp_path: Path) -> None:
    for name in ("dvc.yaml", "conf", "src", "stages", "requirements"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "src").unlink()
    shutil.copytree(REPOSITORY / "src", tmp_path / "src")
    before = find_point(Pipeline(tmp_path), "sweep", []).keys
    assert before == find_point(Pipeline(REPOSITORY), "sweep", []).keys
    with (tmp_path / "src/sharebasis/stages/fit/fit.py").open("a") as file:
        file.write("# an edit\n")
    after = find_point(Pipeline(tmp_path), "sweep", []).keys
    same = [stage for stage in before if before[stage] == after[stage]]
    assert same == [*COMMON, "decompose"]


def test_a_wrong_setting_in_one_point_stops_all_before_anything_runs() -> None:
    grid = expand(["fit.removed=0.2,3"])
    with pytest.raises(SettingsError, match=r"The point fit.removed=3 is not valid: fit.removed"):
        find_points(Pipeline(REPOSITORY), "sweep", grid)


def test_points_that_differ_in_the_budget_alone_share_all_up_to_the_decomposition() -> None:
    points = find_points(
        Pipeline(REPOSITORY), "a", expand(["split=none,qkv", "fit.removed=0.2,0.3"])
    )
    assert [point.name.rpartition("-")[0] for point in points] == [
        "a-none-0.2",
        "a-none-0.3",
        "a-qkv-0.2",
        "a-qkv-0.3",
    ]
    assert {point.shared for point in points} == {(*COMMON, "decompose")}
    assert [point.unit for point in points] == [points[0].unit] * 2 + [points[2].unit] * 2
    assert points[0].unit != points[2].unit


def test_the_time_left_is_that_of_the_points_so_far_by_those_that_run_at_once() -> None:
    account = Account()
    assert account.left(5) is None
    for name in "abc":
        account.add({"what": "point", "name": name, "state": "began"})
    account.add({"what": "point", "name": "a", "state": "done", "seconds": 30.0})
    assert account.left(5) == 30 * 4 / 2
