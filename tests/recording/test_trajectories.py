"""The rows of agents that call a real vLLM: what each row is stands here by hand, and transformers has its logprobs.

A model with random weights says nothing of use, so a logits processor leads it. `raw_logprobs` are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import openai
import pytest

from agentlightning.store import open_store
from agentlightning.trajectory import Trajectory
from examples import loop
from tests.common.oracle import check_logprobs
from tests.common.reference import tokenizer
from tests.common.script import OWN_LINE, PROCESSOR, environment
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer, until

NEVER_ENDING = 500


@pytest.fixture(scope="module")
def server(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    folder = tmp_path_factory.mktemp("store")
    env = {"AGL_LOGPROBS": "on", **environment(folder / "script.json")}
    with nursery.server(folder / "generations.db", *loop.TOOLS, PROCESSOR, env=env) as server:
        yield server


def base_url(server: RecordingServer, rollout: str) -> str:
    return f"{server.url}/rollout/{quote(rollout)}/attempt/a/v1"


class Agent:
    """An agent that keeps its history, as most do: as text, which is rendered and tokenised again for each call."""

    def __init__(self, server: RecordingServer, rollout: str, system: str) -> None:
        self.client = openai.OpenAI(base_url=base_url(server, rollout), api_key="none", max_retries=0, timeout=120)
        self.model = server.model
        self.messages: list[Any] = [{"role": "system", "content": system}]

    def ask(self, question: str, answer: str) -> None:
        """Ask, and lead the model to an answer."""
        self.messages.append({"role": "user", "content": question})
        self.again(answer)

    def again(self, answer: str) -> None:
        led: Any = {"vllm_xargs": {OWN_LINE: answer}}
        said = self.client.chat.completions.create(model=self.model, messages=self.messages, extra_body=led)
        assert said.choices[0].message.content == answer
        self.messages.append({"role": "assistant", "content": answer})

    def hang_up(self, question: str) -> None:
        """Ask for an answer without an end, and close the connection when it begins."""
        self.messages.append({"role": "user", "content": question})
        endless: Any = {"ignore_eos": True}
        with self.client.chat.completions.create(
            model=self.model, messages=self.messages, max_tokens=NEVER_ENDING, stream=True, extra_body=endless
        ) as stream:
            next(iter(stream))


def rows_of(server: RecordingServer, rollout: str, calls: int, **options: Any) -> list[Trajectory]:
    """Read the rows of a rollout when all of its calls are recorded, and check their logprobs."""
    until(lambda: len(server.kept(rollout_id=rollout)) >= calls, f"{calls} calls")
    with open_store(server.store) as store:
        rows = [*store.trajectories(rollout, **options)]
    check_logprobs(rows, server.kept(rollout_id=rollout))
    return rows


def shown(row: Trajectory) -> str:
    """Show a row as text, with what is trained in it in brackets."""
    parts: list[str] = []
    start = 0
    while start < len(row.token_ids):
        end = start + 1
        while end < len(row.token_ids) and row.response_mask[end] == row.response_mask[start]:
            end += 1
        text = tokenizer().decode(row.token_ids[start:end])
        parts.append(f"[{text}]" if row.response_mask[start] else text)
        start = end
    return "".join(parts)


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def answered(text: str) -> str:
    """An answer that is trained: the model ends its turn, and the template breaks the line."""
    return f"<|im_start|>assistant\n[{text}<|im_end|>]"


def test_the_loop_with_a_tool_has_a_row_for_each_call_since_its_template_moves_the_tools(
    server: RecordingServer, rollout: str
) -> None:
    _, (first, second) = loop.agent(base_url(server, rollout), server.model, "What is 2 times 3?")

    rows = rows_of(server, rollout, 2)

    assert [row.token_ids.tolist() for row in rows] == [
        [*first.prompt_token_ids, *first.choices[0].token_ids],
        [*second.prompt_token_ids, *second.choices[0].token_ids],
    ]
    assert [[each.generation_id for each in row.spans] for row in rows] == [
        [each.id] for each in server.kept(rollout_id=rollout)
    ]
    # The template has the tools behind the conversation: the second prompt breaks the first before its end.
    assert [row.parent for row in rows] == [None, None]
    assert [row.prompt_length for row in rows] == [len(first.prompt_token_ids), len(second.prompt_token_ids)]


def test_sub_agents_in_parallel_have_rows_of_their_own(server: RecordingServer, rollout: str) -> None:
    def work(system: str) -> None:
        agent = Agent(server, rollout, system)
        agent.ask("begin", "1")
        agent.ask("go on", "2")

    main = Agent(server, rollout, "You lead.")
    main.ask("Ask both.", "3")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ("You are one.", "You are two.")))
    main.ask("Both are done.", "4")

    rows = rows_of(server, rollout, 6)

    lead = (
        f"{turn('system', 'You lead.')}{turn('user', 'Ask both.')}{answered('3')}\n"
        f"{turn('user', 'Both are done.')}{answered('4')}"
    )
    assert shown(rows[0]) == lead
    assert sorted(map(shown, rows[1:])) == [
        f"{turn('system', system)}{turn('user', 'begin')}{answered('1')}\n{turn('user', 'go on')}{answered('2')}"
        for system in ("You are one.", "You are two.")
    ]
    assert [(row.index, row.count, row.parent, row.flags) for row in rows] == [
        (0, 3, None, []),
        (1, 3, None, []),
        (2, 3, None, []),
    ]


def test_a_compaction_begins_a_row(server: RecordingServer, rollout: str) -> None:
    agent = Agent(server, rollout, "You remember.")
    agent.ask("one", "1")
    agent.ask("two", "2")
    agent.messages = [{"role": "system", "content": "Summary: 1 and 2."}]
    agent.ask("three", "3")

    rows = rows_of(server, rollout, 3)

    assert [shown(row) for row in rows] == [
        f"{turn('system', 'You remember.')}{turn('user', 'one')}{answered('1')}\n{turn('user', 'two')}{answered('2')}",
        f"{turn('system', 'Summary: 1 and 2.')}{turn('user', 'three')}{answered('3')}",
    ]
    assert [(row.parent, row.flags, row.left_out) for row in rows] == [(None, [], []), (None, [], [])]


def test_a_retry_after_a_hang_up_takes_the_place_of_the_call(server: RecordingServer, rollout: str) -> None:
    agent = Agent(server, rollout, "You are slow.")
    agent.hang_up("one")
    agent.again("1")
    agent.ask("two", "2")

    (row,) = rows_of(server, rollout, 3)

    assert shown(row) == (
        f"{turn('system', 'You are slow.')}{turn('user', 'one')}{answered('1')}\n{turn('user', 'two')}{answered('2')}"
    )
    assert row.flags == []
    (aborted,) = (each for each in server.kept(rollout_id=rollout) if each.status == "aborted")
    assert [(each.generation_id, each.reason in ("retried", "empty_answer")) for each in row.left_out] == [
        (aborted.id, True)
    ]


def test_an_edited_history_is_a_branch_with_a_flag(server: RecordingServer, rollout: str) -> None:
    agent = Agent(server, rollout, "You are edited.")
    agent.ask("one", "1")
    agent.ask("two", "2")
    agent.messages[2] = {"role": "assistant", "content": "9"}
    agent.ask("three", "3")

    rows = rows_of(server, rollout, 3)

    begins = f"{turn('system', 'You are edited.')}{turn('user', 'one')}"
    edited = f"{begins}{turn('assistant', '9')}{turn('user', 'two')}"
    assert [shown(row) for row in rows] == [
        f"{begins}{answered('1')}\n{turn('user', 'two')}{answered('2')}",
        f"{edited}{turn('assistant', '2')}{turn('user', 'three')}{answered('3')}",
    ]
    assert [row.flags for row in rows] == [[], ["drifted"]]
    assert rows[1].parent is not None
    assert (rows[1].parent.index, rows[1].parent.position) == (0, rows[0].prompt_length)


def test_a_drifted_end_is_realigned(server: RecordingServer, rollout: str) -> None:
    agent = Agent(server, rollout, "You are cut.")
    # The agent drops the last digit that the model said, and what ended its turn stays.
    agent.ask("one", "12")
    agent.messages[-1] = {"role": "assistant", "content": "1"}
    agent.ask("two", "2")

    forked = rows_of(server, rollout, 2)
    (row,) = rows_of(server, rollout, 2, drift="realign")

    begins = f"{turn('system', 'You are cut.')}{turn('user', 'one')}<|im_start|>assistant\n"
    rest = f"<|im_end|>\n{turn('user', 'two')}"
    assert [shown(each) for each in forked] == [f"{begins}[12<|im_end|>]", f"{begins}1{rest}{answered('2')}"]
    assert shown(row) == f"{begins}[1]{rest}{answered('2')}"
    assert (row.flags, forked[1].flags) == (["drifted"], ["drifted"])


def test_an_unled_conversation_of_ids_is_one_row(server: RecordingServer, rollout: str) -> None:
    """An agent that sends ids back as they were never breaks a prefix, whatever random weights say."""
    client = openai.OpenAI(base_url=base_url(server, rollout), api_key="none", max_retries=0)
    asked: list[int] = tokenizer()("one two three").input_ids
    context: list[int] = []
    mask: list[int] = []
    with_ids: Any = {"return_token_ids": True}
    for _ in range(4):
        context, mask = [*context, *asked], [*mask, *[0] * len(asked)]
        said: Any = client.completions.create(
            model=server.model, prompt=context, max_tokens=7, temperature=1, seed=1, extra_body=with_ids
        )
        answer = said.choices[0].token_ids
        context, mask = [*context, *answer], [*mask, *[1] * len(answer)]
    (row,) = rows_of(server, rollout, 4)

    assert row.token_ids.tolist() == context
    assert row.response_mask.tolist() == mask
