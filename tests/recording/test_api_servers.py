"""Two API servers and one file: every generation once, none mixed up; and no text if text is off."""

from __future__ import annotations

import asyncio
import stat
from typing import Any

import psutil

from agentlightning.generation import Generation
from tests.common.answers import fetch, post
from tests.common.reference import tokenizer
from tests.recording.server import RecordingServer, until
from tests.recording.test_endpoints import ids_of

CALLS = 200
FEW = 30
AT_ONCE = 32
ROLLOUTS = 7
SECRETS = ("Xanthippe", "Zwiebelkuchen", "Quetzalcoatl", "Brummkreisel")
"""A secret in the prompt, in the answer, as a stop string, and in a grammar."""


def talk(number: int) -> Any:
    return [{"role": "user", "content": f"{SECRETS[0]} says that it is number {number}."}]


def said(number: int) -> str:
    return f"{SECRETS[1]} number {number}"


async def ask_all(server: RecordingServer, rollout: str, calls: int) -> list[Any]:
    limit = asyncio.Semaphore(AT_ONCE)

    async def ask(number: int) -> Any:
        whose = {"x-agl-rollout-id": f"{rollout} {number % ROLLOUTS}", "x-agl-attempt-id": str(number)}
        options: dict[str, Any] = {
            "model": server.model,
            "messages": talk(number),
            "max_tokens": 60,
            "stop": [SECRETS[2]],
            "extra_headers": whose,
            "extra_body": {"structured_outputs": {"choice": [said(number), f"{SECRETS[3]} {number}"]}},
        }
        # A connection each: the server's processes take connections, not requests.
        async with limit, server.async_client() as client:
            return await client.chat.completions.create(**options)

    return await asyncio.gather(*map(ask, range(calls)))


def until_kept(server: RecordingServer, rollout: str, calls: int) -> list[Generation]:
    """Return the generations of all requests; each is recorded a moment after its answer."""

    def kept() -> list[Generation]:
        return [each for number in range(ROLLOUTS) for each in server.kept(rollout_id=f"{rollout} {number}")]

    until(lambda: len(kept()) >= calls, "all of them")
    return kept()


def test_each_generation_of_both_servers_is_recorded_once_and_unmixed(
    two_api_servers: RecordingServer, rollout: str
) -> None:
    answers = asyncio.run(ask_all(two_api_servers, rollout, CALLS))
    kept = until_kept(two_api_servers, rollout, CALLS)

    assert sorted(int(str(each.attempt_id)) for each in kept) == list(range(CALLS))
    assert len({each.id for each in kept}) == len({each.call_id for each in kept}) == CALLS
    for each in kept:
        number = int(str(each.attempt_id))
        answer = answers[number]
        prompt, [sampled] = ids_of(each)
        assert each.rollout_id == f"{rollout} {number % ROLLOUTS}"
        assert each.response_id == answer.id
        assert (prompt, [sampled]) == (answer.prompt_token_ids, answer.response_token_ids)
        assert f"is number {number}." in tokenizer().decode(prompt)
        assert tokenizer().decode(sampled, skip_special_tokens=True) == answer.choices[0].message.content


def test_metrics_show_the_sums_of_both_servers(two_api_servers: RecordingServer, rollout: str) -> None:
    asyncio.run(ask_all(two_api_servers, rollout, FEW))
    until_kept(two_api_servers, rollout, FEW)
    until(lambda: len(two_api_servers.kept()) == counters(two_api_servers)["generations"], "the counters")
    until(lambda: counters(two_api_servers)["queue bytes"] == 0, "an empty queue")

    kept = two_api_servers.kept()
    found = counters(two_api_servers)
    assert found["generations"] >= FEW
    assert found["prompt tokens"] == sum(len(ids_of(each)[0]) for each in kept)
    assert found["output tokens"] == sum(len(ids) for each in kept for ids in ids_of(each)[1])
    assert found["lost"] == 0
    assert 0 < found["writes"] <= found["generations"]
    # Each process for itself has seen fewer.
    pids = {process.pid for process in psutil.Process(two_api_servers.process.pid).children(recursive=True)}
    status = fetch(two_api_servers, "/v1/agl/status")
    assert status["pid"] in pids
    assert 0 < status["recording"]["generations"] < found["generations"]


def counters(server: RecordingServer) -> dict[str, float]:
    metrics = server.metrics()
    lost = [value for name, value in metrics.items() if name.startswith("agentlightning_lost_generations_total")]
    # Shown before the first is lost: from a counter that is not there yet, no alert can be made.
    assert len(lost) == 4
    return {
        "generations": metrics["agentlightning_generations_total"],
        "prompt tokens": metrics['agentlightning_tokens_total{kind="prompt"}'],
        "output tokens": metrics['agentlightning_tokens_total{kind="output"}'],
        "queue bytes": metrics["agentlightning_queue_bytes"],
        "writes": metrics["agentlightning_write_seconds_count"],
        "lost": sum(lost),
    }


def test_metrics_of_one_server_show_its_own_numbers(recording: RecordingServer) -> None:
    kept = recording.recorded()
    until(lambda: counters(recording)["generations"] == len(kept), "the counters")

    assert counters(recording)["output tokens"] == sum(len(ids) for each in kept for ids in ids_of(each)[1])


def test_a_file_recorded_without_text_has_no_text(two_api_servers: RecordingServer, rollout: str) -> None:
    asyncio.run(ask_all(two_api_servers, rollout, FEW))
    body = two_api_servers.body(prompt=SECRETS[0], stop=[SECRETS[2]], bad_words=[SECRETS[3]])
    stopped = post(two_api_servers, "/v1/completions", {**body, "structured_outputs": {"choice": [SECRETS[2]]}})
    until(lambda: two_api_servers.kept(response_id=stopped["id"]), "the last one")

    files = [path.read_bytes() for path in two_api_servers.path.parent.iterdir()]
    # What is looked for would be found: ids of rollouts are kept.
    assert any(rollout.encode() in content for content in files)
    assert [secret for secret in SECRETS for content in files if secret.encode() in content] == []
    [kept] = two_api_servers.kept(response_id=stopped["id"])
    assert (kept.choices[0].finish_reason, kept.choices[0].stop_reason, kept.choices[0].text) == ("stop", None, None)


def test_files_of_several_servers_are_readable_only_by_their_owner(two_api_servers: RecordingServer) -> None:
    assert modes_of_files(two_api_servers) == {0o600}


def test_files_of_one_server_are_readable_only_by_its_owner(recording: RecordingServer) -> None:
    assert modes_of_files(recording) == {0o600}


def modes_of_files(server: RecordingServer) -> set[int]:
    server.kept()
    return {stat.S_IMODE(path.stat().st_mode) for path in server.path.parent.iterdir()}
