"""How far a sweep is, from its ledger alone, so that it is the same for every launcher."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sharebasis.pipeline import ledger
from sharebasis.pipeline.ledger import Event
from sharebasis.runtime.console import print_tables

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


@dataclass
class Account:
    """What the events of a ledger amount to."""

    points: dict[str, Event] = field(default_factory=dict)
    """Point -> how it ended."""
    running: dict[str, str] = field(default_factory=dict)
    """Point, or what points have in common -> the stage that it is at."""
    stages: dict[str, list[float | None]] = field(default_factory=dict)
    """Stage -> seconds of every time that it ran; None where it has begun only."""

    def add(self, event: Event) -> None:
        what, name, state = event["what"], event["name"], event["state"]
        if what == "stage":
            times = self.stages.setdefault(name, [])
            if state == "began":
                self.running[event["point"]] = name
                times.append(None)
            else:  # of those that run at once it does not matter which
                times[times.index(None)] = event["seconds"]
        elif state == "began":
            self.running.setdefault(name, "")
        else:
            self.running.pop(name, None)
            if what == "point":
                self.points[name] = event

    @classmethod
    def of(cls, events: Iterable[Event]) -> Account:
        account = cls()
        for event in events:
            account.add(event)
        return account

    def left(self, n_points: int) -> float | None:
        """Seconds until all points have run, as those that have run suggest."""
        took = [event["seconds"] for event in self.points.values() if event["state"] == "done"]
        if not took:
            return None
        return sum(took) / len(took) * (n_points - len(self.points)) / max(1, len(self.running))

    @property
    def failed(self) -> list[Event]:
        return [event for event in self.points.values() if event["state"] == "failed"]


class Watch:
    """A thread that shows a bar on a terminal, and a line for every point in a log."""

    def __init__(self, path: Path, n_points: int) -> None:
        self.path, self.n_points = path, n_points
        self.began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def seconds(self) -> float:
        """Since the watch was made."""
        return time.monotonic() - self.began

    def stop(self) -> Account:
        """End the display; returns all that has happened."""
        self._over.set()
        self._thread.join()
        return Account.of(ledger.read(self.path))

    def _run(self) -> None:
        console = Console(stderr=True)
        (self._bar if console.is_terminal else self._lines)(console)

    def _accounts(self) -> Iterable[Account]:
        """One now and then, the last when all is over."""
        while not self._over.wait(POLL_SECONDS):
            yield Account.of(ledger.read(self.path))
        yield Account.of(ledger.read(self.path))

    def _bar(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[now]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("points", total=self.n_points, left="", now="")
            for account in self._accounts():
                now = ", ".join(f"{name}: {stage}" for name, stage in account.running.items())
                left = _left(account, self.n_points)
                bar.update(task, completed=len(account.points), left=left, now=now)

    def _lines(self, console: Console) -> None:
        said = 0
        for account in self._accounts():
            for event in list(account.points.values())[said:]:
                said += 1
                what = f"{event['name']} {event['state']}, {event['seconds']:.0f} s"
                left = _left(account, self.n_points)
                log.info("sweep: %d of %d points, %s; %s", said, self.n_points, what, left)


def _left(account: Account, n_points: int) -> str:
    seconds = account.left(n_points)
    if seconds is None:
        return ""
    return f"{seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"


def show(account: Account, seconds: float) -> None:
    """Print how every point ended and how often every stage ran."""
    print_tables(_points(account), _stages(account, seconds), width=120)


def _points(account: Account) -> Table:
    table = Table("point", "how it ended", title="Points")
    table.add_column("seconds", justify="right")
    for name, event in account.points.items():
        ended = event["error"] or event["state"]
        table.add_row(name, Text(ended), f"{event['seconds']:.1f}")
    return table


def _stages(account: Account, seconds: float) -> Table:
    table = Table("stage", title=f"What ran, in {seconds:.0f} s")
    for column in ("times", "seconds"):
        table.add_column(column, justify="right")
    for name, times in account.stages.items():
        table.add_row(name, str(len(times)), f"{sum(seconds or 0 for seconds in times):.1f}")
    return table
