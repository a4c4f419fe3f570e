"""Clients that stream answers, in a thread of their own, to compare with the recorded generations."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import aiohttp

from agentlightning.generation import Generation
from tests.common.reference import greedy, tokenizer
from tests.recording.server import RecordingServer

PROMPTS = ["one", "The quick brown", "Größe 😀", "two three"]
TOKENS = 32


@dataclass
class Stream:
    """A streamed request, whose attempt in the rollout is its number, and the answer received so far.

    Attributes:
        leaves_after: the number of chunks after which its client hangs up; to the end if not given.
    """

    number: int
    prompt: str
    tokens: int = TOKENS
    leaves_after: int | None = None
    response_id: str | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    answered: bool = False


def endless(tokens: int = TOKENS) -> Iterator[Stream]:
    """Yield streams without end, each for so many tokens."""
    return (Stream(number, prompt, tokens) for number, prompt in enumerate(itertools.cycle(PROMPTS)))


class Load:
    """Concurrent clients, each of which takes the next stream when it is done with one.

    They begin on entering the context. On leaving it those that are still there hang up.

    Args:
        server: the one that is asked.
        rollout: whose all of it is.
        streams: what is asked for.
        at_once: how many clients there are. One whose stream is broken off by the server does not come again.
        by_request_id: whether they say whose a request is by X-Request-Id alone.
    """

    def __init__(
        self,
        server: RecordingServer,
        rollout: str,
        streams: Iterable[Stream],
        at_once: int = 16,
        by_request_id: bool = False,
    ) -> None:
        self._by_request_id = by_request_id
        self._server = server
        self._rollout = rollout
        self._next = iter(streams)
        self._at_once = at_once
        self._pool = ThreadPoolExecutor(1)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self.streams: list[Stream] = []

    def __enter__(self) -> Load:
        self._ended: Future[None] = self._pool.submit(self._loop.run_until_complete, self._all())
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self.wait()
        self._loop.close()
        self._pool.shutdown()

    def wait(self) -> None:
        """Wait until all clients are done."""
        self._ended.result()

    @property
    def answered(self) -> list[Stream]:
        """The streams whose answers have ended."""
        return [stream for stream in self.streams if stream.answered]

    @property
    def begun(self) -> list[Stream]:
        """The streams whose answers have begun."""
        return [stream for stream in self.streams if stream.token_ids]

    async def _all(self) -> None:
        async with aiohttp.ClientSession(self._server.url, connector=aiohttp.TCPConnector(limit=0)) as session:
            clients = asyncio.gather(*(self._client(session) for _ in range(self._at_once)))
            stop = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait([clients, stop], return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            if clients.done():
                # One that failed for a reason of its own would end in silence.
                clients.result()
            clients.cancel()
            await asyncio.gather(clients, return_exceptions=True)

    async def _client(self, session: aiohttp.ClientSession) -> None:
        for stream in self._next:
            self.streams.append(stream)
            try:
                await self._ask(session, stream)
            except (aiohttp.ClientError, OSError):
                return

    async def _ask(self, session: aiohttp.ClientSession, stream: Stream) -> None:
        body = self._server.body(
            prompt=stream.prompt, max_tokens=stream.tokens, ignore_eos=True, stream=True, return_token_ids=True
        )
        headers = {"x-agl-rollout-id": self._rollout, "x-agl-attempt-id": str(stream.number)}
        if self._by_request_id:
            headers = {"X-Request-Id": f"{self._rollout}.{stream.number}"}
        headers["Authorization"] = "Bearer none"
        async with session.post("/v1/completions", json=body, headers=headers) as response:
            response.raise_for_status()
            chunks = 0
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise aiohttp.ClientError(chunk["error"])
                    stream.response_id = chunk["id"]
                    for choice in chunk["choices"]:
                        stream.token_ids += choice["token_ids"] or []
                        stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
                    chunks += 1
                stream.answered = line.startswith(b"data: [DONE]")
                if chunks == stream.leaves_after:
                    # Before its end, this closes the connection.
                    return
                if stream.answered:
                    break


@cache
def _said(prompt_token_ids: tuple[int, ...]) -> list[int]:
    return greedy(prompt_token_ids, TOKENS)


def checked(kept: Iterable[Generation], streams: Iterable[Stream]) -> dict[int, Generation]:
    """Return generations by the number of their stream, having checked that each is recorded once and exactly."""
    found = [*kept]
    by_number = {int(str(each.attempt_id)): each for each in found}
    asked = {stream.number: stream for stream in streams}
    assert len(by_number) == len({each.id for each in found}) == len({each.request_id for each in found}) == len(found)
    assert by_number.keys() <= asked.keys()
    for number, each in by_number.items():
        stream = asked[number]
        [choice] = each.choices
        assert each.prompt_token_ids is not None
        assert choice.token_ids is not None
        prompt, sampled = each.prompt_token_ids.tolist(), choice.token_ids.tolist()
        assert tokenizer().decode(prompt) == stream.prompt
        assert stream.response_id in (None, each.response_id)
        assert sampled[: len(stream.token_ids)] == stream.token_ids
        # The reference ends where the model does, which these were not let.
        reference = _said(tuple(prompt))
        assert sampled[: len(reference)] == reference[: len(sampled)]
        whole = len(sampled) == stream.tokens
        assert (each.status, choice.finish_reason) in ENDS[whole]
        if stream.answered:
            # An engine that is told to go may still tell its clients so: "abort", and the end of the stream.
            assert (choice.finish_reason, sampled) == (stream.finish_reason, stream.token_ids)
    return by_number


ENDS = {True: [("finished", "length")], False: [("aborted", "abort"), ("error", "error")]}
"""The ends of a generation with all its tokens, and of one without."""
