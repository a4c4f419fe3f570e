"""Real routers in front of a vLLM server: vllm-router and smg from the package index, LiteLLM's proxy, and nginx."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.common.debian import NGINX
from tests.common.vllm import free_port
from tools.peer import environment

__all__ = ["ROUTERS", "VERSIONS", "keeps_ids", "router"]

SECONDS = 240
VERSIONS = {"vllm-router": "0.1.17", "smg": "1.13.0", "LiteLLM": "1.108.0", "nginx": ""}
DATE = "2026-11-30"
"""The date up to which a package index is read for what they need in turn."""

Command = Callable[[int, int, Sequence[str], str, Path], list[str]]
"""A function of a port, a port for metrics, the URLs of servers, the name of their model, and a folder."""


def _in_rust(name: str, *arguments: str) -> Command:
    def command(port: int, metrics: int, servers: Sequence[str], model: str, folder: Path) -> list[str]:
        made = environment("routers", "vllm-router and smg", (_package("vllm-router"), _package("smg")), date=DATE)
        options = [f"--port={port}", f"--prometheus-port={metrics}", "--host=127.0.0.1", "--policy=round_robin"]
        return [str(made / name), *arguments, *options, "--worker-urls", *servers]

    return command


def _package(name: str) -> str:
    return f"{name}=={VERSIONS[name]}"


def _litellm(port: int, metrics: int, servers: Sequence[str], model: str, folder: Path) -> list[str]:
    made = environment("litellm", "LiteLLM's proxy", (f"litellm[proxy]=={VERSIONS['LiteLLM']}",), date=DATE)
    deployment = {"model": f"hosted_vllm/{model}", "api_base": f"{servers[0]}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": model, "litellm_params": deployment}],
        "general_settings": {"forward_client_headers_to_llm_api": True},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return [str(made / "litellm"), "--config", str(folder / "config.yaml"), f"--port={port}", "--host=127.0.0.1"]


def _nginx(port: int, metrics: int, servers: Sequence[str], model: str, folder: Path) -> list[str]:
    upstream = "".join(f"server {urlsplit(each).netloc}; " for each in servers)
    (folder / "nginx.conf").write_text(
        f"""
        daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
        events {{}}
        http {{
            access_log off;
            client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
            uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
            upstream servers {{ hash $http_x_agl_rollout_id consistent; {upstream} }}
            server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://servers; }} }}
        }}"""
    )
    return [str(NGINX.find()), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]


ROUTERS: Mapping[str, Command] = {
    "vllm-router": _in_rust("vllm-router"),
    "smg": _in_rust("smg", "launch"),
    "LiteLLM": _litellm,
    "nginx": _nginx,
}
ENVIRONMENT = {
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
}


@contextmanager
def router(name: str, servers: Sequence[str], model: str, *options: str) -> Iterator[str]:
    """Run a router in front of servers; yields its URL once it serves the model.

    Args:
        servers: their URLs.
        options: are added to its command.
    """
    port, metrics = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="agl-router-") as made:
        folder = Path(made)
        command = [*ROUTERS[name](port, metrics, servers, model, folder), *options]
        env = {each: value for each, value in os.environ.items() if not each.startswith(("AGL_", "PYTHON"))}
        with (
            (folder / "log").open("w") as log,
            subprocess.Popen(
                command, env=env | ENVIRONMENT, cwd=folder, stdout=log, stderr=subprocess.STDOUT
            ) as process,
        ):
            try:
                _wait(f"http://127.0.0.1:{port}", process, folder / "log")
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
                if json.load(answer)["data"]:
                    return
        except (OSError, ValueError):
            pass
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def keeps_ids(url: str, model: str) -> str:
    """Say over which endpoints the ids of answers come through a router."""
    talk: list[dict[str, str]] = [{"role": "user", "content": "one"}]
    asked: Mapping[str, tuple[str, dict[str, Any]]] = {
        "chat": ("chat/completions", {"messages": talk, "max_tokens": 2}),
        "chat streamed": ("chat/completions", {"messages": talk, "max_tokens": 2, "stream": True}),
        "completions": ("completions", {"prompt": "one", "max_tokens": 2}),
        "Responses": ("responses", {"input": "one", "max_output_tokens": 2}),
        "Messages": ("messages", {"messages": talk, "max_tokens": 2}),
    }
    kept = [name for name, (path, body) in asked.items() if b"token_ids" in _answer(f"{url}/v1/{path}", model, body)]
    return "all" if len(kept) == len(asked) else ", ".join(kept) or "none"


def _answer(url: str, model: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(
        url, json.dumps({"model": model, **body}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except OSError:
        return b""
