"""The SQLite file under the spool: opening, transactions, damage, and whether it is still itself.

Every write takes three steps: the gate, a look whether the file at the path is still the one that
is open, and BEGIN IMMEDIATE (a deferred BEGIN that turns into a write would fail at once when
another process writes). The gate is a file lock for one at a time: the writers of all processes,
and the repair of a damaged file. SQLite alone lets writers queue up too, but in sleeps of
milliseconds.
"""

import errno
import fcntl
import json
import logging
import os
import platform
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
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

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;

CREATE TABLE counters (
    last_id INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL DEFAULT 0,
    written INTEGER NOT NULL DEFAULT 0,
    coalesced INTEGER NOT NULL DEFAULT 0,
    dropped INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0,
    flushes INTEGER NOT NULL DEFAULT 0,
    flushed INTEGER NOT NULL DEFAULT 0,
    rows INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0
);

INSERT INTO counters DEFAULT VALUES;

CREATE TABLE lanes (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    inserts INTEGER NOT NULL DEFAULT 0,
    updates INTEGER NOT NULL DEFAULT 0,
    messages INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL DEFAULT 0,
    last_id INTEGER NOT NULL DEFAULT 0,
    nonces TEXT NOT NULL DEFAULT '',
    reason TEXT, sqlstate TEXT, remedy TEXT,
    since REAL, retry_at REAL,
    tries INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE operations (
    id INTEGER PRIMARY KEY,
    lane INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data BLOB NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    held_since REAL, retry_at REAL
);

CREATE INDEX operations_by_lane ON operations (lane);

-- The counts of a lane change with its rows, and one page with every append.
CREATE TRIGGER operation_enters AFTER INSERT ON operations BEGIN
    UPDATE lanes SET
        inserts = inserts + (new.kind = 'insert'),
        updates = updates + (new.kind = 'update'),
        messages = messages + (new.kind = 'message'),
        bytes = bytes + length(new.data),
        accepted = accepted + 1,
        last_id = new.id
    WHERE id = new.lane;
END;

CREATE TRIGGER operation_leaves AFTER DELETE ON operations BEGIN
    UPDATE lanes SET
        inserts = inserts - (old.kind = 'insert'),
        updates = updates - (old.kind = 'update'),
        messages = messages - (old.kind = 'message'),
        bytes = bytes - length(old.data)
    WHERE id = old.lane;
END;

CREATE INDEX operations_held ON operations (lane, retry_at) WHERE held_since IS NOT NULL;

CREATE TABLE dead_letters (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL, table_name TEXT NOT NULL, data BLOB NOT NULL,
    sqlstate TEXT, message TEXT NOT NULL, constraint_name TEXT,
    attempts INTEGER NOT NULL, failed_at REAL NOT NULL
);

CREATE TABLE flushes (
    at REAL NOT NULL, operations INTEGER NOT NULL, rows INTEGER NOT NULL,
    seconds REAL NOT NULL, error TEXT
);

CREATE TABLE flusher (pid INTEGER, host TEXT, since REAL, heartbeat REAL);

PRAGMA user_version = 1;
"""

#: The state of a row that another spool may have written already.
MOVED = "HL004"


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


def prepare(connection: sqlite3.Connection, path: Path, now: float) -> None:
    """Make the tables of a new file; give a file that was moved or copied a new identity."""
    if not connection.execute("PRAGMA user_version").fetchone()[0]:
        connection.execute("BEGIN IMMEDIATE")
        if not connection.execute("PRAGMA user_version").fetchone()[0]:
            for statement in SCHEMA.split("\n\n"):
                connection.execute(statement)
            connection.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [("spool_id", uuid.uuid4().hex), ("home", home(path))],
            )
        connection.execute("COMMIT")
    (known,) = connection.execute("SELECT value FROM meta WHERE key = 'home'").fetchone()
    if known != home(path):
        connection.execute("BEGIN IMMEDIATE")
        take_new_identity(
            connection, path, now, f"its spool was moved or copied here from {json.loads(known)[1]}"
        )
        connection.execute("COMMIT")


def take_new_identity(connection: sqlite3.Connection, path: Path, now: float, why: str) -> None:
    """Become another spool.

    What is queued may have been written elsewhere, so it becomes dead letters.
    """
    connection.execute(
        "INSERT INTO dead_letters SELECT o.id, o.kind, l.name, o.data, ?, ?, NULL, o.attempts, ?"
        " FROM operations o JOIN lanes l ON l.id = o.lane",
        (MOVED, f"not written: {why}, and may have been written from there", now),
    )
    moved = connection.execute("DELETE FROM operations").rowcount
    connection.execute(
        "UPDATE lanes SET nonces = '', reason = NULL, sqlstate = NULL, remedy = NULL,"
        " since = NULL, retry_at = NULL, tries = 0"
    )
    connection.executemany(
        "INSERT OR REPLACE INTO meta VALUES (?, ?)",
        [("spool_id", uuid.uuid4().hex), ("home", home(path))],
    )
    # What is the target of the original need not be the target of the copy.
    connection.execute("DELETE FROM meta WHERE key = 'target_id'")
    log.error(
        "the spool %s takes a new identity, %d operations are dead letters: %s", path, moved, why
    )


def home(path: Path) -> str:
    """What tells a copy from the original: machine, path and inode, as JSON."""
    return json.dumps([_machine(), str(path.resolve()), os.stat(path).st_ino])


def _machine() -> str:
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip() or platform.node()
    except OSError:
        return platform.node()


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


def looks_damaged(path: Path) -> bool:
    """Read the whole file: another process may have repaired it while this one waited."""
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT)) as connection:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok")
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            return True
        raise


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
