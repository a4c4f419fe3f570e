"""Tests of our lines in a server's log: one when it starts, and warnings, each among vLLM's lines and in their form."""

from __future__ import annotations

import re
from pathlib import Path

from agentlightning import __version__, instrumentation
from tests.common.vllm import RemoteOpenAIServer
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer, until


def message(line: str, level: str, process: str = "APIServer(?:_0)?") -> str:
    """Return what a line says after all that each of vLLM's own lines begins with."""
    found = re.fullmatch(rf"\({process} pid=\d+\) {level} \d\d-\d\d \d\d:\d\d:\d\d \[\w+\.py:\d+\] (.*)", line)
    assert found, line
    return found[1]


def line_of_start(server: RemoteOpenAIServer) -> str:
    [line] = (line for line in server.our_lines if " INFO " in line)
    return line


def test_start_of_a_server_is_one_line(armed: RemoteOpenAIServer) -> None:
    # The scheduler is the engine core's, and a server has no offline engine.
    elsewhere = ("offline engine", "offline calls", "scheduler")
    applied = len(instrumentation.status()) - len(elsewhere)
    patched = f"{applied} patch sets applied, {len(elsewhere)} not used by this process ({', '.join(elsewhere)})"
    carried = "answers carry prompt and response ids"
    recorded = "nothing is recorded, since AGL_STORE is not set"

    said = message(line_of_start(armed), "INFO")

    on = rf"agentlightning: release {re.escape(__version__)} is on in vLLM \d+\.\d+\.\d+\S*"
    assert re.fullmatch(f"{on}; {re.escape(patched)}; {carried}; {recorded}", said), said


def test_start_of_a_strict_server_says_what_its_answers_carry(guarded: RemoteOpenAIServer) -> None:
    assert message(line_of_start(guarded), "INFO").split("; ")[2] == "answers carry response ids"


def test_start_of_several_api_servers_is_one_line(two_api_servers: RecordingServer) -> None:
    assert message(line_of_start(two_api_servers), "INFO", "ApiServer_0").endswith(
        f"; answers carry prompt and response ids; records to {two_api_servers.path}"
    )


REASON = (
    "/nonexist/x.db cannot be opened: No such file or directory, since there is no folder /nonexist: "
    "create the folder, or give the path of another file"
)


def test_store_that_cannot_be_used_is_a_warning(nursery: Nursery, tmp_path: Path) -> None:
    with nursery.server(tmp_path / "run.db", store="/nonexist/x.db") as server:
        warnings = [line for line in server.our_lines if " WARNING " in line]
        info = line_of_start(server)

    assert message(warnings[0], "WARNING") == (
        f"agentlightning: the store cannot be written, so generations wait in memory and are retried: {REASON}"
    )
    assert message(info, "INFO").endswith(f"; records once its store can be used: {REASON}")


def test_store_that_cannot_be_used_refuses_a_strict_server(nursery: Nursery, tmp_path: Path) -> None:
    server = nursery.server(tmp_path / "run.db", store="/nonexist/x.db", env={"AGL_INSTRUMENT": "strict"})
    server.start()
    try:
        until(lambda: server.process.poll() is not None, "the end")
        [line] = server.our_lines
    finally:
        server.stop()

    assert line == f"agentlightning: AGL_INSTRUMENT=strict refuses this server: nothing can be recorded: {REASON}"


def test_store_that_can_be_used_lets_a_strict_server_start(nursery: Nursery, tmp_path: Path) -> None:
    with nursery.server(tmp_path / "run.db", env={"AGL_INSTRUMENT": "strict"}) as server:
        [line] = server.our_lines

    assert message(line, "INFO").endswith(f"; records to {tmp_path / 'run.db'}")


def test_store_with_a_password_is_shown_without_it(nursery: Nursery, tmp_path: Path) -> None:
    url = "http://agl:s3cret@127.0.0.1:1"
    with nursery.server(tmp_path / "run.db", store=url) as server:
        lines = server.our_lines

    assert any("http://***@127.0.0.1:1 cannot be reached" in line for line in lines)
    assert "s3cret" not in "\n".join(lines)
