"""What a client asks for over HTTP, and whether it may: pure, and strict."""

import ipaddress
import re
import socket
from collections.abc import Mapping
from http import HTTPStatus

from msgspec import Struct

TEXT = "text/plain; charset=utf-8"


class Answer(Struct, frozen=True):
    """What is sent back; `headers` go before those of every answer."""

    body: bytes
    type: str = TEXT
    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = {}


class Request(Struct, frozen=True):
    """What a client asks for; `name` is the Host without its port, None when it gave none."""

    method: str
    path: str
    name: str | None


class Refused(Exception):
    """The request gets no more than this answer."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.answer = Answer(f"{text}\n".encode(), status=status, headers=headers)


def parse(head: bytes) -> Request:
    """Read a request line with its headers. Raises Refused."""
    line, *fields = head.decode("latin-1").split("\r\n")
    found = re.fullmatch(r"([A-Za-z]{1,20}) (/[!-~]*) HTTP/1\.[01]", line)
    headers = [field.partition(":") for field in fields]
    if found is None or not all(colon and _is_token(name) for name, colon, _ in headers):
        raise Refused(400, "This is no request that this server understands.")
    hosts = [value.strip() for name, _, value in headers if name.lower() == "host"]
    if len(hosts) > 1:
        raise Refused(400, "The request has several Host headers.")
    return Request(found[1], found[2].partition("?")[0], _name(hosts[0]) if hosts else None)


def _is_token(name: str) -> bool:
    return re.fullmatch(r"[!-~]+", name) is not None


def _name(host: str) -> str:
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?", host)
    if found is None:
        raise Refused(400, "The Host header is no name and no address.")
    return found[1].strip("[]").rstrip(".").lower()


def check(request: Request, configured: str) -> None:
    """Let a request pass that only reads, and means this server. Raises Refused."""
    # Nobody but a browser sends a Host without meaning it, and a browser always sends one.
    if request.name is not None and not is_ours(request.name, configured):
        raise Refused(
            421, "Ask by an address of this machine, localhost, or the name in [metrics] host."
        )
    if request.method not in ("GET", "HEAD"):
        raise Refused(405, "This can only be read: GET or HEAD.", Allow="GET, HEAD")


def is_ours(name: str, configured: str) -> bool:
    """Whether a Host names this server, which listens at the address `configured`.

    A page may have the name of its own site resolve to loopback, to read what is there as if it
    were its own. The browser still sends that name.
    """
    if name in ("localhost", configured.lower()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return not is_loopback(configured) and name == socket.gethostname().lower()
    # No site is called by an address of this machine.
    return address.is_loopback or not is_loopback(configured)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
