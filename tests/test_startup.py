"""The effect of `AGL_INSTRUMENT` on Python programs, with the package's `.pth` file installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from pydantic.fields import FieldInfo

import agentlightning
from agentlightning import importhook, instrumentation
from agentlightning._startup import start
from agentlightning.instrumentation import vllm
from agentlightning.instrumentation.vllm import _releases, continuation
from tests.common.made_up_vllm import PROMPT, RESPONSE, VERSION, Layout, made_up_vllm

pytestmark = pytest.mark.tier("check")
slow = pytest.mark.tier("test")

CHECKOUT = Path(__file__).parents[1]
SECONDS = 120

OFF = ["", "0", "false", "off", "no", "False", "OFF", "nO", "   ", " 0\t", " Off "]
ON = ["1", "true", "on", "yes", "strict", "True", "ON", "yEs", "STRICT", " 1 ", "\ton "]
NONSENSE = ["maybe", "2", " Enable "]

MODULES = "import sys; print(*sys.modules, sep='\\n')"
FINDERS = "import sys; print(sum(type(f).__module__ == '_agentlightning' for f in sys.meta_path))"

IMPORT_ALL = """\
import importlib, pkgutil, vllm
for module in pkgutil.walk_packages(vllm.__path__, "vllm."):
    if module.name != "vllm.grpc":  # Only what serves gRPC imports it.
        importlib.import_module(module.name)
"""
STATUS = """\
import json
from agentlightning import instrumentation
print(json.dumps({name: str(status) for name, status in instrumentation.status().items()}))
"""
ANSWERS = """\
import asyncio
from {chat} import ChatCompletionRequest, OpenAIServingChat
from {completions} import CompletionRequest, OpenAIServingCompletion
for create, request in (
    (OpenAIServingChat().create_chat_completion, ChatCompletionRequest()),
    (OpenAIServingCompletion().create_completion, CompletionRequest()),
):
    print(asyncio.run(create(request)).model_dump_json(exclude_none=True))
"""
SERVING: Mapping[Layout, Mapping[str, str]] = {
    "to 0.14": {
        "chat": "vllm.entrypoints.openai.serving_chat",
        "completions": "vllm.entrypoints.openai.serving_completion",
    },
    "from 0.15": {
        "chat": "vllm.entrypoints.openai.chat_completion.serving",
        "completions": "vllm.entrypoints.openai.completion.serving",
    },
    "from 0.29": {
        "chat": "vllm.entrypoints.openai.chat_completion.serving",
        "completions": "vllm.entrypoints.openai.completion.serving",
    },
    "from 0.33": {
        "chat": "vllm.entrypoints.openai.chat_completion.serving",
        "completions": "vllm.entrypoints.openai.completion.serving",
    },
}
CHAT = SERVING["from 0.15"]["chat"]
COMPLETIONS = SERVING["from 0.15"]["completions"]
GENERATOR = f"{COMPLETIONS}.OpenAIServingCompletion.completion_stream_generator"
CHAT_PROTOCOL = "vllm.entrypoints.openai.chat_completion.protocol"
API_SERVER = "vllm.entrypoints.openai.api_server"
LAUNCHER = "vllm.entrypoints.launcher"
SERVE_ARGUMENTS = "vllm.entrypoints.openai.cli_args"
START_UP_CHECK = "start-up check"
PATCH_SETS = tuple(instrumentation.status())

PLAIN_ANSWERS = [{"choices": [{"index": 0}]}] * 2
ANSWERS_WITH_IDS = [
    {
        "choices": [{"index": 0, "token_ids": RESPONSE}],
        "prompt_token_ids": PROMPT,
        "response_token_ids": [RESPONSE],
    },
    {
        "choices": [{"index": 0, "prompt_token_ids": PROMPT, "token_ids": RESPONSE}],
        "response_token_ids": [RESPONSE],
    },
]

all_can_be_patched = pytest.mark.skipif(
    "exclude_if" not in FieldInfo.__slots__, reason="pydantic before 2.12 cannot have the field on chat responses"
)


@dataclass(frozen=True)
class Output:
    """The output of a program that ended well."""

    stdout: list[str]
    stderr: list[str]


def python(*arguments: str | Path, instrument: str | None = None, path: Path | None = None) -> Output:
    """Run a Python program.

    Args:
        arguments: its command line.
        instrument: its `AGL_INSTRUMENT`, None for unset.
        path: the folder that it imports from before all others.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "PYTHON"))}
    variables = {"AGL_INSTRUMENT": instrument, "PYTHONPATH": None if path is None else str(path)}
    try:
        result = subprocess.run(
            [sys.executable, *arguments],
            env=inherited | {name: value for name, value in variables.items() if value is not None},
            # Not the checkout, which `-c` would import from.
            cwd=sys.prefix,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as hung:
        pytest.fail(f"the program does not end; it said {hung.stderr!r}")
    assert result.returncode == 0, result.stderr
    return Output(result.stdout.splitlines(), result.stderr.splitlines())


def answers(layout: Layout = "from 0.15") -> str:
    return ANSWERS.format(**SERVING[layout])


def unpatched(patch_set: str, reason: str) -> str:
    """Return the warning that a patch set is not applied."""
    return f"agentlightning: {patch_set} is not patched: {reason}"


@pytest.mark.parametrize("value", [None, *OFF])
def test_off_imports_nothing_of_the_package(value: str | None) -> None:
    output = python("-c", MODULES, instrument=value)

    assert [module for module in output.stdout if "agentlightning" in module] == []
    assert output.stderr == []


@slow
@pytest.mark.parametrize("value", [None, "0", " OFF "])
def test_off_leaves_vllm_unpatched(value: str | None, tmp_path: Path) -> None:
    made_up_vllm(tmp_path)

    output = python("-c", answers(), instrument=value, path=tmp_path)

    assert list(map(json.loads, output.stdout)) == PLAIN_ANSWERS
    assert output.stderr == []


@pytest.mark.parametrize("value", ON)
def test_on_arms_the_interpreter_once_and_prints_nothing(value: str) -> None:
    assert python("-c", FINDERS, instrument=value) == Output(["1"], [])


@pytest.mark.parametrize("option", ["-I", "-E", "-s"])
def test_an_interpreter_that_is_cut_off_from_its_surroundings_is_armed(option: str) -> None:
    assert python(option, "-c", FINDERS, instrument="1") == Output(["1"], [])


def test_an_armed_interpreter_has_only_our_modules_in_addition() -> None:
    plain = python("-c", MODULES)
    armed = python("-c", MODULES, instrument="1")

    more = set(armed.stdout) ^ set(plain.stdout)
    assert more == {"_agentlightning"}
    assert armed.stderr == []


def test_arming_imports_only_our_modules_where_no_other_startup_file_has_run() -> None:
    package = Path(agentlightning.__file__).parents[1]
    # `os` is what the .pth file's own line imports.
    code = "import os, sys; before = {*sys.modules}; import _agentlightning; "

    output = python("-S", "-c", f"{code}print(*{{*sys.modules}} - before)", instrument="1", path=package)

    assert output.stdout == ["_agentlightning"]


@slow
@pytest.mark.parametrize("before", ["pass", "importlib.util.find_spec('vllm')", "import vllm"])
@pytest.mark.parametrize("after", ["pass", "import vllm"])
def test_starting_again_adds_nothing(before: str, after: str, tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    start_again = f"import importlib.util\n{before}\nfrom agentlightning._startup import start\nstart()\n{after}\n"

    assert python("-c", start_again + FINDERS, instrument="1", path=tmp_path) == Output(["1"], [])


def let_arming_fail(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setenv("AGL_INSTRUMENT", "1")
    monkeypatch.setattr(importhook, "when_imported", fail)
    # Imported already, so that the hook is set at once.
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))


@pytest.mark.forked
@pytest.mark.parametrize("error", [MemoryError(), ImportError("no\nimport")])
def test_an_error_while_arming_is_one_line_on_stderr(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    let_arming_fail(error, monkeypatch)

    start()

    assert capsys.readouterr() == ("", f"agentlightning: not armed: {error!r}\n")


@pytest.mark.forked
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_exit_while_arming_ends_the_process(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    let_arming_fail(error, monkeypatch)

    with pytest.raises(type(error)):
        start()


@pytest.mark.forked
def test_strict_refuses_where_arming_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    let_arming_fail(ImportError("no import"), monkeypatch)
    monkeypatch.setenv("AGL_INSTRUMENT", "strict")

    with pytest.raises(SystemExit, match="AGL_INSTRUMENT=strict refuses this vLLM: ImportError"):
        start()


def test_strict_refuses_where_vllm_calls_us_as_its_plugin_after_it_was_imported(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    # Where no .pth file has run: the variable comes after Python's start.
    code = """\
import os
import vllm, vllm.grpc
from agentlightning._startup import start
os.environ["AGL_INSTRUMENT"] = "strict"
start()
print("serves")
"""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "PYTHON"))}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, "PYTHONPATH": str(tmp_path)},
        cwd=sys.prefix,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("agentlightning: AGL_INSTRUMENT=strict refuses this server: vLLM's gRPC server")


class Unwritable:
    """A stderr that cannot be written to, such as one on a full disk."""

    def write(self, text: str) -> int:
        raise OSError("no space left on device")


@pytest.mark.forked
@pytest.mark.parametrize("stderr", [None, Unwritable()], ids=["none", "unwritable"])
def test_an_error_while_arming_without_stderr_is_swallowed(stderr: object, monkeypatch: pytest.MonkeyPatch) -> None:
    let_arming_fail(ImportError(), monkeypatch)
    monkeypatch.setattr(sys, "stderr", stderr)

    start()


@pytest.mark.parametrize("value", NONSENSE)
def test_an_invalid_value_without_vllm_prints_nothing(value: str) -> None:
    assert python("-c", "print('done')", instrument=value) == Output(["done"], [])


@slow
@pytest.mark.parametrize("value", NONSENSE)
def test_an_invalid_value_with_vllm_is_one_warning_and_counts_as_off(value: str, tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    reload = "import importlib, vllm; importlib.reload(vllm)\n"

    output = python("-c", IMPORT_ALL + reload + answers(), instrument=value, path=tmp_path)

    assert list(map(json.loads, output.stdout)) == PLAIN_ANSWERS
    allowed = "1, true, on, yes, strict, 0, false, off, no"
    wrong = f"AGL_INSTRUMENT={value!r} is not one of {allowed}"
    assert output.stderr == [f"agentlightning: {wrong}; the default 'off' is used"]


@slow
@pytest.mark.parametrize("module", ["vllm", CHAT])
@pytest.mark.parametrize(
    "line", ["import a_library_that_is_missing", "raise ImportError('libcudart.so.12: not found')"]
)
def test_a_vllm_that_cannot_be_imported_raises_its_own_error(module: str, line: str, tmp_path: Path) -> None:
    code = f"""\
import importlib, sys
try:
    importlib.import_module({module!r})
except ImportError as error:
    print(repr(error), error.name)
print({module!r} in sys.modules)
"""
    begins = "__version__ = " if module == "vllm" else "class OpenAIServingChat"
    made_up_vllm(tmp_path, edits={begins: f"{line}\n{begins}"})

    plain = python("-c", code, path=tmp_path)
    armed = python("-c", code, instrument="1", path=tmp_path)

    assert plain.stdout[1] == "False"
    assert armed == plain


def python_with_a_leftover_pth(folder: Path, instrument: str | None) -> Output:
    """An interpreter that has our `.pth` file, but not our package."""
    shutil.copy(CHECKOUT / "agentlightning.pth", folder)
    return python(
        "-I", "-S", "-c", f"import site; site.addsitedir({str(folder)!r}); print('done')", instrument=instrument
    )


@pytest.mark.parametrize("value", [None, *OFF])
def test_a_pth_file_whose_package_is_gone_is_silent_while_off(value: str | None, tmp_path: Path) -> None:
    assert python_with_a_leftover_pth(tmp_path, value) == Output(["done"], [])


def test_a_pth_file_whose_package_is_gone_prints_one_error_while_on(tmp_path: Path) -> None:
    output = python_with_a_leftover_pth(tmp_path, "1")

    assert output.stdout == ["done"]
    assert "agentlightning.pth" in output.stderr[0]


@slow
@all_can_be_patched
@pytest.mark.parametrize("layout", SERVING)
@pytest.mark.parametrize("value", ["1", " Yes "])
def test_an_intact_vllm_answers_with_ids(value: str, layout: Layout, tmp_path: Path) -> None:
    made_up_vllm(tmp_path, layout)

    output = python("-c", answers(layout) + IMPORT_ALL + STATUS, instrument=value, path=tmp_path)

    *answered, status = map(json.loads, output.stdout)
    assert answered == ANSWERS_WITH_IDS
    assert status == dict.fromkeys(PATCH_SETS, "applied")
    assert output.stderr == []


def test_patch_sets_of_modules_not_imported_are_pending(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)

    output = python("-c", f"import {COMPLETIONS}\n{STATUS}", instrument="1", path=tmp_path)

    assert list(map(json.loads, output.stdout)) == [dict.fromkeys(PATCH_SETS, "pending") | {"completions": "applied"}]
    assert output.stderr == []


def test_names_imported_before_patching_see_the_patches(tmp_path: Path) -> None:
    code = f"""\
import asyncio
from {CHAT} import ChatCompletionRequest, OpenAIServingChat

class Subclass(OpenAIServingChat):
    pass

servers = [OpenAIServingChat(), Subclass()]
from agentlightning.instrumentation import instrument_vllm
instrument_vllm()
for server in servers:
    print(asyncio.run(server.create_chat_completion(ChatCompletionRequest())).model_dump_json(exclude_none=True))
"""
    made_up_vllm(tmp_path)

    output = python("-c", code, path=tmp_path)

    assert list(map(json.loads, output.stdout)) == [ANSWERS_WITH_IDS[0]] * 2
    assert output.stderr == []


CHILD = f"""\
def status_of_chat():
    import {CHAT}
    from agentlightning.instrumentation import status
    return str(status()["chat"])
"""
PARENT = """\
import multiprocessing, sys
from child import status_of_chat

if __name__ == "__main__":
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        print(pool.apply(status_of_chat), "vllm" in sys.modules)
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_child_is_armed(method: str, tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)

    assert python(tmp_path / "parent.py", method, instrument="1", path=tmp_path) == Output(["applied False"], [])


# It stops between two finders, where a thread that imports something may be stopped at any time.
SLOWLY = """\
import importlib, sys, threading

halfway = threading.Event()

class Slow(list):
    def __iter__(self):
        for finder in list(super().__iter__()):
            if threading.current_thread() is other and not halfway.is_set():
                halfway.set()
                threading.Event().wait(0.3)
            yield finder

other = threading.Thread(target=importlib.import_module, args=["agentlightning.instrumentation"], daemon=True)
sys.meta_path = Slow(sys.meta_path)
other.start()
halfway.wait()
import vllm
other.join()
"""


def test_a_thread_that_imports_our_modules_while_another_imports_vllm_stops_neither(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)

    output = python("-c", SLOWLY + answers(), instrument="1", path=tmp_path)

    assert list(map(json.loads, output.stdout)) == ANSWERS_WITH_IDS


HALFWAY = """\
import threading
from agentlightning.instrumentation import instrument_vllm

thread = threading.Thread(target=instrument_vllm, daemon=True)
thread.start()
thread.join(0.5)
"""


@slow
@pytest.mark.parametrize("value", [None, "1"])
def test_a_thread_that_instruments_vllm_while_another_imports_it_stops_neither(
    value: str | None, tmp_path: Path
) -> None:
    made_up_vllm(tmp_path, edits={"__version__ = ": "import halfway\n__version__ = "})
    (tmp_path / "halfway.py").write_text(HALFWAY)
    code = "import vllm, halfway\nhalfway.thread.join()\n"

    output = python("-c", code + answers(), instrument=value, path=tmp_path)

    assert list(map(json.loads, output.stdout)) == ANSWERS_WITH_IDS


def test_a_vllm_without_the_modules_works_and_each_patch_set_says_what_it_misses(tmp_path: Path) -> None:
    made_up_vllm(tmp_path, "bare")
    reasons = {
        patch_set.name: f"vLLM {VERSION} has no {' or '.join(patch_set.modules)}" for patch_set in vllm.PATCH_SETS
    }

    output = python("-c", f"import vllm\nprint(vllm.__version__)\n{STATUS}", instrument="1", path=tmp_path)

    version, status = output.stdout
    assert version == VERSION
    # Nobody has asked for these.
    switches = {**dict.fromkeys(continuation.PATCH_SETS, "AGL_CONTINUE"), "sampling": "AGL_SAMPLING"}
    unasked = {
        name: f"not for this release: {reasons.pop(name)}, and {switch} is off" for name, switch in switches.items()
    }
    failed = {patch_set: f"failed: {reason}" for patch_set, reason in reasons.items()}
    assert json.loads(status) == {**failed, **unasked}
    assert output.stderr == [unpatched(patch_set, reason) for patch_set, reason in reasons.items()]


@slow
@all_can_be_patched
def test_an_unknown_release_is_patched_and_named_once(tmp_path: Path) -> None:
    made_up_vllm(tmp_path, edits={VERSION: "1.2.3.post4+cpu"})
    # A process that vLLM starts imports it too.
    code = "import multiprocessing\nif __name__ == '__main__':\n    import vllm\n"
    spawn = "    process = multiprocessing.get_context('spawn').Process(target=exec, args=('import vllm',))\n"
    (tmp_path / "program.py").write_text(f"{code}{spawn}    process.start(); process.join()\n")

    started = python(str(tmp_path / "program.py"), instrument="1", path=tmp_path)
    answered = python("-c", answers(), instrument="1", path=tmp_path)

    newer = f"vLLM 1.2.3.post4+cpu is newer than any release known here ({VERSION}); what can be found in it is patched"
    assert started.stderr == [f"agentlightning: {newer}"]
    assert list(map(json.loads, answered.stdout)) == ANSWERS_WITH_IDS


@pytest.mark.parametrize(
    ("version", "older"),
    [
        ("0.12.0", True),
        ("0.8.5.post2", True),
        ("0.10.2.post2+cpu", True),
        ("0.13.0", False),
        ("0.13.0rc1", False),
        ("1.0.0", False),
        ("0.1.dev9234+g1a2b3c", False),
        ("dev", False),
        ("0.0.0", False),
    ],
)
def test_a_version_that_is_not_a_release_is_never_older(version: str, older: bool) -> None:
    assert _releases.is_before(version, "0.13.0") is older


@slow
@all_can_be_patched
@pytest.mark.parametrize(
    ("old", "new", "patch_set", "reason"),
    [
        ("create_chat_completion", "chat", "chat", f"{CHAT} has no OpenAIServingChat.create_chat_completion"),
        (
            "create_chat_completion(self, request,",
            "create_chat_completion(self, body,",
            "chat",
            f"{CHAT}.OpenAIServingChat.create_chat_completion(self, body, raw_request=None) does not take request",
        ),
        (
            "    async def create_chat_completion",
            "    @staticmethod\n    async def create_chat_completion",
            "chat",
            f"{CHAT}.OpenAIServingChat.create_chat_completion is not a method but staticmethod",
        ),
        ("class OpenAIServingChat:", "class ChatServing:", "chat", f"{CHAT} has no class OpenAIServingChat"),
        ("ChatCompletionRequest", "ChatRequest", "chat", f"{CHAT} has no model ChatCompletionRequest"),
        (
            "ChatCompletionResponse",
            "ChatResponse",
            "chat response",
            f"{CHAT_PROTOCOL} has no model ChatCompletionResponse",
        ),
        (
            "create_completion",
            "complete",
            "completions",
            f"{COMPLETIONS} has no OpenAIServingCompletion.create_completion",
        ),
        (
            "request_output_to_completion_response",
            "to_response",
            "completions",
            f"{COMPLETIONS} has no OpenAIServingCompletion.request_output_to_completion_response",
        ),
        (
            "completion_stream_generator(self, request, result_generator)",
            "completion_stream_generator(self, query, results)",
            "completions",
            f"{GENERATOR}(self, query, results) does not take request, result_generator",
        ),
        (
            "return_token_ids: bool | None = None\n\nclass Chat",
            "another_field: bool | None = None\n\nclass Chat",
            "chat",
            # They would be taken from the engine's results, as in releases before 0.10.2.
            f"{CHAT} has no OpenAIServingChat.chat_completion_full_generator",
        ),
        ("build_app", "build_application", "status route", f"{API_SERVER} has no build_app"),
        ("serve_http", "serve_app", "server", f"{LAUNCHER} has no serve_http"),
        (
            "serve_http(app, sock,",
            "serve_http(application, sock,",
            "server",
            f"{LAUNCHER}.serve_http(application, sock, **uvicorn_kwargs) does not take app",
        ),
        (
            "def validate_parsed_serve_args(",
            "@staticmethod\ndef validate_parsed_serve_args(",
            START_UP_CHECK,
            f"{SERVE_ARGUMENTS}.validate_parsed_serve_args is not a function but staticmethod",
        ),
    ],
)
def test_a_changed_target_is_named_and_its_patch_set_unapplied(
    old: str, new: str, patch_set: str, reason: str, tmp_path: Path
) -> None:
    made_up_vllm(tmp_path, edits={old: new})

    output = python("-c", IMPORT_ALL + STATUS, instrument="1", path=tmp_path)

    applied = dict.fromkeys(PATCH_SETS, "applied")
    assert list(map(json.loads, output.stdout)) == [applied | {patch_set: f"failed: {reason}"}]
    assert output.stderr == [unpatched(patch_set, reason)]


@all_can_be_patched
def test_a_patch_set_not_for_a_release_is_skipped_and_only_the_status_says_so(tmp_path: Path) -> None:
    edits = {"choices: list[Chat": "response_token_ids: list[list[int]] | None = None\n    choices: list[Chat"}
    reason = "ChatCompletionResponse already has a field response_token_ids"
    made_up_vllm(tmp_path, edits=edits)

    output = python("-c", IMPORT_ALL + STATUS, instrument="1", path=tmp_path)

    applied = dict.fromkeys(PATCH_SETS, "applied")
    left_off = {"chat response": f"not for this release: {reason}"}
    assert list(map(json.loads, output.stdout)) == [applied | left_off]
    assert output.stderr == []


def test_strict_patches_as_on_does(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)

    output = python("-c", answers(), instrument="Strict", path=tmp_path)

    assert list(map(json.loads, output.stdout)) == ANSWERS_WITH_IDS
    assert output.stderr == []


def test_uninstrumenting_before_vllm_is_imported_leaves_it_alone(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    undo = "from agentlightning import instrumentation\ninstrumentation.uninstrument_all()\n"

    output = python("-c", undo + answers(), instrument="1", path=tmp_path)

    assert list(map(json.loads, output.stdout)) == PLAIN_ANSWERS


@pytest.mark.parametrize("module", ["agentlightning._startup", "agentlightning.importhook"])
def test_a_package_removed_since_the_start_leaves_vllm_unpatched_with_one_error(module: str, tmp_path: Path) -> None:
    made_up_vllm(tmp_path)
    gone = f"import sys\nsys.modules[{module!r}] = None\n"

    output = python("-c", gone + answers(), instrument="1", path=tmp_path)

    assert list(map(json.loads, output.stdout)) == PLAIN_ANSWERS
    (line,) = output.stderr
    assert line.startswith("agentlightning: vllm is left as it is, unpatched: ModuleNotFoundError")


HIDES_CHAT = """\
import sys
from importlib.machinery import PathFinder
class Hides:
    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.endswith("chat_completion.serving") else None
sys.meta_path.insert(0, Hides())
"""


def test_a_module_that_another_finder_hides_from_us_is_named_in_the_status(tmp_path: Path) -> None:
    made_up_vllm(tmp_path)

    output = python("-c", HIDES_CHAT + IMPORT_ALL + STATUS, instrument="1", path=tmp_path)

    reason = f"{CHAT} was imported past our import hook (finders ahead of it on sys.meta_path: "
    (status,) = map(json.loads, output.stdout)
    assert status["chat"].startswith(f"failed: {reason}")
    assert "Hides" in status["chat"]
    assert (status["chat response"], status["completions"]) == ("applied", "applied")


WILL_NOT_CHANGE = """\
class Sealed(type):
    def __setattr__(cls, name, value):
        if name == "completion_stream_generator":
            raise AttributeError("sealed")
        super().__setattr__(name, value)

class OpenAIServingCompletion(metaclass=Sealed):
"""


@slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("completion_stream_generator", "another_method"),
        ("request_output_to_completion_response", "another_method"),
        ("class OpenAIServingCompletion:\n", WILL_NOT_CHANGE),
    ],
    ids=["the last is missing", "one between is missing", "the last cannot be patched"],
)
def test_no_patch_set_is_applied_partly(old: str, new: str, tmp_path: Path) -> None:
    made_up_vllm(tmp_path, edits={old: new})

    output = python("-c", answers() + STATUS, instrument="1", path=tmp_path)

    _, completion, status = map(json.loads, output.stdout)
    assert completion == PLAIN_ANSWERS[1]
    assert status["completions"].startswith("failed: ")
    assert len(output.stderr) == 1
