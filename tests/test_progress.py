"""Progress in a log: a line now and then, and one at the end."""

from __future__ import annotations

import logging

import pytest

from sharebasis.runtime import progress as module
from sharebasis.runtime.progress import LOG_SECONDS, progress


def test_a_log_gets_a_line_after_some_seconds_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), progress("fit", 100, "groups", done=10) as advance:
        for _ in range(9):
            now += LOG_SECONDS / 2
            advance(10)
    assert [record.getMessage() for record in caplog.records] == [
        "fit: 30 of 100 groups, 1 groups/s, 70 s left",
        "fit: 50 of 100 groups, 1 groups/s, 50 s left",
        "fit: 70 of 100 groups, 1 groups/s, 30 s left",
        "fit: 90 of 100 groups, 1 groups/s, 10 s left",
        "fit: 100 of 100 groups, 1 groups/s, 0 s left",
    ]
