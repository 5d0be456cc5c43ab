"""What DVC makes of dvc.yaml: plots that show one run beside another, artefacts from a remote."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, contents, run_command

from sharebasis.pipeline.compose import compose_params

RANKS = "family,layer,parts,dense,rank,full_rank,width,stored,original\n"
SPECTRUM = "family,layer,rank_fraction,loss\n"


def _commit(directory: Path, message: str) -> None:
    run_command(directory, "git", "add", "--all")
    run_command(directory, "git", "commit", "--quiet", f"--message={message}")


# Stages

MOST_LINES, MOST_COLUMNS = 260, 100


def test_dvc_yaml_can_be_read_as_a_diagram() -> None:
    lines = (REPOSITORY / "dvc.yaml").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= MOST_COLUMNS
    above = {name: line for line, name in itertools.pairwise(lines)}
    stages = yaml.safe_load("\n".join(lines))["stages"]
    made: set[str] = set()
    for name, stage in stages.items():  # in the order in which data flows
        assert above[f"  {name}:"].startswith("  # "), name
        outs = {path for kind in ("outs", "metrics", "plots") for path in _paths(stage, kind)}
        later = {dep for dep in stage["deps"] if dep.startswith(("artifacts/", "metrics/"))} - made
        assert not later, name
        made |= outs


def _paths(stage: dict[str, Any], kind: str) -> list[str]:
    return [next(iter(out)) if isinstance(out, dict) else out for out in stage.get(kind, ())]


def test_dvc_measures_layers_first_only_where_their_distances_make_the_groups(
    tmp_path: Path,
) -> None:
    shutil.copyfile(REPOSITORY / "dvc.yaml", tmp_path / "dvc.yaml")
    run_command(tmp_path, "git", "init", "--quiet")
    run_command(tmp_path, "dvc", "init", "--quiet")
    for grouping in ("adjacent", "by_distance"):
        params = compose_params(REPOSITORY / "conf", [f"grouping={grouping}"])
        (tmp_path / "params.yaml").write_text(params)
        graph = run_command(tmp_path, "dvc", "dag", "--dot", "decompose")
        assert ('"vary" -> "decompose"' in graph) == (grouping == "by_distance")
        assert '"calibrate" -> "decompose"' in graph


# Plots


def _fit(directory: Path, rank: int) -> None:
    """Write plots/fit as a fit would that keeps a rank."""
    rows = [
        f"{family},{layer},1,0,{rank + layer},9,1,30,64\n" for family in "qv" for layer in (0, 1)
    ]
    (directory / "plots/fit/ranks.csv").write_text(RANKS + "".join(rows))
    rows = [f"{family},{layer},0.5,0.{rank}\n" for family in "qv" for layer in (0, 1)]
    (directory / "plots/fit/spectrum.csv").write_text(SPECTRUM + "".join(rows))


def _specs(html: str) -> list[dict[str, Any]]:
    found = [json.loads(spec) for spec in re.findall(r"var spec = (\{.*?\});\n", html, re.DOTALL)]
    return [spec for spec in found if "facet" in spec]


def test_a_diff_of_plots_shows_both_runs_family_by_family(tmp_path: Path) -> None:
    own = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["plots"]
    of_fit = [plot for plot in own if "plots/fit/" in str(plot)]
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"plots": of_fit}))
    (tmp_path / "plots/fit").mkdir(parents=True)
    run_command(tmp_path, "git", "init", "--quiet")
    run_command(tmp_path, "dvc", "init", "--quiet")
    shutil.copytree(REPOSITORY / ".dvc/plots", tmp_path / ".dvc/plots")
    _fit(tmp_path, 3)
    _commit(tmp_path, "three")
    _fit(tmp_path, 5)
    run_command(tmp_path, "dvc", "plots", "diff", "HEAD", "--out", "shown")
    specs = _specs((tmp_path / "shown/index.html").read_text())
    assert [spec["spec"]["encoding"]["y"]["field"] for spec in specs] == [
        "rank",
        "width",
        "stored",
        "loss",
    ]
    for spec in specs:
        assert spec["facet"]["field"] == "family"
        assert spec["spec"]["encoding"]["color"]["field"] == "rev"
    seen = {
        (row["rev"], row["family"], str(row["layer"]), str(row["rank"]))
        for row in specs[0]["data"]["values"]
    }
    assert seen == {
        (rev, family, str(layer), str(rank + layer))
        for rev, rank in (("HEAD", 3), ("workspace", 5))
        for family in "qv"
        for layer in (0, 1)
    }


# A remote

PIPELINE = """
stages:
  make:
    cmd:
      - echo ran >> ran.txt
      - mkdir -p artifacts metrics
      - echo {} > metrics/a.json
      - date > artifacts/a
    deps: [source]
    outs: [artifacts/a]
    metrics:
      - metrics/a.json: {cache: false}
"""


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A repository whose pipeline has run, with a remote that has its artefacts."""
    directory = tmp_path / "origin"
    directory.mkdir()
    (directory / "dvc.yaml").write_text(PIPELINE)
    (directory / "source").write_text("1\n")
    (directory / ".gitignore").write_text("/ran.txt\n/artifacts/\n")
    run_command(directory, "git", "init", "--quiet")
    run_command(directory, "dvc", "init", "--quiet")
    run_command(directory, "dvc", "repro", "--quiet")
    run_command(directory, "dvc", "remote", "add", "-d", "store", str(tmp_path / "store"))
    _commit(directory, "one")
    run_command(directory, "dvc", "push", "--quiet")
    return directory


def test_a_clone_pulls_what_it_would_compute(origin: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run_command(tmp_path, "git", "clone", "--quiet", str(origin), str(clone))
    assert not (clone / "artifacts").exists()
    run_command(clone, "dvc", "pull", "--quiet")
    assert contents(clone / "artifacts") == contents(origin / "artifacts")
    run_command(clone, "dvc", "repro", "--quiet")
    assert not (clone / "ran.txt").exists()  # nothing had to run
    assert run_command(clone, "git", "status", "--porcelain") == ""
    (clone / "source").write_text("2\n")
    run_command(clone, "dvc", "repro", "--quiet")
    assert (clone / "ran.txt").exists()


def test_every_artefact_can_be_pushed_and_every_metric_is_in_git() -> None:
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        outs = {
            path: options
            for kind in ("outs", "metrics", "plots")
            for out in stage.get(kind, ())
            for path, options in (out if isinstance(out, dict) else {out: {}}).items()
        }
        for path, options in outs.items():
            in_git = path.startswith(("metrics/", "plots/"))
            assert options.get("cache", True) != in_git, (name, path)
            assert options.get("push", True), (name, path)
