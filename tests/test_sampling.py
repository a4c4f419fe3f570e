"""Sampling parameters to pin, as text and as a rollout has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentlightning import settings
from agentlightning.errors import InvalidRecord
from agentlightning.rollout_records import Attempt, Rollout, RolloutConfig
from agentlightning.sampling import NEUTRAL, Policy, is_same, parse_pins, parse_policy, pins_for, text_of
from agentlightning.store import open_store

pytestmark = pytest.mark.tier("check")


def test_pins_are_written_as_they_are_read() -> None:
    text = "temperature=0.7,top_p=1,top_k=-1,min_p=0.05,repetition_penalty=1.1,presence_penalty=-2"

    pins = parse_pins(f" {text.replace(',', ' , ')} ")

    assert text_of(pins) == text
    assert parse_pins(text_of(pins)) == pins
    assert parse_pins("client") == {}
    assert text_of({}) == "client"
    assert parse_pins("top_k=0") == parse_pins("top_k=-1")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("temprature=1", "'temprature' is not one of temperature, top_p, top_k"),
        ("temperature", "'temperature' is not NAME=VALUE"),
        ("temperature=hot", "temperature=hot is not 0, or a number from 0.01 to 2"),
        ("temperature=nan", "temperature=nan is not 0"),
        ("temperature=0.001", "temperature=0.001 is not 0, or a number from 0.01"),
        ("temperature=1,temperature=1", "temperature is there twice"),
        ("top_p=0", "top_p=0.0 is not a number above 0, up to 1"),
        ("top_k=1.5", "top_k=1.5 is not a whole number"),
        ("top_k=2147483648", "top_k=2147483648.0 is not a whole number up to 2147483647"),
        ("n=2", "'n' is not one of"),
        ("max_tokens=2", "'max_tokens' is not one of"),
    ],
)
def test_an_unknown_name_or_value_is_named(monkeypatch: pytest.MonkeyPatch, value: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_policy(value)

    monkeypatch.setenv("AGL_SAMPLING", value)
    objection = settings.objection("AGL_SAMPLING")
    assert objection is not None
    assert objection.startswith(f"AGL_SAMPLING={value!r} is not valid: ")


def test_a_policy_is_off_reports_or_pins() -> None:
    assert [parse_policy(text).mode for text in ("off", "0", "Report", "rollout", "top_p=1")] == [
        *("off", "off", "report", "rollout", "pin")
    ]
    assert parse_policy("report").pins == NEUTRAL
    assert parse_policy("rollout").pins == {}
    assert str(parse_policy("top_p=1,temperature=1")) == "temperature=1,top_p=1"
    assert str(Policy()) == "off"


def rollout(sampling: Any, **fields: Any) -> Rollout:
    return Rollout("ro 1", {}, 0.0, config=RolloutConfig(sampling=sampling), **fields)


def test_a_rollout_sends_its_sampling_with_its_id() -> None:
    attempt = Attempt("ro 1", "at-1", 1, 0.0)
    pinned = rollout({"top_p": 0.9, "temperature": 0.6}, attempt=attempt)

    assert pinned.base_url("http://host") == (
        "http://host/rollout/ro%201/attempt/at-1/sampling/temperature=0.6,top_p=0.9/v1"
    )
    assert pinned.api_key("k") == "k@rollout=ro%201,attempt=at-1,sampling=temperature%3D0.6%2Ctop_p%3D0.9"
    assert rollout("client").base_url("http://host") == "http://host/rollout/ro%201/sampling/client/v1"
    assert rollout(None).base_url("http://host") == "http://host/rollout/ro%201/v1"
    with pytest.raises(ValueError, match="the sampling of rollout 'ro 1' is not valid: 'heat' is not one of"):
        rollout({"heat": 1}).base_url("http://host")


def test_sampling_may_depend_on_the_mode() -> None:
    by_mode = {"train": {"temperature": 1}, "val": "client"}

    assert [pins_for(by_mode, mode) for mode in ("train", "val", "test", None)] == [{"temperature": 1}, {}, None, None]
    assert rollout(by_mode, mode="val").base_url("http://host") == "http://host/rollout/ro%201/sampling/client/v1"
    assert rollout(by_mode, mode="test").base_url("http://host") == "http://host/rollout/ro%201/v1"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"heat": 1}, "'heat' is not one of temperature"),
        ({"top_k": 2**31}, "top_k=2147483648 is not a whole number up to 2147483647"),
        ({"temperature": 10**400}, "is not 0, or a number from 0.01 to 2"),
        ({"temperature": True}, "temperature=True is not 0"),
        ({"train": {"top_p": 0.9}, "temperature": 1}, "'temperature' stands beside modes"),
        ({"train": "client", "val": {"top_p": 9}}, "top_p=9 is not a number above 0"),
        ("mine", "'mine' is neither 'client' nor an object of parameters"),
    ],
)
def test_a_store_refuses_sampling_that_cannot_be_pinned(tmp_path: Path, wanted: Any, reason: str) -> None:
    with open_store(str(tmp_path / "store.db")) as store:
        queued = store.enqueue_rollout("a task")
        for refused in (
            lambda: store.enqueue_rollout("a task", config=RolloutConfig(sampling=wanted)),
            lambda: store.start_rollout("a task", config=RolloutConfig(sampling=wanted)),
            lambda: store.update_rollout(queued.rollout_id, config=RolloutConfig(sampling=wanted)),
            lambda: store.add_resources({"main": {"resource_type": "llm", "sampling": wanted}}),
        ):
            with pytest.raises(InvalidRecord, match=f"sampling: .*{reason}"):
                refused()


def test_a_config_without_sampling_is_that_of_a_lightning_store() -> None:
    assert "sampling" not in RolloutConfig().as_dict()
    assert RolloutConfig(sampling="client").as_dict()["sampling"] == "client"


def test_resources_pin_for_the_rollouts_that_use_them(tmp_path: Path) -> None:
    model = {"resource_type": "llm", "endpoint": "http://host/v1", "model": "m"}
    by_mode = {"train": {"temperature": 1}, "val": "client"}
    with open_store(str(tmp_path / "store.db")) as store:
        resources = store.add_resources({"main": {**model, "sampling": by_mode}})

        def path(mode: Any, **config: Any) -> str:
            rollout = store.enqueue_rollout(
                "a task", mode=mode, resources_id=resources.resources_id, config=RolloutConfig(**config)
            )
            assert store.get_rollout_by_id(rollout.rollout_id) == rollout
            return rollout.base_url("http://host").partition(rollout.rollout_id)[2]

        assert path("train") == "/sampling/temperature=1/v1"
        assert path("val") == "/sampling/client/v1"
        assert path(None) == "/v1"
        # The config comes first.
        assert path("train", sampling={"top_p": 0.9}) == "/sampling/top_p=0.9/v1"


@pytest.mark.parametrize(
    ("name", "value", "pinned", "expected"),
    [
        ("top_p", 0.8999999761581421, 0.9, True),  # 0.9 as float32
        ("top_p", 0.8999, 0.9, False),
        ("temperature", 1, 1.0, True),
        ("top_k", 0, -1, True),
        ("top_k", 2**31 - 1, 2**31 - 2, False),
    ],
)
def test_a_value_is_the_same_that_the_engine_cannot_tell_from_it(
    name: str, value: float, pinned: float, expected: bool
) -> None:
    assert is_same(name, value, pinned) is expected
