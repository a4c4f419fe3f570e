"""Pages of other origins cannot change the store, in a browser that knows its key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.common.http_server import serving
from tests.server.process import StoreServer

KEY = "correct-horse"
DEQUEUE = "/v1/agl/queues/rollouts/dequeue"
PAGE = """\
<!doctype html>
<title>not yet</title>
<form method="post" action="{target}"><button>Win a prize</button></form>
<script>
fetch("{target}", {{method: "POST", mode: "no-cors", credentials: "include"}})
  .finally(() => {{ document.title = "asked" }})
</script>
"""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the files of a folder as another origin; yields its URL."""
    with serving(partial(SimpleHTTPRequestHandler, directory=folder)) as url:
        yield url


@pytest.mark.parametrize(
    ("host", "key"),
    [
        pytest.param("127.0.0.1", None, id="of the same host, without a key"),
        pytest.param("localhost", KEY, id="of another host, with a key"),
        pytest.param("127.0.0.1", KEY, id="of the same host, with a key", marks=pytest.mark.tier("all")),
        pytest.param("localhost", None, id="of another host, without a key", marks=pytest.mark.tier("all")),
    ],
)
def test_scripts_and_forms_of_other_origins_leave_the_queue_alone(
    browser: Browser, tmp_path: Path, host: str, key: str | None
) -> None:
    with StoreServer(tmp_path / "store.db", key=key) as store, store.client() as trainer, served(tmp_path) as other:
        rollouts = [{"input": number} for number in range(3)]
        trainer.post("/v1/agl/queues/rollouts/enqueue", json={"rollouts": rollouts}).raise_for_status()
        (tmp_path / "index.html").write_text(PAGE.format(target=store.url + DEQUEUE))
        credentials = None if key is None else {"username": "agl", "password": key}
        window = browser.new_context(http_credentials=credentials)  # type: ignore[arg-type]
        page = window.new_page()
        page.goto(f"{store.url}/rollouts")
        expect(page.get_by_role("link", name="ro-")).to_have_count(3)
        page.goto(other.replace("127.0.0.1", host))
        expect(page).to_have_title("asked")
        page.get_by_role("button", name="Win a prize").click()
        expect(page.get_by_text("may not change anything here")).to_be_visible()
        window.close()

        assert trainer.get("/v1/agl/rollouts?status_in=queuing").json()["total"] == 3
