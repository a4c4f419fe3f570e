"""`AGL_INSTRUMENT=strict`: a server that would not be all it was asked to be says why, and does not start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from agentlightning import instrumentation
from agentlightning.instrumentation.vllm import continuation, sampling
from tests.common.made_up_vllm import VERSION, Layout, made_up_vllm
from tests.common.rust_frontend import rust_frontend
from tests.common.tiny_model import tiny_model
from tests.common.vllm import run, without_agl

pytestmark = pytest.mark.skipif(
    "exclude_if" not in FieldInfo.__slots__, reason="pydantic before 2.12 cannot have the field on chat responses"
)

REFUSAL = "agentlightning: AGL_INSTRUMENT=strict refuses this server: "
OPENAI = "vllm.entrypoints.openai"
CHAT = f"{OPENAI}.chat_completion.serving"
COMPLETIONS = f"{OPENAI}.completion.serving"
CREATE_COMPLETION = f"{COMPLETIONS}.OpenAIServingCompletion.create_completion"
V0 = (
    "vLLM's V0 engine answers (VLLM_USE_V1=0, or what V1 of this release cannot do): only chat and completions carry "
    "ids, and nothing is recorded"
)
GRPC = "vLLM's gRPC server (--grpc) has its own protocol, so its answers stay unchanged"
RUST = (
    "vLLM's Rust frontend (VLLM_USE_RUST_FRONTEND) answers without Python, "
    'with token ids only where a request says "return_token_ids": true'
)

VLLM_SERVE = ("-m", "vllm.entrypoints.cli.main", "serve")
API_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
SECONDS = 30

# Both are for a sitecustomize.py, which Python runs after our .pth file.
FINDER_AHEAD = """\
import sys
from importlib.machinery import PathFinder

class Theirs:
    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name == "{module}" else None

sys.meta_path.insert(0, Theirs())
"""
EDITED = """\
import sys
from importlib.machinery import PathFinder, SourceFileLoader

class Edited(SourceFileLoader):
    def get_code(self, name):
        return compile(self.get_data(self.path).replace(b"{old}", b"{new}"), self.path, "exec")

class Edits:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            spec = PathFinder.find_spec(name, path, target)
            spec.loader = Edited(name, spec.origin)
            return spec

sys.meta_path.insert(sys.meta_path.index(PathFinder), Edits())
"""


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program with the made-up vLLM in `folder`."""
    inherited = {name: value for name, value in without_agl(os.environ).items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"AGL_INSTRUMENT": "strict", "PYTHONPATH": str(folder)} | variables,
        # Not the checkout, which `-c` and `-m` would import from.
        cwd=sys.prefix,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def reasons(refused: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the reasons of a refused server: one sentence, the last line on stderr."""
    assert refused.returncode == 1, refused.stderr
    assert "served" not in refused.stdout
    assert "Traceback" not in refused.stderr
    (sentence,) = (line for line in refused.stderr.splitlines() if line.startswith(REFUSAL))
    assert refused.stderr.endswith(f"{sentence}\n")
    return sentence.removeprefix(REFUSAL).split("; ")


@pytest.mark.parametrize("layout", ["to 0.14", "from 0.15", "from 0.29", "from 0.33"])
@pytest.mark.parametrize("way", [VLLM_SERVE, API_SERVER], ids=["vllm serve", "python -m"])
def test_a_completely_patched_server_serves(way: tuple[str, ...], layout: Layout, tmp_path: Path) -> None:
    made_up_vllm(tmp_path, layout)

    served = python(tmp_path, *way)

    assert (served.returncode, served.stdout, served.stderr) == (0, "validated\nserved\n", "")


@pytest.mark.parametrize("layout", ["to 0.14", "from 0.15", "from 0.29", "from 0.33"])
@pytest.mark.parametrize("way", [VLLM_SERVE, API_SERVER], ids=["vllm serve", "python -m"])
def test_a_missing_target_refuses_every_way_to_start(way: tuple[str, ...], layout: Layout, tmp_path: Path) -> None:
    made_up_vllm(tmp_path, layout, {"create_chat_completion": "chat"})
    module = f"{OPENAI}.serving_chat" if layout == "to 0.14" else CHAT

    assert reasons(python(tmp_path, *way)) == [f"chat: {module} has no OpenAIServingChat.create_chat_completion"]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (
            {"create_completion(self, request,": "create_completion(self, body,"},
            [f"completions: {CREATE_COMPLETION}(self, body, raw_request=None) does not take request"],
        ),
        (
            {"return_token_ids:": "another_field:"},
            # They are taken from the engine's results then, which are nowhere here.
            [f"chat: {CHAT} has no OpenAIServingChat.chat_completion_full_generator"],
        ),
        ({"build_app": "build"}, [f"status route: {OPENAI}.api_server has no build_app"]),
        ({"serve_http": "serve_app"}, ["server: vllm.entrypoints.launcher has no serve_http"]),
        (
            {"validate_parsed_serve_args": "validate_args"},
            [f"start-up check: {OPENAI}.cli_args has no validate_parsed_serve_args"],
        ),
        (
            {
                "import AsyncLLM as": "import AsyncLLMEngine as",
                "vllm.v1.engine.async_llm": "vllm.engine.async_llm_engine",
            },
            [V0],
        ),
    ],
    ids=[
        "other parameters",
        "no return_token_ids",
        "nowhere for the status route",
        "nowhere to judge a server",
        "nowhere to judge the arguments",
        "the V0 engine",
    ],
)
def test_each_broken_target_is_named(edits: Mapping[str, str], expected: list[str], tmp_path: Path) -> None:
    made_up_vllm(tmp_path, edits=edits)

    assert reasons(python(tmp_path, *VLLM_SERVE)) == expected


def test_a_module_missing_from_the_release_is_named(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    (tmp_path / "vllm/entrypoints/openai/completion/serving.py").unlink()

    assert reasons(python(tmp_path, *VLLM_SERVE)) == [
        f"completions: vLLM {VERSION} has no {COMPLETIONS} or {OPENAI}.serving_completion"
    ]


def test_a_vllm_without_the_start_up_check_is_not_imported(tmp_path: Path) -> None:
    made_up_vllm(tmp_path, "bare")

    refused = reasons(python(tmp_path, "-c", "import vllm\nprint('served')"))

    named = [reason.partition(":")[0] for reason in refused]
    optional = (*continuation.PATCH_SETS, sampling.PATCH_SET)
    assert named == [name for name in instrumentation.status() if name not in optional]
    assert all(f"vLLM {VERSION} has no " in reason for reason in refused)


def test_a_release_without_what_agl_continue_needs_is_refused_only_where_it_is_asked_for(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    (tmp_path / "vllm/renderers/base.py").unlink()

    assert python(tmp_path, *VLLM_SERVE).returncode == 0
    assert reasons(python(tmp_path, *VLLM_SERVE, AGL_CONTINUE="on")) == [
        f"chat rendering: vLLM {VERSION} has no vllm.renderers.base or vllm.renderers.protocol"
    ]


def test_a_release_that_is_too_old_for_agl_continue_is_refused(tmp_path: Path) -> None:
    made_up_vllm(tmp_path, edits={VERSION: "0.13.0"})

    assert python(tmp_path, *VLLM_SERVE).returncode == 0
    assert reasons(python(tmp_path, *VLLM_SERVE, AGL_CONTINUE="report")) == ["continuation: came with vLLM 0.14.0"]


def test_a_release_in_which_sampling_cannot_be_pinned_is_refused_only_where_that_is_asked_for(tmp_path: Path) -> None:
    made_up_vllm(tmp_path, edits={"_verify_args": "_verify"})

    assert python(tmp_path, *VLLM_SERVE).returncode == 0
    for value in ("top_p=1", "report", "rollout"):
        assert reasons(python(tmp_path, *VLLM_SERVE, AGL_SAMPLING=value)) == [
            "sampling: vllm.sampling_params has no SamplingParams._verify_args"
        ]


@pytest.mark.parametrize("how", [VLLM_SERVE, API_SERVER], ids=["vllm serve", "api_server"])
def test_a_server_does_not_start_with_sampling_that_makes_no_sense(tmp_path: Path, how: tuple[str, ...]) -> None:
    made_up_vllm(tmp_path)

    ended = python(tmp_path, *how, AGL_INSTRUMENT="on", AGL_SAMPLING="temprature=1")

    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert (
        "agentlightning: this server does not start: AGL_SAMPLING='temprature=1' is not valid: 'temprature' is not one "
        "of temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty"
    ) in ended.stderr


def test_a_batch_is_not_run_with_sampling_that_makes_no_sense(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    run_batch = "-c", "from vllm.v1.engine.async_llm import AsyncLLM; AsyncLLM(None); print('ran')"

    for value, code in (("temprature=1", 1), ("temperature=1", 0)):
        ended = python(tmp_path, *run_batch, AGL_INSTRUMENT="on", AGL_SAMPLING=value)

        assert ended.returncode == code, ended.stderr
        assert "Traceback" not in ended.stderr
        assert ("this server does not start: AGL_SAMPLING='temprature=1'" in ended.stderr) == bool(code)
        assert ("ran" in ended.stdout) != bool(code)


def test_finder_that_hides_a_module_from_the_hook_is_named(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(FINDER_AHEAD.format(module=CHAT))

    (reason,) = reasons(python(tmp_path, *VLLM_SERVE))

    assert reason.startswith(f"chat: {CHAT} was imported past our import hook")
    assert "Theirs" in reason


@pytest.mark.parametrize(("argument", "rust", "reason"), [("--grpc", "0", GRPC), (None, "1", RUST)])
def test_a_frontend_without_python_is_refused(argument: str | None, rust: str, reason: str, tmp_path: Path) -> None:
    made_up_vllm(tmp_path)

    refused = python(tmp_path, *VLLM_SERVE, *filter(None, [argument]), VLLM_USE_RUST_FRONTEND=rust)

    assert reasons(refused) == [reason]


@pytest.mark.parametrize("way", [VLLM_SERVE, API_SERVER], ids=["vllm serve", "python -m"])
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"AGL_STORE": "/nonexist/x.db"}, "nothing can be recorded: /nonexist/x.db cannot be opened: "),
        ({"AGL_STORE": "mysql://me:secret@host/runs"}, "AGL_STORE='mysql://***@host/runs' is neither the path of a "),
        ({"AGL_RETURN_TOKEN_IDS": "some"}, "AGL_RETURN_TOKEN_IDS='some' is not one of all, response, none"),
    ],
    ids=["store that cannot be opened", "no store", "not a value"],
)
def test_a_server_that_could_not_do_what_its_variables_say_is_refused(
    variables: Mapping[str, str], reason: str, way: tuple[str, ...], tmp_path: Path
) -> None:
    made_up_vllm(tmp_path)

    [given] = reasons(python(tmp_path, *way, **variables))

    assert given.startswith(reason)


def test_a_headless_server_is_not_checked(tmp_path: Path) -> None:
    made_up_vllm(tmp_path, edits={"create_chat_completion": "chat"})

    headless = python(tmp_path, *VLLM_SERVE, "--headless", VLLM_USE_RUST_FRONTEND="1")

    assert (headless.returncode, headless.stdout, headless.stderr) == (0, "validated\n", "")


def test_the_rust_frontend_is_refused_only_for_vllm_serve(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)

    served = python(tmp_path, *API_SERVER, VLLM_USE_RUST_FRONTEND="1")

    assert (served.returncode, served.stdout, served.stderr) == (0, "validated\nserved\n", "")


@pytest.mark.parametrize(("argument", "rust", "reason"), [("--grpc", "0", GRPC), (None, "1", RUST)])
def test_a_frontend_without_python_is_one_warning_unless_strict(
    argument: str | None, rust: str, reason: str, tmp_path: Path
) -> None:
    made_up_vllm(tmp_path)
    variables = {"AGL_INSTRUMENT": "1", "VLLM_USE_RUST_FRONTEND": rust}

    served = python(tmp_path, *VLLM_SERVE, *filter(None, [argument]), **variables)

    assert (served.returncode, served.stdout) == (0, "validated\nserved\n")
    assert served.stderr == f"agentlightning: {reason}\n"


@pytest.mark.parametrize("layout", ["to 0.14", "from 0.29", "from 0.33"])
@pytest.mark.parametrize("call", ["run_server", "build_app"])
def test_a_program_without_a_command_line_is_checked_when_it_serves(call: str, layout: Layout, tmp_path: Path) -> None:
    made_up_vllm(tmp_path, layout, {"create_completion": "complete"})
    code = f"from vllm.entrypoints.openai.api_server import {call}\nprint('started')\n{call}(None)\nprint('served')"

    refused = python(tmp_path, "-c", code)

    [reason] = reasons(refused)
    assert reason.startswith("completions: ")
    assert reason.endswith(" has no OpenAIServingCompletion.create_completion")
    assert refused.stdout == "started\n"


def test_patches_that_a_release_does_not_need_refuse_nothing(tmp_path: Path) -> None:
    edits = {"choices: list[Chat": "response_token_ids: list[list[int]] | None = None\n    choices: list[Chat"}
    made_up_vllm(tmp_path, edits=edits)

    served = python(tmp_path, *VLLM_SERVE)

    assert (served.returncode, served.stdout) == (0, "validated\nserved\n")


def test_vllms_own_refusal_of_its_arguments_comes_first(tmp_path: Path) -> None:
    edits = {'    print("validated", flush=True)': '    raise ValueError("vLLM says no")'}
    made_up_vllm(tmp_path, edits={**edits, "create_chat_completion": "chat"})

    refused = python(tmp_path, *VLLM_SERVE)

    assert refused.stderr.endswith("ValueError: vLLM says no\n")
    assert REFUSAL not in refused.stderr


@pytest.mark.tier("all")
class TestTheRealVLLM:
    """The real vLLM is refused before it loads a model."""

    def test_all_reasons_are_in_one_sentence(self, tmp_path: Path) -> None:
        sabotage = EDITED.format(module=COMPLETIONS, old="def create_completion(", new="def complete(")
        (tmp_path / "sitecustomize.py").write_text(sabotage)
        frontend = {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(rust_frontend())}
        env = {"AGL_INSTRUMENT": "strict", "PYTHONPATH": str(tmp_path), **frontend}

        refused = run("vllm", "serve", str(tiny_model()), env=env)

        assert reasons(refused) == [
            RUST,
            f"completions: {COMPLETIONS} has no OpenAIServingCompletion.create_completion",
        ]

    def test_a_finder_ahead_is_refused_for_python_m(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text(FINDER_AHEAD.format(module=CHAT))
        env = {"AGL_INSTRUMENT": "strict", "PYTHONPATH": str(tmp_path)}

        (reason,) = reasons(run("python", *API_SERVER, "--model", str(tiny_model()), env=env))

        assert reason.startswith(f"chat: {CHAT} was imported past our import hook")
        assert "Theirs" in reason
