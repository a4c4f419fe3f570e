"""`vllm serve --api-key`, with us and without: nobody gets in whom vLLM alone keeps out, however he spells it."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from agentlightning.instrumentation.vllm._status import STATUS_ROUTE
from tests.common.vllm import RemoteOpenAIServer
from tests.conftest import PARSERS

PREFIXES = [
    b"",
    b"/rollout/x",
    b"/rollout/x/attempt/1",
    b"/root/rollout/x",
    b"/root/rollout/x/attempt/1",
    b"/rollout/x/root",
    b"/root/rollout/x/root",
    b"/root/root/rollout/x",
    b"/root/../rollout/x",
    b"/root//rollout/x",
    b"/ROOT/rollout/x",
    b"/%72oot/rollout/x",
    b"/rollout/a%2Fb",
    b"/rollout/%2F/attempt/%2f",
    b"/rollout/a%252Fb",
    b"/rollout/%2e%2e",
    b"/rollout/..",
    b"/rollout/../..",
    b"/rollout/x/..",
    b"/rollout/x/.",
    b"/rollout/./x",
    b"/rollout/x/",
    b"/rollout//x",
    b"//rollout/x",
    b"/rollout/x;a=b",
    b"/rollout/x;/attempt/1",
    b"/rollout/x%3B",
    b"/rollout/%20",
    b"/rollout/x%20",
    b"/rollout/x%00",
    b"/rollout/x%0d%0a",
    b"/rollout/\xff",
    b"/rollout/%ff",
    b"/rollout/\xc3\xa9",
    b"/rollout/%F0%9F%98%80/attempt/%F0%9F%98%80",
    b"/rollout/x?",
    b"/rollout/x%3F",
    b"/rollout/x#",
    b"/rollout/x%23",
    b"/rollout/\\..",
    b"/rollout/x\\",
    b"/ROLLOUT/x",
    b"/%72ollout/x",
    b"/rollout%2Fx",
    b"/rollout/v1",
    b"/rollout/attempt/1",
    b"/rollout/x/rollout/y",
    b"/rollout/x/attempt/1/attempt/2",
    b"/rollout/" + b"x" * 257,
    b"/v1/rollout/x",
    b"/health/rollout/x",
    b"http://127.0.0.1/rollout/x",
    b"http://127.0.0.1/root/rollout/x",
    b"http://127.0.0.1",
    b"https://x@rollout/x",
    b"*/rollout/x",
    b"rollout/x",
]
"""Prefixes of paths: a rollout's, and some that resemble one."""

PATHS = [
    b"/v1/models",
    b"/root/v1/models",
    b"/root/root/v1/models",
    b"/root/rootv1/models",
    b"/rootv1/models",
    b"//v1/models",
    b"///v1/models",
    b"/./v1/models",
    b"/x/../v1/models",
    b"/health/../v1/models",
    b"/health/..%2Fv1/models",
    b"/metrics/../v1/models",
    b"/metrics/v1/models",
    b"/V1/models",
    b"/v1/Models",
    b"/%76%31/models",
    b"/%2576%2531/models",
    b"/v1%2Fmodels",
    b"/v1%252Fmodels",
    b"/v1;/models",
    b"/v1/models;x",
    b"/v1/models/",
    b"/v1/models//",
    b"/v1//models",
    b"/v1/models%20",
    b"/%20v1/models",
    b"/v1/models%00",
    b"/%00/v1/models",
    b"/v1/models%0a",
    b"/v1/models?",
    b"/v1/models?root_path=/v1",
    b"/v1/models#x",
    b"/v1\\models",
    b"/\xef\xbc\xb61/models",
    b"/v\xb9/models",
    b"/v1/models\xff",
    b"/%ff/../v1/models",
    b"/inference/v1/generate",
    b"/health",
    b"/version",
    b"/",
    b"",
]
"""Paths that vLLM guards, in many spellings, and paths that it does not guard."""

WITHOUT_A_SLASH = [
    b"v1/models",
    b"%2Fv1/models",
    b";/v1/models",
    b"#/v1/models",
    b"?/v1/models",
    b"\\v1\\models",
    b" /v1/models",
]

SOME_PATHS = [
    b"/v1/models",
    b"/root/v1/models",
    b"/v1/chat/completions",
    b"/v1/realtime",
    b"/v1/responses/resp_1",
    b"/health",
]
METHODS = [b"HEAD", b"POST", b"PUT", b"OPTIONS", b"TRACE", b"CONNECT", b"PROPFIND", b"get", b"X"]

KEY = b"Authorization: Bearer none\r\n"
WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
HEADERS = [
    b"",
    b"Authorization: Bearer\r\n",
    b"Authorization: Bearer another\r\n",
    b"Authorization: none\r\n",
    b"Authorization: Basic none\r\n",
    b"Authorization: Bearer nonE\r\n",
    b"Authorization: Bearer  none\r\n",
    b"Authorization: Bearer none,\r\n",
    b"Authorization: Bearer \xff\r\n",
    b"Authorization: Bearer another\r\nAuthorization: Bearer none\r\n",
    b"Authorization: Bearer none\r\nAuthorization: Bearer another\r\n",
    b"Authorization : Bearer none\r\n",
    b"X-Authorization: Bearer none\r\nX-Api-Key: none\r\nProxy-Authorization: Bearer none\r\n",
    b"x-agl-rollout-id: x\r\nx-agl-attempt-id: 1\r\n",
    b"x-agl-rollout-id: /rollout/x/v1/models\r\nx-agl-rollout-id: \xff\x01\r\n",
    b"x-agl-rollout-id: " + b"x" * 5000 + b"\r\n",
    b"baggage: agentlightning.rollout_id=%00,,=;=,agentlightning.rollout_id\r\ntraceparent: 00-x\r\n",
    b"baggage: \xff\xfe%ff%\r\ntraceparent: \xff\r\nx-session-id: \xff\r\nx-request-id: \xff\r\n",
    b"X-Forwarded-Prefix: /v1\r\nX-Original-URL: /health\r\nX-Rewrite-URL: /health\r\n",
    b"X-HTTP-Method-Override: OPTIONS\r\n",
    b"Host: /health\r\nHost: x/rollout/x\r\n",
    b"Connection: Authorization\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
]

KEYS = [
    b"Authorization: Bearer none",
    b"Authorization: bearer none",
    b"Authorization: Bearer",
    b"Authorization: Bearer ",
    b"Authorization: Bearer another",
    b"Authorization: Bearer nonE",
    b"Authorization: Bearer nonenone",
    b"Authorization: none",
    b"Authorization: Basic none",
    b"Authorization: Bearer  none",
    b"Authorization: Bearer \xff",
    b"Authorization: Bearer x\r\nAuthorization: Bearer none",
    b"Authorization: Bearer none\r\nAuthorization: Bearer x",
    b"X-Api-Key: none",
]
NAMES = [
    b"@rollout=x",
    b"@rollout=none",
    b"@rollout=x,attempt=1,agent=%C3%A9",
    b"@agent=1,attempt=2,rollout=x",
    b"@rollout=%00%0d%0aAuthorization:%20Bearer%20none",
    b"@rollout=../../v1/models",
    b"@rollout=" + b"x" * 257,
    b"@rollout=\xff",
    b"@rollout='%22;--",
]
"""Ends of keys that name a rollout, some by an id that is none: they are taken off all the same."""
NO_NAMES = [
    b"@rollout=",
    b"@rollout=x,",
    b"@rollout=x,other=1",
    b"@rollout=x y",
    b"@rollout=x@",
    b"@rollout=x\t,attempt=1",
    b"@Rollout=x",
    b"@rollout",
    b"@rollout=x,attempt=1,attempt=none",
    b"rollout=x",
    b"%40rollout=x",
]
"""Ends of keys that resemble these, and are a part of the key."""


@pytest.fixture(scope="module")
def guarded_without_us() -> Iterator[RemoteOpenAIServer]:
    """`guarded`, but without us."""
    with RemoteOpenAIServer("--api-key=none", "--root-path=/root", *PARSERS, forks=True) as server:
        yield server


@pytest.mark.tier("all")
@pytest.mark.parametrize(
    "header", [b"", KEY, WEBSOCKET, WEBSOCKET + KEY], ids=["", "key", "websocket", "websocket, key"]
)
def test_a_path_is_answered_as_vllm_answers_it(
    guarded: RemoteOpenAIServer, guarded_without_us: RemoteOpenAIServer, header: bytes
) -> None:
    seen = assert_alike(guarded, guarded_without_us, PATHS, headers=[header])

    assert {"200", "404"} < seen if KEY in header else {"200", "401", "404"} < seen


@pytest.mark.tier("all")
def test_a_path_is_answered_alike_for_every_method(
    guarded: RemoteOpenAIServer, guarded_without_us: RemoteOpenAIServer
) -> None:
    assert "401" in assert_alike(guarded, guarded_without_us, SOME_PATHS, METHODS, [b"", WEBSOCKET])


@pytest.mark.tier("all")
def test_a_path_is_answered_alike_with_any_headers(
    guarded: RemoteOpenAIServer, guarded_without_us: RemoteOpenAIServer
) -> None:
    assert "401" in assert_alike(guarded, guarded_without_us, SOME_PATHS, headers=HEADERS)


@pytest.mark.tier("all")
def test_a_target_without_a_path_is_answered_alike(
    guarded: RemoteOpenAIServer, guarded_without_us: RemoteOpenAIServer
) -> None:
    requests = [request(b"GET", target) for target in WITHOUT_A_SLASH]

    assert answers(guarded, requests) == answers(guarded_without_us, requests)


def test_key_that_names_a_rollout_opens_what_the_key_alone_opens(guarded: RemoteOpenAIServer) -> None:
    paths = [b"/v1/models", b"/rollout/x/v1/models", b"/v1/responses/resp_1", b"/health"]
    asked = [*itertools.product(paths, [b"", WEBSOCKET], KEYS)]

    def requests(end: bytes) -> list[bytes]:
        return [request(b"GET", path, b"%s%s\r\n%s" % (key, end, upgrade)) for path, upgrade, key in asked]

    answered = answers(guarded, [each for end in (b"", *NAMES, *NO_NAMES) for each in requests(end)])
    alone = [answered[each] for each in requests(b"")]
    assert {"200", "401"} < {*alone}
    for end in NAMES:
        assert [answered[each] for each in requests(end)] == alone, end
    unguarded = [each if path == b"/health" else None for (path, _, _), each in zip(asked, alone, strict=True)]
    for end in NO_NAMES:
        found = [answered[each] for each in requests(end)]
        # Of two keys, the first counts, and the end stands behind the second.
        pairs = zip(asked, found, alone, unguarded, strict=True)
        for (_, _, key), said, before, open_to_all in pairs:
            if b"\r\n" not in key:
                assert said == (open_to_all or ("403" if before == "403" else "401")), (end, key)
            else:
                assert said == before, (end, key)


def test_our_route_is_guarded_as_vllms_own(guarded: RemoteOpenAIServer) -> None:
    ours, vllms = (
        [
            request(method, prefix + path, header)
            for method, prefix, header in itertools.product([b"GET", b"HEAD", b"OPTIONS"], PREFIXES, HEADERS)
        ]
        for path in (STATUS_ROUTE.encode(), b"/v1/models")
    )
    answered = answers(guarded, [*ours, *vllms])

    assert [answered[each] for each in ours] == [answered[each] for each in vllms]


def assert_alike(
    ours: RemoteOpenAIServer,
    vllms: RemoteOpenAIServer,
    paths: Iterable[bytes],
    methods: Iterable[bytes] = (b"GET",),
    headers: Iterable[bytes] = (b"",),
) -> set[str]:
    """Assert that each path with each prefix is answered as vLLM answers it; return the answers."""
    asked = {
        request(method, prefix + path, header): request(method, path, header)
        for method, prefix, path, header in itertools.product(methods, PREFIXES, paths, headers)
    }
    answered = answers(ours, asked)
    expected = answers(vllms, [*asked, *asked.values()])

    assert not {
        whole: (answered[whole], expected[whole], expected[rest])
        for whole, rest in asked.items()
        if answered[whole] not in (expected[whole], expected[rest])
    }
    return set(answered.values())


def request(method: bytes, target: bytes, headers: bytes = b"") -> bytes:
    return b"%s %s HTTP/1.1\r\nHost: x\r\n%sConnection: close\r\n\r\n" % (method, target, headers)


def answers(server: RemoteOpenAIServer, requests: Iterable[bytes]) -> dict[bytes, str]:
    """Send each request byte by byte as given, and return its status; "" if the connection is closed without one."""

    def ask(request: bytes) -> str:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(request)
            with contextlib.suppress(ConnectionResetError):
                return connection.makefile("rb").readline().decode("latin-1").removeprefix("HTTP/1.1 ")[:3]
        return ""

    unique = list(dict.fromkeys(requests))
    with ThreadPoolExecutor(8) as threads:
        return dict(zip(unique, threads.map(ask, unique), strict=True))
