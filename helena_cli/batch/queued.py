"""Operations that wait in the tables of a spool, read in their order.

Functions on an open transaction; `Spool` calls them.
"""

import sqlite3
from heapq import merge
from typing import Any

from helena_cli.batch.identity import Damaged
from helena_cli.batch.ledger import DUE
from helena_cli.batch.operation import KINDS, Operation

#: Operations that are read at once.
PAGE = 500

_OPERATION = (
    "SELECT o.id, o.kind, l.name, o.data, o.attempts, o.held_since, o.held_since IS NULL OR"
    f" o.{DUE} FROM operations o JOIN lanes l ON l.id = o.lane"
)


def _operation(row: tuple[Any, ...]) -> Operation:
    identifier, kind, table, data, attempts, held_since, due = row
    # SQLite does not notice when the last page of a long row is lost.
    if kind not in KINDS or type(data) is not bytes or data[-1:] != b"}":
        raise Damaged(f"operation {identifier} is not what was queued")
    return Operation(identifier, kind, table, data, attempts, held_since, bool(due))


def page(connection: sqlite3.Connection, *, table: str, after: int) -> list[Operation]:
    """The next operations of a lane, in order."""
    query = f"{_OPERATION} WHERE l.name = ? AND o.id > ? ORDER BY o.id LIMIT {PAGE}"
    return list(map(_operation, connection.execute(query, (0, table, after))))


def take(
    connection: sqlite3.Connection, *, limit: int, max_bytes: int, lane: str | None, now: float
) -> list[Operation]:
    """The oldest operations that fit, by id, and all held ones of their lanes.

    Of every lane that flows, or of the one named `lane` although it waits.
    """
    found = connection.execute(
        "SELECT id FROM lanes WHERE inserts + updates + messages > 0"
        " AND CASE WHEN ?1 IS NULL THEN reason IS NULL ELSE name = ?1 END",
        (lane,),
    ).fetchall()
    fresh = f"{_OPERATION} WHERE o.lane = ? AND o.held_since IS NULL ORDER BY o.id LIMIT ?"
    held = f"{_OPERATION} WHERE o.lane = ? AND o.held_since IS NOT NULL"
    taken: list[Operation] = []
    room = max_bytes
    # Cursors are lazy: merging them reads only what is taken.
    for row in merge(*(connection.execute(fresh, (now, number, limit)) for (number,) in found)):
        room -= len(row[3])
        if taken and (room < 0 or len(taken) >= limit):
            break
        taken.append(_operation(row))
    for (number,) in found:
        taken.extend(map(_operation, connection.execute(held, (now, number))))
    return sorted(taken, key=lambda operation: operation.id)
