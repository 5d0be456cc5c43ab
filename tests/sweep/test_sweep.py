"""Sweeps: what is common runs once, what is missing runs again, nothing else.

The scripts of the stages are replaced by one that computes nothing, but reads and writes all
that dvc.yaml says; everything else is the repository's own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from sharebasis.pipeline import ledger

STAGE = """
import json, os, time
from pathlib import Path
import yaml
from sharebasis.errors import BudgetError
from sharebasis.pipeline.stage import report_errors

NAME = Path(__file__).stem

@report_errors
def main():
    params = yaml.safe_load(Path("params.yaml").read_text())
    stage = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][NAME]
    made = {}
    for dep in stage["deps"]:
        if dep.startswith("artifacts/"):
            made |= json.loads(Path(dep).read_text())
    for key in stage.get("params", ()):
        value = params
        for step in key.split("."):
            value = value[step]
        made[key] = value
    if NAME == "fit" and params["fit"]["removed"] > 0.9:
        raise BudgetError("no rank removes that much")
    time.sleep(float(os.environ.get("SECONDS_OF_" + NAME, 0)))
    for kind in ("outs", "metrics", "plots"):
        for out in stage.get(kind, ()):
            (path,) = out
            Path(path).parent.mkdir(exist_ok=True)
            if path.startswith("plots/") and not Path(path).suffix:
                Path(path).mkdir(exist_ok=True)
                path = f"{path}/made.json"
            partial = Path(path + ".partial")
            partial.write_text(json.dumps(made))
            partial.replace(path)

main()
"""
GRID = ("split=none,heads", "fit=svd_llm", "fit.removed=0.2,0.95")
COMMON = ("extract", "classify", "calibrate")
AFTER_FIT = ("propagate", "recover", "verify")


@dataclass(frozen=True)
class Checkout:
    """A repository of its own."""

    root: Path

    def git(self, *arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=self.root, check=True, capture_output=True, text=True
        )
        return run.stdout.strip()

    def dvc(self, *arguments: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        return {**os.environ, "PYTHONPATH": str(self.root / "src"), "PATH": path}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "sharebasis.sweep", "-m", *arguments],
            cwd=self.root,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def sweep(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def events(self) -> list[dict[str, Any]]:
        """Of all sweeps so far."""
        paths = sorted(self.root.glob("artifacts/sweeps/*/*/ledger.jsonl"))
        return [event for path in paths for event in ledger.read(path)]

    def ran(self, state: str = "done") -> Counter[str]:
        """How often every stage ran."""
        events = self.events()
        return Counter(
            event["name"] for event in events if (event["what"], event["state"]) == ("stage", state)
        )

    def experiments(self) -> dict[str, str]:
        """Name -> commit."""
        lines = self.git("for-each-ref", "--format=%(refname) %(objectname)", "refs/exps/*/*/*")
        pairs = (line.split() for line in lines.splitlines())
        return {ref.rpartition("/")[2]: commit for ref, commit in pairs}

    def shown(self, commit: str, path: str) -> Any:
        return yaml.safe_load(self.git("show", f"{commit}:{path}"))


MakeCheckout = Callable[[], Checkout]


@pytest.fixture(scope="module")
def make_checkout(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckout:
    """`make_checkout()`: the files of the repository, with other scripts, in their first commit."""

    def make() -> Checkout:
        root = tmp_path_factory.mktemp("parent") / "checkout"
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            text=True,
        )
        for name in listed.stdout.rstrip("\0").split("\0"):
            if (REPOSITORY / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(REPOSITORY / name, root / name)
        for script in (root / "stages").glob("*.py"):
            script.write_text(STAGE)
        checkout = Checkout(root)
        checkout.git("init", "--quiet")
        checkout.git("config", "user.name", "someone")
        checkout.git("config", "user.email", "someone@example.org")
        checkout.git("add", "--all")
        checkout.git("commit", "--quiet", "--message", "All")
        return checkout

    return make


@dataclass(frozen=True)
class Swept:
    """The same sweep twice, the second time by another launcher."""

    checkout: Checkout
    first: subprocess.CompletedProcess[str]
    second: subprocess.CompletedProcess[str]
    began: Counter[str]
    """How often every stage began in the first."""
    began_again: Counter[str]
    """The same of the second."""
    found: Mapping[str, str]
    """The experiments after the first."""


@pytest.fixture(scope="module")
def swept(make_checkout: MakeCheckout) -> Swept:
    """Two splits at a removed fraction that can be met and at one that cannot."""
    checkout = make_checkout()
    checkout.dvc("repro")  # as everybody does first; of another model
    checkout.git("add", "--all")
    checkout.git("commit", "--quiet", "--message", "Run")
    # What is not committed is part of every point, and what git does not know can be read.
    for name in ("own.txt", "other.txt"):
        (checkout.root / name).write_text("a text")
    with (checkout.root / "stages/verify.py").open("a") as file:
        file.write("# an edit\n")
    given = (
        "model.revision=other",
        "data=files",
        "data.calibration.path=own.txt",
        "data.evaluation.path=other.txt",
    )
    first = checkout.sweep(*GRID, *given)
    began, found = checkout.ran("began"), checkout.experiments()
    second = checkout.sweep(*GRID, *given, "hydra/launcher=slurm_local")
    return Swept(checkout, first, second, began, checkout.ran("began") - began, found)


def test_what_is_common_runs_once_and_the_rest_once_a_point(swept: Swept) -> None:
    once, after = dict.fromkeys(COMMON, 1), dict.fromkeys(AFTER_FIT, 2)
    assert swept.began == {**once, "decompose": 2, "sensitivity": 4, "fit": 4, **after}


def test_a_point_that_fails_is_told_with_its_error_and_the_others_end(swept: Swept) -> None:
    assert swept.first.returncode == 1
    assert swept.first.stderr.splitlines()[-1] == "2 of 4 points have failed."
    assert swept.first.stdout.count("fit: BudgetError: no rank removes that much") == 2
    assert [name.rpartition("-")[0] for name in sorted(swept.found)] == [
        "sweep-heads-0.2",
        "sweep-none-0.2",
    ]


def test_the_same_sweep_again_runs_what_has_failed_and_nothing_else(swept: Swept) -> None:
    assert swept.second.returncode == 1, swept.second.stderr
    assert swept.began_again == {"fit": 2}
    assert swept.checkout.experiments() == swept.found
    assert "present" in swept.second.stdout, swept.second.stderr


def test_a_log_has_a_line_for_every_point_and_no_bar(swept: Swept) -> None:
    lines = [line for line in swept.first.stderr.splitlines() if line.startswith("sweep: ")]
    assert [line.split(",")[0] for line in lines] == [
        f"sweep: {n} of 4 points" for n in range(1, 5)
    ]
    assert "\x1b" not in swept.first.stdout + swept.first.stderr


def test_the_benchmark_adds_up_what_the_ledger_says(swept: Swept) -> None:
    first = min((swept.checkout.root / "artifacts/sweeps/sweep").iterdir())
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks/sweep.py"), str(first)],
        env=swept.checkout.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    events = ledger.read(first / "ledger.jsonl")
    (wall,) = (event["seconds"] for event in events if event["what"] == "sweep")
    counted = [
        event for event in events if event["name"] in (*COMMON, "decompose", "fit", "verify")
    ]
    stages = sum(event.get("seconds", 0) for event in counted)
    startup = sum(event.get("startup", 0) for event in counted)
    assert 0 < stages < stages + startup < wall
    assert f"wall / their processes         {wall / (stages + startup):.3f}" in run.stdout
    assert f"wall / them without start-up   {wall / stages:.3f}" in run.stdout
    rows = [line.replace("│", " ").split()[:3] for line in run.stdout.splitlines()]
    for row in (["extract", "1", "1"], ["decompose", "2", "2"], ["verify", "4", "2"]):
        assert row in rows


def test_every_experiment_has_its_own_parameters_and_results(swept: Swept) -> None:
    for name, commit in swept.found.items():
        params = swept.checkout.shown(commit, "params.yaml")
        assert params["split"]["strategy"] == name.split("-")[1]
        metrics = swept.checkout.shown(commit, "metrics/verify.json")
        assert metrics["fit"] == params["fit"]
        assert params["fit"]["removed"] == 0.2
        assert metrics["split"] == params["split"]
        assert metrics["data.calibration"]["path"] == "own.txt"
        edited = swept.checkout.git("show", f"{commit}:stages/verify.py")
        assert edited.endswith("# an edit")
        assert swept.checkout.git("rev-parse", f"{commit}^", "HEAD").splitlines()[0] == (
            swept.checkout.git("rev-parse", "HEAD")
        )


def test_the_workspace_is_as_it_was_and_none_is_left_behind(swept: Swept) -> None:
    new = ("other.txt", "own.txt", "results/sweep/")
    status = swept.checkout.git("status", "--porcelain")
    assert status.splitlines() == ["M stages/verify.py", *(f"?? {name}" for name in new)]
    assert list((swept.checkout.root / ".dvc/tmp/sweep/workspaces").iterdir()) == []


def test_dvc_shows_and_applies_the_experiments(swept: Swept) -> None:
    root = swept.checkout.root
    shown = json.loads(swept.checkout.dvc("exp", "show", "--json"))
    experiments = [one["revs"][0] for rev in shown for one in rev["experiments"] or ()]
    assert {one["name"]: one["rev"] for one in experiments} == dict(swept.found)
    name = min(swept.found)
    swept.checkout.dvc("exp", "apply", name)
    compressed = json.loads((root / "artifacts/compressed").read_text())
    assert compressed["split"] == {"strategy": "heads"}
    assert yaml.safe_load((root / "params.yaml").read_text())["split"]["strategy"] == "heads"


def test_a_clone_that_has_pulled_nothing_runs_an_experiment(swept: Swept, tmp_path: Path) -> None:
    swept.checkout.git("clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = Checkout(tmp_path / "clone")
    clone.git("config", "user.name", "someone")
    clone.git("config", "user.email", "someone@example.org")
    assert not (clone.root / ".dvc/cache").exists()
    clone.dvc("exp", "run", "--name", "fresh", "--set-param", "fit.removed=0.3", "verify")
    assert list(clone.experiments()) == ["fresh"]
    metrics = clone.shown(clone.experiments()["fresh"], "metrics/verify.json")
    assert metrics["fit"]["removed"] == 0.3
    shown = json.loads(clone.dvc("exp", "show", "--json"))
    names = [
        row["name"] for rev in shown for one in rev["experiments"] or () for row in one["revs"]
    ]
    assert names == ["fresh"]


def test_a_sweep_that_is_killed_goes_on_where_it_was(make_checkout: MakeCheckout) -> None:
    checkout = make_checkout()
    command = ("hydra/launcher=cores", "split=heads", "fit.removed=0.2,0.3")
    killed = checkout.start(*command, SECONDS_OF_verify="300")
    deadline = time.monotonic() + 300
    while checkout.ran("began")["verify"] < 2:  # of both points, which run at the same time
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert checkout.experiments() == {}
    resumed = checkout.sweep(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert checkout.ran("began") == {
        **dict.fromkeys((*COMMON, "decompose"), 1),
        **dict.fromkeys(("sensitivity", "fit", "propagate", "recover"), 2),
        "verify": 4,
    }
    removed = {
        checkout.shown(commit, "metrics/verify.json")["fit"]["removed"]
        for commit in checkout.experiments().values()
    }
    assert removed == {0.2, 0.3}


def test_ray_runs_the_points(make_checkout: MakeCheckout) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs the extra sweep-ray")
    checkout = make_checkout()
    run = checkout.sweep("hydra/launcher=ray_tasks", "split=heads", "fit.removed=0.2,0.3")
    assert run.returncode == 0, run.stderr
    once, twice = (*COMMON, "decompose"), ("sensitivity", "fit", *AFTER_FIT)
    assert checkout.ran() == {**dict.fromkeys(once, 1), **dict.fromkeys(twice, 2)}
    assert len(checkout.experiments()) == 2
