"""Empties the pending lists of GIN indexes, on a connection of its own and never inside a flush.

Otherwise the list grows until some insert has to fold it in, and that one waits for all of it.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import psycopg

from helena_cli.database.connection import Connection
from helena_cli.database.failure import LOCK_NOT_AVAILABLE
from helena_cli.errors import HelenaError

log = logging.getLogger(__name__)

#: Seconds that a list may still take to be emptied when Helena ends, and a server to be told.
PATIENCE = 0.5
TRIES = 4

#: Seconds before an index that belongs to somebody else is tried again.
REFUSED_FOR = 3600.0

#: Seconds before another try after one that failed: at full speed there are ten in a second.
REST = 60.0

# With the indexes of partitions: only they have pages. Nothing here opens a relation.
_INDEXES = """\
WITH RECURSIVE named AS (
  SELECT c.oid
    FROM unnest(%s::text[], %s::text[]) AS lane(schema, name)
    JOIN pg_catalog.pg_class c ON c.relname = lane.name::name
    JOIN pg_catalog.pg_namespace s ON s.oid = c.relnamespace
   WHERE CASE WHEN lane.schema IS NULL THEN pg_catalog.pg_table_is_visible(c.oid)
              ELSE s.nspname = lane.schema::name END
  UNION
  SELECT h.inhrelid FROM named JOIN pg_catalog.pg_inherits h ON h.inhparent = named.oid)
SELECT x.oid::bigint, x.oid::regclass::text
  FROM named
  JOIN pg_catalog.pg_index i ON i.indrelid = named.oid AND i.indisvalid AND i.indisready
  JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid AND x.relkind = 'i'
  JOIN pg_catalog.pg_am a ON a.oid = x.relam AND a.amname = 'gin'
 ORDER BY x.oid"""

_CLEAN = """\
BEGIN; SET LOCAL lock_timeout = '500ms'; SET LOCAL statement_timeout = '60s';
SELECT gin_clean_pending_list({oid}::oid::regclass); COMMIT"""


class Maintenance:
    """Keeps the pending lists short. One thread may `run` it and another one `close` it."""

    def __init__(
        self, connect: Callable[[], Connection], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._connect = connect
        self._clock = clock
        self._connection: Connection | None = None
        self._running = threading.Lock()
        self._closed = False
        #: Index → when it is tried again.
        self._left: dict[int, float] = {}
        #: When a connection is tried again.
        self._resting = 0.0

    def run(self, tables: Iterable[str]) -> None:
        """Empty the lists of all GIN indexes of these tables, as far as that is allowed."""
        with self._running:
            if self._closed or self._clock() < self._resting:
                return
            kept = self._connection is not None and not self._connection.closed
            try:
                if self._connection is None or not kept:
                    self._connection = self._connect()
                for oid, name in self._indexes(self._connection, tables):
                    if self._closed:
                        return
                    self._clean(self._connection, oid, name)
            except (psycopg.Error, HelenaError) as error:
                if not self._closed:
                    log.warning("the pending lists were not emptied: %s", error)
                if not kept:
                    # One that was kept may merely have been lost meanwhile.
                    self._resting = self._clock() + REST
                self._disconnect()
            finally:
                # Who closed may have given up waiting.
                if self._closed:
                    self._disconnect()

    def close(self) -> None:
        """Close the connection for good; what is being done on it is given up.

        A server that does not even answer that is left to the thread that waits for it.
        """
        self._closed = True
        for _ in range(TRIES):
            if self._running.acquire(timeout=PATIENCE):
                self._disconnect()
                self._running.release()
                return
            self._cancel()
        log.warning("the server does not answer: its connection is closed later")

    def _cancel(self) -> None:
        connection = self._connection
        if connection is not None:
            with suppress(psycopg.Error):
                connection.cancel_safe(timeout=PATIENCE)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _indexes(self, connection: Connection, tables: Iterable[str]) -> list[tuple[int, str]]:
        parts = [table.rpartition(".") for table in tables]
        names = [[schema or None for schema, _, _ in parts], [name for _, _, name in parts]]
        found = connection.execute(_INDEXES, names, prepare=False).fetchall()
        now = self._clock()
        return [(oid, name) for oid, name in found if now >= self._left.get(oid, now)]

    def _clean(self, connection: Connection, oid: int, name: str) -> None:
        try:
            connection.execute(_CLEAN.format(oid=int(oid)).encode(), prepare=False)
        except psycopg.Error as error:
            if connection.closed:
                raise
            connection.execute("ROLLBACK")
            if error.sqlstate == "42501":
                self._left[oid] = self._clock() + REFUSED_FOR
                log.info("the pending list of %s belongs to somebody else: %s", name, error)
            elif error.sqlstate not in (LOCK_NOT_AVAILABLE, "40P01"):
                self._left[oid] = self._clock() + REST
                log.warning("the pending list of %s was not emptied: %s", name, error)
