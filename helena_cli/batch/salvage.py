"""What can still be read of a damaged spool, brought into a new one.

The position rows in the database go by spool id and operation id. So both are kept where they can
be read; without the old spool id nobody can tell what was written already, and the operations
become dead letters.
"""

import sqlite3
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

#: The SQLSTATE-like mark of an operation whose spool lost its identity.
DAMAGED = "HL003"

#: How many ranges are tried around damaged pages; a page's own rows are never found.
PROBES = 20_000

COPIED = ("counters", "lanes", "dead_letters", "flushes")


def salvage(damaged: Path, connection: sqlite3.Connection) -> str:
    """Copy every readable row from `damaged` into the new spool on `connection`.

    Return a report.
    """
    with closing(sqlite3.connect(f"file:{damaged}?mode=rw", uri=True)) as old:
        connection.execute("BEGIN IMMEDIATE")
        for table in COPIED:
            rows = list(readable_rows(old, table))
            if rows:
                connection.execute(f"DELETE FROM {table}")
                _insert(connection, table, rows)
        known = _identity(old, connection)
        expected = _queued(connection)
        _insert(connection, "operations", readable_rows(old, "operations"))
        _recount_lanes(connection)
        lost = max(0, expected - _queued(connection))
        report = _settle(connection, lost, known=known)
        connection.execute("COMMIT")
    return report


def readable_rows(connection: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """Rows from both ends up to the damage, and in between wherever a rowid can be reached."""
    last: int | None = None
    low = -(2**63)
    ascending = f"SELECT rowid, * FROM {table} WHERE rowid > ? ORDER BY rowid"
    with suppress(sqlite3.DatabaseError):
        for rowid, *row in connection.execute(ascending, (low,)):
            last = rowid
            yield tuple(row)
        return
    low = low if last is None else last
    descending = f"SELECT rowid, * FROM {table} WHERE rowid > ? ORDER BY rowid DESC"
    high = 2**63 - 1
    with suppress(sqlite3.DatabaseError):
        for rowid, *row in connection.execute(descending, (low,)):
            high = rowid
            yield tuple(row)
    yield from _between(connection, table, low, high)


def _between(
    connection: sqlite3.Connection, table: str, low: int, high: int
) -> Iterator[tuple[Any, ...]]:
    """Halve the unreadable range, widest parts first, until its readable pages are found."""
    query = f"SELECT rowid, * FROM {table} WHERE rowid > ? AND rowid < ? ORDER BY rowid"
    ranges = deque([(low, high)])
    for _ in range(PROBES):
        if not ranges:
            return
        start, end = ranges.popleft()
        try:
            found = connection.execute(query, (start, end)).fetchall()
        except sqlite3.DatabaseError:
            middle = (start + end) // 2
            halves = ((start, middle + 1), (middle, end))
            ranges.extend(half for half in halves if half != (start, end) and half[1] - half[0] > 1)
        else:
            yield from (tuple(row[1:]) for row in found)


def _insert(connection: sqlite3.Connection, table: str, rows: Any) -> None:
    width = len(connection.execute(f"SELECT * FROM {table} LIMIT 0").description)
    marks = ", ".join("?" * width)
    connection.executemany(
        f"INSERT OR IGNORE INTO {table} VALUES ({marks})",
        (row for row in rows if len(row) == width),
    )


def _identity(old: sqlite3.Connection, new: sqlite3.Connection) -> bool:
    """Take over the spool id and the target; False when the id cannot be read."""
    known = False
    for key in ("spool_id", "target_id"):
        with suppress(sqlite3.DatabaseError):
            row = old.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            if row:
                new.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, row[0]))
                known = known or key == "spool_id"
    return known


def _settle(connection: sqlite3.Connection, lost: int, *, known: bool) -> str:
    """Make the counters of the law true again, and say what became of everything."""
    if not known:
        connection.execute(
            "INSERT OR IGNORE INTO dead_letters SELECT o.id, o.kind, l.name, o.data, ?,"
            " 'not written: the damaged spool lost its identity, this may have been written',"
            " NULL, o.attempts, unixepoch() FROM operations o JOIN lanes l ON l.id = o.lane",
            (DAMAGED,),
        )
        connection.execute("DELETE FROM operations")
    connection.execute(
        "UPDATE counters SET lost = lost + ?, last_id = max(last_id,"
        " coalesce((SELECT max(id) FROM operations), 0),"
        " coalesce((SELECT max(id) FROM dead_letters), 0)),"
        " accepted = written + coalesced + dropped + (SELECT count(*) FROM operations)"
        " + (SELECT count(*) FROM dead_letters)",
        (lost,),
    )
    connection.execute("UPDATE lanes SET accepted = 0")
    (kept,) = connection.execute("SELECT count(*) FROM operations").fetchone()
    (dead,) = connection.execute("SELECT count(*) FROM dead_letters").fetchone()
    return f"{kept} operations and {dead} dead letters were salvaged, {lost} operations are lost"


def _queued(connection: sqlite3.Connection) -> int:
    """How many operations the lanes know of."""
    total = "SELECT coalesce(sum(inserts + updates + messages), 0) FROM lanes"
    return int(connection.execute(total).fetchone()[0])


def _recount_lanes(connection: sqlite3.Connection) -> None:
    """Count each lane's operations afresh; one whose name is lost gets a name."""
    connection.execute(
        "INSERT OR IGNORE INTO lanes (id, name)"
        " SELECT DISTINCT lane, 'unknown_lane_' || lane FROM operations"
        " WHERE lane NOT IN (SELECT id FROM lanes)"
    )
    for column, kind in (("inserts", "insert"), ("updates", "update"), ("messages", "message")):
        connection.execute(
            f"UPDATE lanes SET {column} = (SELECT count(*) FROM operations"
            " WHERE lane = lanes.id AND kind = ?)",
            (kind,),
        )
    connection.execute(
        "UPDATE lanes SET bytes = (SELECT coalesce(sum(length(data)), 0) FROM operations"
        " WHERE lane = lanes.id)"
    )
