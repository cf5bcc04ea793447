"""Builds what a command or a script needs from the settings, and closes it in reverse order.

Closing order: the engine drains, then the spool closes, then the embedded server stops: a server
that stopped first would leave the last operations behind.
"""

import atexit
import hashlib
import logging
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helena_cli import config
from helena_cli.batch.cycle import Policy
from helena_cli.batch.engine import Engine
from helena_cli.batch.lease import Lease
from helena_cli.batch.spool import Spool
from helena_cli.batch.spoolfile import translated
from helena_cli.errors import DatabaseUnreachable, HelenaError, SpoolUnavailable

# psycopg costs more than everything else together, and many callers never need it.
if TYPE_CHECKING:
    from helena_cli.database.connection import Connection, Target
    from helena_cli.database.embedded import EmbeddedServer

log = logging.getLogger(__name__)

#: File systems on which SQLite's WAL and file locks cannot be relied upon.
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smbfs", "smb3", "afs", "ncpfs", "ceph", "lustre", "beegfs"}
    | {"fuse.sshfs", "glusterfs", "fuse.glusterfs", "davfs", "fuse.davfs2", "webdav", "afpfs"}
)

#: How long a command waits for the host's third connection while another command uses it, seconds.
CONNECTION_WAIT = 30.0


class Runtime:
    """The parts of one process, each made on first use. A context manager; `close` drains."""

    def __init__(self, settings: config.Settings) -> None:
        self.settings = settings
        self._stack = ExitStack()
        self._server: EmbeddedServer | None = None
        self._embedded_dsn: str | None = None
        # Registered first, so that the server stops last.
        self._stack.callback(self._stop_server)
        self._lock = threading.RLock()
        self.remaining = 0

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drain the engine and close everything; `remaining` then says what stays in the spool."""
        self._stack.close()

    @cached_property
    def target(self) -> "Target":
        """Where the database is. Raises ConfigurationError."""
        from helena_cli.database import connection

        return connection.resolve(self.settings)

    @cached_property
    def state_dir(self) -> Path:
        """The private directory of spool and locks, made if need be. Raises SpoolUnavailable."""
        path = self.settings.state_dir
        with translated(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_network_file_system(path)
        return path

    @cached_property
    def spool(self) -> Spool:
        """The queue of the target database."""
        spool = self._open_spool()
        self._stack.callback(spool.close)
        return spool

    @cached_property
    def engine(self) -> Engine:
        """The engine; its thread starts with the first operation, or with `engine.start()`."""
        from helena_cli.database.writer import PostgresWriter

        spool, cycle_spool = self.spool, self._open_spool()
        self._stack.callback(cycle_spool.close)
        batch = self.settings.batch
        policy = Policy(
            size=batch.size,
            interval=batch.interval,
            max_size=batch.max_size,
            max_bytes=batch.max_bytes,
            lane_timeout=batch.lane_timeout,
            shutdown_timeout=batch.shutdown_timeout,
        )
        writer = PostgresWriter(self._connect, host=platform.node())
        engine = Engine(spool, cycle_spool, writer, self._lease("lease"), policy)
        self._stack.callback(self._close_engine, engine)
        return engine

    @contextmanager
    def connection(self, application: str) -> Iterator["Connection"]:
        """The host's third connection: whoever needs it waits until no other command uses it.

        Raises DatabaseUnreachable, or HelenaError when another command keeps it too long.
        """
        lease = self._lease("connection")
        if not lease.acquire(CONNECTION_WAIT):
            raise HelenaError(
                "Another Helena command of this host uses the database.",
                remedy="Wait until it is done, or end it; helena status shows the queue meanwhile.",
            )
        try:
            with self._connect(application) as connection:
                yield connection
        finally:
            lease.release()

    def flusher_running(self) -> bool:
        """Whether some process of this host holds the lease now."""
        return self._lease("lease").held_by_anyone()

    def drain(self) -> None:
        """Wait until nothing more can be written, whichever process flushes.

        Raises the reason, for example DatabaseUnreachable, when flushing keeps failing.
        """
        started = time.time()
        failures = self.spool.flushes().failures
        while not self.engine.flush(timeout=0.5):
            failure = self.engine.failure
            if failure is not None and failure.count >= (3 if failure.cause else 8):
                raise failure.cause or DatabaseUnreachable(failure.message, remedy=failure.remedy)
            flushes = self.spool.flushes()
            last = flushes.last
            if self.engine.flushing or last is None or last.error is None or last.at < started:
                failures = flushes.failures
            elif flushes.failures - failures >= 3:
                raise DatabaseUnreachable(
                    f"The flusher of this host cannot write: {last.error}",
                    remedy="The operations stay queued. See: helena status.",
                )

    def other_spools(self) -> list[Path]:
        """The spools of other target databases in the state directory."""
        return sorted(path for path in self.state_dir.glob("*.spool") if path != self._spool_path)

    @property
    def _spool_path(self) -> Path:
        # The hash keeps apart what is equal after shortening.
        key = self.target.key
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.state_dir / f"{key[:60]}-{digest}.spool"

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

    def _connect(self, purpose: str) -> "Connection":
        from helena_cli.database import connection

        return connection.connect(self._started(), application=purpose)

    def _started(self) -> "Target":
        """The target; the embedded server is started, and given its tables, on first use."""
        from msgspec.structs import replace

        from helena_cli.database import connection, schema

        if not self.target.embedded:
            return self.target
        with self._lock:
            if self._embedded_dsn is None:
                self._embedded_dsn = self._start_embedded()
                target = replace(self.target, dsn=self._embedded_dsn)
                with connection.connect(target, application="init") as fresh:
                    schema.initialise(fresh)
        return replace(self.target, dsn=self._embedded_dsn)

    def _start_embedded(self) -> str:
        from helena_cli.database.embedded import EmbeddedServer

        self._server = EmbeddedServer(self.state_dir / "postgres")
        return self._server.start()

    def _stop_server(self) -> None:
        if self._server is not None:
            self._server.stop()


class BatchEngine:
    """The engine of one process, built from the settings that apply here; a context manager.

    Operations are durable when a call returns and written within the interval, by this process or
    by whichever process of this host flushes. Nothing here waits for the database but `flush`.
    """

    def __init__(self, settings: config.Settings | None = None) -> None:
        self._runtime = Runtime(settings or config.load())

    def __enter__(self) -> "BatchEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_operation(self, kind: str, table: str, data: Mapping[str, Any]) -> int:
        """Accept one operation and return its id.

        `kind` is "insert", "update" or "message"; `table` is a table's name or schema.name; `data`
        maps columns to values. Raises InvalidOperation, SpoolFull or SpoolUnavailable; then nothing
        was queued.
        """
        return self._runtime.engine.add_operation(kind, table, data)

    def add_operations(self, operations: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[int]:
        """Accept many (kind, table, data) at once, all or none, and return their ids in order."""
        return self._runtime.engine.add_operations(operations)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that is queued now is committed, dead, held or in a waiting lane.

        Returns False when that took longer than `timeout` seconds; nothing is lost then.
        """
        return self._runtime.engine.flush(timeout)

    def close(self) -> int:
        """Drain within the shutdown timeout; return how many operations remain in the spool."""
        self._runtime.close()
        if self._runtime.remaining:
            log.warning(
                "%d operations wait in %s; the next process that uses Helena, or `helena"
                " process-pending`, writes them",
                self._runtime.remaining,
                self._runtime.state_dir,
            )
        return self._runtime.remaining


_default: BatchEngine | None = None
_default_lock = threading.Lock()


def default_engine() -> BatchEngine:
    """The engine behind the module-level functions: made on first use, drained at exit."""
    global _default
    with _default_lock:
        if _default is None:
            _default = BatchEngine()
            atexit.register(_default.close)
        return _default


def add_operation(kind: str, table: str, data: Mapping[str, Any]) -> int:
    """Accept one operation with this process's engine: see `BatchEngine.add_operation`."""
    return default_engine().add_operation(kind, table, data)


def add_operations(operations: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[int]:
    """Accept many operations with this process's engine: see `BatchEngine.add_operations`."""
    return default_engine().add_operations(operations)


def flush(timeout: float | None = None) -> bool:
    """Wait until all that is queued now is settled: see `BatchEngine.flush`."""
    return default_engine().flush(timeout)


def _refuse_network_file_system(path: Path) -> None:
    import psutil

    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    place = path.resolve()
    while str(place) not in mounts and place != place.parent:
        place = place.parent
    if mounts.get(str(place), "").lower() in NETWORK_FILE_SYSTEMS:
        raise SpoolUnavailable(
            f"The state directory {path} lies on a network file system ({mounts[str(place)]}).",
            remedy="SQLite is not safe there. Set HELENA_STATE_DIR to a directory on a local disk.",
        )
