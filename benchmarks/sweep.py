"""What a finished sweep took beside its common stages, fits and verifications:

    python -m sharebasis.sweep -m split=none,heads fit=svd_llm,basis_sharing fit.removed=0.2,0.3,0.4
    python benchmarks/sweep.py artifacts/sweeps/sweep/DATE

All is read from the sweep's ledger. With the launcher basic, which runs one point after another,
wall / (common stages + fits + verifications) says what everything else costs; with one that runs
several at once it says nothing. The sweep has to be one that found nothing done before it.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sharebasis.pipeline import ledger
from sharebasis.sweep.run import Sweep


@dataclass(frozen=True)
class Execution:
    """A stage that has run."""

    stage: str
    by: str
    """A point, or what points have in common."""
    startup: float
    """Seconds from the start of its process to that of the stage: imports."""
    seconds: float
    """Of the stage itself."""

    @property
    def process(self) -> float:
        return self.startup + self.seconds


def executions(events: Sequence[ledger.Event]) -> Iterator[Execution]:
    """Every time that a stage began; one that did not end has taken nothing."""
    of_stages = [event for event in events if event["what"] == "stage"]
    for i, event in enumerate(of_stages):
        if event["state"] == "began":
            stage, by = event["name"], event["point"]
            later = (
                one for one in of_stages[i + 1 :] if (one["name"], one["point"]) == (stage, by)
            )
            end = next(later, {"seconds": 0.0})
            yield Execution(stage, by, event["startup"] or 0.0, end.get("seconds", 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("sweep", type=Path, help="directory of its ledger.jsonl and sweep.json")
    directory = parser.parse_args().sweep
    sweep, events = Sweep.load(directory), ledger.read(directory / "ledger.jsonl")
    wall = next((event["seconds"] for event in events if event["what"] == "sweep"), None)
    if wall is None:
        sys.exit(f"{directory} is a sweep that has not ended.")
    states = [event["state"] for event in events if event["what"] == "point"]
    done = [state for state in states if state == "done"]
    ran = list(executions(events))
    points = {point.name for point in sweep.points}
    counted = [one for one in ran if one.by not in points or one.stage in ("fit", "verify")]
    show(sweep, ran)
    process, stages = (sum(getattr(one, of) for one in counted) for of in ("process", "seconds"))
    print(f"points done in this sweep      {len(done)} of {len(sweep.points)}")
    for name, of in (("common stages", None), ("fits", "fit"), ("verifications", "verify")):
        own = [one for one in counted if (one.stage if one.by in points else None) == of]
        print(f"{name:30} {sum(one.process for one in own):.1f} s")
    print(f"the sweep, from start to end   {wall:.1f} s")
    print(f"wall / their processes         {wall / process:.3f}")
    print(f"wall / them without start-up   {wall / stages:.3f}")


def show(sweep: Sweep, ran: Sequence[Execution]) -> None:
    """Print how often every stage ran, beside how many different ones the points need."""
    needed: dict[str, set[str]] = defaultdict(set)
    for point in sweep.points:
        for stage, key in point.keys.items():
            needed[stage].add(key)
    table = Table(title="Stages of all points")
    for column in ("stage", "different", "executions", "start-up, s", "stage, s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, keys in needed.items():
        own = [one for one in ran if one.stage == stage]
        sums = (sum(one.startup for one in own), sum(one.seconds for one in own))
        table.add_row(stage, str(len(keys)), str(len(own)), *(f"{one:.1f}" for one in sums))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
