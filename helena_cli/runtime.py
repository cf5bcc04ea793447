"""Builds what a command or a script needs from the settings, and closes it in reverse order.

Closing order: the engine drains, then the spool closes, then the embedded server stops: a server
that stopped first would leave the last operations behind.
"""

import hashlib
import os
import platform
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from helena_cli.batch import disk, naming
from helena_cli.batch.cycle import Cycle, Policy
from helena_cli.batch.engine import Engine
from helena_cli.batch.lease import Lease
from helena_cli.batch.spool import Spool
from helena_cli.batch.trouble import translated
from helena_cli.errors import DatabaseUnreachable, HelenaError
from helena_cli.settings import Settings

# psycopg costs more than everything else together, and many callers never need it.
if TYPE_CHECKING:
    from helena_cli.database.checkup import Checkup
    from helena_cli.database.connection import Connection, Target
    from helena_cli.database.embedded import EmbeddedServer

#: How long a command waits for the host's third connection while another command uses it, seconds.
CONNECTION_WAIT = 30.0

#: How long a command waits for the lease of another flusher that is about to end, seconds.
LEASE_WAIT = 5.0

#: How long a command waits for a flusher that gives no sign of life, seconds.
SILENCE = 60.0


class Runtime:
    """The parts of one process, each made on first use. A context manager; `close` drains."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.remaining = 0
        self.dead = 0
        self.left_to_another = False
        #: What the first contact has created in the embedded database.
        self.created: list[str] = []
        self._begin()
        _runtimes.add(self)

    def _begin(self) -> None:
        """Have no parts yet."""
        self._lock = threading.RLock()
        self._spool: Spool | None = None
        self._engine: Engine | None = None
        self._server: EmbeddedServer | None = None
        self._embedded_dsn: str | None = None
        self._stack = ExitStack()
        # Registered first, so that the server stops last.
        self._stack.callback(self._stop_server)

    def _forget(self) -> None:
        """In a forked child: leave the parts to the parent and make others when they are needed."""
        # Not even thrown away: a connection that ends here would end the parent's.
        _inherited.append((self._engine, self._stack))
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drain the engine and close everything.

        `remaining` then says what stays in the spool, `left_to_another` whether another process of
        this host writes that, `dead` how many operations the database refused this process.
        """
        self._stack.close()

    @cached_property
    def target(self) -> "Target":
        """Where the database is. Raises ConfigurationError."""
        from helena_cli.database import connection

        return connection.resolve(self.settings)

    def dsn(self) -> str:
        """The address of the database, started if need be. It may hold a password."""
        return self._started().dsn

    def direct_target(self) -> "Target":
        """The same past a pooler, where [database] direct_dsn names a way; ready to connect to.

        Raises ConfigurationError.
        """
        from helena_cli.database import target

        return self._started() if self.target.embedded else target.resolve_direct(self.settings)

    @cached_property
    def state_dir(self) -> Path:
        """The private directory of spool and locks, made if need be. Raises SpoolUnavailable."""
        path = self.settings.state_dir
        with translated(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        disk.refuse_network(path)
        disk.warn_if_shared(path)
        return path

    @property
    def spool(self) -> Spool:
        """The queue of the target database."""
        if self._spool is None:
            with self._lock:
                if self._spool is None:
                    self._spool = self._open_spool()
                    self._stack.callback(self._spool.close)
        return self._spool

    @property
    def engine(self) -> Engine:
        """The engine; its thread starts with the first operation, or with `engine.start()`."""
        if self._engine is None:
            with self._lock:
                if self._engine is None:
                    self._engine = self._make_engine()
        return self._engine

    def _make_engine(self) -> Engine:
        from helena_cli.database.writer import PostgresWriter

        spool, cycle_spool = self.spool, self._open_spool()
        batch = self.settings.batch
        policy = Policy(
            size=batch.size,
            interval=batch.interval,
            max_size=batch.max_size,
            max_bytes=batch.max_bytes,
            lane_timeout=batch.lane_timeout,
            shutdown_timeout=batch.shutdown_timeout,
        )
        writer = PostgresWriter(self.connect, host=platform.node())
        cycle = Cycle(cycle_spool, writer, policy, on_target=self._learn_target)
        engine = Engine(spool, cycle_spool, cycle, writer, self._lease("lease"))
        self._stack.callback(self._close_engine, engine)
        return engine

    def connect(self, purpose: str) -> "Connection":
        """A connection of the caller's own, for what a person asks for: `status`, `init`.

        Raises DatabaseUnreachable.
        """
        from helena_cli.database import connection

        try:
            return connection.connect(self._started(), application=purpose)
        except DatabaseUnreachable:
            # The next attempt starts the embedded server again if it died.
            self._embedded_dsn = None
            raise

    def checkup(self, *, sparing: bool = False) -> "Checkup":
        """Looks at the database and never hangs, for `status`. A context manager.

        Raises DatabaseUnreachable when the embedded server does not start.
        """
        from helena_cli.database.checkup import Checkup
        from helena_cli.database.door import Door

        door = Door(self._spool_path.with_suffix(".barred"))
        return Checkup(self._started(), door, sparing=sparing)

    @contextmanager
    def connection(
        self, application: str, *, wait: float = CONNECTION_WAIT
    ) -> Iterator["Connection"]:
        """The host's third connection: whoever needs it waits until no other command uses it.

        Raises DatabaseUnreachable, or HelenaError when another command keeps it too long.
        """
        with self.turn(wait), self.connect(application) as connection:
            yield connection

    @contextmanager
    def turn(self, wait: float = CONNECTION_WAIT) -> Iterator[None]:
        """The right to open the host's third connection.

        Raises HelenaError when another command keeps it longer than `wait` seconds.
        """
        lease = self._lease("connection")
        if not lease.acquire(wait):
            raise HelenaError(
                "Another Helena command of this host uses the database.",
                remedy="Wait until it is done, or end it; helena status shows the queue meanwhile.",
            )
        try:
            yield
        finally:
            lease.release()

    def flusher_running(self) -> bool:
        """Whether some process of this host holds the lease now."""
        return self._lease("lease").held_by_anyone()

    @contextmanager
    def no_flusher(self) -> Iterator[None]:
        """While this lasts no process of this host writes. Raises HelenaError when one does."""
        lease = self._lease("lease")
        if not lease.acquire():
            raise HelenaError(
                "A process of this host is writing this queue.",
                remedy="End it first; helena status names it.",
            )
        try:
            yield
        finally:
            lease.release()

    def become_flusher(self) -> None:
        """Make sure that no other process writes until this one ends.

        Raises HelenaError when another flusher of this host goes on.
        """
        self.engine.start()
        deadline = time.monotonic() + LEASE_WAIT
        while not self.engine.flushing:
            if time.monotonic() > deadline:
                flusher = self.spool.flusher()
                raise HelenaError(
                    f"Another process writes to this database: pid {flusher and flusher.pid}.",
                    remedy="End it first, so that nothing it still writes comes in between.",
                )
            time.sleep(0.05)

    def drain(self) -> None:
        """Wait until nothing more can be written, whichever process flushes.

        Raises the reason, for example DatabaseUnreachable, when flushing keeps failing, and
        HelenaError when the flusher is another process and gives no sign of life.
        """
        started = time.time()
        failures = self.spool.flushes().failures
        while not self.engine.flush(timeout=0.5):
            failure = self.engine.failure
            if failure is not None and failure.count >= (3 if failure.cause else 8):
                raise failure.cause or DatabaseUnreachable(failure.message, remedy=failure.remedy)
            self._check_flusher(started)
            flushes = self.spool.flushes()
            last = flushes.last
            if self.engine.flushing or last is None or last.error is None or last.at < started:
                failures = flushes.failures
            elif flushes.failures - failures >= 3:
                raise DatabaseUnreachable(
                    f"The flusher of this host cannot write: {last.error}",
                    remedy="The operations stay queued. See: helena status.",
                )

    def _check_flusher(self, waiting_since: float) -> None:
        flusher = self.spool.flusher()
        if self.engine.flushing or flusher is None:
            return
        if time.time() - max(waiting_since, flusher.heartbeat) > SILENCE:
            raise HelenaError(
                f"The flusher of this host, pid {flusher.pid}, gives no sign of life.",
                remedy="Wake it up or end it; the operations stay queued, and the next process "
                "writes them.",
            )

    def other_spools(self) -> list[Path]:
        """The spools of other target databases in the state directory."""
        return sorted(path for path in self.state_dir.glob("*.spool") if path != self._spool_path)

    @cached_property
    def _spool_path(self) -> Path:
        return naming.spool_path(self._own_spool_path)

    @cached_property
    def _own_spool_path(self) -> Path:
        key = self.target.key
        # The hash keeps apart what is equal after shortening.
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.state_dir / f"{key[:60]}-{digest}.spool"

    def _learn_target(self, target_id: str) -> None:
        naming.learn(self._spool_path, target_id)

    def _open_spool(self) -> Spool:
        return Spool.open(
            self._spool_path,
            durability=self.settings.spool.durability,
            max_bytes=self.settings.spool.max_bytes,
            max_operation_bytes=self.settings.batch.max_operation_bytes,
        )

    def _lease(self, purpose: str) -> Lease:
        return Lease(self._spool_path.with_suffix(f".{purpose}"))

    def _close_engine(self, engine: Engine) -> None:
        self.remaining = engine.close()
        self.left_to_another = engine.left_to_another
        self.dead = engine.dead

    def _started(self) -> "Target":
        """The target; the embedded server is started, and given its tables, on first use."""
        if not self.target.embedded:
            return self.target
        from msgspec.structs import replace

        from helena_cli.database import connection, schema

        with self._lock:
            known = self._embedded_dsn
            target = replace(self.target, dsn=known or self._start_embedded())
            if known is None:
                with connection.connect(target, application="init") as fresh:
                    self.created = schema.initialise(fresh)
                    schema.add_inspection(fresh)
                self._embedded_dsn = target.dsn
            return target

    def _start_embedded(self) -> str:
        from helena_cli.database.embedded import EmbeddedServer

        if self._server is None:
            self._server = EmbeddedServer(self.state_dir / "postgres")
        return self._server.start()

    def _stop_server(self) -> None:
        if self._server is not None:
            self._server.stop()


_runtimes: "weakref.WeakSet[Runtime]" = weakref.WeakSet()
_inherited: list[object] = []
_forking: list[Runtime] = []
_one_fork = threading.Lock()


def _before_fork() -> None:
    """Wait for parts in the making: for a half-done import the child would wait for ever."""
    _one_fork.acquire()
    for runtime in list(_runtimes):
        runtime._lock.acquire()
        _forking.append(runtime)


def _after_fork() -> None:
    while _forking:
        _forking.pop()._lock.release()
    _one_fork.release()


def _after_fork_in_child() -> None:
    _after_fork()
    for runtime in list(_runtimes):
        runtime._forget()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)
