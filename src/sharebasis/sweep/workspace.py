"""Workspaces beside the user's own, one for each run: clones that share DVC's cache.

`dvc exp run --temp` would be the obvious choice, but two of them at once share a queue of one
place, from which each may take the other's run.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configobj import ConfigObj

from sharebasis.errors import SweepError
from sharebasis.io.git import git
from sharebasis.pipeline.ledger import LEDGER, POINT
from sharebasis.pipeline.paths import CHECKPOINTS
from sharebasis.sweep.pipeline import Pipeline
from sharebasis.sweep.records import LOCK, Records, read_lock

LINKS = "reflink,hardlink,symlink,copy"
"""How artefacts get from the cache into a workspace; no stage writes into a file that exists."""
BEFORE = Path(".dvc/tmp/before")
"""Where a workspace keeps dvc.lock as it was before the run."""


@dataclass(frozen=True)
class Repository:
    """The user's repository, as it is when a sweep begins."""

    root: Path
    head: str
    """The commit that experiments belong to."""
    snapshot: str
    """A commit of what is in the working tree, the tracked files' changes included."""
    cache: Path
    """Of DVC."""

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(self.root)

    @property
    def state(self) -> Path:
        """Where sweeps keep workspaces, locks and records."""
        return self.root / ".dvc/tmp/sweep"

    @property
    def records(self) -> Records:
        return Records(self.state / "records", self.cache / "files/md5")

    def experiment(self, name: str) -> str | None:
        """The git reference of an experiment of this commit, if there is one."""
        ref = f"refs/exps/{self.head[:2]}/{self.head[2:]}/{name}"
        return ref if git(self.root, "for-each-ref", ref) else None


def find_repository(root: Path) -> Repository:
    """Take a snapshot of the repository at `root`.

    Raises:
        GitError: it is no repository of git, or has no commit.
        SweepError: it is no repository of DVC.
    """
    head = git(root, "rev-parse", "HEAD")
    # Whoever is asked, nobody is: this commit is never seen.
    identity = ("-c", "user.name=sweep", "-c", "user.email=sweep@localhost")
    snapshot = git(root, *identity, "stash", "create") or head
    return Repository(root, head, snapshot, _cache_of(root))


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock that ends with this process and those that its handle is passed on to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


@contextmanager
def workspace(
    repository: Repository, name: str, stages: Mapping[str, str], paths: Sequence[str]
) -> Iterator[Path]:
    """A fresh workspace in which all that is known of some stages need not run.

    What a run of the same name that was killed has left is used: the stages that it had
    finished, and the checkpoint of the one that it had not.

    Args:
        repository: to make experiments of.
        name: of the run.
        stages: name -> key of those that will run.
        paths: of the user's files that stages read; what git does not track is linked.
    """
    path = repository.state / "workspaces" / name
    checkpoints = repository.state / "checkpoints" / name
    for rubbish in path.parent.glob(f".{name}.*"):
        shutil.rmtree(rubbish, ignore_errors=True)
    if path.exists():
        salvage(repository, stages, path)
        if (path / CHECKPOINTS).is_dir():
            shutil.rmtree(checkpoints, ignore_errors=True)
            checkpoints.parent.mkdir(parents=True, exist_ok=True)
            (path / CHECKPOINTS).rename(checkpoints)
        _remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    git(repository.root, "clone", "--quiet", "--shared", "--no-checkout", ".", str(path))
    git(path, "checkout", "--quiet", "--detach", repository.head)
    git(path, "read-tree", "--reset", "-u", repository.snapshot)
    for key in ("user.name", "user.email"):
        if value := git(repository.root, "config", "--default", "", key):
            git(path, "config", key, value)
    _configure(repository, path)
    for outside in paths:
        if not (path / outside).exists() and (repository.root / outside).exists():
            (path / outside).parent.mkdir(parents=True, exist_ok=True)
            (path / outside).symlink_to((repository.root / outside).resolve())
    if checkpoints.is_dir():
        (path / CHECKPOINTS).parent.mkdir(parents=True, exist_ok=True)
        checkpoints.rename(path / CHECKPOINTS)
    repository.records.lay_out(repository.pipeline, stages, path)
    before = path / BEFORE
    before.mkdir(parents=True)
    shutil.copyfile(path / LOCK, before / LOCK)
    try:
        yield path
    finally:
        salvage(repository, stages, path)
        _remove(path)


def salvage(repository: Repository, stages: Mapping[str, str], path: Path) -> None:
    """Record the stages that have run in a workspace, whatever became of the others."""
    before, after = read_lock(path / BEFORE), read_lock(path)
    ran = {stage: key for stage, key in stages.items() if after.get(stage) != before.get(stage)}
    repository.records.keep(repository.pipeline, ran, path)


def run_experiment(
    path: Path,
    name: str,
    overrides: Sequence[str],
    targets: Sequence[str],
    ledger: Path,
    log: Path,
    lock: int,
) -> int:
    """Run targets in a workspace as a DVC experiment; returns DVC's exit status.

    Args:
        path: of the workspace.
        name: of the experiment.
        overrides: of conf/.
        targets: stages; all that they need runs before them.
        ledger: where stages record that they ran.
        log: what DVC and the stages print.
        lock: handle of a lock that lasts as long as DVC runs, even if this process is killed.
    """
    command = [sys.executable, "-m", "dvc", "exp", "run", "--name", name]
    for override in overrides:
        command += ["--set-param", override]
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        # The workspace's code, not that which an editable installation points to.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(path / "src"), inherited))),
        LEDGER: str(ledger),
        POINT: name,
    }
    with log.open("ab") as out:
        run = subprocess.run(
            [*command, *targets],
            cwd=path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            check=False,
        )
    return run.returncode


def publish(repository: Repository, path: Path, name: str) -> None:
    """Have an experiment of a workspace be one of the repository."""
    ref = f"refs/exps/{repository.head[:2]}/{repository.head[2:]}/{name}"
    git(path, "push", "--quiet", str(repository.root), f"+{ref}:{ref}")


def _cache_of(root: Path) -> Path:
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SweepError(f"{' '.join(command)} failed in {root}: {run.stderr.strip()}")
    return Path(run.stdout.strip())


def _configure(repository: Repository, path: Path) -> None:
    """DVC's local settings of a workspace: the repository's own, its cache, links into it."""
    config: dict[str, Any] = ConfigObj(str(repository.root / ".dvc/config.local"))
    config.setdefault("cache", {}).update({"dir": str(repository.cache), "type": LINKS})
    # Or DVC would keep a database for every workspace somewhere else.
    config.setdefault("core", {})["site_cache_dir"] = str(path / ".dvc/tmp/site")
    config.filename = str(path / ".dvc/config.local")  # type: ignore[attr-defined]
    config.write()  # type: ignore[attr-defined]


def _remove(path: Path) -> None:
    """Remove a workspace; by renaming, so that no half of one is ever taken for one."""
    rubbish = path.with_name(f".{path.name}.{os.getpid()}")
    path.rename(rubbish)
    shutil.rmtree(rubbish, ignore_errors=True)
