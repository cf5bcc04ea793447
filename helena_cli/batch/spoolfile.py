"""The SQLite file under the spool: opening, transactions, damage, forks.

Every write takes three steps: the gate, a look whether the file at the path is still the one that
is open, and BEGIN IMMEDIATE (a deferred BEGIN that turns into a write would fail at once when
another process writes). The gate is a file lock for one at a time: the writers of all processes,
whoever opens the file, and the repair of a damaged one. SQLite alone lets writers queue up too, but
in sleeps of milliseconds.
"""

import fcntl
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

from helena_cli.batch import fold, identity, salvage, trouble
from helena_cli.batch.gate import wait_for_lock
from helena_cli.batch.inbox import Inbox, InboxFull, InboxNew, put_on_disk
from helena_cli.batch.record import Row
from helena_cli.batch.tally import Tally
from helena_cli.batch.trouble import is_damage, is_full, translated
from helena_cli.errors import SpoolError

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Work = Callable[[sqlite3.Connection], Result]
Durability = Literal["process", "power"]

#: How long a writer waits for another one, in seconds; a write takes milliseconds.
BUSY_TIMEOUT = 30.0

#: The write-ahead log is folded into the file when it is larger than this, in bytes.
CHECKPOINT_BYTES = 32 * 1024 * 1024

#: What waits in the inbox is folded into the tables when it is larger than this, in bytes; so is
#: all of it when its file is larger than that.
INBOX_BYTES = 64 * 1024 * 1024
LARGEST_INBOX = 4 * INBOX_BYTES

#: Up to so many bytes of records are counted where they are: it holds up the flusher.
COUNTED = 8 * 1024 * 1024

#: How often an operation is put into an inbox that was taken away.
TRIES = 3


class SpoolFile:
    """One open spool file. Safe for threads; a lock makes its writers queue up.

    Raises SpoolUnavailable when the file can neither be opened nor made, SpoolFull when the disk is
    full. A fork closes it; both processes open it again when they use it.
    """

    def __init__(
        self, path: Path, *, durability: Durability, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path.absolute()
        self._durability = durability
        self._clock = clock
        self._lock = threading.RLock()
        self._gate = -1
        self._connection: sqlite3.Connection | None = None
        self._inode = -1
        self._accepted = False
        #: Where the records end that the open transaction makes superfluous.
        self._folded = 0
        self._inbox = Inbox(Path(f"{self.path}.inbox"), sync=durability == "power", clock=clock)
        with _one_fork:
            _files.add(self)
        try:
            self.read(lambda _: None, fresh=False)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; a later use opens it again.

        What was accepted here goes into the tables first, where it can.
        """
        with suppress(SpoolError):
            # Who has accepted nothing leaves what others have where it is.
            if self._connection is not None and self._accepted:
                self.fold()
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            self._disconnect()
            self._inbox.close()
            if self._gate >= 0:
                os.close(self._gate)
                self._gate = -1

    def accept(self, rows: Sequence[Row]) -> range:
        """Put operations into the inbox, all or none: durable when it returns the ids."""
        with self._lock:
            self._accepted = True
            try:
                return self._inbox.append(rows)
            except (InboxFull, InboxNew):
                return self._accept_anew(rows)
            except OSError as error:
                with translated(self.path):
                    raise error

    def _accept_anew(self, rows: Sequence[Row]) -> range:
        for _ in range(TRIES):
            self.transact(self._begin_inbox)
            # It may be taken away, or filled by others, again at once.
            with translated(self.path), suppress(InboxNew, InboxFull):
                return self._inbox.append(rows)
        raise trouble.no_answer(self.path, "its inbox is taken away or full again and again")

    def new_ids(self, connection: sqlite3.Connection, count: int) -> range:
        """Ids for rows of this transaction.

        What was accepted before them is folded first: a lane never skips an id.
        """
        self._begin_inbox(connection)
        ids = self._inbox.reserve(count)
        self._fold_inbox(connection)
        return ids

    def transact(self, work: Work[Result], *, fresh: bool = True) -> Result:
        """Run `work` in a write transaction, on all that was accepted before.

        Without `fresh` what is in the inbox stays there. A damaged file is repaired first and
        `work` run again.
        """
        return self._run(lambda: self._attempt_write(work, fresh=fresh))

    def read(self, work: Work[Result], *, fresh: bool = True) -> Result:
        """Run `work` in one consistent snapshot, of all that was accepted before.

        Without `fresh` what is in the inbox stays there.
        """
        return self._run(lambda: self._attempt_read(work, fresh=fresh))

    def count(self, work: Callable[[sqlite3.Connection, Tally], Result]) -> Result:
        """Run `work` in one snapshot of the tables, with the numbers of what is in the inbox."""
        with self._lock, translated(self.path):
            start, end = self._inbox.bounds()

        def counted(connection: sqlite3.Connection, inbox: Inbox) -> tuple[Result] | None:
            if inbox.owner() != identity.spool_id(connection):
                return None
            tally = inbox.tally(fold.folded(connection))
            return None if tally is None else (work(connection, tally),)

        found = self.look(counted) if 0 < end - start <= COUNTED else None
        # Too much, damaged, or left by another spool: then it is brought into the tables.
        return found[0] if found else self.read(lambda c: work(c, Tally()), fresh=end > start)

    def look(self, work: Callable[[sqlite3.Connection, Inbox], Result]) -> Result:
        """Run `work` on tables and inbox as they are; nobody folds meanwhile."""

        def attempt() -> Result:
            connection = self._current() or self._open()
            return _transaction(connection, "BEGIN", lambda c: work(c, self._inbox))

        return self._run(lambda: self._behind_gate(attempt))

    def peek(self, work: Callable[[Inbox], Result]) -> Result:
        """Run `work` on the inbox alone, which may be folded and filled anew meanwhile."""
        with self._lock, translated(self.path):
            return work(self._inbox)

    def take_out(self, first_id: int, end: int, work: Work[bool]) -> bool:
        """Forget the records of the inbox from this one on, up to `end`.

        If `work` has noted what became of them.
        """

        def whole(connection: sqlite3.Connection) -> bool:
            noted = work(connection)
            # Another inbox, put in its place meanwhile, holds others that nobody has noted.
            here = self._inbox.first_id() == first_id
            self._folded = end if noted and here else 0
            return noted

        return self.transact(whole, fresh=False)

    def fold(self) -> None:
        """Bring what is in the inbox into the tables."""
        self.read(lambda _: None)

    def tidy(self) -> None:
        """Bring the inbox into the tables when too much waits in it, or its file is too large.

        While a lot waits, what has been written already takes room in the file too.
        """
        with self._lock, translated(self.path):
            start, end = self._inbox.bounds()
            if end - start > INBOX_BYTES or end > LARGEST_INBOX:
                self.fold()

    def fresh_bytes(self) -> int:
        """How large the inbox is, with what is done with but still takes room."""
        with self._lock, translated(self.path):
            return self._inbox.bounds()[1]

    def last_id(self) -> int:
        """The highest id that was given out."""
        with self._lock, translated(self.path):
            try:
                return self._inbox.last_id()
            except InboxNew:
                self.transact(self._begin_inbox)
                return self._inbox.last_id()

    def first_fresh_id(self) -> int | None:
        """The id of the oldest operation in the inbox."""
        with self._lock, translated(self.path):
            return self._inbox.first_id()

    def sync(self) -> None:
        """Put on the disk what has been committed so far, without holding up the appenders.

        SQLite itself syncs the log under its write lock. The log carries none of SQLite's locks, so
        that opening and closing it here releases none.
        """
        with translated(self.path), suppress(FileNotFoundError):
            wal = os.open(f"{self.path}-wal", os.O_RDONLY | os.O_CLOEXEC)
            try:
                put_on_disk(wal)
            finally:
                os.close(wal)

    def checkpoint(self, *, at_least: int = CHECKPOINT_BYTES) -> None:
        """Fold a log of so many bytes into the file. Only the holder of the lease does it."""
        if trouble.room(self.path) < 2 * trouble.ROOM:
            # A long log takes the room that it needs itself to be folded.
            at_least = min(at_least, trouble.ROOM // 16)
        with suppress(FileNotFoundError):
            if os.stat(f"{self.path}-wal").st_size < at_least:
                return
            # What cannot be folded now is folded the next time.
            with suppress(SpoolError):
                self._run(self._attempt_checkpoint)

    def _run(self, attempt: Callable[[], Result]) -> Result:
        with self._lock, translated(self.path):
            try:
                return attempt()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                # As text: a handler that kept the error would keep its cursors, and their locks.
                log.error("the spool %s is damaged: %s", self.path, str(error))
            self._behind_gate(self._repair)
            return attempt()

    def _attempt_write(self, work: Work[Result], *, fresh: bool = True) -> Result:
        # The lock may be there before an interrupt is: to unlock what is not locked does no harm.
        try:
            self._enter_gate()
            connection = self._current() or self._open()
            try:
                return self._write(connection, work, fresh=fresh)
            except sqlite3.OperationalError as error:
                if not is_full(error):
                    raise
            # A log that is folded has room, and who settles makes more of it: only the inbox waits.
            with suppress(sqlite3.OperationalError):
                _checkpoint(connection)
            return self._write(connection, work, fresh=False)
        finally:
            self._leave_gate()

    def _write(self, connection: sqlite3.Connection, work: Work[Result], *, fresh: bool) -> Result:
        def whole(connection: sqlite3.Connection) -> Result:
            self._folded = 0
            if fresh:
                self._fold_inbox(connection)
            return work(connection)

        result = _transaction(connection, "BEGIN IMMEDIATE", whole)
        if self._folded:
            # They are in the tables now, or done with, so they need not be in the inbox.
            self._inbox.release(self._folded)
        if fresh and self._inbox.owner() != (spool_id := identity.spool_id(connection)):
            self._inbox.belong_to(spool_id)
        return result

    def _fold_inbox(self, connection: sqlite3.Connection) -> None:
        start, end = self._inbox.bounds()
        self._folded = fold.fold(connection, self._inbox, start, end) if end else 0

    def _begin_inbox(self, connection: sqlite3.Connection) -> None:
        """Tell a new inbox which ids there were."""
        last = identity.last_id(connection)
        if self._inbox.begin_after(last) and last:
            log.error("the inbox of %s is gone; what was in it is lost", self.path)

    def _attempt_read(self, work: Work[Result], *, fresh: bool) -> Result:
        if fresh and not self._inbox.is_empty():
            # On a full disk one can still read what is in the tables.
            self._attempt_write(lambda _: None)
        connection = self._current() or self._behind_gate(self._open)
        return _transaction(connection, "BEGIN", work)

    def _attempt_checkpoint(self) -> bool:
        connection = self._current() or self._behind_gate(self._open)
        # Appenders go on meanwhile. If they never pause the log never starts anew, and grows: then
        # they wait for the rest of it.
        return _checkpoint(connection) or self._behind_gate(lambda: _checkpoint(connection))

    def _behind_gate(self, work: Callable[[], Result]) -> Result:
        try:
            self._enter_gate()
            return work()
        finally:
            self._leave_gate()

    def _enter_gate(self) -> None:
        """Wait for the gate, but not for ever: its holder may be a stopped process."""
        if self._gate < 0:
            self._gate = os.open(f"{self.path}.gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            wait_for_lock(self._gate)
        except BlockingIOError:
            raise trouble.no_answer(self.path, "another process does not let it go") from None

    def _leave_gate(self) -> None:
        if self._gate >= 0:
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    def _current(self) -> sqlite3.Connection | None:
        """The connection, unless another file lies at the path by now: a repair replaces it."""
        if self._connection is not None:
            with suppress(FileNotFoundError):
                if os.stat(self.path).st_ino == self._inode:
                    return self._connection
        return None

    def _open(self) -> sqlite3.Connection:
        """Open or make the file, alone behind the gate."""
        self._disconnect()
        # Never open a file that exists: closing it would drop every POSIX lock that SQLite holds on
        # it.
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if not os.stat(self.path).st_size and _size(f"{self.path}-wal"):
            log.error("the spool %s is empty beside its log", self.path)
            log.error("%s", salvage.rebuild(self.path, self._clock()))
        self._inode = os.stat(self.path).st_ino
        connection = _connect(self.path, self._durability)
        try:
            identity.prepare(connection, self.path, self._clock())
        except BaseException:
            connection.close()
            raise
        if os.stat(self.path).st_size <= salvage.PAGE:
            # The log of a new file goes into it now: on a full disk it could not be folded later.
            _checkpoint(connection)
        self._connection = connection
        self._begin_inbox(connection)
        self._claim_inbox(connection)
        return connection

    def _claim_inbox(self, connection: sqlite3.Connection) -> None:
        """Take what another spool has left out of the inbox: it must not mix with what comes."""
        spool_id = identity.spool_id(connection)
        strange = self._inbox.owner() not in ("", spool_id)
        if strange and not identity.last_id(connection):
            log.error("%s is new beside an older inbox; what was in the old one is lost", self.path)
        if strange and not self._inbox.is_empty():
            _transaction(connection, "BEGIN IMMEDIATE", self._fold_inbox)
            self._inbox.release(self._folded)
        if self._inbox.is_empty():
            self._inbox.belong_to(spool_id)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _repair(self) -> None:
        """Replace the damaged file by what can be salvaged of it, alone behind the gate."""
        self._disconnect()
        with suppress(FileNotFoundError):
            if os.stat(self.path).st_ino != self._inode:
                # Another process repaired it while this one waited.
                return
            log.error("%s", salvage.rebuild(self.path, self._clock()))


def _transaction(connection: sqlite3.Connection, begin: str, work: Work[Result]) -> Result:
    try:
        # Within the try: an interrupt may come as soon as the transaction is open.
        connection.execute(begin)
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise
    return result


def _checkpoint(connection: sqlite3.Connection) -> bool:
    """Whether the whole log is in the file now."""
    _, frames, folded = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return bool(frames == folded)


def _connect(path: Path, durability: Durability) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        if durability == "power":
            connection.execute("PRAGMA synchronous = FULL")
            # On macOS alone fsync leaves the data in the drive's cache.
            connection.execute("PRAGMA fullfsync = ON")
        else:
            connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
        # Once folded, a log that was large is cut, or it would be folded again and again.
        connection.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_BYTES // 2}").fetchall()
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


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


_files: "weakref.WeakSet[SpoolFile]" = weakref.WeakSet()
_forking: list[SpoolFile] = []
_one_fork = threading.Lock()


def _before_fork() -> None:
    """Let no connection be inherited.

    SQLite notes within the process which locks it has. A child that inherited these notes would
    believe that it held its parent's locks, and its parent would delete the log under its feet.
    """
    _one_fork.acquire()
    for file in list(_files):
        file._lock.acquire()
        _forking.append(file)
        # In the middle of a transaction of this very thread nothing can be done.
        if file._connection is None or not file._connection.in_transaction:
            file._let_go()


def _after_fork() -> None:
    while _forking:
        _forking.pop()._lock.release()
    _one_fork.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
