"""Ways to start Python: ours, and those of our peers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Configuration:
    """One way to start Python.

    Attributes:
        label: what the tables call it; the version of its first requirement is put after the first word.
        venv: the environment it starts in; two configurations may share one.
        requires: what pip installs there.
        command: what stands where `python` does; a name that is in the environment's bin is taken from there.
        env: set on top of a bare environment, so that nothing of this shell is measured.
        sitecustomize: the text of that module, if there is to be one.
        check: an expression that is true in a process that starts like this, lest something else be measured.
        slow: three times as slow as a clean start, and more: measured in fewer rounds, and not counted.
    """

    label: str
    venv: str
    requires: tuple[str, ...] = ()
    command: tuple[str, ...] = ("python",)
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    sitecustomize: str = ""
    check: str = "True"
    slow: bool = False


def has_finder(package: str) -> str:
    """The check that a finder of this package is on `sys.meta_path`."""
    return f"any(type(finder).__module__.split('.')[0] == {package!r} for finder in sys.meta_path)"


OURS = "agentlightning"
OUR_FINDER = "_agentlightning"
"""The module that the `.pth` file imports, beside the package."""
CLEAN = Configuration("clean", "clean", check="len(sys.meta_path) == 3")
CLEAN_AGAIN = Configuration("clean, a second environment", "clean-again", check=CLEAN.check)
OFF = Configuration(
    "agentlightning, off", OURS, (OURS,), check=f"{OUR_FINDER!r} not in sys.modules and __import__({OURS!r})"
)
ARMED = Configuration("agentlightning, armed", OURS, (OURS,), env={"AGL_INSTRUMENT": "1"}, check=has_finder(OUR_FINDER))
# Most of what ours needs is vLLM's already, and every start reads the names of all that is installed.
OFF_ALONE = Configuration("agentlightning, off, without what it needs", "alone", (OURS, "--no-deps"), check=OFF.check)
ARMED_ALONE = Configuration(
    "agentlightning, armed, without what it needs", "alone", OFF_ALONE.requires, env=ARMED.env, check=ARMED.check
)
WRAPT = Configuration(
    "wrapt, one hook in sitecustomize",
    "wrapt",
    ("wrapt",),
    sitecustomize='import wrapt\n\nwrapt.register_post_import_hook(lambda module: None, "vllm")\n',
    check=has_finder("wrapt"),
    slow=True,
)
DDTRACE = Configuration(
    "ddtrace-run",
    "ddtrace",
    ("ddtrace",),
    command=("ddtrace-run", "python"),
    # Without an agent they would only wait and complain, which is not what is compared.
    env={"DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", "DD_REMOTE_CONFIGURATION_ENABLED": "false"},
    check=has_finder("ddtrace"),
    slow=True,
)
NEWRELIC = Configuration(
    "newrelic-admin run-python",
    "newrelic",
    ("newrelic",),
    command=("newrelic-admin", "run-python"),
    env={"NEW_RELIC_DEVELOPER_MODE": "true"},  # without it or a key, newrelic does nothing; with it, nothing is sent
    check=has_finder("newrelic"),
    slow=True,
)
PEERS = (
    Configuration(
        "coverage, off",
        "coverage",
        ("coverage",),
        check="'coverage' not in sys.modules and "
        "__import__('glob').glob(sys.prefix + '/lib/python*/site-packages/*coverage*.pth')",
    ),
    Configuration("setuptools", "setuptools", ("setuptools",), check="'_distutils_hack' in sys.modules"),
    Configuration(
        "autowrapt, off",
        "autowrapt",
        ("autowrapt",),
        check="'autowrapt' in sys.modules and 'wrapt' not in sys.modules",
    ),
    Configuration(
        "autowrapt, on",
        "autowrapt",
        ("autowrapt",),
        env={"AUTOWRAPT_BOOTSTRAP": "nothing"},
        check="'wrapt' in sys.modules",
        slow=True,
    ),
    WRAPT,
    NEWRELIC,
    Configuration(
        "opentelemetry-instrument",
        "opentelemetry",
        ("opentelemetry-distro", "opentelemetry-instrumentation"),
        command=("opentelemetry-instrument", "python"),
        env={f"OTEL_{signal}_EXPORTER": "none" for signal in ("TRACES", "METRICS", "LOGS")},
        check="'opentelemetry.sdk' in sys.modules",
        slow=True,
    ),
    DDTRACE,
)
EVERY = (CLEAN, CLEAN_AGAIN, OFF, ARMED, OFF_ALONE, ARMED_ALONE, *PEERS)
