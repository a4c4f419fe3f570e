"""Conversations that go on from exact ids (`AGL_CONTINUE`), of a real vLLM whose model says random bytes.

The clients here know nothing of it: they send back the messages that they were sent, each in its interface's own way.
"""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import pytest

from agentlightning import continuation
from agentlightning.generation import Generation
from agentlightning.instrumentation.vllm._status import STATUS_ROUTE
from agentlightning.store import open_store
from tests.common import templates
from tests.common.answers import VARYING, fetch, joined, post
from tests.common.oracle import check_logprobs
from tests.common.routers import router
from tests.conftest import PARSERS
from tests.instrumentation.vllm.test_random_requests import drawn, random_requests
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer, until

TURNS = 20
BLOCK = 128
"""The number of ids that vLLM's prefix cache keeps together on CPUs."""
LONG = ("--max-model-len=8192", '--hf-overrides={"max_position_embeddings": 8192}')
ROUTES = ("--enable-scale-out",)
PATIENT = "--middleware=tests.recording.patient.Patient"
"""However busy this machine is, a server waits until it has read the calls of another one."""
ENV = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "AGL_LOGPROBS": "on"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"]}
SAID = (
    r"[a-z ]{0,6}\n{0,2}<tool_call>\n? ?"
    r'\{"name": {1,3}"weather", {0,2}"arguments": {0,2}\{ ?"city": {0,2}"(Paris|Rome)" ?\}\}\n{0,2}</tool_call>'
)
CALLED = SAID[SAID.index("<tool_call>") :]
THOUGHT = r"<think>\n[a-z][a-z ]{0,8}\n{1,2}</think>\n{0,2}"
REASONED = THOUGHT + SAID


@dataclass(frozen=True)
class Interface:
    """One of vLLM's chat interfaces: how its clients say things.

    Attributes:
        messages: the field of the messages.
        limit: the field of the most ids.
        tools: its tools.
        call: the options that have the model call the tool.
        history: what its clients keep of an answer, or of its events.
        result: the message with the result of the last tool call of the history; None if there is none at its end.
    """

    path: str
    messages: str
    limit: str
    tools: list[Any]
    call: dict[str, Any]
    history: Callable[[Any], list[Any]]
    result: Callable[[list[Any]], Any]


def chat_history(answer: Any) -> list[Any]:
    if isinstance(answer, list):
        message: dict[str, Any] = joined(answer)["choices"][0]["delta"]
    else:
        message = answer["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    # Where its chunks fall badly, a stream of vLLM has a call without an id, or none: that depends on the machine.
    calls = [call for call in (calls.values() if isinstance(calls, dict) else calls) if call.get("id")]
    said = {"tool_calls": calls} if calls else {}
    return [{"role": "assistant", "content": message.get("content"), **said}]


def messages_history(answer: Any) -> list[Any]:
    if not isinstance(answer, list):
        return [{"role": "assistant", "content": answer["content"]}]
    blocks: list[Any] = []
    for event in answer:
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            for key, target in (("text", "text"), ("thinking", "thinking"), ("partial_json", "json")):
                if key in delta:
                    blocks[-1][target] = (blocks[-1].get(target) or "") + delta[key]
    for block in blocks:
        written = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(written or "{}")
    return [{"role": "assistant", "content": blocks}]


def responses_history(answer: Any) -> list[Any]:
    return (answer[-1]["response"] if isinstance(answer, list) else answer)["output"]


def chat_result(history: list[Any]) -> Any:
    calls = history[-1].get("tool_calls")
    return calls and {"role": "tool", "content": "sunny", "tool_call_id": calls[0]["id"]}


FUNCTION = {"name": "weather", "parameters": SCHEMA}
CHAT = Interface(
    "/v1/chat/completions",
    "messages",
    "max_tokens",
    [{"type": "function", "function": FUNCTION}],
    {"structured_outputs": {"regex": SAID}},
    chat_history,
    chat_result,
)
MESSAGES = Interface(
    "/v1/messages",
    "messages",
    "max_tokens",
    [{"name": "weather", "input_schema": SCHEMA}],
    # Nothing leads the model to a call here; one that is forced may have arguments that vLLM itself cannot show.
    {},
    messages_history,
    lambda said: None,
)
RESPONSES = Interface(
    "/v1/responses",
    "input",
    "max_output_tokens",
    [{"type": "function", **FUNCTION}],
    {"structured_outputs": {"regex": SAID}},
    responses_history,
    lambda said: {"type": "function_call_output", "call_id": said[-1]["call_id"], "output": "sunny"},
)
INTERFACES = {"chat": CHAT, "messages": MESSAGES, "responses": RESPONSES}


@dataclass
class Agent:
    """A client of one interface, with a rollout of its own."""

    server: RecordingServer
    rollout: str
    interface: Interface = CHAT
    streamed: bool = False
    history: list[Any] = field(default_factory=list[Any])
    calls: int = 0

    def user(self, text: str) -> None:
        self.history.append({"role": "user", "content": text})

    def ask(self, **options: Any) -> Any:
        """Send the conversation so far, and keep the answer as its clients do."""
        self.calls += 1
        # Anthropic's interface has no seed.
        seed = {} if self.interface is MESSAGES else {"seed": self.calls}
        body = {
            "model": self.server.model,
            self.interface.messages: self.history,
            self.interface.limit: 16,
            "temperature": 1,
            "stream": self.streamed,
            **seed,
            **options,
        }
        answer = post(self.server, f"/rollout/{quote(self.rollout)}{self.interface.path}", body)
        self.history += self.interface.history(answer)
        return answer

    def use_tool(self, **options: Any) -> None:
        """Have the model call the tool, and give it the result."""
        options = {"tools": self.interface.tools, self.interface.limit: 120, **self.interface.call, **options}
        self.ask(**options)
        result = self.interface.result(self.history)
        if result:
            self.history.append(result)
        else:
            self.user("No call?")

    def generations(self) -> list[Generation]:
        """Return its calls, in order, once all are recorded."""
        until(lambda: len(self.server.kept(rollout_id=self.rollout)) == self.calls, f"{self.calls} calls")
        return sorted(self.server.kept(rollout_id=self.rollout), key=lambda generation: generation.started_at or 0)

    def breaks(self) -> list[int]:
        """Return the numbers of the calls whose prompt does not begin with the ids of the call before."""
        contexts = [as_context(generation) for generation in self.generations()]
        prompts = [list(generation.prompt_token_ids or ()) for generation in self.generations()]
        return [
            number
            for number, (before, prompt) in enumerate(zip(contexts, prompts[1:], strict=False), 1)
            if prompt[: len(before)] != before
        ]

    def rows(self) -> int:
        """Return how many rows its trajectory has, which have the model's own logprobs."""
        with open_store(self.server.store) as store:
            rows = [*store.trajectories(self.rollout)]
        check_logprobs(rows, self.generations())
        return len(rows)


def as_context(generation: Generation) -> list[int]:
    [choice] = generation.choices
    return [*(generation.prompt_token_ids or ()), *(choice.token_ids or ())]


def counts(server: RecordingServer) -> dict[str, int]:
    return fetch(server, STATUS_ROUTE)["continuation"]["results"]


@pytest.fixture(scope="module")
def server(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    """A server with a tool parser, on which prompts go on; requests bring their templates."""
    folder = tmp_path_factory.mktemp("continuation")
    (folder / "chat.jinja").write_text(templates.CHATML)
    arguments = (
        *PARSERS[:2],
        f"--chat-template={folder / 'chat.jinja'}",
        "--trust-request-chat-template",
        *ROUTES,
        *LONG,
    )
    with nursery.server(folder / "generations.db", *arguments, env={"AGL_CONTINUE": "on", **ENV}) as server:
        yield server
        assert fetch(server, STATUS_ROUTE)["counters"]["failures"] == {}


@pytest.fixture(scope="module")
def reasoning(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    """The same with a reasoning parser, and a template that keeps reasoning while tools are called."""
    folder = tmp_path_factory.mktemp("reasoning")
    (folder / "chat.jinja").write_text(templates.QWEN3)
    arguments = (*PARSERS, f"--chat-template={folder / 'chat.jinja'}", "--trust-request-chat-template", *LONG)
    with nursery.server(folder / "generations.db", *arguments, env={"AGL_CONTINUE": "on", **ENV}) as server:
        yield server
        assert fetch(server, STATUS_ROUTE)["counters"]["failures"] == {}


@pytest.fixture(scope="module")
def counting(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    """`AGL_CONTINUE=report`, without a store for it to come from."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "chat.jinja").write_text(templates.CHATML)
    arguments = (*PARSERS[:2], f"--chat-template={folder / 'chat.jinja'}", *LONG)
    with nursery.server(folder / "generations.db", *arguments, env={"AGL_CONTINUE": "report", **ENV}) as server:
        yield server
        assert fetch(server, STATUS_ROUTE)["counters"]["failures"] == {}


@pytest.fixture
def without(server: RecordingServer, nursery: Nursery, tmp_path: Path) -> Iterator[RecordingServer]:
    """A server like the first, but that its prompts do not go on."""
    [template] = (argument for argument in server.command if argument.startswith("--chat-template="))
    arguments = (*PARSERS[:2], template, "--trust-request-chat-template", *ROUTES, *LONG)
    with nursery.server(tmp_path / "generations.db", *arguments, env=ENV) as other:
        yield other


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("interface", INTERFACES.values(), ids=INTERFACES)
def test_a_conversation_of_twenty_turns_is_one_row(
    server: RecordingServer, rollout: str, interface: Interface, streamed: bool
) -> None:
    agent = Agent(server, rollout, interface, streamed)
    for turn in range(TURNS):
        agent.user(f"Question {turn}?")
        if turn % 3 == 2:
            agent.use_tool()
        agent.ask(tools=interface.tools)

    assert agent.breaks() == []
    assert agent.rows() == 1


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("template", [templates.LLAMA, templates.MISTRAL], ids=["Llama 3", "Mistral"])
def test_a_conversation_goes_on_in_other_templates(
    server: RecordingServer, rollout: str, template: str, streamed: bool
) -> None:
    agent = Agent(server, rollout, streamed=streamed)
    for turn in range(TURNS):
        agent.user(f"Question {turn}?")
        agent.ask(chat_template=template)

    assert agent.breaks() == []


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
def test_reasoning_goes_on_while_tools_are_called_and_is_left_out_after_the_next_question(
    reasoning: RecordingServer, rollout: str, streamed: bool
) -> None:
    before = counts(reasoning)
    agent = Agent(reasoning, rollout, streamed=streamed)
    questions: list[int] = []
    for turn in range(TURNS):
        if turn % 5 == 0:
            agent.user(f"Question {turn}?")
        if turn and agent.history[-1]["role"] == "user":
            questions.append(turn)
        agent.use_tool(structured_outputs={"regex": REASONED})

    # The client never sends reasoning back.
    assert agent.breaks() == questions
    assert set(questions) >= {5, 10, 15}
    results = grown(before, counts(reasoning))
    assert results[continuation.FIRST_CALL] == 1
    assert results[continuation.CONTINUED] == TURNS - 1 - len(questions)
    assert results[continuation.REASONING_DROPPED] >= 3


KINDS = {"tool": CALLED, "reasoning": THOUGHT + "[a-z ]{4,12}", "both": THOUGHT + CALLED}


@pytest.mark.tier("all")
@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", templates.TEMPLATES.values(), ids=templates.TEMPLATES)
def test_each_of_twenty_turns_goes_on_wherever_the_template_appends(
    request: pytest.FixtureRequest, rollout: str, template: str, kind: str, streamed: bool
) -> None:
    # A reasoning parser of vLLM takes a call without a thought in front of it for reasoning where it is streamed.
    server: RecordingServer = request.getfixturevalue("server" if kind == "tool" else "reasoning")
    agent = Agent(server, rollout, streamed=streamed)
    agent.user("Paris?")
    results: list[str] = []
    follows: list[str] = []
    for _ in range(TURNS):
        before = counts(server)
        follows.append(agent.history[-1]["role"])
        options = {"chat_template": template, "structured_outputs": {"regex": KINDS[kind]}}
        if kind == "reasoning":
            agent.ask(**options, max_tokens=120)
            agent.user("More?")
        else:
            agent.use_tool(**options)
        [result] = grown(before, counts(server))
        results.append(result)

    keeps = kind == "tool" or (kind == "both" and template == templates.QWEN3)
    # Where its chunks fall badly, a stream of vLLM loses a call: then its client has another answer than the model's.
    lost = {continuation.REASONING_DROPPED, continuation.NO_MATCH, continuation.CONTINUED_EARLIER}
    expected = {"tool": {continuation.CONTINUED if keeps else continuation.REASONING_DROPPED}}
    if kind == "reasoning":
        expected["user"] = {continuation.REASONING_DROPPED}
    elif streamed:
        expected["user"] = lost
    assert results[0] == continuation.FIRST_CALL
    assert [
        each for each in zip(follows[1:], results[1:], strict=True) if each[1] not in expected.get(each[0], ())
    ] == []
    assert agent.breaks() == [number for number in range(1, TURNS) if results[number] != continuation.CONTINUED]
    if keeps:
        assert continuation.CONTINUED in results
        assert agent.rows() == 1 + len(agent.breaks())


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {result: count - before[result] for result, count in after.items() if count > before[result]}


def test_without_it_each_prompt_is_vllms_own_and_breaks_and_is_counted(counting: RecordingServer, rollout: str) -> None:
    before = counts(counting)
    agent = Agent(counting, rollout)
    agent.user("Paris?")
    for _ in range(5):
        agent.use_tool()

    assert agent.breaks() == [1, 2, 3, 4]
    assert grown(before, counts(counting)) == {continuation.FIRST_CALL: 1, continuation.CONTINUED: 4}


def test_a_call_without_a_rollout_is_answered_as_ever(server: RecordingServer) -> None:
    before = counts(server)
    history: Any = [{"role": "user", "content": "Paris?"}]
    for seed in range(3):
        body = {"model": server.model, "messages": history, "max_tokens": 16, "temperature": 1, "seed": seed}
        answer = post(server, "/v1/chat/completions", body)
        assert answer["prompt_token_ids"] == post(server, "/tokenize", {"messages": history})["tokens"]
        history = [*history, *chat_history(answer), {"role": "user", "content": "More?"}]

    assert counts(server) == before


def test_a_session_is_continued_as_a_rollout_is(server: RecordingServer, rollout: str) -> None:
    history: Any = [{"role": "user", "content": "Paris?"}]
    contexts: list[list[int]] = []
    for seed in range(3):
        body = {"model": server.model, "messages": history, "max_tokens": 16, "temperature": 1, "seed": seed}
        answer = post(server, "/v1/chat/completions", body, {"x-session-id": rollout})
        prompt = answer["prompt_token_ids"]
        assert not contexts or prompt[: len(contexts[-1])] == contexts[-1]
        contexts.append(prompt + answer["choices"][0]["token_ids"])
        history = [*history, *chat_history(answer), {"role": "user", "content": "More?"}]


def test_another_client_gets_at_no_history(server: RecordingServer, rollout: str) -> None:
    """Neither with a forged answer, nor with the same messages in a rollout, an attempt or a session of its own."""
    agent = Agent(server, rollout)
    agent.user("Paris?")
    agent.ask()
    [asked, said] = agent.history
    context = as_context(agent.generations()[0])

    def goes_on(message: Any, prefix: str, options: Any, headers: Any) -> bool:
        messages = [asked, message, {"role": "user", "content": "More?"}]
        body = {"model": server.model, "messages": messages, "max_tokens": 4, **options}
        prompt = post(server, f"{prefix}/v1/chat/completions", body, headers)["prompt_token_ids"]
        return prompt[: len(context)] == context

    own, other = f"/rollout/{quote(rollout)}", f"/rollout/{quote(rollout)}-2"
    assert goes_on(said, own, {}, {})
    assert not goes_on(said, own, {"chat_template": templates.LLAMA}, {})
    assert not goes_on(said, own, {"tools": CHAT.tools}, {})
    assert not goes_on({**said, "content": f"{said['content']}."}, own, {}, {})
    assert not goes_on({**said, "reasoning": "I think so."}, own, {}, {})
    for prefix, headers in ((other, {}), (f"{own}/attempt/2", {}), ("", {"x-session-id": rollout}), ("", {})):
        # Vacuous where the model's own ids are those that its text is tokenised to.
        assert not goes_on(said, prefix, {}, headers) or is_canonical(server, [asked, said], context)


def is_canonical(server: RecordingServer, messages: list[Any], context: list[int]) -> bool:
    body = {"model": server.model, "messages": messages, "add_generation_prompt": False}
    return post(server, "/tokenize", body)["tokens"][: len(context)] == context


def test_retries_and_branches_go_on_from_their_own_answers(server: RecordingServer, rollout: str) -> None:
    agent = Agent(server, rollout)
    agent.user("Paris?")
    start = [*agent.history]
    branches: list[Any] = []
    for _ in range(4):
        agent.history = [*start]
        agent.ask()
        branches.append(agent.history)
    contexts = [as_context(generation) for generation in agent.generations()]
    for branch, context in reversed([*zip(branches, contexts, strict=True)]):
        agent.history = [*branch, {"role": "user", "content": "More?"}]
        agent.ask()
        prompt = list(agent.generations()[-1].prompt_token_ids or ())
        assert prompt[: len(context)] == context


def test_each_of_several_choices_can_be_gone_on_from(server: RecordingServer, rollout: str) -> None:
    path = f"/rollout/{quote(rollout)}/v1/chat/completions"
    asked = {"role": "user", "content": "Paris?"}
    body = {"model": server.model, "messages": [asked], "max_tokens": 16, "temperature": 1, "seed": 1, "n": 3}
    answer = post(server, path, body)
    for choice in answer["choices"]:
        messages = [asked, {"role": "assistant", "content": choice["message"]["content"]}, asked]
        prompt = post(server, path, {**body, "messages": messages, "n": 1})["prompt_token_ids"]
        context = answer["prompt_token_ids"] + choice["token_ids"]
        assert prompt[: len(context)] == context


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"prompt_logprobs": 1}, id="prompt_logprobs"),
        pytest.param({"echo": True}, id="echo"),
        pytest.param({"truncate_prompt_tokens": 40}, id="truncated"),
        pytest.param({"add_generation_prompt": False}, id="no generation prompt"),
        pytest.param({"use_beam_search": True, "n": 2, "temperature": 0}, id="beam search"),
    ],
)
def test_a_request_that_needs_vllms_own_prompt_has_it(server: RecordingServer, rollout: str, options: Any) -> None:
    before = counts(server)
    agent = Agent(server, rollout)
    agent.user("Paris?")
    agent.ask()
    body = {"messages": [*agent.history, {"role": "user", "content": "More?"}], "model": server.model, "max_tokens": 4}
    answer = post(server, f"/rollout/{quote(rollout)}/v1/chat/completions", {**body, **options})

    if "use_beam_search" not in options:
        assert (
            answer["prompt_token_ids"] == post(server, "/v1/chat/completions", {**body, **options})["prompt_token_ids"]
        )
    assert grown(before, counts(server))[continuation.OTHER_REQUEST] == 1


def test_what_it_came_to_is_in_the_metrics(server: RecordingServer, rollout: str) -> None:
    agent = Agent(server, rollout)
    agent.user("Paris?")
    agent.ask()
    agent.user("More?")
    agent.ask()

    metrics = server.metrics()
    for result, count in counts(server).items():
        assert metrics[f'agentlightning_continuations_total{{result="{result}"}}'] == count


def test_the_prefix_cache_has_all_that_came_before(server: RecordingServer, rollout: str) -> None:
    agent = Agent(server, rollout)
    for turn in range(6):
        agent.user(f"Question {turn}? " * 10)
        agent.ask()

    before = agent.generations()[-2]
    context = len(as_context(before))
    assert agent.generations()[-1].cached_tokens == context // BLOCK * BLOCK


@pytest.mark.tier("all")
def test_where_nothing_can_be_continued_answers_are_those_of_a_server_without_it(
    server: RecordingServer, without: RecordingServer
) -> None:
    """A thousand random requests, each to both, and greedy, so that the answers have to be equal."""
    before = counts(server)
    drawn_requests = drawn(random_requests(fetch(server, "/openapi.json"), server.model), 1200)
    # Its temperature stands elsewhere.
    requests = [request for request in drawn_requests if request.path != "/inference/v1/generate"][:1000]
    different = [
        request for request in requests if answer_to(server, request.prefix, request) != answer_to(without, "", request)
    ]

    assert different == []
    assert grown(before, counts(server)).keys() & {continuation.FIRST_CALL, continuation.NOT_TEXT}


def answer_to(server: RecordingServer, prefix: str, request: Any) -> Any:
    body = {**json.loads(request.body), "temperature": 0, "stream": False}
    try:
        return unvarying(post(server, f"{prefix}{request.path}", body))
    except HTTPError as error:
        return error.code


def unvarying(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {name: unvarying(value) for name, value in answer.items() if name not in VARYING}
    return [unvarying(each) for each in answer] if isinstance(answer, list) else answer


@pytest.mark.tier("all")
def test_without_it_the_same_conversation_breaks(
    server: RecordingServer, without: RecordingServer, rollout: str
) -> None:
    breaks: list[list[int]] = []
    for each in (server, without):
        agent = Agent(each, rollout)
        for turn in range(TURNS):
            agent.user(f"Question {turn}?")
            agent.ask()
        breaks.append(agent.breaks())

    assert breaks[0] == []
    # Random bytes are tokenised otherwise than they were sampled.
    assert len(breaks[1]) > TURNS // 2


@pytest.fixture
def pair(nursery: Nursery, server: RecordingServer, tmp_path: Path) -> Iterator[tuple[RecordingServer, ...]]:
    """Two servers like the first, which record into the same store."""
    [template] = (argument for argument in server.command if argument.startswith("--chat-template="))
    arguments = (*PARSERS[:2], template, "--trust-request-chat-template", *ROUTES, *LONG)
    env = {"AGL_CONTINUE": "on", **ENV}
    with (
        nursery.server(server.path, *arguments, PATIENT, env=env) as one,
        nursery.server(server.path, *arguments, PATIENT, env=env) as other,
    ):
        yield one, other
        assert fetch(other, STATUS_ROUTE)["counters"]["failures"] == {}


def went_on(servers: Iterable[RecordingServer], before: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Count the results since then, of all servers."""
    found: Counter[str] = Counter()
    for server, counted in zip(servers, before, strict=True):
        found.update(grown(dict(counted), counts(server)))
    return dict(found)


@pytest.mark.tier("all")
def test_two_servers_that_take_turns_go_on_from_each_other(pair: tuple[RecordingServer, ...], rollout: str) -> None:
    before = [counts(server) for server in pair]
    agent = Agent(pair[0], rollout)
    for turn in range(TURNS):
        agent.server = pair[turn % 2]
        agent.user(f"Question {turn}?")
        agent.ask()
        # As a tool takes its time: by then the call is in the store.
        until(lambda: len(pair[0].kept(rollout_id=rollout)) == agent.calls, "the call")

    assert agent.breaks() == []
    assert went_on(pair, before) == {continuation.FIRST_CALL: 1, continuation.CONTINUED: TURNS - 1}


@pytest.mark.tier("all")
@pytest.mark.takes_long("it may install the router")
@pytest.mark.parametrize("policy", ["round_robin", "consistent_hash"])
def test_behind_a_router_no_call_breaks(pair: tuple[RecordingServer, ...], rollout: str, policy: str) -> None:
    before = [counts(server) for server in pair]
    with router("vllm-router", [server.url for server in pair], pair[0].model, f"--policy={policy}") as url:
        history: list[Any] = []
        contexts: list[list[int]] = []
        breaks = 0
        for turn in range(TURNS):
            history.append({"role": "user", "content": f"Question {turn}?"})
            body = {"model": pair[0].model, "messages": history, "max_tokens": 16, "temperature": 1, "seed": turn}
            answer = post_to(url, f"/rollout/{quote(rollout)}/v1/chat/completions", body, {"x-session-id": rollout})
            prompt = answer["prompt_token_ids"]
            breaks += bool(contexts) and prompt[: len(contexts[-1])] != contexts[-1]
            contexts.append([*prompt, *answer["choices"][0]["token_ids"]])
            history += chat_history(answer)
            until(lambda: len(pair[0].kept(rollout_id=rollout)) == turn + 1, "the call")  # noqa: B023

    assert breaks == 0
    assert went_on(pair, before) == {continuation.FIRST_CALL: 1, continuation.CONTINUED: TURNS - 1}


def post_to(url: str, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> Any:
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.tier("all")
def test_a_restarted_server_goes_on_from_the_store(nursery: Nursery, tmp_path: Path, rollout: str) -> None:
    (tmp_path / "chat.jinja").write_text(templates.CHATML)
    arguments = (f"--chat-template={tmp_path / 'chat.jinja'}", PATIENT, *LONG)
    agent, results = None, {}
    for _ in range(2):
        with nursery.server(tmp_path / "generations.db", *arguments, env={"AGL_CONTINUE": "on", **ENV}) as each:
            agent = agent or Agent(each, rollout)
            agent.server = each
            for turn in range(4):
                agent.user(f"Question {turn}?")
                agent.ask()
            results = counts(each)

    assert agent is not None
    assert agent.breaks() == []
    assert results[continuation.CONTINUED] == 4


def test_a_server_that_did_not_answer_the_call_before_says_so(
    server: RecordingServer, reasoning: RecordingServer, rollout: str
) -> None:
    """Set up a server that knows no call, as behind a router, or after a restart."""
    agent = Agent(server, rollout)
    agent.user("Paris?")
    agent.ask()
    agent.user("More?")
    before = counts(reasoning)
    other = Agent(reasoning, rollout, history=agent.history)
    answer = other.ask()

    assert grown(before, counts(reasoning)) == {continuation.ELSEWHERE: 1}
    assert answer["prompt_token_ids"] == post(reasoning, "/tokenize", {"messages": other.history[:-1]})["tokens"]
