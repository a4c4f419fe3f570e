"""A gateway in front of a server, while it is measured: `benchmarks/proxy.py`, in a process of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp

from tests.common.vllm import RemoteOpenAIServer, free_port


@contextmanager
def gateway(server: RemoteOpenAIServer, *asks: str) -> Iterator[str]:
    """The address of a gateway to this server, while it runs."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.proxy", server.url, str(port), *asks])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def is_up(gateway: aiohttp.ClientSession) -> None:
    for _ in range(600):
        try:
            async with gateway.get("/health"):
                return
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.1)
    raise RuntimeError("the gateway does not start")
