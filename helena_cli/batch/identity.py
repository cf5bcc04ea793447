"""The tables of a spool file, and whether the file is still the one that it was.

The position rows in the database go by the spool's id. A copy under the same id would skip what the
original wrote, or write it again; so a file that finds itself elsewhere becomes another spool.
"""

import json
import logging
import os
import sqlite3
import uuid
from pathlib import Path

from helena_cli.errors import SpoolUnavailable

log = logging.getLogger(__name__)

VERSION = 3

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;

CREATE TABLE counters (
    last_id INTEGER NOT NULL DEFAULT 0,
    folded_id INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL DEFAULT 0,
    written INTEGER NOT NULL DEFAULT 0,
    coalesced INTEGER NOT NULL DEFAULT 0,
    dropped INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0,
    flushes INTEGER NOT NULL DEFAULT 0,
    flushed INTEGER NOT NULL DEFAULT 0,
    rows INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0
);

INSERT INTO counters DEFAULT VALUES;

CREATE TABLE lanes (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    inserts INTEGER NOT NULL DEFAULT 0,
    updates INTEGER NOT NULL DEFAULT 0,
    messages INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL DEFAULT 0,
    last_id INTEGER NOT NULL DEFAULT 0,
    nonces TEXT NOT NULL DEFAULT '',
    reason TEXT, sqlstate TEXT, remedy TEXT,
    since REAL, retry_at REAL,
    tries INTEGER NOT NULL DEFAULT 0
);

CREATE TABLE operations (
    id INTEGER PRIMARY KEY,
    lane INTEGER NOT NULL,
    kind TEXT NOT NULL,
    data BLOB NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    held_since REAL, retry_at REAL
);

CREATE INDEX operations_by_lane ON operations (lane);

-- The counts of a lane change with its rows, and one page with every append.
CREATE TRIGGER operation_enters AFTER INSERT ON operations BEGIN
    UPDATE lanes SET
        inserts = inserts + (new.kind = 'insert'),
        updates = updates + (new.kind = 'update'),
        messages = messages + (new.kind = 'message'),
        bytes = bytes + length(new.data),
        accepted = accepted + 1,
        last_id = new.id
    WHERE id = new.lane;
END;

CREATE TRIGGER operation_leaves AFTER DELETE ON operations BEGIN
    UPDATE lanes SET
        inserts = inserts - (old.kind = 'insert'),
        updates = updates - (old.kind = 'update'),
        messages = messages - (old.kind = 'message'),
        bytes = bytes - length(old.data)
    WHERE id = old.lane;
END;

CREATE INDEX operations_held ON operations (lane, retry_at) WHERE held_since IS NOT NULL;

CREATE TABLE dead_letters (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL, table_name TEXT NOT NULL, data BLOB NOT NULL,
    sqlstate TEXT, message TEXT NOT NULL, constraint_name TEXT,
    attempts INTEGER NOT NULL, failed_at REAL NOT NULL
);

CREATE TABLE flushes (
    at REAL NOT NULL, operations INTEGER NOT NULL, rows INTEGER NOT NULL,
    seconds REAL NOT NULL, error TEXT
);

CREATE TABLE flusher (pid INTEGER, host TEXT, since REAL, heartbeat REAL);
"""

#: The last tables, for version 1 did not have the first of them and version 2 not the second.
CONSUMED = """
CREATE TABLE IF NOT EXISTS consumed (
    name TEXT NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (name, digest)
);
"""

HISTOGRAMS = """
CREATE TABLE IF NOT EXISTS histograms (
    name TEXT NOT NULL, bound REAL NOT NULL, count INTEGER NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (name, bound)
);
"""

#: The state of a row that another spool may have written already.
MOVED = "HL004"


class Damaged(sqlite3.DatabaseError):
    """The file holds what Helena never wrote, and SQLite did not notice."""


def prepare(connection: sqlite3.Connection, path: Path, now: float) -> None:
    """Make the tables of a new file; give a file that was moved or copied a new identity."""
    version = _version(connection)
    if version > VERSION:
        raise SpoolUnavailable(
            f"The queue {path} was made by a newer Helena (layout {version}).",
            remedy="Update Helena, or set HELENA_STATE_DIR to another directory.",
        )
    if not version:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise Damaged("its version is missing")
        connection.execute("BEGIN IMMEDIATE")
        create(connection, home(path))
        connection.execute("COMMIT")
    elif version < VERSION:
        connection.execute("BEGIN IMMEDIATE")
        _upgrade(connection)
        connection.execute("COMMIT")
    known = connection.execute("SELECT value FROM meta WHERE key = 'home'").fetchone()
    if known is None:
        raise Damaged("its identity is missing")
    if known[0] != home(path):
        connection.execute("BEGIN IMMEDIATE")
        why = f"its spool was moved or copied here from {_path(known[0])}"
        take_new_identity(connection, path, now, why)
        connection.execute("COMMIT")


def create(connection: sqlite3.Connection, where: str) -> None:
    """Make the tables, on an open transaction, of a file whose home is `where`."""
    for statement in SCHEMA.split("\n\n"):
        connection.execute(statement)
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?)", [("spool_id", uuid.uuid4().hex), ("home", where)]
    )
    _upgrade(connection)


def _upgrade(connection: sqlite3.Connection) -> None:
    connection.execute(CONSUMED)
    connection.execute(HISTOGRAMS)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def take_new_identity(connection: sqlite3.Connection, path: Path, now: float, why: str) -> None:
    """Become another spool.

    What is queued may have been written elsewhere, so it becomes dead letters; in one transaction,
    however much it is, for a spool with half of its identity would be neither.
    """
    connection.execute(
        "INSERT INTO dead_letters SELECT o.id, o.kind, l.name, o.data, ?, ?, NULL, o.attempts, ?"
        " FROM operations o JOIN lanes l ON l.id = o.lane",
        (MOVED, f"not written: {why}, and may have been written from there", now),
    )
    moved = connection.execute("DELETE FROM operations").rowcount
    connection.execute(
        "UPDATE lanes SET nonces = '', reason = NULL, sqlstate = NULL, remedy = NULL,"
        " since = NULL, retry_at = NULL, tries = 0"
    )
    connection.executemany(
        "INSERT OR REPLACE INTO meta VALUES (?, ?)",
        [("spool_id", uuid.uuid4().hex), ("home", home(path))],
    )
    # What is the target of the original need not be the target of the copy.
    connection.execute("DELETE FROM meta WHERE key = 'target_id'")
    log.error(
        "the spool %s takes a new identity, %d operations are dead letters: %s", path, moved, why
    )


def spool_id(connection: sqlite3.Connection) -> str:
    """The id of the spool."""
    query = "SELECT value FROM meta WHERE key = 'spool_id'"
    return str(connection.execute(query).fetchone()[0])


def last_id(connection: sqlite3.Connection) -> int:
    """The highest id that any operation in the tables has had."""
    query = "SELECT max(last_id, (SELECT coalesce(max(last_id), 0) FROM lanes)) FROM counters"
    return int(connection.execute(query).fetchone()[0])


def home(path: Path, *, as_if_at: Path | None = None) -> str:
    """What tells a copy from the original: machine, path and inode, as JSON."""
    return json.dumps([machine(), str((as_if_at or path).resolve()), os.stat(path).st_ino])


def machine() -> str:
    """The id of this machine, where it has one.

    Never its name: that changes with the network of a laptop and with every new container.
    """
    try:
        return Path("/etc/machine-id").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _path(where: str) -> str:
    try:
        return str(json.loads(where)[1])
    except (ValueError, LookupError, TypeError):
        return "an unknown place"
