"""Work that is done at once comes out as if it had been done in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from sharebasis.runtime import devices
from sharebasis.runtime.threads import in_parallel


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers: int) -> None:
    """Also where a later one is ready first."""
    gates = [threading.Event() for _ in range(7)]

    def work(i: int) -> int:
        if workers > 1 and i + 1 < len(gates) and i % workers != workers - 1:
            assert gates[i + 1].wait(10)
        gates[i].set()
        return i

    assert list(in_parallel((partial(work, i) for i in range(7)), workers)) == list(range(7))


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_are_taken_than_may_run(workers: int) -> None:
    taken = 0

    def tasks() -> Iterator[Callable[[], int]]:
        nonlocal taken
        for i in range(10):
            taken += 1
            yield partial(int, i)

    for done, _ in enumerate(in_parallel(tasks(), workers), start=1):
        assert taken - done < workers


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_in_its_turn_and_nothing_else_begins(workers: int) -> None:
    begun = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 1:
            raise ValueError("one")
        return i

    results = in_parallel((partial(work, i) for i in range(100)), workers)
    assert next(results) == 0
    with pytest.raises(ValueError, match="one"):
        next(results)
    assert len(begun) <= 1 + workers


def test_the_cores_are_divided_and_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        tasks = [torch.get_num_threads] * 3
        assert list(in_parallel(tasks, 2)) == [2, 2, 2]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_there_are_as_many_workers_as_memory_allows_and_one_at_least(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "_free", lambda _: 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    cpu = torch.device("cpu")
    assert [devices.workers_for(n, cpu) for n in (0, 100, 300, 600, 1000)] == [4, 4, 3, 1, 1]
    assert not caplog.text
    assert devices.workers_for(1001, cpu) == 1
    assert "memory are free on cpu: it may be killed" in caplog.text
