"""The inbox: where operations are accepted, in one write, before SQLite gets them in bulk.

A transaction of SQLite costs a caller some fifty microseconds, a write into an open file five. So
an accepted operation is a record in this file. A flush takes it from here if it can; who needs it
in the tables of the spool folds it into them; who only wants numbers counts the records. What a
process wrote survives its death; with `sync` also a power cut.

The file begins with a page of numbers that all processes map: where the records begin and end (one
word, so that a death never leaves half of a change) and the last id. A record that did not get into
`end` was not accepted, and is overwritten by the next one. Ids grow from record to record, so that
a record which SQLite has already is known by its id.
"""

import errno
import fcntl
import logging
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from helena_cli.batch import record
from helena_cli.batch.gate import wait_for_lock
from helena_cli.batch.operation import Operation
from helena_cli.batch.record import Row
from helena_cli.batch.tally import Tally

log = logging.getLogger(__name__)

#: Bytes before the first record.
PAGE = 4096
#: In it: the magic word, the bounds of the records, the last id, and the spool's own id. Each is a
#: native word, aligned, so that it changes at once for whoever looks without the lock.
_BOUNDS, _LAST_ID, _OWNER = 1, 2, slice(3, 7)
_MAGIC = b"helena 1"

#: Seconds after a look at the path in which it is enough that the file has not been deleted: that
#: costs half as much. What comes into a file that was moved a moment ago is moved with it.
LOOK = 0.0002

#: The bounds are 32 bits wide each, the end in the lower half.
_END = 2**32 - 1
LARGEST = _END - PAGE

#: Bytes of records that are counted or moved at once.
SLICE = 1024 * 1024

#: The file begins anew when so many bytes of it are done with, and less than a slice is not.
ANEW = 16 * 1024 * 1024

#: Bytes that a growing inbox leaves free on its disk: without room for a few pages of its own
#: SQLite could not note what was written, and a disk that the inbox has filled would stay full.
RESERVE = 1024 * 1024

#: Bytes after which it looks again how much is free.
_LOOK_EVERY = 64 * 1024


class Content(Struct, frozen=True):
    """What was read: operations, where they end, and whether something there was damaged."""

    operations: list[Operation]
    end: int
    damaged: bool


class InboxFull(Exception):
    """The records take all the room that the file may have; fold them first."""


class InboxNew(Exception):
    """It does not know which ids were given out already; see `begin_after`."""


class Inbox:
    """One open inbox file. Its owner lets one thread at a time in. Raises OSError."""

    def __init__(self, path: Path, *, sync: bool, clock: Callable[[], float]) -> None:
        self._path = os.fspath(path)
        self._sync = sync
        self._clock = clock
        self._fd = self._inode = -1
        self._page: mmap.mmap | None = None
        #: The same page as words, and as signed ones: the ids.
        self._words = self._ids = memoryview(b"")
        #: When the file was last found at the path.
        self._looked = 0.0
        #: Up to here the file may grow before the next look at the disk.
        self._room = 0

    def close(self) -> None:
        """Close the file; a later use opens it again."""
        page, self._page = self._page, None
        self._words.release()
        self._ids.release()
        if page is not None:
            page.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def append(self, rows: Sequence[Row]) -> range:
        """Accept operations, all or none; the range of their ids.

        Raises InboxFull when the records that are there must be folded first, and InboxNew.
        """
        words = self._open()
        # Not `_locked`, which is the same: it would take a tenth of a caller's time.
        try:
            wait_for_lock(self._fd)
            start, end = _bounds(words)
            ids = self._next_ids(len(rows))
            records = b"".join(map(record.encode, ids, rows))
            if end + len(records) > LARGEST:
                raise InboxFull
            if end + len(records) > self._room:
                self._look_for_room(end + len(records))
            written = os.pwrite(self._fd, records, PAGE + end)
            while written < len(records):
                # A full disk takes a part, and refuses the rest with the next write.
                written += os.pwrite(self._fd, records[written:], PAGE + end + written)
            self._ids[_LAST_ID] = ids[-1]
            _set_bounds(words, start, end + len(records))
            if self._sync:
                try:
                    self._put_on_disk()
                except OSError:
                    # The caller is told that nothing was accepted.
                    _set_bounds(words, start, end)
                    raise
            return ids
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def reserve(self, count: int) -> range:
        """Ids for operations that come from elsewhere. Raises InboxNew."""
        with self._locked():
            ids = self._next_ids(count)
            self._ids[_LAST_ID] = ids[-1]
            return ids

    def begin_after(self, last_id: int) -> bool:
        """Never give out this id or a lower one: the spool knows it. Whether the inbox is new."""
        with self._locked():
            known = self._ids[_LAST_ID]
            self._ids[_LAST_ID] = max(known, last_id, 1)
            return not known

    def is_empty(self) -> bool:
        """Whether there are no records."""
        start, end = _bounds(self._open())
        return start >= end

    def bounds(self) -> tuple[int, int]:
        """Where the records begin and end; equal when there are none."""
        # Behind the lock everything that was written before it was released can be read.
        with self._locked() as words:
            start, end = _bounds(words)
        return (start, end) if start < end else (0, 0)

    def read(self, start: int, end: int, *, limit: int, count: int = sys.maxsize) -> Content:
        """The records from `start` on: `count` or about `limit` bytes of them, and at least one."""
        size = min(end - start, limit)
        content = os.pread(self._fd, size, PAGE + start)
        operations, length = record.parse(content, count)
        if not operations and size < end - start:
            # The first one is larger than that.
            size = min(end - start, record.length(content))
            operations, length = record.parse(os.pread(self._fd, size, PAGE + start), count)
        if length == size or len(operations) == count or (operations and size < end - start):
            return Content(operations, start + length, damaged=False)
        # Where a record should begin and none does, nobody knows where the next one begins.
        return Content(operations, end, damaged=True)

    def last_id(self) -> int:
        """The highest id that was given out. Raises InboxNew."""
        with self._locked():
            last = self._ids[_LAST_ID]
        if not last:
            raise InboxNew
        return int(last)

    def first_id(self) -> int | None:
        """The id of the oldest record; None when there is none."""
        with self._locked() as words:
            start, end = _bounds(words)
            if start >= end:
                return None
            head = os.pread(self._fd, record.HEAD, PAGE + start)
        return record.identifier(head)

    def tally(self, after: int) -> Tally | None:
        """Count the operations past this id; None when something is damaged."""
        at, end = self.bounds()
        found = Tally(size=end - at)
        while at < end:
            length = record.count(os.pread(self._fd, min(end - at, SLICE), PAGE + at), after, found)
            if not length or at + length > end:
                return None
            at += length
        return found

    def release(self, end: int) -> None:
        """Forget the records up to this end: SQLite has them. For whoever is behind the gate."""
        with self._locked() as words:
            _, current = _bounds(words)
            if current <= end:
                _set_bounds(words, 0, 0)
            elif end < ANEW or current - end > SLICE:
                _set_bounds(words, end, current)
            else:
                self._move_to_front(words, end, current)

    def _move_to_front(self, words: memoryview, start: int, end: int) -> None:
        """Begin the file anew: where producers never pause it is never empty."""
        rest = os.pread(self._fd, end - start, PAGE + start)
        if os.pwrite(self._fd, rest, PAGE) < end - start:
            # Nothing of it counts yet.
            _set_bounds(words, start, end)
            return
        if self._sync:
            self._put_on_disk()
        _set_bounds(words, 0, end - start)
        if self._sync:
            self._put_on_disk()

    def owner(self) -> str:
        """The id of the spool that the records were accepted for; empty in a new file."""
        return self._open()[_OWNER].tobytes().rstrip(b"\0").decode("ascii", "replace")

    def belong_to(self, spool_id: str) -> None:
        """Say whose records these are from now on."""
        # Let go of at the end: whoever closes on an interrupt could not unmap the page otherwise.
        with self._locked() as words, words[_OWNER] as owner:
            name = spool_id.encode("ascii")[: owner.nbytes].ljust(owner.nbytes, b"\0")
            owner[:] = memoryview(name).cast("Q")

    def _put_on_disk(self) -> None:
        assert self._page
        self._page.flush()
        put_on_disk(self._fd)

    def _look_for_room(self, end: int) -> None:
        """Refuse to grow up to `end` on a disk that is nearly full; what is there may be reused."""
        size = os.fstat(self._fd).st_size - PAGE
        if end > size:
            disk = os.fstatvfs(self._fd)
            if disk.f_bavail * disk.f_frsize < RESERVE + end - size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
        self._room = max(size, end + _LOOK_EVERY)

    def _next_ids(self, count: int) -> range:
        last = self._ids[_LAST_ID]
        if not last:
            raise InboxNew
        first = max(last + 1, int(self._clock() * 1_000_000))
        return range(first, first + count)

    @contextmanager
    def _locked(self) -> Iterator[memoryview]:
        """The numbers, while no other process changes them."""
        words = self._open()
        # Within the try: an interrupt may come as soon as the lock is there.
        try:
            wait_for_lock(self._fd)
            yield words
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _open(self) -> memoryview:
        """The numbers of the file that lies at the path now."""
        now = time.monotonic()
        if self._page is not None:
            if now < self._looked + LOOK and os.fstat(self._fd).st_nlink:
                return self._words
            try:
                if os.stat(self._path).st_ino == self._inode:
                    self._looked = now
                    return self._words
            except FileNotFoundError:
                pass
            self.close()
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._inode = os.fstat(self._fd).st_ino
            try:
                wait_for_lock(self._fd)
                self._begin()
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._page = mmap.mmap(self._fd, PAGE)
        except BaseException:
            self.close()
            raise
        self._words = memoryview(self._page).cast("Q")
        self._ids = memoryview(self._page).cast("q")
        self._room = 0
        return self._words

    def _begin(self) -> None:
        """Write the numbers of a new file, or of one whose numbers are lost."""
        page = os.pread(self._fd, PAGE, 0)
        if page.startswith(_MAGIC) and len(page) == PAGE:
            return
        if page:
            log.error("the inbox %s is damaged; what was in it is lost", self._path)
        if os.pwrite(self._fd, _MAGIC.ljust(PAGE, b"\0"), 0) < PAGE:
            # A full disk takes a part. What is mapped beyond the end of a file cannot be used.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)


def put_on_disk(fd: int) -> None:
    """Let what was written into a file survive a power cut."""
    if FULL_SYNC is None:
        os.fsync(fd)
    else:
        fcntl.fcntl(fd, FULL_SYNC)


#: On macOS alone fsync leaves the data in the drive's cache.
FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)


def _bounds(words: memoryview) -> tuple[int, int]:
    word = words[_BOUNDS]
    return word >> 32, word & _END


def _set_bounds(words: memoryview, start: int, end: int) -> None:
    words[_BOUNDS] = start << 32 | end
