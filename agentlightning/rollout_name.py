"""Names of rollouts: the rules for their ids, their form as text, and the blocks that name what a program itself calls.

    with agl.rollout("ro-1", attempt_id="at-1"):
        outputs = llm.generate(prompts)

A context variable holds the name of the block. Tasks that are started in the block have it, as does what
`asyncio.to_thread` runs; other threads begin without it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from urllib.parse import unquote

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RolloutName", "current_block", "is_id", "outside_of_blocks", "parse_name", "rollout", "rollouts"]

MAX_ID_LENGTH = 256

# Ids end up in paths, shells and queries of the people who read them. U+FFFD stands for bytes that were not UTF-8.
_NOT_IN_IDS = re.compile(r"""[\x00-\x1f\x7f-\x9f\ufffd"'`\\]|(?:^|/)\.\.(?:/|$)""")
_IN_TEXT = re.compile(r"agl/([^/]+)(?:/([^/]+)(?=/)(?:/([^/]+)(?=/))?)?(?:/.*)?", re.DOTALL)

Function = TypeVar("Function", bound=Callable[..., Any])


class RolloutName(NamedTuple):
    """A rollout, and one of its attempts and agents; None where nothing names one."""

    rollout_id: str | None = None
    attempt_id: str | None = None
    agent_id: str | None = None


def is_id(value: str) -> bool:
    """Tell whether a value can be the id of a rollout, an attempt, a session or an agent."""
    return len(value) <= MAX_ID_LENGTH and not _NOT_IN_IDS.search(value)


def parse_name(text: str) -> RolloutName | None:
    """Parse `agl/ROLLOUT[/ATTEMPT[/AGENT]]/anything`; None for any other text. Each id is percent-encoded."""
    match = _IN_TEXT.fullmatch(text)
    return None if match is None else RolloutName(*(None if part is None else unquote(part) for part in match.groups()))


class _Block:
    """A block of code that names its calls, also as a decorator; the same object may be entered again, and anywhere."""

    def __enter__(self) -> Self:
        _blocks.set((*_blocks.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        blocks = _blocks.get()
        # Not always the innermost, since generators end in any order. Another context may end it, which has not entered
        # it, such as that of a task which closes a generator.
        place = next((place for place in reversed(range(len(blocks))) if blocks[place] is self), None)
        if place is not None:
            _blocks.set((*blocks[:place], *blocks[place + 1 :]))

    def __call__(self, function: Function) -> Function:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is a generator, which runs in the context of who iterates over it: "
                f"write `with agl.{type(self).__name__}(...)` around the loop instead"
            )

        async def wait(coroutine: Coroutine[Any, Any, Any]) -> Any:
            with self:
                return await coroutine

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                answer = function(*args, **kwargs)
            # Nothing of it has run, as of that of an object whose `__call__` is a coroutine function.
            return wait(answer) if inspect.iscoroutine(answer) else answer

        @wraps(function)
        async def call_and_wait(*args: Any, **kwargs: Any) -> Any:
            return await wait(function(*args, **kwargs))

        return cast("Function", call_and_wait if inspect.iscoroutinefunction(function) else call)


class rollout(_Block):  # noqa: N801 - written as a function is
    """Name the rollout of what a block calls in its own process: vLLM's `LLM`, `AsyncLLM` and `LLMEngine`.

        with agl.rollout("ro-1", attempt_id="at-1", agent_id="planner"):
            outputs = llm.generate(prompts)

    It is also a decorator, of functions and coroutine functions. The innermost block counts, and the one around it
    again when that one ends, by an exception or otherwise. It names no call over HTTP:
    `Rollout.base_url` is for these.

    Args:
        rollout_id: the rollout that the calls belong to.
        attempt_id: which attempt at it, if there are several.
        agent_id: which of its agents calls.

    Raises:
        ValueError: an id is empty, or has more than 256 characters or one that ids may not have.
    """

    def __init__(self, rollout_id: str, *, attempt_id: str | None = None, agent_id: str | None = None) -> None:
        self.name = RolloutName(
            _valid("rollout_id", rollout_id),
            None if attempt_id is None else _valid("attempt_id", attempt_id),
            None if agent_id is None else _valid("agent_id", agent_id),
        )


class rollouts(_Block):  # noqa: N801 - written as a function is
    """Name a rollout for each prompt of a batch: of one call of vLLM's `LLM`, in the order of the prompts.

        with agl.rollouts(["ro-1", "ro-2"]):
            outputs = llm.generate(["one", "two"])

    A call with another number of prompts raises `ValueError` before anything runs, as does `LLM.beam_search` with
    several; where calls are not recorded, nothing checks it.

    Args:
        each: for each prompt the id of its rollout, or what `agl.rollout(...)` returns, with an attempt or an agent.

    Raises:
        TypeError: `each` is a single id.
        ValueError: an id is empty, or has more than 256 characters or one that ids may not have.
    """

    def __init__(self, each: Sequence[str | rollout]) -> None:
        if isinstance(each, str | bytes):
            raise TypeError(f"agl.rollouts takes a list, with a rollout for each prompt, and not {each!r:.100} alone")
        self.names = [(one if isinstance(one, rollout) else rollout(one)).name for one in each]


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("agentlightning.rollout", default=())
"""The blocks that the caller is in, the innermost last."""


def current_block() -> rollout | rollouts | None:
    """Return the innermost block that the caller is in."""
    blocks = _blocks.get()
    return cast("rollout | rollouts", blocks[-1]) if blocks else None


class outside_of_blocks:  # noqa: N801 - written as a function is
    """Be in no block: a server that a program has started in one serves others, who name their calls by themselves."""

    def __enter__(self) -> None:
        self._token = _blocks.set(())

    def __exit__(self, *_: object) -> None:
        _blocks.reset(self._token)


def _valid(parameter: str, value: object) -> str:
    if not isinstance(value, str) or not value or not is_id(value):
        raise ValueError(
            f"{parameter}={value!r:.100} is not an id: at most {MAX_ID_LENGTH} characters, without control characters, "
            "quotes, backticks, backslashes and the path segment '..'"
        )
    return value
