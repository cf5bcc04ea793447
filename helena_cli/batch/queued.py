"""Operations that wait in the tables of a spool, read in their order.

Functions on an open transaction; `Spool` calls them.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from heapq import merge
from itertools import islice
from typing import Any

from helena_cli.batch.identity import Damaged
from helena_cli.batch.ledger import DUE
from helena_cli.batch.operation import KINDS, Operation

#: Operations that are read at once.
PAGE = 500

#: What was never put back; what was has to be taken whole.
_UNTRIED = "o.held_since IS NULL"

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
    connection: sqlite3.Connection,
    *,
    limit: int,
    max_bytes: int,
    lane: str | None,
    now: float,
    known: Sequence[Operation] = (),
) -> list[Operation]:
    """The oldest operations that fit, by id, and all held ones of their lanes.

    Of every lane that flows, or of the one named `lane` although it waits. `known` were read ahead,
    by `follow` or in the inbox before they were folded, and need not be read again.
    """
    lanes = _lanes(connection, lane)
    fits = len(known) <= limit and _size(known) <= max_bytes
    first = known if fits and _are_first(connection, lanes, known) else ()
    taken = _take(connection, lanes, first, 0, limit, max_bytes)
    held = f"{_OPERATION} WHERE o.lane = ? AND o.held_since IS NOT NULL"
    for number in lanes:
        taken.extend(map(_operation, connection.execute(held, (now, number))))
    return sorted(taken, key=lambda operation: operation.id)


def follow(
    connection: sqlite3.Connection, *, after: int, limit: int, max_bytes: int
) -> list[Operation]:
    """What `take` will begin with when all up to this id is settled; none that is held."""
    return _take(connection, _lanes(connection, None), (), after, limit, max_bytes)


def _lanes(connection: sqlite3.Connection, name: str | None) -> list[int]:
    found = connection.execute(
        "SELECT id FROM lanes WHERE inserts + updates + messages > 0"
        " AND CASE WHEN ?1 IS NULL THEN reason IS NULL ELSE name = ?1 END",
        (name,),
    )
    return [number for (number,) in found.fetchall()]


def _take(
    connection: sqlite3.Connection,
    lanes: Sequence[int],
    first: Sequence[Operation],
    after: int,
    limit: int,
    max_bytes: int,
) -> list[Operation]:
    """`first`, and those that come after them and fit; none that is held."""
    taken = list(first)
    room = max_bytes - _size(taken)
    after = taken[-1].id if taken else after
    query = f"{_OPERATION} WHERE o.lane = ? AND o.id > ? AND {_UNTRIED} ORDER BY o.id LIMIT ?"
    # Cursors are lazy: merging them reads only what is taken.
    for row in merge(*(connection.execute(query, (0, number, after, limit)) for number in lanes)):
        room -= len(row[3])
        if taken and (room < 0 or len(taken) >= limit):
            break
        taken.append(_operation(row))
    return taken


def _are_first(
    connection: sqlite3.Connection, lanes: Sequence[int], known: Sequence[Operation]
) -> bool:
    """Whether these are still the oldest: then nothing about them has changed."""
    # An index knows which are held, and another one all of them: no operation is read.
    query = (
        "SELECT id FROM operations WHERE lane = ?1 AND id NOT IN"
        " (SELECT id FROM operations WHERE lane = ?1 AND held_since IS NOT NULL)"
        " ORDER BY id LIMIT ?2"
    )
    ids = merge(*(connection.execute(query, (number, len(known))) for number in lanes))
    return [operation.id for operation in known] == [id for (id,) in islice(ids, len(known))]


def _size(operations: Iterable[Operation]) -> int:
    return sum(len(operation.data) for operation in operations)
