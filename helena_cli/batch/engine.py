"""The engine: callers append to the spool, one thread flushes while it holds the lease.

The lock of a spool covers one short transaction, never the database. Threads are started in one
place and joined in one place, with a limit, and a thread that does not stop is named in the log.
"""

import logging
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from helena_cli.batch.cycle import Cycle, Failure
from helena_cli.batch.flush import Writer
from helena_cli.batch.lease import Lease
from helena_cli.batch.ledger import Flusher
from helena_cli.batch.spool import Spool
from helena_cli.errors import HelenaError, SpoolError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Seconds between two looks at the spool, with and without the lease.
TICK = 0.1
STANDBY_TICK = 0.5
#: Seconds after its deadline in which the flusher may still end: a statement may outlast it.
GRACE = 5.0
#: Seconds between two signs of life; without one for 60 s `status` calls the flusher stale.
HEARTBEAT = 5.0
#: Pending lists are emptied so many seconds after the last time, or so many bytes of data. By
#: default a list may hold 4 MB: an insert that finds it full has to fold it in, and every reader
#: goes through all of it.
MAINTENANCE_SECONDS = 60.0
MAINTENANCE_BYTES = 2 * 1024 * 1024
#: Operations of one call after which the caller pauses for so many seconds.
BREATH = 32
BREATH_SECONDS = 20e-6


class Engine:
    """Takes operations and sees to it that they are written.

    `spool` serves the callers, `cycle_spool` the flusher's thread: two connections to one file, so
    that a caller never waits while a batch is read.
    """

    def __init__(
        self, spool: Spool, cycle_spool: Spool, cycle: Cycle, writer: Writer, lease: Lease
    ) -> None:
        self._spool = spool
        self._cycle_spool = cycle_spool
        self._cycle = cycle
        self._writer = writer
        self._lease = lease
        self._policy = cycle.policy
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._turned = threading.Condition()
        self._stopping = threading.Event()
        self._deadline = 0.0
        self._started = self._ended = False
        self._remaining = 0
        #: At the end: whether another process writes what remains.
        self.left_to_another = False
        self._thread: threading.Thread | None = None
        self._maintenance: threading.Thread | None = None
        self._appended = 0
        self._since = self._beaten = self._maintained = 0.0

    @property
    def failure(self) -> Failure | None:
        """Why this process's flushing does not succeed at the moment; None while it does."""
        return self._cycle.failure

    @property
    def dead(self) -> int:
        """How many operations this process has moved to the dead letters."""
        return self._cycle.dead

    @property
    def flushing(self) -> bool:
        """Whether this process is the host's flusher."""
        return self._lease.held

    def start(self) -> None:
        """Start the flusher's thread.

        Done by the first operation too; a second call does nothing.
        """
        with self._lock:
            self._started = True
            if self._thread is None and not self._stopping.is_set():
                try:
                    self._thread = _spawn(self._run, "helena-flusher")
                except RuntimeError as error:
                    # There are too many, or the interpreter is ending: then `flush` and `close`
                    # do its work.
                    log.warning("helena-flusher was not started: %s", error)

    def add_operation(self, kind: str, table: str, data: Any) -> int:
        """Accept one operation and return its id: it is durable then, and soon written.

        Raises InvalidOperation, SpoolFull or SpoolUnavailable; then nothing was queued.
        """
        self._check_open()
        identifier = self._spool.append(kind, table, data)
        self._accepted(1)
        return identifier

    def add_operations(self, operations: Iterable[tuple[str, str, Any]]) -> list[int]:
        """Accept many operations at once, all or none, and return their ids in order."""
        self._check_open()
        identifiers = self._spool.extend(self._breathing(operations))
        self._accepted(len(identifiers))
        return identifiers

    def _breathing(
        self, operations: Iterable[tuple[str, str, Any]]
    ) -> Iterator[tuple[str, str, Any]]:
        """The operations, with a pause now and then in which the flusher gets the interpreter.

        It would wait 5 ms for it each time that the server has answered.
        """
        for number, operation in enumerate(operations, 1):
            if number % BREATH == 0 and self._lease.held:
                time.sleep(BREATH_SECONDS)
            yield operation

    def extend(self, operations: Iterable[tuple[str, str, Any]]) -> list[int]:
        """The same as `add_operations`, under the spool's name for it."""
        return self.add_operations(operations)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that is in the spool now is committed, dead, held or in a waiting lane.

        Returns False when that took longer than `timeout` seconds; nothing is lost then. It does
        not matter which process flushes.
        """
        self._check_open()
        self.start()
        through = self._spool.request_flush()
        self._wake.set()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._spool.is_settled(through):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if self._thread is None:
                with self._lock:
                    self._guarded(self._turn)
            with self._turned:
                self._turned.wait(0.05)
        return True

    def close(self, timeout: float | None = None) -> int:
        """Drain if this process is the flusher, hand on the lease; how many operations remain.

        `timeout` in seconds, by default the shutdown timeout; what it cuts off stays in the spool.
        """
        limit = self._policy.shutdown_timeout if timeout is None else timeout
        self._deadline = time.monotonic() + limit
        self._stopping.set()
        self._wake.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            # What a statement decides after that is safe either way; its end frees the lease.
            thread.join(limit + GRACE)
            if thread.is_alive():
                log.error("helena-flusher did not stop in time: it still waits for the database")
                return self._spool.queue().total
        elif not self._ended:
            self._end()
        return self._remaining

    def _check_open(self) -> None:
        if self._stopping.is_set():
            raise HelenaError(
                "This engine is closed; nothing was queued.",
                remedy="Close it after its last use, or make a new BatchEngine.",
            )

    def _accepted(self, count: int) -> None:
        if not self._started:
            self.start()
        self._appended += count
        if self._appended >= self._policy.size:
            # Begun anew, for to wake costs a caller as much as to encode.
            self._appended = 0
            self._wake.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._guarded(self._turn)
            with self._turned:
                self._turned.notify_all()
            if self._wake.wait(TICK if self._lease.held else STANDBY_TICK):
                self._wake.clear()
        self._end()

    def _guarded(self, work: Callable[[], Result]) -> Result | None:
        """A failure of one turn must not end the thread that keeps the promise."""
        try:
            return work()
        except SpoolError as error:
            log.error("%s %s", error, error.remedy)
        except Exception:
            log.exception("a turn of the flusher failed; the operations stay in the spool")
        self._stopping.wait(1.0)
        return None

    def _turn(self) -> None:
        self._appended = 0
        if not self._lease.held:
            if not self._lease.acquire():
                return
            self._since = time.time()
        self._beat()
        self._maintain()
        while self._cycle.turn() and not self._stopping.is_set():
            with self._turned:
                self._turned.notify_all()
            self._beat()
            self._maintain()

    def _end(self) -> None:
        """Drain, hand on the lease, and close what only the flusher uses.

        Then look again: a process that ended meanwhile saw the lease taken, and relied upon it. One
        that goes on takes the lease within its tick.
        """
        drained = False
        while self._started and (drained := bool(self._guarded(self._drain))):
            self._writer.close()
            self._lease.release()
            if self._guarded(self._is_settled) is not False:
                break
            time.sleep(STANDBY_TICK)
        self._remaining = self._guarded(lambda: self._left(drained)) or 0
        self._ended = True
        self._cycle.close()
        self._writer.close()
        self._lease.release()
        self._cycle_spool.close()

    def _drain(self) -> bool:
        """Whether all is written that was queued by now and can be written.

        Two failures in a row mean that it has to wait for another process.
        """
        self.left_to_another = not (self._lease.held or self._lease.acquire())
        if self.left_to_another:
            return False
        through, failures = self._cycle_spool.request_flush(), 0
        while time.monotonic() < self._deadline and failures < 2:
            settled = self._cycle.turn(force=True)
            failures = failures + 1 if self._cycle.failure else 0
            if not failures and (not settled or self._cycle_spool.is_settled(through)):
                return True
        return False

    def _is_settled(self) -> bool:
        return self._cycle_spool.is_settled(self._cycle_spool.request_flush())

    def _left(self, drained: bool) -> int:
        """How many operations remain; those of a running process do not count after a drain."""
        queued, flowing = self._cycle_spool.queue().total, self._cycle_spool.pressure().count
        return max(0, queued - flowing) if drained else queued

    def _beat(self) -> None:
        now = time.time()
        if not 0 <= now - self._beaten < HEARTBEAT:
            self._beaten = now
            self._cycle_spool.beat(Flusher(os.getpid(), platform.node(), self._since, now))

    def _maintain(self) -> None:
        """Empty the pending lists of the tables written, but not at every turn."""
        touched, now = self._cycle.touched, time.monotonic()
        if not touched:
            self._maintained = now
        elif self._maintenance is not None and self._maintenance.is_alive():
            return
        elif (
            now - self._maintained >= MAINTENANCE_SECONDS
            or max(touched.values()) >= MAINTENANCE_BYTES
        ):
            self._maintained = now
            self._cycle.touched = Counter()
            # Beside the flushes: a long list takes longer than they may wait. An interpreter that
            # is ending starts no thread, and has no need of it.
            with suppress(RuntimeError):
                self._maintenance = _spawn(
                    lambda: self._writer.maintain(frozenset(touched)), "helena-maintenance"
                )


def _spawn(target: Any, name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
