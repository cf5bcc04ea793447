"""Operations that are written straight from the inbox, without a detour through the tables.

That is the usual way of a flush: nothing waits in the tables for the same lanes, and the database
takes everything. Then the tables learn nothing but the numbers. Whatever is less smooth (a lane
that waits, an operation that is put back or refused, a damaged record) goes through the tables.

Functions behind the gate, so that nobody folds these records meanwhile; `Spool` calls them.
"""

import sqlite3
from collections import Counter

from helena_cli.batch import fold, identity, lanes
from helena_cli.batch.flush import Outcome, Taken
from helena_cli.batch.inbox import Inbox
from helena_cli.batch.ledger import Pressure

#: Bytes that are read for each operation wanted: most are smaller.
GUESS = 1024


class Straight(Taken, frozen=True):
    """The oldest operations of the inbox, where they begin, and where the next one does."""

    start: int = 0
    end: int = 0
    #: The last operation that somebody waits for.
    asked: int = 0

    def pressure(self, now: float) -> Pressure:
        """What asks for a flush of these."""
        if not self.operations:
            return Pressure(0, None, urgent=False)
        oldest = self.operations[0].id
        urgent = self.more or oldest <= self.asked
        return Pressure(len(self.operations), now - oldest / 1_000_000, urgent)


def read(inbox: Inbox, start: int, *, limit: int, max_bytes: int) -> Straight | None:
    """The operations from `start` on; None when something there is damaged.

    Without the gate it may read what is being overwritten: `look` finds that out.
    """
    _, end = inbox.bounds()
    if end <= start or limit <= 0 or max_bytes <= 0:
        return Straight((), end > start, start=start, end=start)
    content = inbox.read(start, end, limit=min(max_bytes, max(limit, 64) * GUESS), count=limit)
    if content.damaged:
        return None
    more = content.end < end
    return Straight(tuple(content.operations), more, start=start, end=content.end)


def look(
    connection: sqlite3.Connection,
    inbox: Inbox,
    ahead: Straight | None,
    *,
    limit: int,
    max_bytes: int,
) -> Straight | None:
    """What could be written straight from the inbox; None when it has to be folded for that.

    `ahead` was read beforehand, and is the beginning of it, or of no use.
    """
    start, end = inbox.bounds()
    if not end:
        return Straight()
    current = ahead is not None and ahead.end <= end and _is_current(ahead, inbox, start, limit)
    known = ahead.operations if ahead and current else ()
    at = ahead.end if ahead and known else start
    rest = read(inbox, at, limit=limit - len(known), max_bytes=max_bytes - (at - start))
    if rest is not None and known and rest.end - start > max_bytes:
        # A single one is read whatever its size.
        rest = Straight((), more=True, start=at, end=at)
    if rest is None or inbox.owner() != identity.spool_id(connection):
        return None
    operations = known + rest.operations
    folded, asked = connection.execute(
        "SELECT folded_id, (SELECT value FROM meta WHERE key = 'flush_through') FROM counters"
    ).fetchone()
    if operations[0].id <= folded:
        return None
    if not _busy_tables(connection).isdisjoint(_bare(operation.table) for operation in operations):
        return None
    readings = ahead.readings if ahead and known else {}
    return Straight(
        operations, rest.more, readings, start=start, end=rest.end, asked=int(asked or 0)
    )


def _is_current(ahead: Straight, inbox: Inbox, start: int, limit: int) -> bool:
    """Whether the inbox begins with these: an id is never given out twice."""
    ids = [operation.id for operation in ahead.operations]
    return (
        ahead.start == start
        and 0 < len(ids) <= limit
        and ids[0] == inbox.first_id()
        # Not what an earlier filling of the file has left between or behind those of the new one.
        and ids == sorted(ids)
    )


def settle(
    connection: sqlite3.Connection, straight: Straight, outcome: Outcome, nonce: str
) -> bool:
    """Note that the database has all of it; False when it was folded meanwhile."""
    operations = straight.operations
    if fold.folded(connection) >= operations[0].id:
        return False
    connection.execute(
        "UPDATE counters SET folded_id = ?, written = written + ?, coalesced = coalesced + ?",
        (operations[-1].id, len(operations) - len(outcome.coalesced), len(outcome.coalesced)),
    )
    last = {operation.table: operation.id for operation in operations}
    counts = Counter(operation.table for operation in operations)
    lanes.add(connection, counts)
    connection.executemany(
        "UPDATE lanes SET accepted = accepted + ?, last_id = ?, nonces = ? WHERE name = ?",
        [(counts[table], last[table], nonce, table) for table in counts],
    )
    return True


def _busy_tables(connection: sqlite3.Connection) -> set[str]:
    """The tables that have something queued, or a reason to wait, by their bare names."""
    query = "SELECT name FROM lanes WHERE reason IS NOT NULL OR inserts + updates + messages > 0"
    return {_bare(name) for (name,) in connection.execute(query).fetchall()}


def _bare(table: str) -> str:
    """Two lanes may mean one table, and only the database knows; this is never too narrow."""
    return table.rpartition(".")[2]
