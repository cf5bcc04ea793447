"""The SQLite file under the spool: opening, transactions, damage, and whether it is still itself.

Every write takes three steps: the gate, a look whether the file at the path is still the one that
is open, and BEGIN IMMEDIATE (a deferred BEGIN that turns into a write would fail at once when
another process writes). The gate is a file lock for one at a time: the writers of all processes,
and the repair of a damaged file. SQLite alone lets writers queue up too, but in sleeps of
milliseconds.
"""

import errno
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

from helena_cli.errors import SpoolError, SpoolFull, SpoolUnavailable

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Work = Callable[[sqlite3.Connection], Result]
Durability = Literal["process", "power"]

#: How long a writer waits for another one, in seconds; a write takes milliseconds.
BUSY_TIMEOUT = 30.0
GATE_POLL = 0.0001

#: The write-ahead log is folded into the file when it is larger than this, in bytes.
CHECKPOINT_BYTES = 32 * 1024 * 1024


class SpoolFile:
    """One open spool file. Safe for threads; a lock makes its writers queue up.

    Raises SpoolUnavailable when the file can neither be opened nor made, SpoolFull when the disk is
    full.
    """

    def __init__(
        self, path: Path, *, durability: Durability, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self._durability = durability
        self._clock = clock
        self._lock = threading.RLock()
        self._gate = -1
        self._connection: sqlite3.Connection | None = None
        self._inode = -1
        with translated(path):
            self._gate = os.open(f"{path}.gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.transact(lambda _: None)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Whoever closes it last makes SQLite fold the WAL into it."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._gate >= 0:
                os.close(self._gate)
                self._gate = -1

    def transact(self, work: Work[Result]) -> Result:
        """Run `work` in a write transaction.

        A damaged file is repaired first and `work` run again.
        """
        return self._run(work, self._attempt_write)

    def read(self, work: Work[Result]) -> Result:
        """Run `work` in one consistent snapshot."""
        return self._run(work, self._attempt_read)

    def sync(self) -> None:
        """Put on the disk what has been committed so far, without holding up the appenders.

        SQLite itself syncs the WAL under its write lock. The WAL carries none of SQLite's locks, so
        that opening and closing it here releases none.
        """
        with suppress(FileNotFoundError):
            wal = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(wal)
            finally:
                os.close(wal)

    def checkpoint(self, *, at_least: int = CHECKPOINT_BYTES) -> None:
        """Fold a WAL of so many bytes into the file. Only the holder of the lease does it."""
        with self._lock, suppress(sqlite3.OperationalError, FileNotFoundError):
            if os.stat(f"{self.path}-wal").st_size >= at_least:
                self._open().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def used_bytes(self) -> int:
        """The bytes of the pages in use; the file itself never shrinks."""
        with self._lock:
            return used_bytes(self._open())

    def _run(self, work: Work[Result], attempt: Callable[[Work[Result]], Result]) -> Result:
        with self._lock, translated(self.path):
            try:
                return attempt(work)
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                log.error("the spool %s is damaged: %s", self.path, error)
            self._repair()
            return attempt(work)

    def _attempt_write(self, work: Work[Result]) -> Result:
        self._enter_gate()
        try:
            return _transaction(self._open(), "BEGIN IMMEDIATE", work)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    def _attempt_read(self, work: Work[Result]) -> Result:
        return _transaction(self._open(), "BEGIN", work)

    def _enter_gate(self) -> None:
        """Wait for the gate, but not for ever: its holder may be a stopped process."""
        deadline = time.monotonic() + BUSY_TIMEOUT
        while True:
            try:
                fcntl.flock(self._gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise sqlite3.OperationalError("another process does not let it go") from None
                time.sleep(GATE_POLL)
            else:
                return

    def _open(self) -> sqlite3.Connection:
        """The connection to the file that lies at the path now: a repair replaces it."""
        if self._connection is not None:
            try:
                if os.stat(self.path).st_ino == self._inode:
                    return self._connection
            except FileNotFoundError:
                pass
            self._connection.close()
            self._connection = None
        # Never open a file that exists: closing it would drop every POSIX lock that SQLite holds on
        # it.
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._inode = os.stat(self.path).st_ino
        connection = _connect(self.path, self._durability)
        try:
            prepare(connection, self.path, self._clock())
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _repair(self) -> None:
        """Move the damaged file aside and salvage what can be read, alone behind the gate."""
        from helena_cli.batch.salvage import salvage

        self._enter_gate()
        try:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if not looks_damaged(self.path):
                return
            aside = Path(f"{self.path}.damaged-{time.time_ns()}")
            for suffix in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
            report = salvage(aside, self._open())
            log.error("moved it to %s; %s", aside, report)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)


def _transaction(connection: sqlite3.Connection, begin: str, work: Work[Result]) -> Result:
    connection.execute(begin)
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    return result


def _connect(path: Path, durability: Durability) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
    )
    try:
        level = "FULL" if durability == "power" else "NORMAL"
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute(f"PRAGMA synchronous = {level}")
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
        # Statement journals in files would cost more than the statements.
        connection.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        connection.close()
        raise
    return connection


def used_bytes(connection: sqlite3.Connection) -> int:
    """Pages in use times their size."""
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the file is not, or no longer, a database."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite and of the file system into Helena's."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translate(error, getattr(error, "sqlite_errorcode", 0) & 0xFF, path) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = sqlite3.SQLITE_FULL if full else sqlite3.SQLITE_CANTOPEN
        raise _translate(error, code, path) from error


def _translate(error: Exception, code: int, path: Path) -> SpoolError:
    if code == sqlite3.SQLITE_FULL:
        return SpoolFull(
            f"The disk of the queue is full ({path}); the operation was not accepted.",
            remedy="Free some space, or move the state directory (HELENA_STATE_DIR).",
        )
    if code in (
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_IOERR,
    ):
        return SpoolUnavailable(
            f"The queue {path} cannot be used: {error}.",
            remedy="Helena needs a local directory that it may write to: set HELENA_STATE_DIR.",
        )
    return SpoolError(
        f"The queue {path} did not answer: {error}.",
        remedy="Another process may hold it; try again, and look with: helena status.",
    )
