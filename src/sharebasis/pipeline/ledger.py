"""What ran, and for how long: a line of JSON for every event, from whatever process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEDGER = "SHAREBASIS_LEDGER"
"""Environment variable that names the file; without it nothing is recorded."""
POINT = "SHAREBASIS_POINT"
"""Environment variable that says for whom a stage runs."""


Event = Mapping[str, Any]


def record(ledger: Path, **event: Any) -> None:
    """Append one event."""
    line = json.dumps({"time": time.time(), **event}) + "\n"
    # A single write to a file open for appending is not torn apart by those of other processes.
    handle = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def read(ledger: Path) -> list[Event]:
    """Every event so far; none, if nothing has been recorded."""
    try:
        lines = ledger.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def process_age() -> float | None:
    """Seconds since this process began; None where there is no /proc to tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def recorded(stage: str) -> Iterator[None]:
    """Record that a stage begins, and how it ends: a stage that is killed has begun only.

    Its seconds do not count those that its process took to start, which are told apart.
    """
    name = os.environ.get(LEDGER)
    if name is None:
        yield
        return
    ledger, what = Path(name), {"what": "stage", "name": stage, "point": os.environ.get(POINT)}
    began = time.monotonic()
    record(ledger, **what, state="began", startup=process_age())
    try:
        yield
    except BaseException as error:
        seconds = time.monotonic() - began
        reason = f"{type(error).__name__}: {error}"
        record(ledger, **what, state="failed", seconds=seconds, error=reason)
        raise
    record(ledger, **what, state="done", seconds=time.monotonic() - began)
