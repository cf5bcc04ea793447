"""The lanes of a spool: one ordered stream per table, with its counts, nonces and reasons to wait.

Functions on an open transaction; `Spool` calls them.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence

from helena_cli.batch.flush import Waiting

#: A position that was written under none of these nonces was written by a copy of this spool.
REMEMBERED_NONCES = 16

COLUMN = {"insert": "inserts", "update": "updates", "message": "messages"}


def grow(
    connection: sqlite3.Connection, table: str, kinds: Counter[str], size: int
) -> tuple[int, int]:
    """Count new operations in; the lane's id and the bytes it holds now."""
    query = "SELECT id, bytes FROM lanes WHERE name = ?"
    found = connection.execute(query, (table,)).fetchone()
    if found is None:
        connection.execute("INSERT INTO lanes (name) VALUES (?)", (table,))
        found = connection.execute(query, (table,)).fetchone()
    lane, used = found
    connection.execute(
        "UPDATE lanes SET inserts = inserts + ?, updates = updates + ?,"
        " messages = messages + ?, bytes = bytes + ? WHERE id = ?",
        (kinds["insert"], kinds["update"], kinds["message"], size, lane),
    )
    return lane, used + size


def remember_nonce(connection: sqlite3.Connection, nonce: str, tables: Sequence[str]) -> None:
    for table in tables:
        row = connection.execute("SELECT nonces FROM lanes WHERE name = ?", (table,)).fetchone()
        known = [known for known in (row[0].split() if row else []) if known != nonce]
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


def resume(connection: sqlite3.Connection, tables: Iterable[str]) -> None:
    """Let lanes flow again."""
    connection.executemany(
        "UPDATE lanes SET reason = NULL, sqlstate = NULL, remedy = NULL, since = NULL,"
        " retry_at = NULL, tries = 0 WHERE name = ? AND reason IS NOT NULL",
        [(table,) for table in tables],
    )


def delete(connection: sqlite3.Connection, ids: Sequence[int]) -> int:
    """Delete operations and take them off their lanes' counts. Returns how many were there."""
    rows = connection.execute(
        "DELETE FROM operations WHERE id IN (SELECT value FROM json_each(?))"
        " RETURNING lane, kind, length(data)",
        (json.dumps(list(ids)),),
    ).fetchall()
    counts: Counter[tuple[int, str]] = Counter()
    sizes: Counter[int] = Counter()
    for lane, kind, size in rows:
        counts[lane, kind] += 1
        sizes[lane] += size
    for (lane, kind), count in counts.items():
        column = COLUMN[kind]
        connection.execute(f"UPDATE lanes SET {column} = {column} - ? WHERE id = ?", (count, lane))
    connection.executemany(
        "UPDATE lanes SET bytes = bytes - ? WHERE id = ?",
        [(size, lane) for lane, size in sizes.items()],
    )
    return len(rows)
