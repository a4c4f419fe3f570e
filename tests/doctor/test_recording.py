"""`agl doctor --store`: what was recorded, and why there is nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentlightning.generation import Generation, Loss
from agentlightning.rollout_records import NewRollout
from agentlightning.store import lifecycle, open_database, open_store
from tests.common.environments import Environment
from tests.common.generations import START, generation
from tests.doctor.command import Said, doctor, doctor_elsewhere

NEVER_CALLED = "problem generations none: no server that records here was ever called"
HOW_TO_NAME_IT = "call http://HOST:PORT/rollout/ROLLOUT/v1, or send the header x-agl-rollout-id"


def loss(count: int, reason: str) -> Loss:
    return Loss(count=count, reason=reason, first_at=START, last_at=START, host="host", pid=7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "generations.db"


@pytest.fixture
def said(path: Path) -> Any:
    """Run `agl doctor` on a store with these generations."""

    def said(generations: list[Generation], losses: list[Loss], *arguments: str) -> Said:
        with open_store(str(path)) as store:
            store.add(generations)
            store.add_losses(losses)
        return doctor_elsewhere("--store", str(path), *arguments)

    return said


def test_check_of_a_store_counts_its_generations(said: Any, path: Path) -> None:
    generations = [generation(1), generation(2), generation(3, status="aborted"), generation(4, status="error")]

    answer = said(generations, [])

    assert (answer.status, answer.stderr) == (0, "")
    assert f"the store at {path} " in answer.text
    assert "ok generations 4: 2 finished, 1 aborted, 1 error" in answer.text
    assert "lost" not in answer.text


def test_check_of_a_rollout_counts_its_generations(said: Any) -> None:
    answer = said([generation(1), generation(2, status="aborted"), generation(11)], [], "--rollout", "rollout-0")

    assert answer.status == 0
    assert "ok rollout 2: 1 finished, 1 aborted" in answer.text
    assert "ok generations 3: 2 finished, 1 aborted" in answer.text


@pytest.mark.parametrize("arguments", [(), ("--rollout", "rollout-0")])
def test_rollout_that_no_call_named_is_reported_without_calls(said: Any, arguments: tuple[str, ...]) -> None:
    answer = said([], [], *arguments)

    assert answer.status == 1
    assert NEVER_CALLED in answer.text
    assert "is this the store that AGL_STORE names where the server runs" in answer.text
    assert ("problem rollout 'rollout-0': no recorded call names this rollout or any other" in answer.text) == bool(
        arguments
    )


def test_calls_that_name_no_rollout_are_pointed_out(said: Any) -> None:
    unnamed = [generation(number, rollout_id=None) for number in range(3)]

    answer = said([*unnamed, generation(30)], [], "--rollout", "rollout-0")

    assert answer.status == 1
    assert "problem rollout 'rollout-0': no recorded call names this rollout; some calls name none" in answer.text
    assert HOW_TO_NAME_IT in answer.text
    assert "note no rollout 3 of them belong to no rollout" in answer.text


@pytest.mark.parametrize(
    ("via", "how", "cure"),
    [
        ("http", "over HTTP", HOW_TO_NAME_IT),
        ("router", "through a router or a proxy", "`agl doctor --url http://ROUTER` tries each"),
        ("process", "from a program in vLLM's own process", "let the program name it"),
        ("grpc", "over gRPC", "make the request's id ROLLOUT"),
        ("engine", "from a frontend that is not instrumented", "send X-Request-Id: ROLLOUT"),
        (None, "in a way that an older version did not record", HOW_TO_NAME_IT),
    ],
)
def test_calls_without_a_rollout_are_told_apart_by_how_they_came(said: Any, via: Any, how: str, cure: str) -> None:
    unnamed = [generation(number, rollout_id=None, via=via) for number in range(3)]

    answer = said(
        [*unnamed, generation(30), generation(31, rollout_id=None, via="engine" if via != "engine" else "http")], []
    )

    assert answer.status == 0
    assert f"note no rollout 3 of them belong to no rollout: their calls came {how}" in answer.text
    assert "note no rollout 1 of them belong to no rollout" in answer.text
    assert cure in answer.text


def test_calls_of_other_rollouts_are_pointed_out(said: Any) -> None:
    answer = said([generation(1)], [], "--rollout", "ROLLOUT-0")

    assert answer.status == 1
    assert "'ROLLOUT-0': no recorded call names this rollout; other rollouts have calls" in answer.text
    assert "compare its id with the one in the agent's base URL or headers" in answer.text


def test_rollout_in_the_queue_is_reported_as_waiting(said: Any, path: Path) -> None:
    database = open_database(str(path))
    with database.writing() as connection:
        [waiting] = lifecycle.enqueue(connection, [NewRollout(1)])
    database.close()

    answer = said([generation(1, rollout_id=None)], [], "--rollout", waiting)

    assert answer.status == 1
    assert f"problem rollout '{waiting}': it is waiting in the queue" in answer.text
    assert "check that a runner is running, and that it asks this store" in answer.text


def test_rollout_whose_client_hung_up_is_reported_as_aborted(said: Any) -> None:
    answer = said([generation(1, status="aborted"), generation(2, status="error")], [], "--rollout", "rollout-0")

    assert answer.status == 1
    assert "problem rollout 'rollout-0': none of its calls finished (1 aborted, 1 error): the client" in answer.text
    assert "look at the client's timeout, and at the server's log" in answer.text


def test_a_rollout_whose_calls_were_dropped_is_a_problem(said: Any) -> None:
    losses = [loss(30, "queue full"), loss(12, "queue full"), loss(1, "not built: KeyError('x')")]

    answer = said([], losses, "--rollout", "rollout-0")

    assert answer.status == 1
    assert "problem rollout 'rollout-0': no recorded call names this rollout; some calls were lost" in answer.text
    assert "problem lost 42 could not be kept, the last at 2026-09-21 14:13:20+00:00: queue full" in answer.text
    assert "give the store a faster disk, or the server a larger AGL_QUEUE_MB" in answer.text
    assert "problem lost 1 could not be kept, the last at 2026-09-21 14:13:20+00:00: not built" in answer.text
    assert NEVER_CALLED not in answer.text


def test_what_was_lost_is_a_note_where_the_rest_was_kept(said: Any) -> None:
    answer = said([generation(1)], [loss(1, "stopped: the process ended before they were written")])

    assert answer.status == 0
    assert "note lost 1 could not be kept" in answer.text


def test_a_store_without_rollouts_says_so(said: Any) -> None:
    answer = said([generation(1, rollout_id=None)], [])

    assert answer.status == 0
    assert (
        "note no rollout all of them belong to no rollout: their calls came in a way that an older version did not "
        f"record, and named none -> {HOW_TO_NAME_IT}" in answer.text
    )


def test_a_store_that_is_not_there_is_a_problem_and_is_not_made(path: Path) -> None:
    answer = doctor_elsewhere("--store", str(path))

    assert answer.status == 1
    assert f"problem store {path} cannot be opened: No such file or directory -> check the path" in answer.text
    assert not path.exists()


def test_file_that_is_no_store_is_a_problem(path: Path) -> None:
    path.write_text("a text " * 1000)

    answer = doctor_elsewhere("--store", str(path))

    assert answer.status == 1
    assert f"problem store {path} is not a SQLite file, or is damaged" in answer.text
    assert "-> give the path of another file" in answer.text


def test_no_password_is_shown(pristine: Environment) -> None:
    answer = doctor(pristine, "--store", "postgresql://me:secret@host/db")

    assert answer.status == 1
    assert "the store at postgresql://***@host/db" in answer.text
    assert "secret" not in answer.stdout


def test_json_has_the_counts(said: Any) -> None:
    answer = said(
        [generation(1, rollout_id=None), generation(11)], [loss(3, "queue full")], "--rollout", "x'", "--json"
    )

    assert answer.status == 1
    assert answer.json.keys() == {"ok", "findings", "store"}
    assert answer.json["store"] == {
        "generations": {"finished": 2, "aborted": 0, "error": 0},
        "without_rollout": 1,
        "without_rollout_by_way": {"unknown": 1},
        "lost": {"queue full": {"count": 3, "last_at": START}},
        "rollout_id": "x'",
        "of_rollout": {"finished": 0, "aborted": 0, "error": 0},
        "status": None,
    }


def test_json_of_a_store_that_is_not_there_is_a_problem(path: Path) -> None:
    answer = doctor_elsewhere("--store", str(path), "--json")

    assert answer.status == 1
    assert answer.json["store"] == {}
    assert [finding["mark"] for finding in answer.json["findings"]] == ["problem"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("--rollout", "x"), "--rollout needs --store"), (("--store", "a.db", "--url", "x"), "--url")],
)
def test_options_that_contradict_each_other_exit_with_status_2(
    pristine: Environment, arguments: tuple[str, ...], reason: str
) -> None:
    answer = doctor(pristine, *arguments)

    assert (answer.status, answer.stdout) == (2, "")
    assert reason in answer.stderr
