"""Points against the experiments they come from, in a small DVC repository."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import run_command
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sharebasis.errors import StoreError
from sharebasis.stages.report.experiments import collect, overrides
from sharebasis.stages.report.points import Point, read_points, workspace_point, write_points

SCRIPT = """
import json, math, pathlib, yaml
fit = yaml.safe_load(open("params.yaml"))["fit"]
loss = math.sqrt(fit["removed"])
for name in ("metrics", "plots/fit", "artifacts"):
    pathlib.Path(name).mkdir(parents=True, exist_ok=True)
pathlib.Path("artifacts/compressed").write_text(str(fit))
metrics = {"method": fit["method"], "removed_fraction": fit["removed"], "provenance": [{"seed": 0}]}
pathlib.Path("metrics/fit.json").write_text(json.dumps(metrics))
verify = {"compressed": {"perplexity": loss, "kl_mean": math.nan if fit["removed"] > 0.4 else 0.1}}
pathlib.Path("metrics/verify.json").write_text(json.dumps(verify))
table = "family,layer,parts,dense,rank,full_rank,stored,original\\nq,0,1,0,3,8,30,64\\n"
pathlib.Path("plots/fit/ranks.csv").write_text(table)
rows = "q,0,0.0,1\\nq,0,0.5,0.25\\nq,1,0.0,1\\nq,1,0.5,0.75\\n"
pathlib.Path("plots/fit/spectrum.csv").write_text("family,layer,rank_fraction,loss\\n" + rows)
"""
PIPELINE = """
stages:
  fit:
    cmd: python fit.py
    deps: [fit.py]
    params: [fit]
    outs:
      - artifacts/compressed
      - plots/fit: {cache: false}
    metrics:
      - metrics/fit.json: {cache: false}
      - metrics/verify.json: {cache: false}
"""
CONF = {"fit": {"method": "auto", "removed": 0.2, "note": None, "shared": [], "limits": {}}}
RUNS = {"wide-10": ["fit.removed=0.5", r"fit.note='it\'s: 1, 2'"], "wide-9": ["fit.method=svd"]}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository with the experiments of RUNS; not to be changed but by experiments."""
    directory = tmp_path_factory.mktemp("repository")
    (directory / "conf").mkdir()
    (directory / "conf/config.yaml").write_text(yaml.safe_dump(CONF))
    (directory / "params.yaml").write_text(yaml.safe_dump(CONF))
    (directory / "fit.py").write_text(SCRIPT)
    (directory / "dvc.yaml").write_text(PIPELINE)
    run_command(directory, "git", "init", "--quiet")
    run_command(directory, "dvc", "init", "--quiet")
    run_command(directory, "dvc", "config", "hydra.enabled", "True")
    run_command(directory, "dvc", "repro", "--quiet")
    run_command(directory, "git", "add", ".")
    run_command(directory, "git", "commit", "--quiet", "--message=one")
    for name, given_settings in RUNS.items():
        told = [word for one in given_settings for word in ("-S", one)]
        run_command(directory, "dvc", "exp", "run", "--quiet", "--name", name, *told)
    return directory


def test_a_point_is_what_its_experiment_holds(repository: Path) -> None:
    nine, ten = collect(["wide-*"], repository)
    assert (nine.name, ten.name) == ("wide-9", "wide-10")
    listed = run_command(repository, "git", "for-each-ref", "--format=%(objectname) %(refname)")
    assert any(
        f"{nine.commit} refs/exps/" in row and "/wide-9" in row for row in listed.split("\n")
    )
    assert nine.parameter("fit.method") == "svd"
    assert ten.parameter("fit.note") == "it's: 1, 2"
    assert ten.metric("fit", "removed_fraction") == 0.5
    assert ten.metric("verify", "compressed", "perplexity") == math.sqrt(0.5)
    assert ten.metrics["fit"]["provenance"] == [{"seed": 0}]
    (cell,) = ten.cells
    assert (cell.family, cell.layer, cell.rank, cell.stored, cell.original) == ("q", 0, 3, 30, 64)
    assert ten.spectrum == {"q": (1.0, 0.5)}
    locked = yaml.safe_load(run_command(repository, "git", "show", f"{ten.commit}:dvc.lock"))
    (of_stage,) = locked["stages"].values()
    md5 = {out["path"]: out["md5"] for out in of_stage["outs"]}
    assert ten.artefacts == md5
    assert ten.artefacts["artifacts/compressed"] != nine.artefacts["artifacts/compressed"]


def test_a_number_that_is_none_is_missing(repository: Path) -> None:
    nine, ten = collect(["wide-*"], repository)
    assert nine.metric("verify", "compressed", "kl_mean") == 0.1
    assert ten.metric("verify", "compressed", "kl_mean") is None
    assert ten.metric("verify", "recovered", "perplexity") is None
    assert ten.metric("vary", "n_pairs") is None


def test_the_command_of_a_point_does_it_again(repository: Path) -> None:
    (ten,) = collect(["wide-10"], repository)
    checkout, again = ten.command.split(" && ")
    assert checkout == f"git checkout {run_command(repository, 'git', 'rev-parse', 'HEAD').strip()}"
    run_command(repository, *shlex.split(again), "--quiet", "--force", "--name", "again")
    (other,) = collect(["again"], repository)
    assert other.parameters == ten.parameters
    assert other.metrics == ten.metrics


def test_only_names_that_match_are_collected_and_none_is_an_error(repository: Path) -> None:
    assert [point.name for point in collect(["wide-1?"], repository)] == ["wide-10"]
    with pytest.raises(StoreError, match=r"No experiment is called narrow\*\. .* dvc exp list"):
        collect(["wide-*", "narrow*"], repository)


def test_of_experiments_with_one_name_it_is_the_newest(repository: Path) -> None:
    """A sweep that is run again after another commit makes its experiments anew."""
    (before,) = collect(["wide-9"], repository)
    run_command(repository, "git", "commit", "--quiet", "--allow-empty", "--message=two")
    told = ["-S", "fit.method=svd", "-S", "fit.removed=0.3"]
    run_command(repository, "dvc", "exp", "run", "--quiet", "--name", "wide-9", *told)
    (after,) = collect(["wide-9"], repository)
    assert before.metric("fit", "removed_fraction") == 0.2
    assert after.metric("fit", "removed_fraction") == 0.3


def test_without_a_repository_there_are_no_experiments(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no git repository"):
        collect(["*"], tmp_path)


def test_the_file_outlives_the_experiments(repository: Path, tmp_path: Path) -> None:
    points = tuple(collect(["wide-*"], repository))
    path = write_points("widths", points, tmp_path)
    assert path == tmp_path / "widths" / "points.json"
    assert read_points(path) == points
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN in it
    path.write_text('{"points": [{"name": "a"}]}')
    with pytest.raises(StoreError, match=r"points\.json is no .* that this version can read"):
        read_points(path)


def test_the_command_line_writes_the_file(repository: Path) -> None:
    command = (sys.executable, "-m", "sharebasis.collect", "own", "wide-9", "wide-10")
    assert run_command(repository, *command) == "results/own/points.json: 2 points\n"
    own = read_points(repository / "results/own/points.json")
    assert list(own) == collect(["wide-*"], repository)


def test_the_workspace_is_a_point_too(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    here = workspace_point()
    written = json.loads(Path("metrics/verify.json").read_text())
    assert here.metric("verify", "compressed", "perplexity") == written["compressed"]["perplexity"]
    assert here.commit is None
    assert [cell.family for cell in here.cells] == ["q"]


def test_a_workspace_without_metrics_is_a_point_without_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert workspace_point() == Point("workspace", None, "dvc repro", {}, {}, {})


# Overrides

TEXT = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), max_size=12)
SCALAR = st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-10, 10) | TEXT
VALUE = SCALAR | st.lists(SCALAR, max_size=3)


@settings(max_examples=15, deadline=None)
@given(value=VALUE.filter(lambda own: "$" not in str(own) and own != "???"))
def test_hydra_reads_an_override_as_the_value(
    value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "conf"
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text("a: {b: before}\n")
    with initialize_config_dir(str(directory), version_base=None):
        config = compose("config", overrides=overrides({"a": {"b": "before"}}, {"a": {"b": value}}))
    assert OmegaConf.to_container(config)["a"]["b"] == value  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c=3"]),
        ({"a": 0}, {"a": False}, ["a=false"]),
        ({"a": None}, {"a": {"x": [1, "k b"]}}, ["a={x:[1,'k b']}"]),
        ({"a": "x"}, {"a": "null"}, ["a='null'"]),
    ],
)
def test_only_what_differs_is_told(before: Any, after: Any, told: Sequence[str]) -> None:
    assert overrides(before, after) == told
