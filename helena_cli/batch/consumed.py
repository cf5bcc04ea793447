"""Which files were taken in: noted in the transaction that accepts what is in them.

A file that is found again, because its reader died before it was put away, is thus known. When it
has been put away its note goes, so that a new file of the same name and content is a new one.

Functions on an open transaction; `Spool` calls them.
"""

import sqlite3
from collections.abc import Iterable


def note(connection: sqlite3.Connection, name: str, digest: str, now: float) -> bool:
    """Note a file by its path and what tells its content. False when it was noted before."""
    statement = "INSERT OR IGNORE INTO consumed (name, digest, at) VALUES (?, ?, ?)"
    return connection.execute(statement, (name, digest, now)).rowcount > 0


def below(connection: sqlite3.Connection, folder: str) -> list[str]:
    """The paths of the noted files of a folder."""
    query = "SELECT DISTINCT name FROM consumed WHERE substr(name, 1, length(?1)) = ?1"
    return [name for (name,) in connection.execute(query, (f"{folder}/",))]


def forget(connection: sqlite3.Connection, names: Iterable[str]) -> None:
    """Drop the notes of these files."""
    connection.executemany("DELETE FROM consumed WHERE name = ?", [(name,) for name in names])
