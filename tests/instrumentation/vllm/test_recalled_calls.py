"""Prompts that go on from calls that another process has answered: those of a store, on vLLM's own renderer."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

from agentlightning import continuation as decisions
from agentlightning import instrumentation
from agentlightning.errors import StoreUnavailable
from agentlightning.generation import Choice, Generation
from agentlightning.instrumentation.vllm import _isolation, continuation
from agentlightning.instrumentation.vllm.continuation import reading, recall
from agentlightning.instrumentation.vllm.continuation.chats import RenderedChat
from agentlightning.instrumentation.vllm.continuation.parsing import Parsers, Said, possible_tool_choices
from agentlightning.store import Store, open_store
from tests.common.rendering import answered, online_renderer, prompt_of
from tests.common.templates import CHATML, QWEN3

pytestmark = pytest.mark.forked

ROLLOUT = "ro-1"
USER = {"role": "user", "content": "Paris?"}
MORE = {"role": "user", "content": "More?"}
TEXT = "The quick fox. "


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The store of two servers."""
    path = tmp_path / "generations.db"
    open_store(str(path)).close()
    monkeypatch.setenv("AGL_CONTINUE", "on")
    monkeypatch.setenv("AGL_STORE", str(path))
    # However busy this machine is.
    monkeypatch.setattr(recall, "SECONDS", 60)
    instrumentation.instrument_vllm()
    return path


class Server:
    """A server that answers each call alike, and records it.

    Args:
        text: the answers.
        recorded: what else is recorded of each.
    """

    rollout = ROLLOUT

    def __init__(self, store: Path, text: str = TEXT, template: str = CHATML, **recorded: Any) -> None:
        self._store, self._text = store, text
        self.recorded = recorded
        self.renderer = online_renderer(template)
        self.tokenizer = self.renderer.renderer.get_tokenizer()
        self.said = [*(self.tokenizer.encode(each)[0] for each in text), self.tokenizer.eos_token_id]
        self.messages: list[Any] = [USER]
        self.context: list[int] = []

    async def turn(self, shown: str | None = None, follows: Mapping[str, Any] = MORE, is_kept: bool = True) -> None:
        """Answer the conversation so far.

        Args:
            shown: what the client keeps of the answer.
            follows: what it says then.
            is_kept: whether this process keeps the call.
        """
        prompt, context = await prompt_of(self.renderer, self.messages, self.rollout)
        if is_kept:
            answered(prompt, context, self.said, self._text, self.tokenizer.eos_token_id)
        # Without a text where the ids are not those of one, as vLLM has it.
        text = None if self.context and prompt[: len(self.context)] == self.context else self._rendered()
        logprobs = array("f", [-1.0]) * len(self.said)
        choice = Choice(token_ids=array("i", self.said), text=self._text, finish_reason="stop", logprobs=logprobs)
        generation = Generation(
            request_id="chatcmpl-1",
            endpoint=continuation.ROUTES[0],
            rollout_id=self.rollout,
            finished_at=time.time_ns(),
            status="finished",
            prompt_token_ids=array("i", prompt),
            prompt_text=text,
            sampling_params="{}",
            choices=[choice],
        )
        for name, value in self.recorded.items():
            setattr(generation, name, value)
        self._add(generation)
        self.context = [*prompt, *self.said]
        self.messages += [{"role": "assistant", "content": self._text if shown is None else shown}, follows]

    def _add(self, generation: Generation) -> None:
        with open_store(str(self._store)) as store:
            store.add([generation])

    def _rendered(self) -> str:
        return self.tokenizer.apply_chat_template(
            self.messages, chat_template=self.renderer.chat_template, tokenize=False, add_generation_prompt=True
        )

    async def goes_on_elsewhere(self, **caller: Any) -> bool:
        """Ask another server to go on, which knows nothing; tell whether it goes on from the exact ids."""
        continuation.forget()
        return await self.goes_on(**caller)

    async def goes_on(self, **caller: Any) -> bool:
        """Ask this server to go on; tell whether it goes on from the exact ids."""
        prompt, _ = await prompt_of(self.renderer, self.messages, self.rollout, **caller)
        return prompt[: len(self.context)] == self.context


class WatchedStore:
    """The store as this server reads it: what it reads is counted, and nothing is read until the gate is open."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.gate = threading.Event()
        self.gate.set()
        self.asked = self.read = 0

    def tally(self, **filters: Any) -> Any:
        self.asked += 1
        self.gate.wait()
        return self._store.tally(**filters)

    def generations(self, *at_once: int, **options: Any) -> Iterator[Generation]:
        for each in self._store.generations(*at_once, **options):
            # Many times as large as all else.
            assert not any(choice.logprobs or choice.routed_experts for choice in each.choices)
            self.read += 1
            yield each

    def close(self) -> None:
        """Left open: a server that is restarted reads it again."""


@pytest.fixture
def watched(store: Path, monkeypatch: pytest.MonkeyPatch) -> WatchedStore:
    watched = WatchedStore(open_store(str(store), read_only=True))
    monkeypatch.setattr(reading, "open_store", lambda *_, **__: watched)
    return watched


def results() -> dict[str, int]:
    report = continuation.report()
    assert report is not None
    return {result: count for result, count in report["results"].items() if count}


def test_another_server_goes_on_from_a_conversation_of_several_turns(store: Path) -> None:
    async def turns() -> bool:
        server = Server(store)
        for _ in range(4):
            await server.turn()
        return await server.goes_on_elsewhere()

    assert asyncio.run(turns())
    assert results() == {decisions.FIRST_CALL: 1, decisions.CONTINUED: 4}
    assert not _isolation.failures


def test_two_servers_that_take_turns_go_on_from_each_other(store: Path) -> None:
    async def turns() -> None:
        server = Server(store)
        for _ in range(6):
            # Whoever is asked knows nothing of the call before.
            assert await server.goes_on_elsewhere() or not server.context
            await server.turn()

    asyncio.run(turns())
    assert not _isolation.failures


def test_reasoning_that_clients_leave_out_comes_from_the_store(store: Path) -> None:
    async def turns() -> bool:
        server = Server(store, "<think>\nHm.\n</think>\n\nIt is.", QWEN3)
        server.renderer.parser = ParserManager.get_parser(reasoning_parser_name="qwen3", tokenizer=server.tokenizer)
        for _ in range(3):
            await server.turn("It is.", {"role": "tool", "content": "sunny", "tool_call_id": "call-1"})
        return await server.goes_on_elsewhere()

    assert asyncio.run(turns())
    assert not _isolation.failures


def test_a_call_of_others_is_not_continued(store: Path) -> None:
    others: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"rollout_id": "ro-2"}, {}),
        ({"attempt_id": "at-2"}, {}),
        ({"agent_id": "other"}, {}),
        ({}, {"agent_id": "other"}),
        ({"model": "other"}, {}),
        ({"served_model": "other"}, {}),
        ({"endpoint": "/v1/completions"}, {}),
        # Another vocabulary.
        ({"prompt_token_ids": array("i", [1, 2, 3])}, {}),
        # It goes on behind the end of a turn.
        ({"sampling_params": '{"ignore_eos":true}'}, {}),
        ({"sampling_params": json.dumps({"stop_token_ids": [*range(500)]})}, {}),
        ({"prompt_text": "another template's"}, {}),
        ({"prompt_text": None}, {}),
        ({"status": "aborted"}, {}),
    ]

    async def go_on() -> list[bool]:
        found: list[bool] = []
        for number, (recorded, caller) in enumerate(others):
            server = Server(store, **recorded)
            server.messages = [{"role": "user", "content": f"Question {number}?"}]
            await server.turn()
            found.append(await server.goes_on_elsewhere(**caller))
        return found

    assert asyncio.run(go_on()) == [False] * len(others)
    assert results() == {decisions.FIRST_CALL: len(others), decisions.ELSEWHERE: len(others)}


def test_a_forged_answer_is_not_taken_for_one_that_is_stored(store: Path) -> None:
    async def goes_on() -> bool:
        server = Server(store)
        await server.turn("The quick cat.")
        return await server.goes_on_elsewhere()

    assert not asyncio.run(goes_on())
    assert results() == {decisions.FIRST_CALL: 1, decisions.NO_MATCH: 1}


def test_what_does_not_arrive_in_time_is_counted_and_the_next_request_is_answered_as_ever(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def goes_on() -> bool:
        server = Server(store)
        await server.turn()
        monkeypatch.setattr(recall, "SECONDS", 0)
        return await server.goes_on_elsewhere()

    assert not asyncio.run(goes_on())
    assert results() == {decisions.FIRST_CALL: 1, decisions.ELSEWHERE: 1}
    assert not _isolation.failures


def test_a_store_that_cannot_be_reached_is_no_failure(store: Path) -> None:
    async def goes_on() -> bool:
        server = Server(store)
        await server.turn()
        store.write_bytes(b"damaged" * 1000)
        return await server.goes_on_elsewhere()

    assert not asyncio.run(goes_on())
    assert results() == {decisions.FIRST_CALL: 1, decisions.STORE_NOT_AVAILABLE: 1}
    assert not _isolation.failures


def test_after_a_failure_the_store_is_left_alone_for_a_while_and_the_log_says_so_once(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = 0

    def refuse(*_: Any, **__: Any) -> Store:
        nonlocal opened
        opened += 1
        raise StoreUnavailable("it is away")

    async def goes_on() -> list[bool]:
        server = Server(store)
        await server.turn()
        continuation.forget()
        found = [await server.goes_on() for _ in range(5)]
        monkeypatch.setattr(reading, "SECONDS_BETWEEN_FAILURES", 0)
        reading.close()
        return [*found, *[await server.goes_on() for _ in range(5)]]

    monkeypatch.setattr(reading, "open_store", refuse)
    monkeypatch.setattr(reading, "SECONDS_BETWEEN_FAILURES", 3600)
    assert not any(asyncio.run(goes_on()))
    assert opened == 1 + 5
    assert sum("it is away" in each.message for each in caplog.records) == 2
    assert not _isolation.failures


def test_an_agl_store_that_hangs_keeps_no_thread_for_as_long_as_a_request_to_it_may_take(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opening = reading.open_store
    # It takes connections, and never answers.
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        url = f"http://127.0.0.1:{hangs.getsockname()[1]}"
        monkeypatch.setattr(reading, "open_store", lambda _, **options: opening(url, **options))
        monkeypatch.setattr(recall, "SECONDS", 20)

        async def goes_on() -> bool:
            server = Server(store)
            await server.turn()
            return await server.goes_on_elsewhere()

        assert not asyncio.run(goes_on())

    assert results() == {decisions.FIRST_CALL: 1, decisions.STORE_NOT_AVAILABLE: 1}
    assert any("cannot be read from the store" in each.message for each in caplog.records)
    assert not _isolation.failures


def test_a_request_that_goes_on_from_an_earlier_answer_than_its_last_says_so(store: Path) -> None:
    async def turns() -> None:
        server = Server(store)
        await server.turn()
        await server.turn("The quick cat.")
        await prompt_of(server.renderer, server.messages, ROLLOUT)

    asyncio.run(turns())
    assert results() == {decisions.FIRST_CALL: 1, decisions.CONTINUED: 1, decisions.CONTINUED_EARLIER: 1}


def test_a_request_does_not_wait_for_a_store_that_does_not_answer_and_the_next_one_has_what_was_read_since(
    store: Path, watched: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def turns() -> list[bool]:
        server = Server(store)
        await server.turn()
        watched.gate.clear()
        monkeypatch.setattr(recall, "SECONDS", 0.05)
        goes_on = [await server.goes_on_elsewhere()]
        # While that read is late, no other one begins.
        goes_on += [await server.goes_on() for _ in range(20)]
        asked = watched.asked
        watched.gate.set()
        while not reading.reader().is_available():
            await asyncio.sleep(0.01)
        monkeypatch.setattr(recall, "SECONDS", 60)
        goes_on.append(await server.goes_on())
        assert (asked, watched.read) == (1, 1)
        return goes_on

    assert asyncio.run(turns()) == [False] * 21 + [True]
    assert results() == {decisions.FIRST_CALL: 1, decisions.STORE_NOT_AVAILABLE: 21, decisions.CONTINUED: 1}
    assert not _isolation.failures


def test_a_request_does_not_wait_for_a_renderer_that_does_not_answer_and_cannot_be_cancelled(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = RenderedChat.render

    async def turns() -> list[bool]:
        server = Server(store)
        await server.turn()
        gate = asyncio.Event()

        async def wait_and_render(self: RenderedChat, *args: Any, **kwargs: Any) -> str:
            while not gate.is_set():
                try:
                    await gate.wait()
                except asyncio.CancelledError:
                    continue
            return await render(self, *args, **kwargs)

        monkeypatch.setattr(RenderedChat, "render", wait_and_render)
        monkeypatch.setattr(recall, "SECONDS", 1)
        goes_on = [await server.goes_on_elsewhere()]
        gate.set()
        monkeypatch.setattr(recall, "SECONDS", 60)
        return [*goes_on, await server.goes_on()]

    assert asyncio.run(turns()) == [False, True]
    assert not _isolation.failures


def test_a_rollout_that_is_longer_than_one_read_is_read_and_rendered_once_by_several_requests(
    store: Path, watched: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    renders = 0
    render = RenderedChat.render

    async def count_and_render(self: RenderedChat, *args: Any, **kwargs: Any) -> str:
        nonlocal renders
        renders += 1
        return await render(self, *args, **kwargs)

    async def turns() -> list[bool]:
        nonlocal renders
        server = Server(store)
        for _ in range(3 * reading.CALLS_AT_ONCE):
            await server.turn()
        # Each request has time for one page.
        monkeypatch.setattr(reading, "SHARE", 0)
        monkeypatch.setattr(RenderedChat, "render", count_and_render)
        goes_on = [await server.goes_on_elsewhere()]
        return [*goes_on, *[await server.goes_on() for _ in range(2)]]

    assert asyncio.run(turns()) == [False, False, True]
    calls = 3 * reading.CALLS_AT_ONCE
    # Not three times: at most the calls of the same moment as the last.
    assert watched.read <= calls + 2
    assert results()[decisions.CONTINUED_EARLIER] == 2
    # One of each beginning, one of its stand-in for what follows; one of each request; and the next one after a page.
    assert renders <= 2 * calls + 6
    assert not _isolation.failures


def test_sixteen_requests_at_once_each_go_on_from_calls_of_another_server(store: Path, watched: WatchedStore) -> None:
    async def turns() -> tuple[list[bool], list[bool]]:
        servers = [Server(store, rollout_id=f"ro-{number}") for number in range(16)]
        for number, server in enumerate(servers):
            server.rollout = f"ro-{number}"
            await server.turn()
        continuation.forget()
        apart = await asyncio.gather(*[server.goes_on() for server in servers])
        continuation.forget()
        watched.read = 0
        return apart, await asyncio.gather(*[servers[0].goes_on() for _ in range(16)])

    apart, together = asyncio.run(turns())

    assert all(apart)
    assert all(together)
    assert watched.read == 1
    assert not _isolation.failures


def test_a_later_call_is_read_though_more_answers_are_known_than_calls_are_stored(store: Path) -> None:
    async def turns() -> list[bool]:
        server = Server(store)
        first = Choice(token_ids=array("i", server.said), text=TEXT, finish_reason="stop")
        ids = array("i", server.tokenizer.encode("Other."))
        others = [
            Choice(index=1 + each, token_ids=ids[each:], text="Other.", finish_reason="length") for each in (0, 1)
        ]
        server.recorded["choices"] = [first, *others]
        await server.turn()
        goes_on = [await server.goes_on_elsewhere()]
        del server.recorded["choices"]
        await server.turn(is_kept=False)
        return [*goes_on, await server.goes_on()]

    assert asyncio.run(turns()) == [True, True]
    assert not _isolation.failures


def test_while_prompts_are_only_counted_no_request_waits_for_the_store(
    store: Path, watched: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def turns() -> bool:
        server = Server(store)
        await server.turn()
        instrumentation.uninstrument_vllm()
        monkeypatch.setenv("AGL_CONTINUE", "report")
        instrumentation.instrument_vllm()
        return await server.goes_on_elsewhere()

    assert not asyncio.run(turns())
    assert watched.asked == 0


def test_a_call_that_is_stored_long_after_it_has_ended_is_found_by_the_request_after_the_next(store: Path) -> None:
    async def turns() -> list[bool]:
        other = Server(store)
        other.messages = [{"role": "user", "content": "Rome?"}]
        await other.turn()
        server = Server(store, finished_at=time.time_ns() - 6 * reading.OVERLAP)
        await other.goes_on_elsewhere()
        await server.turn(is_kept=False)
        return [await server.goes_on(), await server.goes_on()]

    assert asyncio.run(turns()) == [False, True]


def test_a_forked_process_does_not_wait_for_a_read_of_its_parent(
    store: Path, watched: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def goes_on() -> bool:
        server = Server(store)
        await server.turn()
        watched.gate.clear()
        monkeypatch.setattr(recall, "SECONDS", 0.05)
        return await server.goes_on_elsewhere()

    assert not asyncio.run(goes_on())
    assert not reading.reader().is_available()
    child = os.fork()
    if child == 0:
        os._exit(0 if reading.reader().is_available() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    watched.gate.set()


@pytest.mark.parametrize(("recorded", "asked"), [("auto", "none"), ("none", "auto")])
def test_an_answer_of_another_server_is_parsed_by_the_tool_choices_that_its_request_may_have_had(
    recorded: str, asked: str
) -> None:
    renderer = online_renderer(CHATML)
    tokenizer = renderer.renderer.get_tokenizer()
    parser = ParserManager.get_parser("hermes", enable_auto_tools=True, tokenizer=tokenizer)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    fields = {"model": "tiny", "messages": [USER], "tools": tools, "tool_choice": asked}
    request = ChatCompletionRequest.model_validate(fields)
    text = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    ids = tokenizer.encode(text)
    parsers = Parsers(parser, None, None, True, tokenizer, renderer.model_config, {})

    [said, *_] = parsers.answers(request, Said(text, [recorded], False), [1], ids)
    answers = parsers.answers(request, Said(text, possible_tool_choices(request), True), [1], ids)

    assert said in answers
    assert bool(said.tool_calls) is (recorded == "auto")
    assert not _isolation.failures
