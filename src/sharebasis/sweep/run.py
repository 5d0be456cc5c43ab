"""Run a point, or what points have in common; at most once, whoever else is at it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from sharebasis.errors import GitError, SweepError
from sharebasis.io.records import read_json, save_record
from sharebasis.pipeline import ledger
from sharebasis.sweep.points import TARGET, Point, find_point
from sharebasis.sweep.workspace import Repository, locked, publish, run_experiment, workspace


@dataclass(frozen=True)
class Sweep:
    """Everything that a process needs to know to run one of its points."""

    name: str
    directory: Path
    """For the ledger, and for what DVC and the stages print."""
    repository: Repository
    points: tuple[Point, ...]

    @property
    def ledger(self) -> Path:
        return self.directory / "ledger.jsonl"

    @property
    def units(self) -> dict[str, Point]:
        """Name of what some points share -> one of those that are still to run."""
        waiting = [point for point in self.points if not self.repository.experiment(point.name)]
        return {point.unit: point for point in waiting if point.shared}

    def point(self, overrides: Sequence[str]) -> Point:
        """The point of some overrides.

        It goes by the plan and not by the code, which may have changed since the snapshot. A
        sweeper that does not say beforehand what it will try has points of which nobody knew.
        """
        for point in self.points:
            if set(point.overrides) == set(overrides):
                return point
        unplanned = find_point(self.repository.pipeline, self.name, overrides)
        return next((point for point in self.points if point.key == unplanned.key), unplanned)

    def save(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        save_record(self.directory / "sweep.json", self)

    @classmethod
    def load(cls, directory: Path) -> Sweep:
        content = read_json(directory / "sweep.json")
        return TypeAdapter(cls).validate_python(content)


def run_common(sweep: Sweep, point: Point) -> None:
    """Run the stages that a point shares with others, unless that was done.

    Raises:
        SweepError, GitError: one of them fails, or has failed in this sweep.
    """
    repository, name = sweep.repository, point.unit
    if all(key in repository.records for key in point.common.values()):
        return
    with locked(repository.state / "locks" / name) as lock:
        if all(key in repository.records for key in point.common.values()):
            return  # done by somebody else, while this waited
        for event in ledger.read(sweep.ledger):
            if (event["what"], event["name"], event["state"]) == ("common", name, "failed"):
                raise SweepError(event["error"])
        began = time.monotonic()
        ledger.record(sweep.ledger, what="common", name=name, state="began")
        try:
            _run(sweep, name, point, point.common, point.shared, lock)
        except (SweepError, GitError) as error:
            ledger.record(sweep.ledger, what="common", name=name, state="failed", error=str(error))
            raise
        seconds = time.monotonic() - began
        ledger.record(sweep.ledger, what="common", name=name, state="done", seconds=seconds)


def run_point(sweep: Sweep, point: Point) -> None:
    """Make a point a DVC experiment, unless it is one; the ledger says how it ended."""
    began = time.monotonic()

    def ended(state: str, error: str | None = None) -> None:
        seconds = time.monotonic() - began
        how = {"state": state, "seconds": seconds, "error": error}
        ledger.record(sweep.ledger, what="point", name=point.name, **how)

    with locked(sweep.repository.state / "locks" / point.name) as lock:
        if sweep.repository.experiment(point.name):
            return ended("present")
        ledger.record(sweep.ledger, what="point", name=point.name, state="began")
        try:
            run_common(sweep, point)
            _run(sweep, point.name, point, point.keys, [TARGET], lock, published=True)
        except (SweepError, GitError) as error:
            return ended("failed", str(error))
        return ended("done")


def _run(
    sweep: Sweep,
    name: str,
    point: Point,
    stages: Mapping[str, str],
    targets: Sequence[str],
    lock: int,
    published: bool = False,
) -> None:
    repository, log = sweep.repository, sweep.directory / f"{name}.log"
    with workspace(repository, name, stages, point.paths) as path:
        status = run_experiment(path, name, point.overrides, targets, sweep.ledger, log, lock)
        if status:
            raise SweepError(_reason(sweep.ledger, name, log))
        repository.records.keep(repository.pipeline, stages, path)
        if published:
            publish(repository, path, name)


def _reason(events: Path, name: str, log: Path) -> str:
    """Why a run failed: what its stage said, or else the last line of its log."""
    for event in reversed(ledger.read(events)):
        if event["what"] == "stage" and event["point"] == name and event["state"] == "failed":
            return f"{event['name']}: {event['error']}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "DVC said nothing")
    return f"{last.strip()} (see {log})"
