"""The spool: accepted operations, in order, until the database has them.

Ids grow with acceptance and follow the clock: `max(last id + 1, Unix time in µs)`. A new or
restored file thus never hands out ids at or below those that the database remembers, which a flush
would skip in silence.

Counters change in the transaction that adds, removes or moves a row, so that at any moment
accepted = written + coalesced + dead + dropped + spooled.
"""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from helena_cli.batch import (
    consumed,
    fold,
    identity,
    lanes,
    ledger,
    letters,
    queued,
    report,
    spoolfile,
    standing,
    straight,
)
from helena_cli.batch.flush import Outcome, Taken, Waiting
from helena_cli.batch.histogram import Bin
from helena_cli.batch.ledger import (
    Conservation,
    Flusher,
    Flushes,
    FlushRecord,
    Lane,
    Pressure,
    Queue,
)
from helena_cli.batch.letters import DeadLetter
from helena_cli.batch.operation import Operation, encode
from helena_cli.batch.record import Row
from helena_cli.batch.report import Report
from helena_cli.batch.spoolfile import Durability, SpoolFile
from helena_cli.batch.standing import Standing
from helena_cli.batch.straight import Straight
from helena_cli.batch.verdict import Verdict
from helena_cli.errors import InvalidOperation, SpoolFull

Item = TypeVar("Item")

MIB = 1024 * 1024

#: Rows per delete. 5,000 in one transaction held the write lock, and every appender with it, 27 ms.
CHUNK = 500


class Spool:
    """The durable queue of one target database.

    Any process may append and read; safe for threads.
    """

    def __init__(
        self,
        file: SpoolFile,
        *,
        max_bytes: int,
        max_operation_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._max_operation_bytes = max_operation_bytes
        self._clock = clock
        # Measuring the pages costs as much as an append, so it is done now and then.
        self._unmeasured = self._measure_every = min(16 * MIB, max_bytes // 64)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        durability: Durability = "process",
        max_bytes: int = 4096 * MIB,
        max_operation_bytes: int = 8 * MIB,
        clock: Callable[[], float] = time.time,
    ) -> "Spool":
        """Open or make the spool at `path`. Raises SpoolUnavailable or SpoolFull."""
        file = SpoolFile(path, durability=durability, clock=clock)
        return cls(file, max_bytes=max_bytes, max_operation_bytes=max_operation_bytes, clock=clock)

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return self._file.path

    @property
    def id(self) -> str:
        """What the position rows in the database know this spool by."""
        return str(self._meta("spool_id"))

    @property
    def target_id(self) -> str | None:
        """The `helena.meta` id of the database it belongs to; None before the first contact."""
        return self._meta("target_id")

    def close(self) -> None:
        """Close the file; what is queued stays."""
        self._file.close()

    # Accepting

    def append(self, kind: Any, table: Any, data: Any) -> int:
        """Accept one operation and return its id; durable when this returns.

        Raises InvalidOperation, SpoolFull or SpoolUnavailable; then nothing was queued.
        """
        row = (kind, table, encode(kind, table, data, max_bytes=self._max_operation_bytes))
        self._unmeasured += len(row[2])
        if self._unmeasured >= self._measure_every:
            self._check_room([row])
        return self._file.accept([row])[0]

    def extend(self, operations: Iterable[tuple[Any, Any, Any]]) -> list[int]:
        """Accept many operations in one write, all or none, and return their ids in order."""
        rows = [self._row(operation) for operation in operations]
        if not rows:
            return []
        self._unmeasured += sum(len(data) for _, _, data in rows)
        if self._unmeasured >= self._measure_every:
            self._check_room(rows)
        return list(self._file.accept(rows))

    def accept_file(
        self, name: str, digest: str, operations: Iterable[tuple[Any, Any, Any]]
    ) -> list[int] | None:
        """Accept what a file holds, and note the file, in one transaction; the ids.

        `name` is its absolute path, `digest` tells its content. None when it was noted already.
        """
        rows = [self._row(operation) for operation in operations]
        self._unmeasured += sum(len(data) for _, _, data in rows)
        if self._unmeasured >= self._measure_every:
            self._check_room(rows)
        now = self._clock()

        def work(connection: sqlite3.Connection) -> list[int] | None:
            if not consumed.note(connection, name, digest, now):
                return None
            return self._insert(connection, rows) if rows else []

        return self._file.transact(work)

    def accepted_files(self, folder: str) -> list[str]:
        """The files of a folder that are noted as accepted, by their paths."""
        return self._file.read(lambda connection: consumed.below(connection, folder))

    def forget_files(self, names: Iterable[str]) -> None:
        """Drop the notes of accepted files, for they have been put away."""
        gone = list(names)
        if gone:
            self._file.transact(lambda connection: consumed.forget(connection, gone))

    def _row(self, operation: tuple[Any, Any, Any]) -> Row:
        try:
            kind, table, data = operation
        except (TypeError, ValueError):
            raise InvalidOperation(
                "The operation was refused: it is not a triple of kind, table and data.",
                field="operation",
                remedy="Nothing was queued. Give each operation as (kind, table, data).",
            ) from None
        return kind, table, encode(kind, table, data, max_bytes=self._max_operation_bytes)

    def _insert(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> list[int]:
        """Queue encoded operations within a transaction; their ids."""
        ids = self._file.new_ids(connection, len(rows))
        fold.insert(connection, [Operation(i, *row) for i, row in zip(ids, rows, strict=True)])
        return list(ids)

    def _check_room(self, rows: Sequence[Row]) -> None:
        """Measure, and refuse what does not fit. Raises SpoolFull."""
        self._file.tidy()
        sizes: Counter[str] = Counter()
        for _, table, data in rows:
            sizes[table] += len(data)
        in_tables = self._file.read(spoolfile.used_bytes, fresh=False)
        if in_tables + self._file.fresh_bytes() + sizes.total() < self._max_bytes // 2:
            self._unmeasured = 0
            return
        used, by_table = self._file.read(
            lambda connection: (spoolfile.used_bytes(connection), lanes.sizes(connection))
        )
        remedy = "See why it is not written (helena status), or raise [spool] max_bytes."
        if used + sizes.total() > self._max_bytes:
            raise SpoolFull(
                f"The queue is full: {used:,} of {self._max_bytes:,} bytes are in use; the"
                " operation was not accepted.",
                remedy=remedy,
            )
        for table, size in sizes.items():
            if by_table.get(table, 0) + size > self._max_bytes // 2:
                raise SpoolFull(
                    f"The queue for {table} holds {by_table.get(table, 0):,} bytes, and may have"
                    f" half of the spool's {self._max_bytes:,}; the operation was not accepted.",
                    remedy=remedy,
                )
        self._unmeasured = 0

    # Flushing: only the holder of the lease calls these

    def straight(
        self, ahead: Taken | None = None, *, limit: int, max_bytes: int
    ) -> Straight | None:
        """The oldest operations of the inbox, when they may be written from there.

        None when they have to go through the tables: then fold them. `ahead` comes from
        `read_ahead`.
        """
        known = ahead if isinstance(ahead, Straight) else None
        return self._file.look(
            lambda connection, inbox: straight.look(
                connection, inbox, known, limit=limit, max_bytes=max_bytes
            )
        )

    def read_ahead(self, taken: Taken, *, limit: int, max_bytes: int) -> Taken | None:
        """What follows, in the inbox or in the tables, while another thread writes these."""
        if isinstance(taken, Straight):
            end = taken.end
            return self._file.peek(
                lambda inbox: straight.read(inbox, end, limit=limit, max_bytes=max_bytes)
            )
        # What was put back is taken whatever its id, and says nothing about how far it has come.
        last = max((o.id for o in taken.operations if o.held_since is None), default=0)
        look = partial(queued.follow, after=last, limit=limit, max_bytes=max_bytes)
        return Taken(tuple(self._file.read(look, fresh=False)))

    def settle_straight(
        self,
        taken: Straight,
        outcome: Outcome,
        nonce: str,
        flush: FlushRecord,
        delays: Sequence[Bin],
    ) -> bool:
        """Forget what the database has, and `record` the flush.

        False, and nothing is noted, when it went into the tables meanwhile.
        """

        def work(connection: sqlite3.Connection) -> bool:
            settled = straight.settle(connection, taken, outcome, nonce)
            if settled:
                ledger.record(connection, flush, delays)
            return settled

        return self._file.take_out(taken.operations[0].id, taken.end, work)

    def pressure(self, *, fresh: bool = True) -> Pressure:
        """What could be written now; without `fresh` only of what is in the tables.

        Held operations that are not due and waiting lanes do not count.
        """
        now = self._clock()
        return self._file.read(lambda connection: ledger.pressure(connection, now), fresh=fresh)

    def take(
        self,
        *,
        limit: int,
        max_bytes: int,
        lane: str | None = None,
        fresh: bool = True,
        ahead: Taken | None = None,
    ) -> list[Operation]:
        """The oldest operations that fit into one flush, by id, and all held ones of their tables.

        Of every lane that flows, or of the one named `lane` although it waits; without `fresh` only
        of what is in the tables, which is older than what is not. `ahead` comes from `read_ahead`.
        """
        now, known = self._clock(), ahead.operations if ahead else ()
        look = partial(
            queued.take, limit=limit, max_bytes=max_bytes, lane=lane, now=now, known=known
        )
        return self._file.read(look, fresh=fresh)

    def standing(self) -> Standing:
        """What the flusher has to know of the tables before it looks what there is to write."""
        now = self._clock()
        return self._file.read(lambda connection: standing.read(connection, now), fresh=False)

    def remember_nonce(
        self,
        nonce: str,
        tables: Iterable[str],
        last_id: int = 0,
        found: Mapping[str, str] | None = None,
    ) -> None:
        """Store the nonce of a flush, and its last id; `sync` must follow before its COMMIT.

        `found`: table → the nonce of its locked position row, so that no other need be known.
        The inbox may be lost in a power cut, and with it the ids that were given out: what the
        database has must never be given out again.
        """
        names = list(tables)

        def work(connection: sqlite3.Connection) -> None:
            lanes.remember_nonce(connection, nonce, names, found or {})
            connection.execute("UPDATE counters SET last_id = max(last_id, ?)", (last_id,))

        self._file.transact(work, fresh=False)

    def sync(self) -> None:
        """Put on the disk what must outlive a COMMIT: the nonce and the dead letters."""
        self._file.sync()

    def bury(self, dead: Sequence[Verdict]) -> None:
        """Move operations to the dead letters."""
        now = self._clock()
        for chunk in _chunks(dead):
            self._file.transact(partial(letters.bury, dead=chunk, now=now))

    def settle(self, outcome: Outcome, nonce: str, delays: Mapping[int, float]) -> None:
        """Forget what the database has; put back what is held, for `delays` seconds by id.

        All of it is in the tables by now.
        """
        now = self._clock()
        written = [*outcome.written, *outcome.skipped]
        for counter, ids in (("written", written), ("coalesced", outcome.coalesced)):
            for chunk in _chunks(ids):
                self._file.transact(_deletion(chunk, counter), fresh=False)
        held = [(now, now + delay, identifier) for identifier, delay in delays.items()]
        self._file.transact(lambda c: _settle(c, outcome, nonce, held), fresh=False)

    def wait(self, table: str, waiting: Waiting, delay: float) -> None:
        """Let a lane wait `delay` seconds and say why; the operations stay."""
        now = self._clock()
        self._file.transact(lambda c: lanes.wait(c, table, waiting, now, delay))

    def resume(self, table: str) -> None:
        """Let a lane flow again."""
        self._file.transact(lambda connection: lanes.resume(connection, [table]))

    def hurry(self) -> None:
        """Have the flusher try at once what waits for its table or for another row.

        It is not settled before that.
        """
        self._file.transact(lanes.hurry, fresh=False)

    def expire_lane(self, table: str, sqlstate: str | None, reason: str) -> int:
        """Give up on a lane: all of its operations become dead letters. Returns how many."""
        count = 0
        while chunk := self.take(limit=CHUNK, max_bytes=16 * MIB, lane=table):
            self.bury([Verdict(o.id, sqlstate or "", reason) for o in chunk])
            count += len(chunk)
        self.resume(table)
        return count

    def release_held(self, operation_ids: Iterable[int]) -> None:
        """Make held operations due now."""
        ids = json.dumps(list(operation_ids))
        statement = (
            "UPDATE operations SET retry_at = 0 WHERE held_since IS NOT NULL"
            " AND id IN (SELECT value FROM json_each(?))"
        )
        self._file.transact(lambda connection: connection.execute(statement, (ids,)))

    def has_unsettled(self, table: str) -> bool:
        """Whether operations for a table wait that are not merely held."""
        query = (
            "SELECT EXISTS (SELECT 1 FROM operations o JOIN lanes l ON l.id = o.lane"
            " WHERE l.name = ? AND o.held_since IS NULL)"
        )
        return self._file.read(lambda c: bool(c.execute(query, (table,)).fetchone()[0]))

    def beat(self, flusher: Flusher) -> None:
        """Say that the flusher is alive, which keeps log and inbox short while it cannot write."""
        self._file.transact(lambda c: ledger.beat(c, flusher), fresh=False)
        self.checkpoint()

    def record(self, flush: FlushRecord, delays: Iterable[Bin] = ()) -> None:
        """Remember one flush, and how long its operations waited for the commit."""
        counted = list(delays)
        self._file.transact(lambda c: ledger.record(c, flush, counted), fresh=False)

    def learn_target(self, target_id: str) -> None:
        """Bind this spool to a database on first contact."""
        self._file.transact(lambda c: _set_meta(c, "target_id", target_id), fresh=False)

    def fold(self) -> None:
        """Bring what was accepted into the tables now, so that the next look finds it there."""
        self._file.fold()

    def checkpoint(self) -> None:
        """Keep inbox and write-ahead log short."""
        self._file.tidy()
        self._file.checkpoint()

    def renew_identity(self, why: str) -> None:
        """Become a new spool; what is queued becomes dead letters, for it may have been written."""
        now = self._clock()
        self._file.transact(lambda c: identity.take_new_identity(c, self.path, now, why))

    # Looking

    def request_flush(self) -> int:
        """Ask the flusher, in whatever process, to write all that is queued now; its last id."""
        last = self._file.last_id()
        # Somebody may have asked for more meanwhile.
        statement = (
            "INSERT INTO meta VALUES ('flush_through', ?1) ON CONFLICT (key) DO UPDATE"
            " SET value = CAST(max(CAST(value AS INTEGER), ?1) AS TEXT)"
        )
        self._file.transact(lambda c: c.execute(statement, (last,)), fresh=False)
        return last

    def is_settled(self, through: int) -> bool:
        """Whether all operations up to this id are gone, held or in a waiting lane."""
        query = (
            "SELECT EXISTS (SELECT 1 FROM lanes l WHERE (reason IS NULL OR retry_at IS NULL)"
            " AND EXISTS (SELECT 1 FROM operations o WHERE o.lane = l.id AND o.id <= ?"
            " AND (o.held_since IS NULL OR o.retry_at = 0)))"
        )
        # In this order: what is in the inbox may come into the tables, but never goes back.
        fresh = self._file.first_fresh_id()
        if fresh is not None and fresh <= through:
            return False
        return self._file.read(
            lambda c: not c.execute(query, (through,)).fetchone()[0], fresh=False
        )

    def queued(self, table: str) -> Iterator[Operation]:
        """What waits in one lane, in order, read in pieces."""
        last = 0
        while page := self._file.read(partial(queued.page, table=table, after=last)):
            yield from page
            last = page[-1].id

    def conservation(self) -> Conservation:
        """Both sides of the law, in one snapshot."""
        return self._file.count(ledger.conservation)

    def queue(self) -> Queue:
        """What waits, in numbers."""
        now = self._clock()
        return self._file.count(lambda connection, fresh: ledger.queue(connection, fresh, now))

    def lanes(self) -> list[Lane]:
        """Every table with queued operations or a reason to wait."""
        return self._file.count(ledger.lanes)

    def flushes(self) -> Flushes:
        """All flushes in numbers, and the last one."""
        return self._file.read(ledger.flushes, fresh=False)

    def recent_flushes(self, after: int) -> list[tuple[int, FlushRecord]]:
        """The last flushes past the `after`th, with their numbers; only so many are remembered."""
        return self._file.read(lambda c: ledger.recent_flushes(c, after), fresh=False)

    def report(self) -> Report:
        """All of its numbers in one snapshot."""
        now = self._clock()
        return self._file.count(lambda connection, fresh: report.read(connection, fresh, now))

    def flusher(self) -> Flusher | None:
        """The process that flushed last, as it said itself.

        The lease tells whether it still runs.
        """
        return self._file.read(ledger.flusher, fresh=False)

    def lost(self) -> int:
        """How many operations a repair could not bring back."""
        return self._file.read(lambda c: int(c.execute("SELECT lost FROM counters").fetchone()[0]))

    # Dead letters

    def dead_letters(
        self, ids: Sequence[int] | None = None, *, table: str | None = None
    ) -> list[DeadLetter]:
        """The dead letters with these ids, of one table, or all; oldest first."""
        return self._file.read(lambda connection: letters.select(connection, ids, table))

    def retry(self, ids: Iterable[int]) -> int:
        """Put dead letters back at the end of the queue, under new ids. Returns how many."""

        def work(chunk: Sequence[int], connection: sqlite3.Connection) -> int:
            rows = letters.remove(connection, chunk)
            if rows:
                self._insert(connection, rows)
            # They had been accepted before, and are counted as accepted again.
            connection.execute("UPDATE counters SET accepted = accepted - ?", (len(rows),))
            return len(rows)

        return self._by_chunks(ids, work)

    def drop(self, ids: Iterable[int]) -> int:
        """Delete dead letters for good. Returns how many."""

        def work(chunk: Sequence[int], connection: sqlite3.Connection) -> int:
            count = len(letters.remove(connection, chunk))
            connection.execute("UPDATE counters SET dropped = dropped + ?", (count,))
            return count

        return self._by_chunks(ids, work)

    def _by_chunks(
        self, ids: Iterable[int], work: Callable[[Sequence[int], sqlite3.Connection], int]
    ) -> int:
        count = 0
        for chunk in _chunks(list(ids)):
            count += self._file.transact(partial(work, chunk))
        return count

    def _meta(self, key: str) -> str | None:
        query = "SELECT value FROM meta WHERE key = ?"
        row = self._file.read(lambda c: c.execute(query, (key,)).fetchone(), fresh=False)
        return str(row[0]) if row and row[0] else None


def _deletion(ids: Sequence[int], counter: str) -> Callable[[sqlite3.Connection], None]:
    def work(connection: sqlite3.Connection) -> None:
        count = lanes.delete(connection, ids)
        connection.execute(f"UPDATE counters SET {counter} = {counter} + ?", (count,))

    return work


def _settle(
    connection: sqlite3.Connection,
    outcome: Outcome,
    nonce: str,
    held: Sequence[tuple[float, float, int]],
) -> None:
    connection.executemany(
        "UPDATE operations SET attempts = attempts + 1, held_since = coalesce(held_since, ?),"
        " retry_at = ? WHERE id = ?",
        held,
    )
    connection.executemany(
        "UPDATE lanes SET nonces = ? WHERE name = ?",
        [(nonce, table) for table in outcome.settled_tables],
    )
    lanes.resume(connection, outcome.settled_tables)


def _set_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def _chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))
