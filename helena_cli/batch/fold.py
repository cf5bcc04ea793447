"""From the inbox into the tables: accepted operations, in order, each once."""

import logging
import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from helena_cli.batch import identity, lanes
from helena_cli.batch.inbox import Inbox
from helena_cli.batch.operation import Operation

log = logging.getLogger(__name__)

#: Bytes of records that are in memory at once.
SLICE = 4 * 1024 * 1024

#: Rows of one statement. Of the largest operations they stay below what SQLite takes at once.
ROWS = 100

_INSERT = """\
INSERT OR IGNORE INTO operations (id, lane, kind, data)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
       substr(?1, json_extract(value, '$[3]'), json_extract(value, '$[4]'))
  FROM json_each(?2)"""


def fold(connection: sqlite3.Connection, inbox: Inbox, start: int, end: int) -> int:
    """Insert the records between these bounds; where to release the inbox after the commit.

    After a death between commit and release they come again, and are known by their ids.
    """
    last = folded(connection)
    strangers = inbox.owner() not in ("", identity.spool_id(connection))
    while start < end:
        content = inbox.read(start, end, limit=SLICE)
        start = content.end
        if content.damaged:
            log.error("the inbox of the spool is damaged; some operations are lost")
            connection.execute("UPDATE counters SET lost = lost + 1")
        operations = [operation for operation in content.operations if operation.id > last]
        if operations:
            last = operations[-1].id
            if strangers:
                _bury(connection, operations)
            else:
                insert(connection, operations)
    connection.execute("UPDATE counters SET folded_id = max(folded_id, ?)", (last,))
    return end


def folded(connection: sqlite3.Connection) -> int:
    """The last id that is in the tables, or done with: records up to it do not count any more."""
    return int(connection.execute("SELECT folded_id FROM counters").fetchone()[0])


def insert(connection: sqlite3.Connection, operations: Sequence[Operation]) -> None:
    """Put operations into their lanes, made if need be."""
    lanes.add(connection, {operation.table for operation in operations})
    numbers = dict(connection.execute("SELECT name, id FROM lanes").fetchall())
    for start in range(0, len(operations), ROWS):
        part = operations[start : start + ROWS]
        # One statement: between two rows of many the interpreter would pass to another thread.
        places, at = [], 1
        for one in part:
            places.append((one.id, numbers[one.table], one.kind, at, len(one.data)))
            at += len(one.data)
        data = b"".join(one.data for one in part)
        connection.execute(_INSERT, (data, msgspec.json.encode(places).decode()))


def _bury(connection: sqlite3.Connection, operations: Iterable[Operation]) -> None:
    """Operations that were accepted for the original of this copy: it may have written them."""
    message = "not written: its spool was moved or copied here, it may have been written elsewhere"
    buried = connection.executemany(
        "INSERT OR IGNORE INTO dead_letters"
        " SELECT ?, ?, ?, ?, ?, ?, NULL, 0, CAST(strftime('%s', 'now') AS REAL)",
        [(o.id, o.kind, o.table, o.data, identity.MOVED, message) for o in operations],
    ).rowcount
    connection.execute("UPDATE counters SET accepted = accepted + ?", (buried,))
    log.error("%d operations of a moved or copied spool are dead letters", buried)
