"""A TCP proxy in front of a database, for tests that break the line between the two."""

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.ports import free_port


class Proxy:
    """Listens on loopback and passes bytes on to the server of `upstream`, a conninfo string.

    `dsn` is the same database through the proxy. Faults are switched on and off at any time:

    - `cut()` resets the connections that are open; new ones work.
    - `stop()` does the same and listens no more (refused); `start()` listens on that port again.
    - `stalled = True` passes nothing on in either direction, and accepts without answering.
    - `delay` seconds are waited before each piece that the server sends is passed on.
    - `drop_next_answer()` passes the client's next request on to the server, and resets the
      connection when the answer arrives: the client never learns what became of it. With
      `containing`, the first request that contains these bytes, such as b"COMMIT".
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.port = 0
        self.stalled = False
        self.delay = 0.0
        #: How many connections were accepted so far.
        self.accepted = 0
        self._drop: bytes | None = None
        self.dropped = threading.Event()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []

    @property
    def dsn(self) -> str:
        """The upstream's conninfo, with the proxy in place of the server and without TLS."""
        return make_conninfo(
            self._upstream,
            host="127.0.0.1",
            hostaddr="",
            port=self.port,
            sslmode="disable",
            gssencmode="disable",
        )

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        with self._lock:
            return len(self._pairs)

    def start(self) -> Self:
        """Listen. The port is chosen at the first start and kept."""
        self._stopping.clear()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port = self.port or free_port()
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        # So that the accepting thread sees the stop: closing a socket does not wake it.
        listener.settimeout(0.05)
        self._spawn(self._accept, listener)
        return self

    def stop(self) -> None:
        """Reset all connections and listen no more."""
        self._stopping.set()
        self.cut()
        for thread in self._threads:
            thread.join(10)
        self._threads.clear()

    def cut(self) -> None:
        """Reset the open connections, as a failing network or a killed server does."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            _reset(*pair)

    def drop_next_answer(self, containing: bytes = b"") -> None:
        """Lose the server's answer to the next request with these bytes; `dropped` tells when."""
        self.dropped.clear()
        self._drop = containing

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while not self._stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    client, _ = listener.accept()
                    self.accepted += 1
                    self._join(client)

    def _join(self, client: socket.socket) -> None:
        try:
            server = _connect(self._upstream)
        except OSError:
            _reset(client)
            return
        with self._lock:
            self._pairs.append((client, server))
        self._spawn(self._pass, client, server)

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        """Carry bytes both ways until one side ends or the pair is cut."""
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError, ValueError):
            selector.register(client, selectors.EVENT_READ)
            selector.register(server, selectors.EVENT_READ)
            losing = False
            while not self._stopping.is_set() and client.fileno() >= 0:
                # A short wait: a stall ends, or a cut happens, without any bytes arriving.
                ready = [] if self.stalled else selector.select(0.02)
                if self.stalled:
                    self._stopping.wait(0.02)
                for key, _ in ready:
                    source = client if key.fileobj is client else server
                    piece = source.recv(65536)
                    if not piece or (losing and source is server):
                        self._forget(client, server)
                        # Set last: who waits for it finds the connection gone.
                        return self.dropped.set() if piece else None
                    if source is client:
                        losing = losing or self._wants_loss(piece)
                        server.sendall(piece)
                    else:
                        self._stopping.wait(self.delay)
                        client.sendall(piece)
        self._forget(client, server)
        return None

    def _wants_loss(self, piece: bytes) -> bool:
        if self._drop is None or self._drop not in piece:
            return False
        self._drop = None
        return True

    def _forget(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            if (client, server) in self._pairs:
                self._pairs.remove((client, server))
        _reset(client, server)


def _connect(upstream: str) -> socket.socket:
    """A raw connection to the server that a conninfo names."""
    # libpq knows the defaults of host and port.
    info = {d.keyword.decode(): d.val for d in psycopg.pq.Conninfo.get_defaults()}
    given = conninfo_to_dict(upstream)
    port = int(given.get("port") or (info["port"] or b"5432"))
    host = str(given.get("hostaddr") or given.get("host") or "127.0.0.1")
    if not host.startswith("/"):
        return socket.create_connection((host, port), timeout=10)
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{host}/.s.PGSQL.{port}")
    return server


def _reset(*sockets: socket.socket) -> None:
    """Close with RST where there is such a thing."""
    for end in sockets:
        with contextlib.suppress(OSError):
            # (on, 0 seconds): unsent bytes are thrown away and the other side sees a reset.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
