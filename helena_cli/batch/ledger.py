"""The books of a spool: what was accepted, what became of it, how the flushes went.

Functions on an open transaction; `Spool` calls them.
"""

import math
import sqlite3
from collections.abc import Iterable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from helena_cli.batch import histogram
from helena_cli.batch.histogram import Bin
from helena_cli.batch.spoolfile import used_bytes
from helena_cli.batch.tally import Tally

#: Seconds for which anything is put off, at most.
LONGEST_PAUSE = 60.0

#: Whether a held operation is due at a time. What is put off for longer is due as well: somebody
#: has set the clock back.
DUE = f"retry_at - ? NOT BETWEEN 1e-9 AND {LONGEST_PAUSE}"

#: How many flushes are remembered one by one.
KEPT_FLUSHES = 200


class Conservation(Struct, frozen=True):
    """Both sides of the law: accepted = written + coalesced + dead + dropped + spooled."""

    accepted: int
    written: int
    coalesced: int
    dead: int
    dropped: int
    spooled: int


class Queue(Struct, frozen=True):
    """What waits.

    Operations by kind, seconds since the oldest was accepted, bytes of the spool in use.
    """

    insert: int
    update: int
    message: int
    total: int
    oldest_seconds: float | None
    dead_letters: int
    spool_bytes: int


class Lane(Struct, frozen=True):
    """One table's stream. With a `reason` it waits, since that Unix time, until `retry_at`."""

    table: str
    operations: int
    reason: str | None
    sqlstate: str | None
    remedy: str | None
    since: float | None
    retry_at: float | None
    tries: int


class FlushRecord(Struct, frozen=True):
    """One flush.

    Unix time of its end, operations settled, rows sent, seconds; an `error` when it failed.
    """

    at: float
    operations: int
    rows: int
    seconds: float
    error: str | None = None


class Flushes(Struct, frozen=True):
    """All flushes of this spool in numbers.

    Percentiles and rate over the last ones that succeeded.
    """

    count: int
    operations: int
    rows: int
    failures: int
    operations_per_second: float | None
    p50_ms: float | None
    p99_ms: float | None
    last: FlushRecord | None


class Flusher(Struct, frozen=True):
    """The process that flushed last, and the Unix times of its start and its last sign of life."""

    pid: int
    host: str
    since: float
    heartbeat: float


class Pressure(Struct, frozen=True):
    """What asks for a flush.

    Operations that could be written now, and the age of the oldest in seconds.
    """

    count: int
    oldest_age: float | None
    #: Somebody waits for it, or a held operation is due.
    urgent: bool


def conservation(connection: sqlite3.Connection, fresh: Tally) -> Conservation:
    """The counters, and the operations that are there."""
    query = (
        "SELECT accepted + (SELECT coalesce(sum(accepted), 0) FROM lanes), written, coalesced,"
        " (SELECT count(*) FROM dead_letters), dropped, (SELECT count(*) FROM operations)"
        " FROM counters"
    )
    books = Conservation(*connection.execute(query).fetchone())
    return replace(
        books, accepted=books.accepted + fresh.total, spooled=books.spooled + fresh.total
    )


def queue(connection: sqlite3.Connection, fresh: Tally, now: float) -> Queue:
    """What waits, in numbers."""
    inserts, updates, messages, oldest, dead = connection.execute(
        "SELECT coalesce(sum(inserts), 0), coalesce(sum(updates), 0),"
        " coalesce(sum(messages), 0), (SELECT min(id) FROM operations),"
        " (SELECT count(*) FROM dead_letters) FROM lanes"
    ).fetchone()
    # What is in the tables is older than what is not.
    oldest = fresh.first if oldest is None else oldest
    return Queue(
        insert=inserts + fresh.kind("insert"),
        update=updates + fresh.kind("update"),
        message=messages + fresh.kind("message"),
        total=inserts + updates + messages + fresh.total,
        oldest_seconds=None if oldest is None else max(0.0, now - oldest / 1_000_000),
        dead_letters=dead,
        spool_bytes=used_bytes(connection) + fresh.size,
    )


def lanes(connection: sqlite3.Connection, fresh: Tally) -> list[Lane]:
    """Every table with queued operations or a reason to wait, by name."""
    query = (
        "SELECT name, inserts + updates + messages AS queued, reason, sqlstate, remedy, since,"
        " retry_at, tries FROM lanes WHERE queued > 0 OR reason IS NOT NULL"
    )
    more = fresh.tables()
    found = [
        Lane(name, queued + more.pop(name, 0), *rest)
        for name, queued, *rest in connection.execute(query)
    ]
    found += [Lane(name, queued, None, None, None, None, None, 0) for name, queued in more.items()]
    return sorted(found, key=lambda lane: lane.table)


def flusher(connection: sqlite3.Connection) -> Flusher | None:
    """Who flushed last."""
    row = connection.execute("SELECT pid, host, since, heartbeat FROM flusher").fetchone()
    return Flusher(*row) if row else None


def beat(connection: sqlite3.Connection, flusher: Flusher) -> None:
    """Note a sign of life."""
    connection.execute("DELETE FROM flusher")
    row = (flusher.pid, flusher.host, flusher.since, flusher.heartbeat)
    connection.execute("INSERT INTO flusher VALUES (?, ?, ?, ?)", row)


def pressure(connection: sqlite3.Connection, now: float) -> Pressure:
    """What could be written now.

    Held operations that are not due and waiting lanes do not count.
    """
    count, firsts, urgent = 0, [], False
    flowing = connection.execute(
        "SELECT id, inserts + updates + messages FROM lanes"
        " WHERE reason IS NULL AND inserts + updates + messages > 0"
    ).fetchall()
    for lane, queued in flowing:
        held, due = connection.execute(
            f"SELECT count(*), coalesce(sum({DUE}), 0) FROM operations"
            " WHERE lane = ? AND held_since IS NOT NULL",
            (now, lane),
        ).fetchone()
        firsts += connection.execute(
            "SELECT id FROM operations WHERE lane = ? AND held_since IS NULL ORDER BY id LIMIT 1",
            (lane,),
        ).fetchall()
        count += queued - held + due
        urgent = urgent or due > 0
    if not firsts:
        return Pressure(count, None, urgent)
    (oldest,) = min(firsts)
    asked = connection.execute("SELECT value FROM meta WHERE key = 'flush_through'").fetchone()
    urgent = urgent or (asked is not None and oldest <= int(asked[0]))
    return Pressure(count, now - oldest / 1_000_000, urgent)


def record(connection: sqlite3.Connection, flush: FlushRecord, delays: Iterable[Bin] = ()) -> None:
    failed = flush.error is not None
    if not failed:
        histogram.add(connection, histogram.FLUSH, histogram.of_flush(flush.seconds))
    histogram.add(connection, histogram.COMMIT_DELAY, delays)
    connection.execute(
        "UPDATE counters SET flushes = flushes + ?, flushed = flushed + ?, rows = rows + ?,"
        " failures = failures + ?",
        (not failed, flush.operations, flush.rows, failed),
    )
    connection.execute(
        "INSERT INTO flushes VALUES (?, ?, ?, ?, ?)",
        (flush.at, flush.operations, flush.rows, flush.seconds, flush.error),
    )
    connection.execute(
        "DELETE FROM flushes WHERE rowid <= (SELECT max(rowid) FROM flushes) - ?", (KEPT_FLUSHES,)
    )


def flushes(connection: sqlite3.Connection) -> Flushes:
    count, operations, rows, failures = connection.execute(
        "SELECT flushes, flushed, rows, failures FROM counters"
    ).fetchone()
    records = [
        FlushRecord(*row) for row in connection.execute("SELECT * FROM flushes ORDER BY rowid")
    ]
    good = [record for record in records if record.error is None]
    seconds = sorted(record.seconds for record in good)
    busy = sum(seconds)
    return Flushes(
        count=count,
        operations=operations,
        rows=rows,
        failures=failures,
        operations_per_second=sum(r.operations for r in good) / busy if busy else None,
        p50_ms=_percentile_ms(seconds, 0.50),
        p99_ms=_percentile_ms(seconds, 0.99),
        last=records[-1] if records else None,
    )


def recent_flushes(connection: sqlite3.Connection, after: int) -> list[tuple[int, FlushRecord]]:
    """The remembered flushes past the `after`th of this spool, oldest first, with their numbers.

    They are counted from 1. A spool that has had fewer has lost its books, and begins anew.
    """
    query = (
        "WITH total AS (SELECT flushes + failures AS n FROM counters)"
        " SELECT n - (SELECT max(rowid) FROM flushes) + f.rowid AS number, f.*"
        " FROM flushes f, total WHERE number > CASE WHEN n < ?1 THEN 0 ELSE ?1 END ORDER BY number"
    )
    return [(number, FlushRecord(*row)) for number, *row in connection.execute(query, (after,))]


def _percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile of sorted seconds, in milliseconds."""
    return seconds[math.ceil(share * len(seconds)) - 1] * 1000 if seconds else None
