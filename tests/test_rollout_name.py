"""`agl.rollout` and `agl.rollouts`: which name a call in the process has, and ids that they refuse."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.rollout_name import RolloutName, current_block

pytestmark = pytest.mark.tier("check")


def names() -> list[RolloutName]:
    """The names of the innermost block: one, several for a batch, or none."""
    block = current_block()
    return [] if block is None else block.names if isinstance(block, agl.rollouts) else [block.name]


def only(rollout_id: str, attempt_id: str | None = None, agent_id: str | None = None) -> list[RolloutName]:
    return [RolloutName(rollout_id, attempt_id, agent_id)]


def test_a_block_names_its_calls_and_the_block_around_it_counts_again_after_it() -> None:
    with agl.rollout("ro-1", attempt_id="at-1", agent_id="planner"):
        with agl.rollout("ro-2"):
            assert names() == only("ro-2")
        assert names() == only("ro-1", "at-1", "planner")
    assert names() == []


def test_a_batch_has_a_name_for_each_prompt() -> None:
    with agl.rollouts(["ro-1", agl.rollout("ro-2", attempt_id="at-2")]):
        assert names() == [RolloutName("ro-1"), RolloutName("ro-2", "at-2")]
    assert names() == []


def test_an_exception_ends_a_block() -> None:
    with pytest.raises(RuntimeError, match="failed"), agl.rollout("ro-1"):
        raise RuntimeError("failed")

    assert names() == []


def test_blocks_of_generators_end_in_any_order() -> None:
    def generate(rollout_id: str) -> Generator[None, None, None]:
        with agl.rollout(rollout_id):
            yield

    first, second = generate("ro-1"), generate("ro-2")
    next(first)
    next(second)
    first.close()
    assert names() == only("ro-2")
    second.close()
    assert names() == []


def test_a_block_that_is_entered_again_ends_its_newest_entry_first() -> None:
    again, other = agl.rollout("ro-1"), agl.rollout("ro-2")
    for each in (again, other, again):
        each.__enter__()
    other.__exit__()
    assert names() == only("ro-1")
    again.__exit__()
    assert names() == only("ro-1")
    again.__exit__()
    assert names() == []


def test_a_decorated_function_has_the_name_each_time_it_is_called() -> None:
    @agl.rollout("ro-1")
    def ask(depth: int = 0) -> list[RolloutName]:
        """Ask."""
        return names() if depth == 0 else ask(depth - 1)

    assert ask(2) == ask() == only("ro-1")
    assert names() == []
    assert (ask.__name__, ask.__doc__) == ("ask", "Ask.")


async def let_the_other_run() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_decorated_coroutines_keep_their_names_while_they_wait_for_each_other() -> None:
    async def talk() -> None:
        inner = agl.rollout("ro-1")

        @inner
        async def first() -> list[RolloutName]:
            await let_the_other_run()
            return names()

        @agl.rollouts(["ro-2"])
        async def second() -> list[RolloutName]:
            with inner:
                await let_the_other_run()
            return names()

        assert await asyncio.gather(first(), second()) == [only("ro-1"), only("ro-2")]
        assert names() == []

    asyncio.run(talk())


def test_a_coroutine_has_the_name_of_the_decorated_function_that_returns_it() -> None:
    async def ask() -> list[RolloutName]:
        await asyncio.sleep(0)
        return names()

    class Asker:
        async def __call__(self) -> list[RolloutName]:
            return await ask()

    async def call() -> None:
        for each in (ask, Asker(), lambda: ask(), partial(ask), lambda: asyncio.ensure_future(ask())):
            assert await agl.rollout("ro-1")(each)() == only("ro-1")
            assert names() == []

    asyncio.run(call())


def test_a_task_has_the_name_of_the_block_that_started_it_and_keeps_it_after_its_end() -> None:
    async def start() -> list[RolloutName]:
        ended = asyncio.Event()

        async def call() -> list[RolloutName]:
            await ended.wait()
            return names()

        with agl.rollout("ro-1"):
            task = asyncio.create_task(call())
        ended.set()
        assert names() == []
        return await task

    assert asyncio.run(start()) == only("ro-1")


def test_a_thread_of_to_thread_has_the_name_and_another_thread_has_none() -> None:
    found: list[list[RolloutName]] = []

    async def ask() -> list[RolloutName]:
        with agl.rollout("ro-1"):
            thread = threading.Thread(target=lambda: found.append(names()))
            thread.start()
            thread.join()
            return await asyncio.to_thread(names)

    assert asyncio.run(ask()) == only("ro-1")
    assert found == [[]]


def test_a_generator_cannot_be_decorated() -> None:
    def generate() -> Iterator[int]:
        yield 1

    async def generate_async() -> AsyncIterator[int]:
        yield 1

    for function in (generate, generate_async):
        with pytest.raises(TypeError, match=r"is a generator.*with agl\.rollout\(\.\.\.\)"):
            agl.rollout("ro-1")(function)


@pytest.mark.parametrize("alone", ["ro-1", b"ro-1"])
def test_a_batch_is_not_named_by_the_characters_of_one_id(alone: Any) -> None:
    with pytest.raises(TypeError, match=r"takes a list, with a rollout for each prompt, and not b?'ro-1' alone"):
        agl.rollouts(alone)


BAD_IDS = ["", "a" * 257, "a\nb", 'a"b', "../x", "a/../b", "\ufffd", 1, None]


@pytest.mark.parametrize("bad", BAD_IDS, ids=repr)
@pytest.mark.parametrize(
    "name",
    [
        agl.rollout,
        lambda bad: agl.rollouts(["ro-1", bad]),
        lambda bad: agl.rollout("ro-1", attempt_id=bad if bad is not None else ""),
        lambda bad: agl.rollout("ro-1", agent_id=bad if bad is not None else ""),
    ],
    ids=["rollout", "rollouts", "attempt", "agent"],
)
def test_an_invalid_id_is_an_error_that_says_what_is_valid(name: Callable[[object], object], bad: object) -> None:
    with pytest.raises(ValueError, match="is not an id: at most 256 characters"):
        name(bad)
