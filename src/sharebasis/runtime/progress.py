"""Progress that a person wants to watch, and that is quiet in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

log = logging.getLogger(__name__)

LOG_SECONDS = 20
"""Time between two lines where there is no terminal to draw a bar on."""


@runtime_checkable
class Advance(Protocol):
    """Reports that `n` more units are done."""

    def __call__(self, n: int = 1) -> None: ...


class _Rate(ProgressColumn):
    """Units a second since this run began."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} {self.unit}/s")


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Show how far a loop is, at what rate, and how long it will take.

    Args:
        title: of the bar.
        total: units in all.
        unit: what is counted, plural.
        done: units that an earlier run has finished.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, total, unit, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda n=1: bar.advance(task, n)


def _lines(title: str, total: int, unit: str, done: int) -> Advance:
    began = last = time.monotonic()
    first = done

    def advance(n: int = 1) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if done < total and now - last < LOG_SECONDS:
            return
        last = now
        rate = (done - first) / max(now - began, 1e-9)
        eta = (total - done) / max(rate, 1e-9)
        log.info(
            "%s: %d of %d %s, %.0f %s/s, %.0f s left", title, done, total, unit, rate, unit, eta
        )

    return advance
