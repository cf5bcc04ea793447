"""One transaction of a flush: how it begins, its savepoints, and its end.

Savepoints are set, released and rolled back together, in one message right before the next
statement, so that a flush over a slow line does not pay a round trip for each.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from helena_cli.batch.flush import FlushFailed
from helena_cli.database.connection import Connection

_BEGIN = """\
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SET LOCAL lock_timeout = {lock_timeout};
SET LOCAL statement_timeout = {statement_timeout};
SET LOCAL idle_in_transaction_session_timeout = {idle_timeout};
SET LOCAL TimeZone = 'UTC';
SET CONSTRAINTS ALL IMMEDIATE"""


class Transaction:
    """A transaction on a connection in autocommit mode. Times in milliseconds."""

    def __init__(self, connection: Connection, busy: Callable[[], None] = lambda: None) -> None:
        """`busy()` is called when the server is about to work for long.

        That is before a statement, and after the first block of a COPY.
        """
        self._busy = busy
        self._cursor: psycopg.RawCursor[TupleRow] = psycopg.RawCursor(connection)
        self._later: list[str] = []
        self._depth = 0

    def begin(self, *, lock_timeout: int, statement_timeout: int, idle_timeout: int) -> None:
        """Begin. A constraint is checked at once: at COMMIT it would fail outside any savepoint."""
        self._later = [
            _BEGIN.format(
                lock_timeout=int(lock_timeout),
                statement_timeout=int(statement_timeout),
                idle_timeout=int(idle_timeout),
            )
        ]

    def execute(
        self, query: bytes, parameters: list[Any] | None = None
    ) -> psycopg.RawCursor[TupleRow]:
        """Execute one statement with $1 … as its parameters; its rows are there until the next."""
        self._catch_up()
        return self._cursor.execute(query, parameters, prepare=False)

    def write(self, query: bytes, parameters: list[Any]) -> None:
        """Execute a statement that takes long."""
        self._catch_up()
        self._busy()
        self._cursor.execute(query, parameters, prepare=False)

    def copy(self, query: bytes, blocks: Iterable[bytes]) -> int:
        """Execute COPY FROM STDIN with these lines; how many rows it wrote."""
        self._catch_up()
        rest = iter(blocks)
        with self._cursor.copy(query) as copy:
            copy.write(next(rest, b""))
            # Only now has the server something to do meanwhile.
            self._busy()
            for block in rest:
                copy.write(block)
        return self._cursor.rowcount

    def compose(self, query: sql.Composable) -> bytes:
        """The text of a query, to be used more than once."""
        return query.as_bytes(self._cursor)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """What happens inside is undone, alone, when an exception leaves the block."""
        name = f"helena_{self._depth}"
        self._depth += 1
        self._later.append(f"SAVEPOINT {name}")
        try:
            yield
        except BaseException:
            self._later.append(f"ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
            raise
        else:
            self._later.append(f"RELEASE SAVEPOINT {name}")
        finally:
            self._depth -= 1

    def commit(self) -> None:
        """Commit. Raises FlushFailed when the server rolls back instead: it calls that no error."""
        self._catch_up()
        if self._cursor.execute(b"COMMIT", prepare=False).statusmessage != "COMMIT":
            raise FlushFailed("the server rolled the transaction back instead of committing it")

    def _catch_up(self) -> None:
        if self._later:
            script, self._later = "; ".join(self._later), []
            # Without parameters it is a simple query, which may hold several statements.
            self._cursor.execute(script.encode(), prepare=False)
