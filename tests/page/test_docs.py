"""The reference of the HTTP API at `/docs`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from playwright.sync_api import expect

from agentlightning.server import create_app
from agentlightning.store import open_database
from tests.common.browser import Visit
from tests.page.conftest import Filled, Open
from tests.server.process import StoreServer

PREFIX = "/some/path"


class Elements(HTMLParser):
    """The ids and headings of a page, and the addresses that it uses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[str] = []
        self._in_heading = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src", "action", "hx-get"):
                self.addresses.append(value or "")
        if tag in ("h2", "h3"):
            self._in_heading = True
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_heading = self._in_heading and tag not in ("h2", "h3")

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings[-1] += data


@pytest.fixture(scope="module", params=[(), ("--agentops",)], ids=["store", "agentops"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with StoreServer(tmp_path_factory.mktemp("docs") / "store.db", *request.param) as server:
        yield server


@pytest.fixture(scope="module")
def document(served: StoreServer) -> Any:
    return httpx.get(f"{served.url}/openapi.json").json()


@pytest.fixture(scope="module")
def elements(served: StoreServer) -> Elements:
    return Elements(httpx.get(f"{served.url}/docs").raise_for_status().text)


def test_docs_list_every_route_and_schema(document: Any, elements: Elements) -> None:
    routes = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    titles = {schema["title"] for schema in document["components"]["schemas"].values()}

    assert len(routes) > 40
    assert routes | titles <= set(elements.headings)


def test_docs_name_every_parameter_and_show_every_example(served: StoreServer, document: Any) -> None:
    html = httpx.get(f"{served.url}/docs").text
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    names = {each["name"] for operation in operations for each in operation.get("parameters", ())}
    bodies = [each for each in operations if "application/json" in each.get("requestBody", {}).get("content", {})]
    schemas = document["components"]["schemas"].values()
    examples = len(bodies) + len([each for each in schemas if "examples" in each])

    assert names
    assert all(f"<code>{name}</code>" in html for name in names)
    assert html.count("<summary>Example</summary>") == examples


def test_links_within_docs_lead_to_an_element(elements: Elements) -> None:
    fragments = {address[1:] for address in elements.addresses if address.startswith("#")}

    assert len(elements.ids) == len(set(elements.ids))
    assert len(fragments) > 80
    assert fragments <= set(elements.ids)


@pytest.mark.parametrize("root_path", ["", PREFIX], ids=["prefix unknown", "prefix as root path"])
@pytest.mark.parametrize("address", ["/", "/rollouts", "/docs", "/senders", "/rollout", "/generation/prompt?id=none"])
def test_pages_below_a_path_of_a_proxy_use_only_addresses_below_it(
    tmp_path: Path, address: str, root_path: str
) -> None:
    app = create_app(open_database(str(tmp_path / "store.db")), body_limit=1 << 20)
    url = "http://127.0.0.1"

    async def html() -> str:
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url=url) as client:
            return (await client.get(address)).text

    targets = [urlsplit(urljoin(f"{url}{PREFIX}{address}", each)) for each in Elements(asyncio.run(html())).addresses]
    assert len(targets) > 5
    assert all(each.hostname == "127.0.0.1" and each.path.startswith(f"{PREFIX}/") for each in targets)


def test_docs_load_without_scripts_and_policy_allows_own_host_alone(filled: Filled, look: Open) -> None:
    page = look("/docs", javascript=False)
    expect(page.get_by_role("heading", name="GET /v1/agl/rollouts/{rollout_id}", exact=True)).to_be_visible()
    policy = httpx.get(f"{filled.server.url}/docs").headers["content-security-policy"]

    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")


def test_keyboard_reaches_a_route_and_opens_its_example(look: Open) -> None:
    page = look("/docs")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.get_by_role("navigation", name="Routes").get_by_role("link", name="POST /v1/agl/rollouts", exact=True).focus()
    page.keyboard.press("Enter")
    heading = page.get_by_role("heading", name="POST /v1/agl/rollouts", exact=True)
    expect(heading).to_be_in_viewport()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    shown = page.get_by_role("article", name="POST /v1/agl/rollouts", exact=True)
    expect(shown.get_by_text('"input"')).to_be_visible()


def test_every_page_links_to_docs(look: Open) -> None:
    page = look("/")
    page.get_by_role("link", name="HTTP API").click()

    expect(page.get_by_role("heading", level=1)).to_contain_text("HTTP API")
    expect(page.get_by_text("This store asks for no key.")).to_be_visible()


def test_docs_of_a_store_with_a_key_say_which_routes_need_none(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", key="correct-horse") as server:
        assert httpx.get(f"{server.url}/docs").status_code == 401
        page = visit(server, key="correct-horse").page
        page.goto("/docs")
        expect(page.get_by_text("Requests need the key of this store")).to_be_visible()
        expect(page.get_by_text("Needs no key.")).to_have_count(2)
