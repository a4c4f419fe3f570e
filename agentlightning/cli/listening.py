"""The socket of a server: reserved before anything else is done, and open to clients once the server can start."""

from __future__ import annotations

import errno
import ipaddress
import socket

__all__ = ["CannotListen", "bound_socket", "listen", "url_of"]

CONNECTIONS_WAITING = 2048
ADVICE = {
    errno.EADDRINUSE: "another program uses this port; choose another --port, or 0 for any free one",
    errno.EACCES: "this user may not use this port; choose another --port, above 1023",
    errno.EADDRNOTAVAIL: "this machine does not have this address; choose another --host",
}


class CannotListen(Exception):
    """The server cannot listen where it is told to; the message says why, and what to do."""


def bound_socket(host: str, port: int) -> socket.socket:
    """Reserve an address, without accepting connections yet: no client waits for a server that does not start.

    Args:
        host: a name or address of IPv4, or an address of IPv6; `::` is all addresses of both.
        port: 0 for any free one.

    Raises:
        CannotListen: the address cannot be used.
    """
    is_ipv6 = ":" in host
    bound = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_ipv6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not _is_any(host))
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise _cannot_listen(host, port, error) from error
    return bound


def listen(bound: socket.socket, host: str, port: int) -> None:
    """Accept connections.

    Raises:
        CannotListen: of two servers that started at the same moment, the other one has the port.
    """
    try:
        bound.listen(CONNECTIONS_WAITING)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def url_of(bound: socket.socket) -> str:
    """Return an address for clients. None can connect to an unspecified one: they get this machine's name."""
    host, port = bound.getsockname()[:2]
    return f"http://{_in_url(socket.gethostname() if _is_any(host) else host)}:{port}"


def _cannot_listen(host: str, port: int, error: OSError) -> CannotListen:
    if isinstance(error, socket.gaierror):
        reason = "this host is not known here; choose another --host"
    else:
        reason = ADVICE.get(error.errno or 0) or error.strerror or str(error)
    return CannotListen(f"cannot listen on {_in_url(host)}:{port}: {reason}")


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
