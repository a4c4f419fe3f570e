"""Prompts that go on from calls that another process has answered: those of a store, on vLLM's own renderer."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from vllm.parser import ParserManager

from agentlightning import continuation as decisions
from agentlightning import instrumentation
from agentlightning.generation import Choice, Generation
from agentlightning.instrumentation.vllm import _isolation, continuation
from agentlightning.instrumentation.vllm.continuation import recall
from agentlightning.store import open_store
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

    def __init__(self, store: Path, text: str = TEXT, template: str = CHATML, **recorded: Any) -> None:
        self._store, self._text, self._recorded = store, text, recorded
        self.renderer = online_renderer(template)
        self.tokenizer = self.renderer.renderer.get_tokenizer()
        self.said = [*(self.tokenizer.encode(each)[0] for each in text), self.tokenizer.eos_token_id]
        self.messages: list[Any] = [USER]
        self.context: list[int] = []

    async def turn(self, shown: str | None = None, follows: Mapping[str, Any] = MORE) -> None:
        """Answer the conversation so far.

        Args:
            shown: what the client keeps of the answer.
            follows: what it says then.
        """
        prompt, context = await prompt_of(self.renderer, self.messages, ROLLOUT)
        answered(prompt, context, self.said, self._text, self.tokenizer.eos_token_id)
        # Without a text where the ids are not those of one, as vLLM has it.
        text = None if self.context and prompt[: len(self.context)] == self.context else self._rendered()
        choice = Choice(token_ids=array("i", self.said), text=self._text, finish_reason="stop")
        generation = Generation(
            request_id="chatcmpl-1",
            rollout_id=ROLLOUT,
            finished_at=time.time_ns(),
            status="finished",
            prompt_token_ids=array("i", prompt),
            prompt_text=text,
            sampling_params="{}",
            choices=[choice],
        )
        for name, value in self._recorded.items():
            setattr(generation, name, value)
        with open_store(str(self._store)) as store:
            store.add([generation])
        self.context = [*prompt, *self.said]
        self.messages += [{"role": "assistant", "content": self._text if shown is None else shown}, follows]

    def _rendered(self) -> str:
        return self.tokenizer.apply_chat_template(
            self.messages, chat_template=self.renderer.chat_template, tokenize=False, add_generation_prompt=True
        )

    async def goes_on_elsewhere(self, **caller: Any) -> bool:
        """Ask another server to go on, which knows nothing; tell whether it goes on from the exact ids."""
        continuation.forget()
        prompt, _ = await prompt_of(self.renderer, self.messages, ROLLOUT, **caller)
        return prompt[: len(self.context)] == self.context


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
    assert results() == {decisions.FIRST_CALL: 1, decisions.ELSEWHERE: 1}
    assert not _isolation.failures


def test_a_request_that_goes_on_from_an_earlier_answer_than_its_last_says_so(store: Path) -> None:
    async def turns() -> None:
        server = Server(store)
        await server.turn()
        await server.turn("The quick cat.")
        await prompt_of(server.renderer, server.messages, ROLLOUT)

    asyncio.run(turns())
    assert results() == {decisions.FIRST_CALL: 1, decisions.CONTINUED: 1, decisions.CONTINUED_EARLIER: 1}
