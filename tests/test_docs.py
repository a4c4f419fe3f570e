"""The documentation: its examples are well formed, and the real vLLM finds what it installs."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentlightning.drift import ABOUT, UNFIT
from agentlightning.settings import VARIABLES
from tests.common.environments import CHECKOUT, Environment, build, run, virtual_environment
from tests.common.tiers import TIERS, Tier

ENGLISH, CHINESE = CHECKOUT / "README.md", CHECKOUT / "README.zh.md"
PAGES = (ENGLISH, CHINESE, CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md")))

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ANY_FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LEVEL = re.compile(r"^(#+) ", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
COLUMN = re.compile(r"(?<!\\)\|")
LINK = re.compile(r"\]\(([^()\s]+)\)")

LOADED_BY_VLLM = """\
from vllm.plugins import load_general_plugins
load_general_plugins()
from agentlightning.instrumentation import status, vllm
vllm.import_targets()
print(vllm.__file__, *(found.state.value for found in status().values()))
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str


def blocks(*languages: str, pages: tuple[Path, ...] = PAGES) -> Iterator[Block]:
    for page in pages:
        text = page.read_text()
        for match in FENCED.finditer(text):
            if match[1] in languages:
                yield Block(page, text[: match.start()].count("\n") + 1, match[1], match[2])


def each_block(*languages: str) -> pytest.MarkDecorator:
    found = list(blocks(*languages))
    return pytest.mark.parametrize("block", found, ids=[f"{block.page.name}:{block.line}" for block in found])


def manifests(kind: str) -> list[dict[str, Any]]:
    documents = [document for block in blocks("yaml") for document in yaml.safe_load_all(block.text)]
    return [document for document in documents if document["kind"] == kind]


def variables(container: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def pods() -> list[dict[str, Any]]:
    return [deployment["spec"]["template"]["spec"] for deployment in manifests("Deployment")]


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def relative_links(page: Path) -> list[str]:
    return [link for link in LINK.findall(prose(page)) if "://" not in link]


def table_shapes(page: Path) -> list[list[int]]:
    """Count the columns of each row, table by table."""
    return [[len(COLUMN.findall(row)) - 1 for row in table.splitlines()] for table in TABLE.findall(prose(page))]


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    headings = HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheels"), "--wheel")


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volume that the command of the init container fills."""
    folder = tmp_path_factory.mktemp("agl")
    (container,) = (container for pod in pods() for container in pod.get("initContainers", ()))
    *shell, script = container["command"]
    for name, path in {"wheels": wheel.parent, "agl": folder}.items():
        script = script.replace(mounts(container)[name], str(path))
    run(*shell, script, PATH=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    return folder


@pytest.fixture(scope="module")
def with_vllm(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that sees the real vLLM and all that it needs, but none of this package."""
    visible, environment = tmp_path_factory.mktemp("visible"), virtual_environment(tmp_path_factory.mktemp("vllm"))
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if "agentlightning" not in entry.name:
                (visible / entry.name).symlink_to(entry)
    (environment.site_packages / "visible.pth").write_text(f"{visible}\n")
    return environment


@each_block("bash")
def test_each_shell_block_is_a_shell_script(block: Block) -> None:
    result = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)

    assert (result.returncode, result.stderr) == (0, "")


@each_block("python")
def test_each_python_block_compiles(block: Block) -> None:
    compile(block.text, f"{block.page.name}:{block.line}", "exec")


@each_block("yaml")
def test_each_yaml_block_is_one_or_more_kubernetes_objects(block: Block) -> None:
    for document in yaml.safe_load_all(block.text):
        assert {"apiVersion", "kind", "metadata", "spec"} == document.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_somewhere(page: Path) -> None:
    links = relative_links(page)
    assert links

    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_chinese_readme_has_the_headings_of_the_english_one() -> None:
    levels = LEVEL.findall(prose(ENGLISH))

    assert levels
    assert LEVEL.findall(prose(CHINESE)) == levels


def test_the_chinese_readme_has_the_blocks_of_the_english_one() -> None:
    fenced = ANY_FENCED.findall(ENGLISH.read_text())

    assert fenced
    assert ANY_FENCED.findall(CHINESE.read_text()) == fenced


def test_the_chinese_readme_has_tables_of_the_shapes_of_the_english_one() -> None:
    shapes = table_shapes(ENGLISH)

    assert shapes
    assert table_shapes(CHINESE) == shapes


def test_the_chinese_readme_has_the_links_of_the_english_one() -> None:
    assert set(relative_links(CHINESE)) - {ENGLISH.name} == set(relative_links(ENGLISH)) - {CHINESE.name}


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_every_page_says_the_same_time_for_a_command_that_runs_tests(tier: Tier) -> None:
    [help_text] = re.findall(rf"'make {tier.target}[ '][^(=]*\(([^)]+)\)'", (CHECKOUT / "Makefile").read_text())
    [table_row] = re.findall(rf"^\| `make {tier.target}` .*\| (.+) \|$", PAGES[2].read_text(), re.MULTILINE)
    elsewhere = [
        found
        for page in (ENGLISH, CHINESE)
        for found in re.findall(rf"^make {tier.target} .*; (.+)$", page.read_text(), re.MULTILINE)
    ]

    assert {help_text, table_row, *elsewhere} == {tier.takes}


def test_each_readme_leads_to_the_other_below_its_title() -> None:
    assert ENGLISH.read_text().splitlines()[2] == "English | [中文](README.zh.md)"
    assert CHINESE.read_text().splitlines()[2] == "[English](README.md) | 中文"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_variable_in_the_documents_exists(page: Path) -> None:
    assert set(re.findall(r"\bAGL_[A-Z_]*[A-Z]", page.read_text())) <= VARIABLES.keys()


def test_each_deployment_switches_its_server_on_with_a_value_that_counts() -> None:
    assert len(pods()) == 2

    for pod in pods():
        (container,) = pod["containers"]
        assert variables(container)["AGL_INSTRUMENT"] in VARIABLES["AGL_INSTRUMENT"].values


def test_each_deployment_is_of_a_piece_with_itself_and_with_the_service() -> None:
    (service,) = manifests("Service")
    # Kubernetes sets NAME_PORT in every pod, and vLLM reads VLLM_PORT.
    assert not service["metadata"]["name"].startswith("vllm")

    for deployment in manifests("Deployment"):
        template = deployment["spec"]["template"]
        labels, pod = template["metadata"]["labels"], template["spec"]
        assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert volumes == {name for c in (*pod.get("initContainers", ()), *pod["containers"]) for name in mounts(c)}
        ports = {port["name"] for port in pod["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_the_server_looks_for_the_package_where_the_init_container_unpacks_it() -> None:
    (pod,) = (pod for pod in pods() if "initContainers" in pod)
    (init,), (server,) = pod["initContainers"], pod["containers"]

    assert variables(server)["PYTHONPATH"] == mounts(server)["agl"]
    assert f"--target {mounts(init)['agl']} " in init["command"][-1]
    assert init["image"] == server["image"]


@pytest.mark.parametrize(
    ("installed", "vllm", "status"),
    [(True, True, 0), (False, True, 1), (True, False, 1)],
    ids=["as it should be", "not installed", "vLLM elsewhere"],
)
def test_the_image_is_built_only_where_the_python_of_vllm_arms_itself(
    installed: bool, vllm: bool, status: int, wheel: Path, tmp_path: Path
) -> None:
    (dockerfile,) = blocks("dockerfile")
    (check,) = re.findall(r"^RUN (AGL_INSTRUMENT=(?:.*\\\n)*.*)$", dockerfile.text, re.MULTILINE)
    environment = virtual_environment(tmp_path)
    if installed:
        environment.pip("install", "--no-deps", wheel)
    if vllm:
        (environment.site_packages / "vllm.py").touch()

    # As Docker hands it to the shell.
    command = ["/bin/sh", "-c", check.replace("\\\n", "")]
    result = subprocess.run(command, env={"PATH": str(environment.scripts)}, cwd=tmp_path, check=False)

    assert result.returncode == status


@pytest.mark.tier("all")
def test_the_real_vllm_calls_what_is_only_on_pythonpath(unpacked: Path, with_vllm: Environment) -> None:
    output = with_vllm.execute(LOADED_BY_VLLM, AGL_INSTRUMENT="1", PYTHONPATH=str(unpacked))

    file, *states = output.splitlines()[-1].split()
    assert Path(file).is_relative_to(unpacked)
    assert set(states) == {"applied"}


@pytest.mark.tier("all")
def test_the_real_vllm_does_not_where_its_plugins_are_named_and_we_are_not(
    unpacked: Path, with_vllm: Environment
) -> None:
    loaded = "from vllm.plugins import load_general_plugins as load; load(); import sys; print(*sys.modules, sep='\\n')"

    output = with_vllm.execute(loaded, AGL_INSTRUMENT="1", PYTHONPATH=str(unpacked), VLLM_PLUGINS="other")

    assert not [line for line in output.splitlines() if line.startswith("agentlightning")]


@pytest.mark.tier("all")
def test_the_command_is_there_without_a_script(unpacked: Path, with_vllm: Environment) -> None:
    command = (with_vllm.python, "-m", "agentlightning", "doctor", "--help")

    assert "--url" in with_vllm.run(*command, PYTHONPATH=str(unpacked))


def test_the_page_on_drift_has_every_cause_and_reason_as_the_report_has_it() -> None:
    page = (CHECKOUT / "docs" / "drift.md").read_text()

    assert not [cause for cause, (title, cure) in ABOUT.items() if f"| `{cause}` | {title} | {cure} |" not in page]
    assert not [name for name, title in UNFIT.items() if f"| `{name}` | {title} |" not in page]
