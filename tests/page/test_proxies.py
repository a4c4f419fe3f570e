"""Pages below the path of a reverse proxy, and pages that were opened with the key in their address."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import httpx
import pytest
from playwright.sync_api import expect

from tests.common.browser import Visit
from tests.common.debian import NGINX
from tests.common.environments import CHECKOUT
from tests.common.reverse_proxy import PATH, PathHandling, reverse_proxy
from tests.common.rollouts import fill
from tests.common.vllm import free_port
from tests.page.conftest import started
from tests.page.test_annotations import fill_in
from tests.server.process import StoreServer

OPERATIONS = CHECKOUT / "docs" / "operations.md"
NGINX_CONFIGURATION = """\
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
{block}    }}
}}
"""
"""Everything that nginx needs around a block, and no file outside of the folder."""
KEY = "correct-horse:battery/staple@4747"


@pytest.mark.parametrize(
    ("how", "arguments"),
    [
        pytest.param("removed", (), id="path removed, and unknown to the store"),
        pytest.param("removed", ("--root-path", PATH), id="path removed, given as --root-path"),
        pytest.param("kept", ("--root-path", f"{PATH}/"), id="path kept, given as --root-path"),
        pytest.param("forwarded", (), id="path removed, sent as X-Forwarded-Prefix"),
    ],
)
def test_pages_behind_a_proxy_link_load_and_update(
    visit: Callable[..., Visit], tmp_path: Path, how: PathHandling, arguments: tuple[str, ...]
) -> None:
    path = tmp_path / "store.db"
    rollout = next(each for each in fill(str(path), 20) if each.status == "succeeded")
    with StoreServer(path, *arguments) as store, reverse_proxy(store.url, how) as url, store.client() as trainer:
        # The window complains of whatever the page requests and does not get.
        page = visit(SimpleNamespace(url=url)).page
        page.goto(f"{PATH}/")
        page.get_by_role("link", name="Rollouts", exact=True).click()
        page.get_by_role("link", name=rollout.rollout_id).click()
        page.get_by_role("link", name="Call 1", exact=True).click()
        expect(page.get_by_role("img", name="Plot of logprobs").locator("canvas")).to_be_visible()
        page.get_by_role("region", name="Prompt").get_by_text("tokens").click()
        expect(page.get_by_role("group", name="Prompt: ")).to_be_visible()
        fill_in(page, "0.5")
        expect(page.get_by_role("region", name="Rewards and notes")).to_contain_text("reward 0.5")
        page.get_by_role("link", name=rollout.rollout_id).click()
        # Loaded with its scripts, without which nothing comes when it is unfolded.
        page.wait_for_url("**/rollout?*")
        page.get_by_text("Raw text", exact=True).first.click()
        expect(page.get_by_text("<|im_start|>system").first).to_be_visible()
        page.get_by_role("link", name="Compare").click()
        expect(page.get_by_role("heading", name="Side by side")).to_be_visible()
        page.get_by_role("link", name="HTTP API").click()
        page.get_by_role("link", name="The OpenAPI document").click()
        page.go_back()
        pages = page.get_by_role("navigation", name="Pages")
        pages.get_by_role("link", name="Senders").click()
        expect(page.get_by_role("rowheader")).to_contain_text("gpu-7")
        pages.get_by_role("link", name="Rollouts").click()
        new = started(trainer, "Is it live?")
        expect(page.get_by_role("link", name=new["rollout_id"])).to_be_visible()
        page.get_by_label("Search rollouts").press_sequentially("live?")
        expect(page.get_by_text("1 rollout found")).to_be_visible()


@pytest.mark.parametrize(
    ("how", "arguments"), [("kept", ("--root-path", PATH)), ("forwarded", ())], ids=["--root-path", "header"]
)
def test_empty_store_behind_a_proxy_shows_the_address_there(
    visit: Callable[..., Visit], tmp_path: Path, how: PathHandling, arguments: tuple[str, ...]
) -> None:
    with StoreServer(tmp_path / "store.db", *arguments) as store, reverse_proxy(store.url, how) as url:
        page = visit(SimpleNamespace(url=url)).page
        page.goto(f"{PATH}/")

        expect(page.get_by_text(f"AGL_STORE={url}{PATH} AGL_INSTRUMENT=1 vllm serve")).to_be_visible()
        # Clients of the API find it below the path, too.
        with httpx.Client(base_url=f"{url}{PATH}") as client:
            assert client.get("/v1/agl/health").status_code == 200
            assert client.get("/openapi.json").json()["servers"] == [{"url": PATH}]


def test_block_for_nginx_in_the_documentation_serves_the_page(visit: Callable[..., Visit], tmp_path: Path) -> None:
    program = NGINX.find()
    if program is None:
        pytest.skip(NGINX.missing)
    [block] = re.findall(r"^```nginx\n(.*?)^```$", OPERATIONS.read_text(), re.DOTALL | re.MULTILINE)
    with StoreServer(tmp_path / "store.db") as store, store.client() as trainer:
        port = free_port()
        configuration = NGINX_CONFIGURATION.format(
            folder=tmp_path, port=port, block=block.replace("http://127.0.0.1:4747", store.url)
        )
        (tmp_path / "nginx.conf").write_text(configuration)
        with subprocess.Popen([str(program), "-e", f"{tmp_path}/nginx.log", "-c", f"{tmp_path}/nginx.conf"]) as nginx:
            try:
                page = visit(SimpleNamespace(url=f"http://127.0.0.1:{port}")).page
                until_it_listens(port)
                # nginx itself adds the slash that is missing.
                page.goto("/agl")
                expect(page.get_by_text(f"AGL_STORE=http://127.0.0.1:{port}/agl ")).to_be_visible()
                page.get_by_role("link", name="Rollouts", exact=True).click()
                new = started(trainer, "Is it live?")
                expect(page.get_by_role("link", name=new["rollout_id"])).to_be_visible()
                page.get_by_role("link", name=new["rollout_id"]).click()
                expect(page.get_by_role("heading", name=new["rollout_id"])).to_be_visible()
            finally:
                nginx.terminate()


def until_it_listens(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)


@pytest.mark.parametrize("prefix", ["//elsewhere.example", "javascript:alert(1)", "/a b", '/"><script>', "/" + "é" * 3])
def test_header_that_is_no_path_changes_nothing(tmp_path: Path, prefix: str) -> None:
    with StoreServer(tmp_path / "store.db") as store:
        sent = [(b"X-Forwarded-Prefix", prefix.encode())]
        assert httpx.get(f"{store.url}/", headers=sent).text == httpx.get(f"{store.url}/").text


def test_page_opened_with_the_key_in_its_address_updates(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", key=KEY) as store, store.client() as trainer:
        quoted = str(httpx.URL(store.url, username="agl", password=KEY))
        first = started(trainer, "Is it there?")
        visitor = visit(store)
        page = visitor.page
        page.goto(f"{quoted.removesuffix('/')}/rollouts")
        # The page opens itself again, and the address no longer shows the key.
        expect(page).to_have_url(f"{store.url}/rollouts")
        assert page.evaluate("document.baseURI") == f"{store.url}/rollouts"
        # The first requests have the key in their addresses.
        assert all(KEY in unquote(each) for each in visitor.complaints)
        visitor.complaints.clear()
        expect(page.get_by_role("link", name=first["rollout_id"])).to_be_visible()
        new = started(trainer, "Is it live?")

        expect(page.get_by_role("link", name=new["rollout_id"])).to_be_visible()
        page.get_by_label("Search rollouts").press_sequentially("live?")
        expect(page.get_by_text("1 rollout found")).to_be_visible()
        page.get_by_role("link", name=new["rollout_id"]).click()
        expect(page.get_by_role("heading", name=new["rollout_id"])).to_be_visible()
