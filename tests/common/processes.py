"""Work that several processes do at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

SECONDS = 120
"""A safety net: nothing here takes as long."""

fork = multiprocessing.get_context("fork")


def together(count: int, work: Callable[[int], object]) -> None:
    """`work` in so many processes at once, each of which starts when all are there."""
    barrier = fork.Barrier(count)

    def start(number: int) -> None:
        barrier.wait(SECONDS)
        work(number)

    processes = [fork.Process(target=start, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0] * count
