"""What the database says of itself, read gently on one connection.

It is asked when it is sick, so each question is bounded by itself, takes no lock that the user's
sessions could wait for, and is answered with None and a reason when it has to. None is not zero.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import psycopg
from msgspec import Struct
from psycopg import sql
from psycopg.rows import namedtuple_row

#: Seconds for all GIN indexes together: on a busy server each may wait for its lock.
GIN_SECONDS = 3.0

#: The largest indexes are looked at; the rest would only make the answer late.
GIN_INDEXES = 50

BOUNDS = "SET LOCAL statement_timeout = '2s'; SET LOCAL lock_timeout = '500ms'"

REASONS = {
    "57014": "it took longer than 2 s",
    "55P03": "locked by another session",
    "42501": "permission denied",
}

NO_STATEMENTS_OF_OTHERS = (
    "the role may not look at other sessions: GRANT pg_read_all_stats TO its name"
)

ACTIVITY = """
SELECT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE') OR count(*) FILTER
           (WHERE state IS NULL AND usename IS DISTINCT FROM current_user) = 0 AS complete,
       count(*) FILTER (WHERE state = 'active') AS active,
       coalesce(max(extract(epoch FROM clock_timestamp() - query_start))
           FILTER (WHERE state = 'active'), 0)::float8 AS longest,
       count(*) FILTER (WHERE state LIKE 'idle in transaction%') AS idle_in_transaction
  FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid()
   AND coalesce(backend_type, 'client backend') = 'client backend'
"""

# pg_locks shows waiting sessions to every role; pg_stat_activity hides them.
LOCK_WAITS = """
SELECT count(DISTINCT l.pid) AS waiting
  FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE NOT l.granted AND a.datname = current_database()
"""

# The sessions of `status`, `init` and the like belong to a person, not to the batch writer.
CONNECTIONS = """
SELECT count(*) AS used,
       current_setting('max_connections')::int
           - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0) AS usable,
       count(*) FILTER (WHERE application_name LIKE 'helena %' AND pid <> pg_backend_pid()
           AND application_name NOT IN ('helena status', 'helena init', 'helena clear-locks'))
           AS helena
  FROM pg_stat_activity
 WHERE coalesce(backend_type, 'client backend') = 'client backend'
"""

PREPARED = "SELECT to_regclass('helena.spool_position') IS NOT NULL AS found"

HOSTS = """
SELECT coalesce(host, '') AS host, count(DISTINCT spool_id) AS spools, count(*) AS tables,
       max(updated_at) AS updated_at
  FROM helena.spool_position GROUP BY 1 ORDER BY 1
"""

# oid::regclass is safe while somebody holds the relation; its size is not asked for.
GIN = """
SELECT c.oid, c.oid::regclass::text AS index, i.indrelid::regclass::text AS relation,
       coalesce((SELECT option_value FROM pg_options_to_table(c.reloptions)
                  WHERE option_name = 'gin_pending_list_limit'), s.setting)::bigint * 1024
           / current_setting('block_size')::bigint AS limit_pages,
       (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
         WHERE e.extname = 'pgstattuple') AS pgstattuple
  FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid JOIN pg_am m ON m.oid = c.relam,
       pg_settings s
 WHERE m.amname = 'gin' AND c.relkind = 'i' AND i.indisvalid AND c.relpersistence <> 't'
   AND s.name = 'gin_pending_list_limit'
   AND c.relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
 ORDER BY c.relpages DESC LIMIT %s
"""


class Connections(Struct, frozen=True):
    """Slots: in use, usable by an ordinary role, and in use by the batch writers of all hosts."""

    used: int | None = None
    max: int | None = None
    helena: int | None = None


class GinIndex(Struct, frozen=True):
    """The pending list of one GIN index, in pages; None with a `reason` when it is not known."""

    index: str
    table: str
    pending_pages: int | None
    limit_pages: int
    reason: str | None = None


class HostRow(Struct, frozen=True):
    """A host that writes into this database: its spools, their tables, and when they last moved."""

    host: str
    spools: int
    tables: int
    updated_at: datetime


class Health(Struct, frozen=True):
    """One look at the database. `unknown` says, by the name of a field, why it is None or empty."""

    server_version: str
    #: Whether `helena init` was here.
    prepared: bool | None
    response_ms: float | None
    active_queries: int | None
    longest_query_seconds: float | None
    lock_waits: int | None
    idle_in_transaction: int | None
    connections: Connections
    gin: tuple[GinIndex, ...]
    hosts: tuple[HostRow, ...]
    unknown: Mapping[str, str]


def probe(connection: psycopg.Connection[Any]) -> Health:
    """Ask everything; takes a few milliseconds, and some seconds at most. Never raises for a no."""
    reader = _Reader(connection)
    activity = reader.one("active_queries", ACTIVITY)
    if activity is not None and not activity.complete:
        reader.unknown["active_queries"] = NO_STATEMENTS_OF_OTHERS
        activity = None
    waits = reader.one("lock_waits", LOCK_WAITS)
    slots = reader.one("connections", CONNECTIONS)
    prepared = reader.one("prepared", PREPARED)
    return Health(
        server_version=connection.info.parameter_status("server_version") or "",
        prepared=prepared and prepared.found,
        response_ms=reader.response_ms(),
        active_queries=activity and activity.active,
        longest_query_seconds=activity and activity.longest,
        lock_waits=waits and waits.waiting,
        idle_in_transaction=activity and activity.idle_in_transaction,
        connections=Connections(slots.used, slots.usable, slots.helena) if slots else Connections(),
        gin=tuple(_gin(reader)),
        hosts=tuple(_hosts(reader, prepared)),
        unknown=reader.unknown,
    )


class _Reader:
    """Asks one question at a time, each in a bounded transaction of its own."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self.unknown: dict[str, str] = {}

    def response_ms(self) -> float | None:
        """One round trip; the best of three, for the first may wait for this client."""
        times = []
        with self._recorded("response_ms"):
            for _ in range(3):
                started = time.perf_counter()
                self._connection.execute("SELECT 1").fetchone()
                times.append((time.perf_counter() - started) * 1000)
        return min(times, default=None)

    def all(self, name: str, query: sql.SQL | sql.Composed | str, *values: object) -> list[Any]:
        """The rows, or none and a reason under `name`."""
        rows: list[Any] = []
        with self._recorded(name), self._connection.transaction():
            # Not SET: a pooler would hand the session's settings to somebody else.
            self._connection.execute(BOUNDS)
            with self._connection.cursor(row_factory=namedtuple_row) as cursor:
                rows = cursor.execute(query, values or None).fetchall()
        return rows

    def one(self, name: str, query: sql.SQL | sql.Composed | str, *values: object) -> Any:
        """The only row, or None and a reason under `name`."""
        rows = self.all(name, query, *values)
        return rows[0] if rows else None

    @contextmanager
    def _recorded(self, name: str) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            lost = "the connection was lost" if self._connection.closed else str(error).strip()
            self.unknown[name] = REASONS.get(error.sqlstate or "", lost)


def _hosts(reader: _Reader, prepared: Any) -> Iterator[HostRow]:
    if prepared is None or prepared.found:
        yield from (HostRow(*row) for row in reader.all("hosts", HOSTS))


def _gin(reader: _Reader) -> Iterator[GinIndex]:
    deadline = time.monotonic() + GIN_SECONDS
    for row in reader.all("gin", GIN, GIN_INDEXES):
        pending: int | None = None
        reason: str | None = None
        if row.pgstattuple is None:
            reason = "the extension pgstattuple is not installed"
        elif time.monotonic() > deadline:
            reason = f"not looked at within {GIN_SECONDS:.0f} s"
        else:
            pending, reason = _pending(reader, row)
        yield GinIndex(row.index, row.relation, pending, row.limit_pages, reason)


def _pending(reader: _Reader, row: Any) -> tuple[int | None, str | None]:
    query = sql.SQL("SELECT pending_pages FROM {}.pgstatginindex(%s::oid::regclass)")
    found = reader.one(row.index, query.format(sql.Identifier(row.pgstattuple)), row.oid)
    return (found.pending_pages, None) if found else (None, reader.unknown.pop(row.index))
