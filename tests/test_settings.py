"""The settings of recording, as a server reads them."""

from __future__ import annotations

import logging

import pytest

from agentlightning import settings

pytestmark = pytest.mark.tier("check")


@pytest.fixture(autouse=True)
def _not_warned_yet() -> None:
    settings._validated.cache_clear()


@pytest.mark.parametrize(
    "value",
    [
        "/data/Runs/A.db",
        " runs/a b?.db ",
        "sqlite:///runs/a.db",
        "sqlite:////Data/A.db",
        "postgresql://me:Secret@Host/Runs",
        "postgresql:///Runs",
        "http://host:4747",
        "https://agl:Key@host/Path",
        "http://[::1]:4747",
    ],
)
def test_a_store_is_a_path_or_a_url_and_keeps_its_case(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AGL_STORE", value)

    assert settings.store() == value.strip()


@pytest.mark.parametrize("value", [None, "", "  "])
def test_nothing_is_recorded_without_a_store(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("AGL_STORE", raising=False)
    else:
        monkeypatch.setenv("AGL_STORE", value)

    assert settings.store() is None


@pytest.mark.parametrize(
    "value",
    [
        "mysql://me:secret@host/db",
        "ftp://me:se/cr@et@host",
        "sqlite://",
        "sqlite:///",
        "postgresql://",
        "http://",
        "https:///path",
    ],
)
def test_an_invalid_store_is_one_warning_without_its_password(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv("AGL_STORE", value)

    assert [settings.store(), settings.store()] == [None, None]
    (message,) = caplog.messages
    assert "neither the path of a file nor sqlite:///PATH, postgresql://HOST/NAME or http(s)://HOST:PORT; " in message
    assert message.endswith("it is ignored")
    assert "secret" not in message
    assert "cr@et" not in message


@pytest.mark.parametrize(
    ("value", "recorded"), [("", True), ("on", True), ("TRUE", True), ("off", False), ("No", False), ("0", False)]
)
def test_text_is_recorded_unless_switched_off(monkeypatch: pytest.MonkeyPatch, value: str, recorded: bool) -> None:
    monkeypatch.setenv("AGL_RECORD_TEXT", value)

    assert settings.record_text() is recorded


@pytest.mark.parametrize(("value", "recorded"), [("", False), ("On", True), ("1", True), ("off", False)])
def test_logprobs_are_recorded_only_when_switched_on(
    monkeypatch: pytest.MonkeyPatch, value: str, recorded: bool
) -> None:
    monkeypatch.setenv("AGL_LOGPROBS", value)

    assert settings.logprobs() is recorded


@pytest.mark.parametrize(("value", "recorded"), [("", False), ("On", True), ("1", True), ("off", False)])
def test_an_offline_model_is_recorded_only_when_switched_on(
    monkeypatch: pytest.MonkeyPatch, value: str, recorded: bool
) -> None:
    monkeypatch.setenv("AGL_RECORD_OFFLINE", value)

    assert settings.record_offline() is recorded


@pytest.mark.parametrize(("value", "mebibytes"), [("", 256), ("1", 1), (" 064 ", 64), ("4096", 4096)])
def test_the_queue_is_bounded_in_mebibytes(monkeypatch: pytest.MonkeyPatch, value: str, mebibytes: int) -> None:
    monkeypatch.setenv("AGL_QUEUE_MB", value)

    assert settings.queue_bytes() == mebibytes * 1024 * 1024


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "lots", "1e3", "٣", "99999999"])
def test_an_invalid_queue_size_counts_as_the_default_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv("AGL_QUEUE_MB", value)

    with caplog.at_level(logging.WARNING):
        assert [settings.queue_bytes(), settings.queue_bytes()] == [256 << 20, 256 << 20]

    (message,) = caplog.messages
    assert f"AGL_QUEUE_MB={value!r} is not a whole number from 1 to 9999999; the default '256' is used" in message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/data/a?b@c.db", "/data/a?b@c.db"),
        ("sqlite:////data/a.db", "sqlite:////data/a.db"),
        ("postgresql://me:secret@host:5432/db?password=secret", "postgresql://***@host:5432/db"),
        ("https://key@host/v1", "https://***@host/v1"),
    ],
)
def test_a_store_is_shown_without_secrets(url: str, shown: str) -> None:
    assert settings.without_secrets(url) == shown
