"""Several pieces of work at once, one thread of linear algebra each.

Eigenproblems of some hundred rows, of which there are thousands, gain nothing from threads
of their own, and often lose; two of them side by side take hardly longer than one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def in_parallel(tasks: Iterable[Callable[[], T]], workers: int) -> Iterator[T]:
    """Run tasks, so many at a time, and yield what they return, in their order.

    Tasks are taken as they are needed: never are there more than `workers` of them, with their
    results, that have not been yielded. The first error of a task is raised in its turn, and no
    further task is begun.

    Args:
        tasks: made in the caller's thread.
        workers: threads. Among them the cores that torch may use are divided; so what one task
            computes does not depend on what runs beside it.
    """
    if workers == 1:
        yield from (task() for task in tasks)
        return
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers)
    with _divided(workers):
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) == workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _divided(workers: int) -> Iterator[None]:
    """Let every thread that begins now have its share of the cores."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, n_threads // workers))
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
