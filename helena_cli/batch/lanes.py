"""The lanes of a spool: one ordered stream per table, with its counts, nonces and reasons to wait.

Functions on an open transaction; `Spool` calls them.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence

from helena_cli.batch.flush import Waiting

#: A position that was written under none of these nonces was written by a copy of this spool.
REMEMBERED_NONCES = 16


def sizes(connection: sqlite3.Connection) -> dict[str, int]:
    """Table → bytes of data that wait for it."""
    return dict(connection.execute("SELECT name, bytes FROM lanes").fetchall())


def add(connection: sqlite3.Connection, tables: Iterable[str]) -> None:
    """Make the lanes that are not there yet."""
    names = [(table,) for table in tables]
    connection.executemany("INSERT OR IGNORE INTO lanes (name) VALUES (?)", names)


def remember_nonce(
    connection: sqlite3.Connection, nonce: str, tables: Sequence[str], found: Mapping[str, str]
) -> None:
    """Add a nonce to those that a position may have.

    What was `found` there, in a row that is locked, takes the place of all that it might have been.
    """
    add(connection, tables)
    for table in tables:
        row = connection.execute("SELECT nonces FROM lanes WHERE name = ?", (table,)).fetchone()
        possible = found.get(table, row[0]).split()
        known = [known for known in possible if known != nonce]
        connection.execute(
            "UPDATE lanes SET nonces = ? WHERE name = ?",
            (" ".join([*known, nonce][-REMEMBERED_NONCES:]), table),
        )


def wait(
    connection: sqlite3.Connection, table: str, waiting: Waiting, now: float, delay: float
) -> None:
    """Let a lane wait and say why."""
    connection.execute(
        "UPDATE lanes SET reason = ?, sqlstate = ?, remedy = ?, since = coalesce(since, ?),"
        " retry_at = ?, tries = tries + 1 WHERE name = ?",
        (waiting.reason, waiting.sqlstate, waiting.remedy, now, now + delay, table),
    )


def hurry(connection: sqlite3.Connection) -> None:
    """Have all that waits tried at once: how long it has waited and how often counts on."""
    connection.execute("UPDATE lanes SET retry_at = NULL WHERE reason IS NOT NULL")
    connection.execute("UPDATE operations SET retry_at = 0 WHERE held_since IS NOT NULL")


def resume(connection: sqlite3.Connection, tables: Iterable[str]) -> None:
    """Let lanes flow again."""
    connection.executemany(
        "UPDATE lanes SET reason = NULL, sqlstate = NULL, remedy = NULL, since = NULL,"
        " retry_at = NULL, tries = 0 WHERE name = ? AND reason IS NOT NULL",
        [(table,) for table in tables],
    )


def delete(connection: sqlite3.Connection, ids: Sequence[int]) -> int:
    """Take operations out. Returns how many were there."""
    statement = "DELETE FROM operations WHERE id IN (SELECT value FROM json_each(?))"
    return connection.execute(statement, (json.dumps(list(ids)),)).rowcount
