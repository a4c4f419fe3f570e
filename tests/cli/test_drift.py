"""`agl drift`: what it prints, as text and as JSON, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentlightning.cli import drift
from agentlightning.store import Store, open_store
from tests.drift.conversations import conversation, record

pytestmark = pytest.mark.tier("check")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store.db")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url) as store:
        yield store


def test_a_report_says_how_much_broke_why_where_and_what_to_do(
    store: Store, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store, *conversation("whole", "It is."), *conversation("broken", "It is.\n\n", 3))

    assert drift.main(["--store", url]) == 0

    printed = capsys.readouterr().out
    assert printed.startswith("4 calls in 2 conversations of 2 attempts; 1 broke (50.0%)\n")
    assert "rows: 4 before merging, 3 after, 2 if nothing had broken\n" in printed
    assert "      1 answer_end: white space, stop token or stop string at an answer's end\n" in printed
    assert "rollout broken, attempt a\n" in printed
    assert "message 2 (assistant)" in printed
    assert r'[201 "\n"]' in printed
    assert "remove its `trim`" in printed
    assert max(map(len, printed.splitlines())) < 200


def test_what_breaks_next_is_counted_too(store: Store, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    record(store, *conversation("r", "<think>\nSnow.\n</think>\n\nIt is.\n\nObservation:", stop=None))

    assert drift.main(["--store", url, "--brief"]) == 0

    *_, counted, title, behind = capsys.readouterr().out.splitlines()
    assert counted == "      1 reasoning: reasoning left out of the history"
    assert title == "once these are gone, what breaks the same prompts next:"
    assert behind == "      1 answer_end: white space, stop token or stop string at an answer's end"


def test_json_has_the_same_and_a_share_that_is_too_large_fails(
    store: Store, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store, *conversation("whole", "It is."), *conversation("broken", "It is.\n\n", 3))

    assert drift.main(["--store", url, "--json", "--fail-above", "50%"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["calls"], found["broken"], found["share_broken"]) == (4, 1, 0.5)
    assert found["causes"][0]["example"]["rollout_id"] == "broken"

    assert drift.main(["--store", url, "--brief", "--fail-above", "0.49"]) == 1
    assert capsys.readouterr().err == "agl drift: 50.0% of the conversations broke, more than 49.0%\n"


def test_filters_choose_a_rollout_a_model_and_a_time(
    store: Store, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store, *conversation("whole", "It is."), *conversation("broken", "It is.\n\n", 3, "other"))

    for options, counted in (
        (("--rollout", "broken"), "2 calls in 1 conversation of 1 attempt; 1 broke"),
        (("--rollout", "broken", "--attempt", "a"), "2 calls in 1 conversation of 1 attempt; 1 broke"),
        (("--model", "m"), "2 calls in 1 conversation of 1 attempt; 0 broke"),
        (("--since", "2000-01-01"), "4 calls in 2 conversations of 2 attempts; 1 broke"),
    ):
        assert drift.main(["--store", url, "--brief", *options]) == 0
        assert capsys.readouterr().out.startswith(counted)


def test_without_a_vocabulary_it_says_that_the_ids_alone_are_known(
    store: Store, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store, *conversation("broken", "It is.\n\n"), registered=False)

    assert drift.main(["--store", url]) == 0

    printed = capsys.readouterr().out
    assert "of 2 calls the ids alone are known, and no vocabulary: their breaks have no certain cause" in printed
    assert "      1 other: not known, 1 of them uncertain\n" in printed


def test_report_on_no_call_says_so(store: Store, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert drift.main(["--store", url]) == 1
    assert capsys.readouterr().err == "agl drift: 0 attempts: the store has no generations\n"

    record(store, *conversation("r", "It is."))
    assert drift.main(["--store", url, "--rollout", "none"]) == 1
    assert "0 attempts match --rollout none; the store has 2 generations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fail-above", "much"], "'much' is not a share; write it like 1%"),
        (["--fail-above", "101%"], "'101%' is not between 0% and 100%"),
        (["--since", "yesterday"], "'yesterday' is not a time; write it like 2026-11-24T10:30"),
    ],
)
def test_a_wrong_argument_is_explained(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        drift.main(["--store", "x.db", *arguments])

    assert says in capsys.readouterr().err
