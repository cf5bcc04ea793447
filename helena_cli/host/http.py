"""A small HTTP server for programs and people on this machine: GET and HEAD, a few fixed paths.

Whoever reaches the port may be hostile. So a request has a few kilobytes and seconds, and when all
places are taken the one that came first has to go.
"""

import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from helena_cli.errors import HelenaError
from helena_cli.host.request import Answer, Refused, Request, check, parse

log = logging.getLogger(__name__)

Routes = Mapping[str, Callable[[], Answer]]

#: Bytes of a request line with its headers.
LONGEST_HEAD = 16 * 1024

#: Seconds for a request to arrive, and again for the answer to leave.
PATIENCE = 5.0

#: Seconds, and bytes, that a client may go on sending after its answer.
FAREWELL = 1.0
FAREWELL_BYTES = 1024 * 1024

#: Conversations at a time.
PLACES = 32

#: Seconds until it is tried again to let somebody in.
PAUSE = 0.1

#: Of every answer. Nothing may be loaded, framed, kept, or read by pages from elsewhere.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Connection": "close",
}


class HttpServer:
    """Serves `routes`, by path, until it is closed. Raises HelenaError when it cannot listen."""

    def __init__(self, routes: Routes, *, host: str, port: int) -> None:
        self._routes = routes
        self._host = host
        self._listener = _listen(host, port)
        self.url = f"http://{_shown(host)}:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        #: Who is here, in the order of arrival.
        self._visits: dict[socket.socket, threading.Thread] = {}
        #: Those of them who had to go, and have not left yet.
        self._leaving: set[socket.socket] = set()
        self._stopped, self._stop = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="helena-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and end the conversations."""
        self._stop.close()
        self._thread.join()
        self._stopped.close()
        self._listener.close()
        with self._lock:
            visits = dict(self._visits)
            for connection in visits:
                _cut(connection)
        until = time.monotonic() + PATIENCE
        for thread in visits.values():
            thread.join(max(0.0, until - time.monotonic()))
        if left := sum(thread.is_alive() for thread in visits.values()):
            log.warning("%d HTTP answers do not end: they wait for the queue", left)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stopped, selectors.EVENT_READ)
            while self._stopped not in [key.fileobj for key, _ in selector.select()]:
                try:
                    connection, _ = self._listener.accept()
                    self._admit(connection)
                except (OSError, RuntimeError) as error:
                    # No free descriptor, no thread: nothing that a hasty second try would mend.
                    log.warning("an HTTP client was not let in: %s", error)
                    time.sleep(PAUSE)

    def _admit(self, connection: socket.socket) -> None:
        with self._lock:
            if len(self._visits) >= 2 * PLACES:
                # Those who were cut off still wait for the queue.
                connection.close()
                return
            staying = [one for one in self._visits if one not in self._leaving]
            if len(staying) >= PLACES:
                _cut(staying[0])
                self._leaving.add(staying[0])
            thread = threading.Thread(
                target=self._visit, args=(connection,), name="helena-http-answer", daemon=True
            )
            thread.start()
            # It cannot have left, for that takes the lock.
            self._visits[connection] = thread

    def _visit(self, connection: socket.socket) -> None:
        try:
            _converse(connection, self._answer)
        except OSError as error:
            log.debug("an HTTP client went away: %s", error)
        finally:
            with self._lock:
                del self._visits[connection]
                self._leaving.discard(connection)
                connection.close()

    def _answer(self, request: Request) -> Answer:
        """What one of the routes says. Raises Refused."""
        check(request, self._host)
        if request.path not in self._routes:
            raise Refused(404, f"There is nothing here. There are: {', '.join(self._routes)}")
        try:
            return self._routes[request.path]()
        except Exception:
            # One answer that fails is no reason to leave the others without theirs.
            log.exception("%s %s failed", request.method, request.path)
            return Answer(b"This is a bug in Helena; its log has the traceback.\n", status=500)


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise HelenaError(
            f"This machine has no address called {host!r}.",
            remedy="Mend [metrics] host: 127.0.0.1 is for this machine alone.",
        ) from error
    family, _, _, _, address = found[0]
    both: dict[str, Any] = {"dualstack_ipv6": host == "::" and socket.has_dualstack_ipv6()}
    try:
        return socket.create_server(address, family=family, backlog=64, **both)
    except OSError as error:
        raise HelenaError(
            f"Port {port} of {host} cannot be used: {os.strerror(error.errno or 0)}.",
            remedy="Another program may listen there, perhaps another helena watch: end it,"
            " or choose another [metrics] port; 0 takes any that is free.",
        ) from error


def _shown(host: str) -> str:
    """The host in a URL that can be opened on this machine."""
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _cut(connection: socket.socket) -> None:
    """End a conversation; its own thread closes the socket."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _converse(connection: socket.socket, answer: Callable[[Request], Answer]) -> None:
    head_only = False
    try:
        request = parse(_receive_head(connection))
        head_only = request.method == "HEAD"
        found = answer(request)
    except Refused as refusal:
        found = refusal.answer
    connection.settimeout(PATIENCE)
    connection.sendall(_render(found, head_only=head_only))
    # To close it with something unread would take the answer back.
    connection.shutdown(socket.SHUT_WR)
    until, room = time.monotonic() + FAREWELL, FAREWELL_BYTES
    while room > 0 and (chunk := _receive(connection, until)):
        room -= len(chunk)


def _receive_head(connection: socket.socket) -> bytes:
    until, head = time.monotonic() + PATIENCE, b""
    while b"\r\n\r\n" not in head:
        if len(head) > LONGEST_HEAD:
            raise Refused(431, "The request is too large.")
        try:
            chunk = _receive(connection, until)
        except TimeoutError:
            raise Refused(408, "The request did not arrive in time.") from None
        if not chunk:
            raise ConnectionAbortedError("it sent half a request")
        head += chunk
    return head.partition(b"\r\n\r\n")[0]


def _receive(connection: socket.socket, until: float) -> bytes:
    """The next bytes; a timeout of the socket alone would begin anew with each of them."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)
    return connection.recv(4096)


def _render(answer: Answer, *, head_only: bool) -> bytes:
    status = HTTPStatus(answer.status)
    headers = {
        "Date": formatdate(usegmt=True),
        "Content-Type": answer.type,
        "Content-Length": str(len(answer.body)),
        **HEADERS,
        **answer.headers,
    }
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if head_only else head + answer.body
