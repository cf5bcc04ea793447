"""Reads who blocks whom, without waiting for a lock of the users' own tables.

It is asked when the database hangs. So it connects within two seconds, to another database of the
same server if need be, and every question is bounded.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psycopg
from msgspec import Struct
from msgspec.structs import replace
from psycopg.rows import dict_row

from helena_cli.database import prepared
from helena_cli.database.blocking import Awaited, Key, Look, Session
from helena_cli.database.connection import (
    Connection,
    connect,
    nobody_answered,
    slots_are_taken,
    translate,
)
from helena_cli.database.elsewhere import PLACES, SHUT, TEMPLATE
from helena_cli.database.statement_text import readable, without_secrets
from helena_cli.database.target import Target, database_name
from helena_cli.errors import DatabaseUnreachable, HelenaError, UsageError

#: Seconds. libpq takes nothing less.
CONNECT_TIMEOUT = 2.0

#: Seconds between two looks: what is over by then was no blockade.
PAUSE = 0.5

BOUNDS = b"SET LOCAL statement_timeout = '2s'; SET LOCAL lock_timeout = '500ms'"

#: The server hands text out as it is. What a session of another database runs, or a program with an
#: encoding of its own, need not be text here: to convert it would fail, and with it the whole look.
_UNCONVERTED = b"SET LOCAL client_encoding = 'SQL_ASCII'"

#: Characters of a statement that are read; a server may keep a million.
_LONGEST = 10_000

# It never goes back: a statement may begin with any number of comments.
_VACUUM = re.compile(r"(?>\s+|--[^\n]*\n|/\*.*?\*/)*+vacuum\b", re.IGNORECASE | re.DOTALL)

_SERVER = """
SELECT current_database()::text AS database, pg_backend_pid() AS pid,
       pg_is_in_recovery() AS standby, current_user::text AS role,
       (SELECT oid::bigint FROM pg_database WHERE datname = coalesce(%s, current_database())) AS oid
"""

# One statement, so that all of it is one moment. pg_locks shows the waits to every role. The wait's
# beginning is there from release 14 on. Names are resolved without opening anything, and only where
# the oid means something: in this database, or below the first oid of users' objects. A query of a
# database of another encoding is handed on byte by byte: to cut it might fail.
_SESSIONS = """
WITH locks AS MATERIALIZED (SELECT * FROM pg_catalog.pg_locks),
awaited AS (
  SELECT DISTINCT ON (pid) pid, database, locktype, mode,
         (to_jsonb(locks) ->> 'waitstart')::timestamptz AS since,
         CASE WHEN relation IS NULL THEN NULL
              WHEN relation::oid::bigint < 16384 OR database IN
                   (SELECT oid FROM pg_database WHERE datname = current_database())
              THEN relation::oid::regclass::text END AS name
    FROM locks WHERE NOT granted AND pid IS NOT NULL ORDER BY pid, relation),
touched AS (
  SELECT pid, array_agg(DISTINCT relation::bigint) AS relations,
         array_agg(DISTINCT relation::bigint) FILTER (WHERE NOT granted OR
             mode NOT IN ('AccessShareLock', 'RowShareLock')) AS written
    FROM locks WHERE pid IS NOT NULL AND locktype IN ('relation', 'tuple', 'extend')
     AND database::oid::bigint = %(database)s GROUP BY pid)
SELECT coalesce(a.pid, w.pid) AS pid,
       coalesce(nullif(a.datid, 0), w.database)::bigint = %(database)s AS here,
       a.datname::text AS database, a.usename::text AS "user",
       coalesce(a.application_name, '') AS application, coalesce(host(a.client_addr), '') AS client,
       a.backend_type, a.state, a.backend_start, a.xact_start, a.query_start, a.state_change,
       extract(epoch FROM clock_timestamp() - CASE WHEN a.state = 'active' THEN a.query_start
               ELSE a.state_change END)::float8 AS seconds,
       CASE WHEN d.encoding = own.encoding THEN left(a.query, %(longest)s) ELSE a.query
           END AS query,
       a.leader_pid AS leader,
       coalesce(r.rolsuper, false) AS superuser,
       a.usesysid IS NOT NULL AND CASE WHEN r.rolsuper THEN me.rolsuper
           ELSE pg_has_role(a.usesysid, 'USAGE') OR pg_has_role('pg_signal_backend', 'USAGE')
           END AS may_end,
       v.pid IS NOT NULL AS vacuum,
       w.locktype, w.mode, w.name,
       extract(epoch FROM clock_timestamp() - coalesce(w.since, a.query_start))::float8 AS waited,
       CASE WHEN w.pid IS NOT NULL THEN pg_blocking_pids(w.pid) ELSE '{}' END AS blockers,
       coalesce(t.relations, '{}') AS relations, coalesce(t.written, '{}') AS written
  FROM pg_catalog.pg_stat_activity a FULL JOIN awaited w ON w.pid = a.pid
  LEFT JOIN touched t ON t.pid = coalesce(a.pid, w.pid)
  LEFT JOIN pg_catalog.pg_stat_progress_vacuum v ON v.pid = a.pid
  LEFT JOIN pg_catalog.pg_roles r ON r.oid = a.usesysid
  LEFT JOIN pg_catalog.pg_database d ON d.oid = a.datid
  JOIN pg_catalog.pg_database own ON own.datname = current_database()
  JOIN pg_catalog.pg_roles me ON me.rolname = current_user
 WHERE a.pid IS DISTINCT FROM pg_backend_pid()
"""

# With the partitions of a partitioned table, and the indexes of all.
_RELATIONS = """
WITH RECURSIVE named AS (
  SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
   WHERE c.relname = %(name)s AND c.relkind IN ('r', 'p', 'm', 'i', 'I')
     AND CASE WHEN %(schema)s::text IS NULL THEN pg_catalog.pg_table_is_visible(c.oid)
              ELSE n.nspname = %(schema)s END
  UNION
  SELECT h.inhrelid FROM named JOIN pg_catalog.pg_inherits h ON h.inhparent = named.oid)
SELECT oid::bigint FROM named UNION
SELECT i.indexrelid::bigint FROM named JOIN pg_catalog.pg_index i ON i.indrelid = named.oid
"""

#: What a lock of this kind is on, for a person; by default the relation, or the kind itself.
_PLACES = {
    "tuple": "a row of {0}",
    "transactionid": "a row that a transaction has changed",
    "virtualxid": "a transaction",
    "advisory": "a number that programs agreed on",
}


class Server(Struct, frozen=True):
    """A connection to the server of the database that is to be freed."""

    connection: Connection
    #: The name of that database, and its oid; it may be another one that is connected to.
    database: str
    oid: int
    label: str
    #: Why it is not the database itself that is connected to.
    detour: str | None = None
    #: Whether there is a pooler in between.
    pooled: bool = False
    standby: bool = False
    #: Where each question takes a connection of its own, for PostgreSQL copies no database that
    #: somebody is connected to: CREATE DATABASE would fail while a person thinks.
    visited: Target | None = None


def reach(target: Target) -> Server:
    """Connect to the database, or to another one of its server.

    Raises DatabaseUnreachable or DatabaseRefused, with the remedy.
    """
    first: HelenaError | None = None
    hurried = replace(target, connect_timeout=CONNECT_TIMEOUT)
    name = database_name(target)
    for database in (None, *(other for other in PLACES if name and other != name)):
        try:
            connection = connect(hurried, application="clear-locks", database=database)
        except DatabaseUnreachable as error:
            first = first or _with_remedy(error)
            continue
        try:
            server = _server(connection, target, None if database is None else name, first)
            look(server)
            if database == TEMPLATE:
                connection.close()
                server = replace(server, visited=hurried)
            return server
        except HelenaError as error:
            # A lock on the catalogs may let us in, and stop the first question.
            first = first or error
            connection.close()
        except BaseException:
            connection.close()
            raise
    assert first is not None
    raise first


def _server(
    connection: Connection, target: Target, name: str | None, detour: Exception | None
) -> Server:
    found = _rows(connection, _SERVER, [name])[0]
    if found["oid"] is None:
        raise DatabaseUnreachable(str(detour), remedy="Mend the name of the database in the DSN.")
    return Server(
        connection=connection,
        database=name or found["database"],
        oid=found["oid"],
        label=target.label,
        detour=str(detour) if detour else None,
        # A pooler makes up the pid that it tells its clients.
        pooled=found["pid"] != connection.info.backend_pid,
        standby=found["standby"],
    )


def _with_remedy(error: DatabaseUnreachable) -> DatabaseUnreachable:
    if nobody_answered(error):
        remedy = f"Look at the load of the server, a firewall and the network. {SHUT}"
        return DatabaseUnreachable(str(error), remedy=remedy)
    if not slots_are_taken(error):
        return error
    return DatabaseUnreachable(
        str(error),
        remedy="Nothing can be looked at or ended without a connection, and all that this role may "
        "have are taken. Run the command as a superuser (--dsn with user=postgres): PostgreSQL "
        "keeps some connections for that. Or stop a program: helena stop-realtime needs none.",
    )


def ask(
    server: Server, query: str, values: Any = None, *, unconverted: bool = False
) -> list[dict[str, Any]]:
    """The rows of one bounded question. Raises DatabaseUnreachable, DatabaseRefused.

    `unconverted` is for what other databases have a part in; it must have no text among its values.
    """
    if server.visited is None:
        return _rows(server.connection, query, values, unconverted=unconverted)
    with connect(server.visited, application="clear-locks", database=TEMPLATE) as connection:
        return _rows(connection, query, values, unconverted=unconverted)


def _rows(
    connection: Connection, query: str, values: Any, *, unconverted: bool = False
) -> list[dict[str, Any]]:
    try:
        with connection.transaction():
            # Not SET: a pooler would hand the session's settings to somebody else.
            connection.execute(BOUNDS)
            if unconverted:
                connection.execute(_UNCONVERTED)
            with connection.cursor(row_factory=dict_row) as cursor:
                rows = cursor.execute(query.encode(), values, prepare=False).fetchall()
    except psycopg.Error as error:
        raise translate(error) from error
    encoding = connection.info.parameter_status("server_encoding") or ""
    return [{key: readable(value, encoding) for key, value in row.items()} for row in rows]


def look(server: Server) -> Look:
    """All sessions of the database, and who blocks whom, now."""
    values = {"database": server.oid, "longest": _LONGEST}
    rows = ask(server, _SESSIONS, values, unconverted=True)
    found: list[dict[str, Any]] = []
    # It is what pg_blocking_pids says of a prepared transaction.
    if any(0 in row["blockers"] for row in rows):
        found = ask(server, prepared.QUERY, values, unconverted=True)
    blocked = prepared.blocked(found)
    sessions = [_session(row, blocked.get(row["pid"], [])) for row in rows]
    return Look.of([*sessions, *map(prepared.session, found)])


def lasting_look(server: Server, sleep: Callable[[float], None] = time.sleep) -> Look:
    """The same, without the waits that are over after a moment."""
    earlier = look(server)
    if not earlier.edges():
        return earlier
    sleep(PAUSE)
    return look(server).lasting(earlier)


def relations(server: Server, names: Iterable[str]) -> frozenset[int]:
    """The oids of these tables, with their partitions and indexes. Raises UsageError."""
    found: set[int] = set()
    for name in names:
        schema, _, table = name.rpartition(".")
        values = {"schema": schema or None, "name": table}
        oids = {row["oid"] for row in ask(server, _RELATIONS, values)}
        if server.detour:
            # Only the catalogs have the same oids everywhere.
            oids = {oid for oid in oids if oid < 16384}
        if not oids:
            raise UsageError(
                f"There is no table {name!r} in the database {server.database}"
                + (", as far as can be told from outside." if server.detour else "."),
                remedy="Write it as name or schema.name, in the database's own spelling; or leave "
                "--table out.",
            )
        found |= oids
    return frozenset(found)


def is_vacuum(query: str) -> bool:
    """Whether this is a VACUUM, whatever comments stand before it."""
    return _VACUUM.match(query) is not None


def _session(row: dict[str, Any], prepared_blockers: Sequence[str]) -> Session:
    kind, awaits = row["locktype"], None
    query = (row["query"] or "")[:_LONGEST]
    if kind is not None:
        awaits = Awaited(kind, row["mode"], _PLACES.get(kind, "{0}").format(row["name"] or kind))
    own: dict[str, Any] = {
        name: row[name] for name in Session.__struct_fields__ if name in row and name != "blockers"
    }
    blockers: set[Key] = {pid for pid in row["blockers"] if pid} | set(prepared_blockers)
    own |= {
        "here": bool(row["here"]),
        "query": without_secrets(query) or "",
        "vacuum": row["vacuum"] or is_vacuum(query),
        "awaits": awaits,
        "blockers": frozenset(blockers),
        "relations": frozenset(row["relations"]),
        "written": frozenset(row["written"]),
    }
    return Session(**own)
