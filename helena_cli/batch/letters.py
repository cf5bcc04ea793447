"""Dead letters: operations that the database refused, with its reason, until somebody decides.

Functions on an open transaction; `Spool` calls them.
"""

import json
import sqlite3
from collections.abc import Sequence

from msgspec import Struct

from helena_cli.batch import lanes
from helena_cli.batch.identity import Damaged
from helena_cli.batch.operation import KINDS
from helena_cli.batch.record import Row
from helena_cli.batch.verdict import Verdict


class DeadLetter(Struct, frozen=True):
    """An operation that the database refused, and what it said. `data` is JSON."""

    id: int
    kind: str
    table: str
    data: bytes
    sqlstate: str | None
    message: str
    constraint: str | None
    attempts: int
    failed_at: float


def bury(connection: sqlite3.Connection, dead: Sequence[Verdict], *, now: float) -> None:
    """Move operations out of their lanes."""
    connection.executemany(
        "INSERT OR IGNORE INTO dead_letters"
        " SELECT o.id, o.kind, l.name, o.data, ?, ?, ?, o.attempts + 1, ?"
        " FROM operations o JOIN lanes l ON l.id = o.lane WHERE o.id = ?",
        [(v.sqlstate or None, v.message, v.constraint, now, v.operation_id) for v in dead],
    )
    lanes.delete(connection, [verdict.operation_id for verdict in dead])


def select(
    connection: sqlite3.Connection, ids: Sequence[int] | None, table: str | None
) -> list[DeadLetter]:
    """The dead letters with these ids, of one table, or all; oldest first."""
    query = (
        "SELECT * FROM dead_letters"
        " WHERE (?1 IS NULL OR id IN (SELECT value FROM json_each(?1)))"
        " AND (?2 IS NULL OR table_name = ?2) ORDER BY id"
    )
    wanted = None if ids is None else json.dumps(list(ids))
    letters = [DeadLetter(*row) for row in connection.execute(query, (wanted, table))]
    for letter in letters:
        _check(letter.kind, letter.data)
    return letters


def remove(connection: sqlite3.Connection, ids: Sequence[int]) -> list[Row]:
    """Take dead letters out, as (kind, table, data) in the order of their ids."""
    # Not RETURNING: the SQLite of some systems with a new enough Python is too old for it.
    those = "FROM dead_letters WHERE id IN (SELECT value FROM json_each(?))"
    wanted = (json.dumps(list(ids)),)
    query = f"SELECT kind, table_name, data {those} ORDER BY id"
    rows = connection.execute(query, wanted).fetchall()
    for kind, _, data in rows:
        _check(kind, data)
    connection.execute(f"DELETE {those}", wanted)
    return rows


def _check(kind: object, data: object) -> None:
    if kind not in KINDS or type(data) is not bytes:
        raise Damaged("a dead letter is not what was buried")
