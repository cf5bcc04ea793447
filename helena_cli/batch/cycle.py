"""One turn of the flusher: what is due is taken from the spool, written, and settled.

The rules of this room:
- an operation leaves the spool only after the commit that contains it;
- it is applied once, because the position of the spool moves in the same transaction;
- a failure that may pass is tried again for ever, and nothing leaves the spool meanwhile;
- what concerns one row ends in the dead letters, what concerns one table makes its lane wait.
"""

import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from msgspec import Struct
from msgspec.structs import replace

from helena_cli.batch import histogram
from helena_cli.batch.flush import Batch, FlushFailed, Outcome, Taken, Waiting, Writer
from helena_cli.batch.histogram import Bin
from helena_cli.batch.ledger import LONGEST_PAUSE, FlushRecord, Lane, Pressure
from helena_cli.batch.operation import Operation
from helena_cli.batch.plan import backoff, flush_due
from helena_cli.batch.spool import Spool
from helena_cli.batch.standing import Standing
from helena_cli.batch.straight import Straight
from helena_cli.batch.verdict import Verdict
from helena_cli.errors import HelenaError

log = logging.getLogger(__name__)

BUG = "This is a bug in Helena; its log has the traceback. The operations stay queued."


class Policy(Struct, frozen=True):
    """When to flush and when to give up. Seconds, operations and bytes."""

    size: int = 100
    interval: float = 5.0
    max_size: int = 5000
    max_bytes: int = 16 * 1024 * 1024
    lane_timeout: float = 86_400.0
    shutdown_timeout: float = 10.0
    #: A child waits at least this long for its foreign-key parent.
    hold_at_least: float = 60.0
    #: How often an SQLSTATE that nobody knows is tried again before the row is blamed.
    unknown_attempts: int = 5


class Failure(Struct, frozen=True):
    """Why flushing does not succeed at the moment."""

    message: str
    sqlstate: str | None
    remedy: str
    #: Consecutive failures.
    count: int
    #: What the database layer made of it, where it has a name for it.
    cause: HelenaError | None = None


class Cycle:
    """Flushes one spool through one writer. Not safe for threads: the flusher's thread owns it."""

    def __init__(
        self,
        spool: Spool,
        writer: Writer,
        policy: Policy,
        *,
        on_target: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._spool = spool
        self._writer = writer
        self.policy = policy
        self._on_target = on_target
        self._clock = clock
        self._limit = policy.max_size
        self._retry_at = 0.0
        self._unknown = 0
        # How often a single operation has taken too long, one after another.
        self._alone = 0
        # Kept until a commit is known to have succeeded: see `Spool.seal`.
        self._nonce = uuid.uuid4().hex
        self._parents: dict[int, str] = {}
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="helena-disk")
        self._syncing: Future[None] | None = None
        self._ahead: Future[Taken | None] | None = None
        # Whether the last flush succeeded.
        self._flowing = False
        self._introduced = False
        self.failure: Failure | None = None
        #: How many operations it has moved to the dead letters.
        self.dead = 0
        #: Tables written since the last maintenance, with the bytes of their operations.
        self.touched: Counter[str] = Counter()

    def close(self) -> None:
        """End the thread that syncs."""
        self._disk.shutdown()

    def turn(self, *, force: bool = False) -> bool:
        """Flush what is due, or with `force` all that can be; whether anything was settled."""
        now = self._clock()
        if _is_early(now, self._retry_at) and not force:
            return False
        standing = self._spool.standing()
        settled = any([self._probe(lane, now) for lane in standing.waiting])
        if settled:
            standing = self._spool.standing()
        ahead = self._read_before()
        pressure, taken = self._pressure(standing.pressure, ahead)
        due = pressure.urgent or flush_due(
            pressure.count,
            pressure.oldest_age,
            size=self.policy.size,
            interval=self.policy.interval,
        )
        if due or (force and pressure.count):
            settled = self._flush(taken or self._take(standing, ahead), standing) or settled
        return settled

    def _read_before(self) -> Taken | None:
        """What was read during the last flush; it may be of no use by now."""
        ahead, self._ahead = self._ahead, None
        return ahead.result() if ahead and not ahead.exception() else None

    def _pressure(
        self, pressure: Pressure, ahead: Taken | None
    ) -> tuple[Pressure, Straight | None]:
        """What asks for a flush; with the operations where they need not go through the tables.

        `pressure` is that of the tables.
        """
        if not pressure.count:
            taken = self._spool.straight(ahead, limit=self._limit, max_bytes=self.policy.max_bytes)
            if taken is not None:
                return taken.pressure(self._clock()), taken
        if pressure.count < self.policy.size:
            # They count together. With more in the tables these are due, and leave the way free.
            pressure = self._spool.pressure()
        return pressure, None

    def _probe(self, lane: Lane, now: float) -> bool:
        """Try a waiting lane again in a transaction of its own, or give it up after its time."""
        if lane.since is not None and now - lane.since > self.policy.lane_timeout:
            count = self._spool.expire_lane(lane.table, lane.sqlstate, str(lane.reason))
            self.dead += count
            log.error("gave up on %s: %d operations are dead letters", lane.table, count)
            return count > 0
        if lane.retry_at is not None and _is_early(now, lane.retry_at):
            return False
        operations = self._spool.take(
            limit=self._limit, max_bytes=self.policy.max_bytes, lane=lane.table, fresh=False
        )
        return self._flush(Taken(tuple(operations)), self._spool.standing(), lane)

    def _take(self, standing: Standing, ahead: Taken | None) -> Taken:
        """What is to be written of the tables."""
        operations = self._spool.take(
            limit=self._limit, max_bytes=self.policy.max_bytes, fresh=False, ahead=ahead
        )
        more = standing.pressure.count > len(operations)
        return Taken(tuple(operations), more, ahead.readings if ahead else {})

    def _flush(self, taken: Taken, standing: Standing, lane: Lane | None = None) -> bool:
        operations = taken.operations
        if not any(operation.due for operation in operations):
            if lane is not None:
                self._spool.resume(lane.table)
            return False
        batch = Batch(
            spool_id=standing.spool_id,
            target_id=standing.target_id,
            operations=operations,
            nonce=self._nonce,
            known_nonces=standing.known_nonces({operation.table for operation in operations}),
            probe=lane is not None,
            blame_rows=self._unknown >= self.policy.unknown_attempts,
            ahead=taken.readings,
        )
        started = time.perf_counter()
        try:
            outcome = self._write(batch, taken)
        except FlushFailed as failure:
            self._failed(failure, operations, time.perf_counter() - started)
            return False
        except Exception as bug:
            # Counted and put off like any failure, so that `status` shows it; then the engine's.
            unexpected = FlushFailed(f"unexpected {type(bug).__name__}: {bug}", remedy=BUG)
            self._failed(unexpected, operations, time.perf_counter() - started)
            raise
        self._succeeded(batch, outcome, time.perf_counter() - started, taken)
        return True

    def _write(self, batch: Batch, taken: Taken) -> Outcome:
        """Write a batch. Raises FlushFailed."""
        try:
            early = self._is_smooth(batch)
            self._syncing = self._remember_nonce(batch, batch.known_nonces) if early else None
            return self._writer.write(
                batch,
                hold=self._hold,
                seal=lambda outcome: self._seal(batch, outcome),
                busy=lambda: self._use_the_time(taken),
            )
        except HelenaError as error:
            raise FlushFailed(str(error), remedy=error.remedy) from error

    def _hold(self, operation: Operation, parent: str) -> bool:
        """Whether a child without its parent is put back: the parent may still be on its way."""
        since = operation.held_since
        age = 0.0 if since is None else self._clock() - since
        self._parents[operation.id] = parent
        if age > self.policy.lane_timeout:
            return False
        return age < self.policy.hold_at_least or self._spool.has_unsettled(parent)

    def _is_smooth(self, batch: Batch) -> bool:
        """Whether the nonce may be stored beforehand.

        A spool remembers few: those of flushes that never move a position must not push out the one
        that is in the database. So where there are several already, `_seal` does it.
        """
        return self._flowing and all(len(known) < 3 for known in batch.known_nonces.values())

    def _remember_nonce(
        self, batch: Batch, tables: Iterable[str], found: Mapping[str, str] | None = None
    ) -> "Future[None]":
        """Store the nonce, and bring it to the disk while the database works."""
        last_id = max(operation.id for operation in batch.operations)
        self._spool.remember_nonce(batch.nonce, tables, last_id, found)
        try:
            return self._disk.submit(self._spool.sync)
        except RuntimeError:
            # The interpreter is ending and starts no work beside.
            done: Future[None] = Future()
            self._spool.sync()
            done.set_result(None)
            return done

    def _use_the_time(self, taken: Taken) -> None:
        if taken.more and self._ahead is None:
            # An interpreter that is ending starts no work beside, and has no need of it.
            with suppress(RuntimeError):
                self._ahead = self._disk.submit(self._read_ahead, taken)

    def _read_ahead(self, taken: Taken) -> Taken | None:
        """What comes after these operations, read against its tables. Nothing depends on it."""
        following = self._spool.read_ahead(
            taken, limit=self._limit, max_bytes=self.policy.max_bytes
        )
        if following is None:
            return None
        return replace(following, readings=self._writer.read_ahead(following.operations))

    def _seal(self, batch: Batch, outcome: Outcome) -> None:
        """Make durable, before COMMIT, what must outlive it: the nonce and the dead letters."""
        moved, found = outcome.settled_tables, outcome.nonces
        (self._syncing or self._remember_nonce(batch, moved, found)).result()
        if outcome.dead:
            self._spool.bury(outcome.dead)
            self._spool.sync()
            self.dead += len(outcome.dead)

    def _succeeded(self, batch: Batch, outcome: Outcome, seconds: float, taken: Taken) -> None:
        spool, committed = self._spool, self._clock()
        if batch.target_id is None:
            spool.learn_target(outcome.target_id)
        if not self._introduced:
            self._introduced = True
            self._on_target(outcome.target_id)
        due = {operation.id: operation for operation in batch.operations if operation.due}
        held = [verdict for verdict in outcome.held if verdict.operation_id in due]
        settled = len(outcome.written) + len(outcome.coalesced) + len(outcome.skipped)
        flush = FlushRecord(committed, settled + len(outcome.dead), outcome.rows, seconds)
        delays = histogram.of_delays(committed, due, outcome)
        if not (
            isinstance(taken, Straight) and self._settle_straight(taken, outcome, flush, delays)
        ):
            put_back = {v.operation_id: self._hold_delay(due[v.operation_id]) for v in held}
            spool.settle(outcome, self._nonce, put_back)
            spool.record(flush, delays)
        for table, waiting in outcome.waiting.items():
            self._wait(table, waiting)
        self._release_children(outcome)
        spool.checkpoint()
        for table in outcome.settled_tables:
            self.touched[table] += sum(len(o.data) for o in batch.operations if o.table == table)
        self._nonce = uuid.uuid4().hex
        self._limit = min(self.policy.max_size, self._limit * 2)
        self._retry_at, self._unknown, self._alone, self.failure = 0.0, 0, 0, None
        self._flowing = True

    def _settle_straight(
        self, taken: Straight, outcome: Outcome, flush: FlushRecord, delays: Sequence[Bin]
    ) -> bool:
        """Forget operations that never were in the tables; False when they are there after all."""
        if outcome.dead or outcome.held or outcome.waiting:
            self._spool.fold()
            return False
        return self._spool.settle_straight(taken, outcome, self._nonce, flush, delays)

    def _hold_delay(self, operation: Operation) -> float:
        first = min(5.0, self.policy.interval)
        return float(min(LONGEST_PAUSE, first * 2 ** min(operation.attempts, 10)))

    def _release_children(self, outcome: Outcome) -> None:
        """Children whose parents' table has just moved need not wait for their time."""
        if not self._parents:
            return
        for identifier in (*outcome.written, *outcome.coalesced, *outcome.skipped):
            self._parents.pop(identifier, None)
        for verdict in outcome.dead:
            self._parents.pop(verdict.operation_id, None)
        tried = {verdict.operation_id for verdict in outcome.held}
        ready = [
            identifier
            for identifier, parent in self._parents.items()
            if parent in outcome.settled_tables and identifier not in tried
        ]
        if ready:
            self._spool.release_held(ready)

    def _wait(self, table: str, waiting: Waiting) -> None:
        lane = next((o for o in self._spool.standing().waiting if o.table == table), None)
        tries = lane.tries if lane else 0
        delay = backoff(tries, base=1.0, cap=LONGEST_PAUSE, random=random.random)
        self._spool.wait(table, waiting, delay)
        if lane is None or lane.reason != waiting.reason:
            log.warning("%s waits: %s. %s", table, waiting.reason, waiting.remedy)

    def _failed(
        self, failure: FlushFailed, operations: Sequence[Operation], seconds: float
    ) -> None:
        count = 1 + (self.failure.count if self.failure else 0)
        cause = failure.__cause__ if isinstance(failure.__cause__, HelenaError) else None
        self.failure = Failure(str(failure), failure.sqlstate, failure.remedy, count, cause)
        self._flowing = False
        self._retry_at = self._clock() + backoff(count - 1, cap=LONGEST_PAUSE, random=random.random)
        self._spool.record(FlushRecord(self._clock(), 0, 0, seconds, str(failure)))
        log.warning("flush failed (%d in a row): %s (%s)", count, failure, failure.remedy)
        if failure.unknown:
            self._unknown += 1
        if failure.halve:
            self._limit = max(1, len(operations) // 2)
            self._alone = self._alone + 1 if len(operations) == 1 else 0
            if self._alone >= self.policy.unknown_attempts:
                # It alone takes longer than a statement may: it would block the queue for ever.
                self._alone = 0
                sqlstate = failure.sqlstate or ""
                self._spool.bury([Verdict(operations[0].id, sqlstate, str(failure))])


def _is_early(now: float, retry_at: float) -> bool:
    """Whether the next try has to wait; a clock that was set back must not make it hours."""
    return 0 < retry_at - now <= LONGEST_PAUSE
