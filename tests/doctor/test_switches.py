"""`agl doctor` on this shell's variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common.environments import Environment
from tests.doctor.command import doctor


@pytest.mark.parametrize(
    ("value", "said_of_it"),
    [
        (None, "note AGL_INSTRUMENT not set in this shell: `vllm serve` needs it, `agl vllm serve` sets it"),
        ("", "note AGL_INSTRUMENT not set in this shell: `vllm serve` needs it"),
        ("0", "note AGL_INSTRUMENT 0 in this shell: `vllm serve` needs it"),
        ("Off", "note AGL_INSTRUMENT off in this shell: `vllm serve` needs it"),
        ("1", "ok AGL_INSTRUMENT 1 "),
        (" Yes ", "ok AGL_INSTRUMENT yes "),
        ("STRICT", "ok AGL_INSTRUMENT strict "),
    ],
)
def test_the_variable_of_this_shell_says_whether_it_is_on(
    environment: Environment, value: str | None, said_of_it: str
) -> None:
    said = doctor(environment, "--quick", **({} if value is None else {"AGL_INSTRUMENT": value}))

    assert said.status == 0, said.stdout
    assert said_of_it in said.text


def test_patches_are_tried_as_if_it_were_on(environment: Environment) -> None:
    said = doctor(environment, AGL_INSTRUMENT="0")

    assert said.status == 0, said.stdout
    assert "ok chat applied" in said.text


@pytest.mark.parametrize(
    ("value", "said_of_it"),
    [
        ("all", "ok AGL_RETURN_TOKEN_IDS all "),
        ("Response", "ok AGL_RETURN_TOKEN_IDS response "),
        ("none", "note AGL_RETURN_TOKEN_IDS none: answers carry ids only where a request asks"),
    ],
)
def test_the_variable_says_which_ids_answers_carry(environment: Environment, value: str, said_of_it: str) -> None:
    said = doctor(environment, "--quick", AGL_RETURN_TOKEN_IDS=value)

    assert said.status == 0, said.stdout
    assert said_of_it in said.text


@pytest.mark.parametrize("variable", ["AGL_INSTRUMENT", "AGL_RETURN_TOKEN_IDS"])
def test_invalid_variable_is_a_problem(environment: Environment, variable: str) -> None:
    said = doctor(environment, "--quick", **{variable: "maybe"})

    assert said.status == 1
    assert f"problem {variable} {variable}='maybe' is not one of " in said.text
    assert f"-> set {variable} to one of these, or unset it" in said.text


@pytest.mark.parametrize(
    ("variable", "value", "said_of_it"),
    [
        ("AGL_STORE_KEY", "s3cret://Key", "ok AGL_STORE_KEY set"),
        ("AGL_LOGPROBS", "On", "ok AGL_LOGPROBS on"),
        ("AGL_RECORD_TEXT", "OFF", "ok AGL_RECORD_TEXT off"),
        ("AGL_RECORD_OFFLINE", "On", "ok AGL_RECORD_OFFLINE on"),
        ("AGL_QUEUE_MB", "64", "ok AGL_QUEUE_MB 64"),
        ("AGL_CONTINUE", "Report", "ok AGL_CONTINUE report"),
        ("AGL_CONTINUE_REASONING", "keep", "ok AGL_CONTINUE_REASONING keep"),
        ("AGL_CONTINUE_MB", "1", "ok AGL_CONTINUE_MB 1"),
    ],
)
def test_the_variables_say_what_is_recorded_and_continued(
    environment: Environment, variable: str, value: str, said_of_it: str
) -> None:
    said = doctor(environment, "--quick", **{variable: value})

    assert said.status == 0, said.stdout
    assert said_of_it in said.text
    assert "s3cret" not in said.stdout


@pytest.mark.parametrize(
    ("value", "said_of_it"),
    [
        ("on", "ok AGL_RECORD_OFFLINE on: what vLLM's LLM generates without a server is recorded"),
        ("", "note AGL_RECORD_OFFLINE off: what vLLM's LLM generates without a server is not recorded"),
    ],
)
def test_the_variable_says_whether_an_offline_model_is_recorded(
    environment: Environment, tmp_path: Path, value: str, said_of_it: str
) -> None:
    said = doctor(environment, "--quick", AGL_STORE=str(tmp_path / "run.db"), AGL_RECORD_OFFLINE=value)

    assert said_of_it in said.text


@pytest.mark.parametrize(
    ("variable", "value", "said_of_it"),
    [
        (
            "AGL_STORE",
            "mysql://me:secret@host/runs",
            "AGL_STORE='mysql://***@host/runs' is neither the path of a file nor sqlite:///PATH, postgresql://HOST/NAME",
        ),
        (
            "AGL_QUEUE_MB",
            "lots",
            "AGL_QUEUE_MB='lots' is not a whole number from 1 to 9999999; the default '256' is used",
        ),
    ],
)
def test_invalid_recording_variable_is_a_problem_and_no_password_is_shown(
    environment: Environment, variable: str, value: str, said_of_it: str
) -> None:
    said = doctor(environment, "--quick", **{variable: value})

    assert said.status == 1
    assert f"problem {variable} {said_of_it}" in said.text
    assert f"-> correct or unset {variable}" in said.text
    assert "secret" not in said.stdout
