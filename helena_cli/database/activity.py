"""Who is connected to a database, who waits for whom, and how many connections are left.

Asks of a database by its name, so that it works from another one of the same server too. Nothing
here opens a relation of the database.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from helena_cli.database.blocking import Edges, behind, roots
from helena_cli.database.health import Connections, Holder, RelationLock, Session
from helena_cli.database.inquiry import Inquiry
from helena_cli.database.statement_text import without_secrets

NEEDS_MONITOR = (
    "needs pg_monitor: the role may not look at the sessions of others; an administrator can "
    "GRANT pg_monitor TO it"
)
UNTRACKED = "the server does not track it: track_activities is off"

#: The tree of waiting sessions is followed for so many; all are counted.
MOST_WAITING = 200

#: Without the privilege to look, backend_type is NULL, but only clients have a database and a user.
_CLIENT = (
    "coalesce(backend_type, CASE WHEN datid IS NULL OR usesysid IS NULL THEN 'background'"
    " ELSE 'client backend' END) = 'client backend'"
)
#: Those who look, this session among them, are no part of the picture.
_OTHERS = "pid <> pg_backend_pid() AND application_name IS DISTINCT FROM 'helena status'"

_COUNTS = f"""
SELECT pg_has_role(current_user, 'pg_read_all_stats', 'USAGE') OR count(*) FILTER
           (WHERE state IS NULL AND usename IS DISTINCT FROM current_user) = 0 AS complete,
       count(*) FILTER (WHERE state = 'disabled') = 0 AS tracked,
       count(*) FILTER (WHERE state IN ('active', 'fastpath function call')) AS active,
       count(*) FILTER (WHERE state LIKE 'idle in transaction%%') AS idle,
       max(extract(epoch FROM clock_timestamp() - state_change))
           FILTER (WHERE state LIKE 'idle in transaction%%')::float8 AS longest_idle
  FROM pg_stat_activity
 WHERE datname = %(database)s AND {_OTHERS} AND {_CLIENT}
"""

_SESSIONS = """
SELECT pid, usename::text AS user, application_name AS application, state,
       extract(epoch FROM clock_timestamp() - CASE WHEN state = 'active'
           THEN query_start ELSE state_change END)::float8 AS seconds,
       left(query, 1000) AS query
  FROM pg_stat_activity
"""
_LONGEST = f"""{_SESSIONS}
 WHERE datname = %(database)s AND {_OTHERS} AND {_CLIENT}
   AND state IN ('active', 'fastpath function call')
 ORDER BY query_start LIMIT 1
"""
_THESE = f"{_SESSIONS} WHERE pid = ANY(%(pids)s)"

# pg_locks shows waiting sessions to every role; pg_stat_activity hides them, and before release 18
# those that are still being opened. waitstart is new in 14. pg_blocking_pids halts the lock manager
# for a moment: it is called for those who wait, and not for all of very many.
_WAITS = """
SELECT w.*, pg_blocking_pids(w.pid) AS blockers FROM (
  SELECT l.pid, a.usename::text AS user, a.application_name AS application,
         coalesce(a.state, CASE WHEN a.pid IS NULL THEN 'starting' END) AS state,
         extract(epoch FROM clock_timestamp() - coalesce(l.since, a.query_start))::float8
             AS seconds,
         left(a.query, 1000) AS query, count(*) OVER () AS total
    FROM (SELECT pid, max(database) AS database,
                 min((to_jsonb(k) ->> 'waitstart')::timestamptz) AS since
            FROM pg_locks k WHERE NOT granted AND pid IS NOT NULL GROUP BY pid) l
    LEFT JOIN pg_stat_activity a ON a.pid = l.pid
   WHERE coalesce(a.datname, (SELECT datname FROM pg_database WHERE oid = l.database))
         = %(database)s AND a.application_name IS DISTINCT FROM 'helena status'
   ORDER BY seconds DESC NULLS LAST LIMIT %(most)s) w
 ORDER BY seconds DESC NULLS LAST
"""

_PREPARED = """
SELECT string_agg(gid, ', ' ORDER BY prepared) AS names, min(owner::text) AS user,
       extract(epoch FROM clock_timestamp() - min(prepared))::float8 AS seconds
  FROM pg_prepared_xacts WHERE database = %(database)s
"""

# Only ACCESS EXCLUSIVE keeps readers off; a session that still waits for it does so as well.
_LOCKS = """
SELECT relation::int8 AS oid, CASE WHEN database IN (0, (SELECT oid FROM pg_database
           WHERE datname = current_database())) OR relation::int8 < 16384
           THEN relation::regclass::text ELSE relation::text END AS relation, pid, granted
  FROM pg_locks
 WHERE locktype = 'relation' AND mode = 'AccessExclusiveLock' AND pid IS DISTINCT FROM
           pg_backend_pid()
   AND database IN (0, (SELECT oid FROM pg_database WHERE datname = %(database)s))
 ORDER BY relation::int8 >= 16384, granted DESC, pid LIMIT 1000
"""

# The sessions of `status`, `init` and the like belong to a person, not to the batch writer.
_CONNECTIONS = f"""
SELECT count(*) AS used,
       current_setting('max_connections')::int
           - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0) AS max,
       count(*) FILTER (WHERE application_name LIKE 'helena %%' AND pid <> pg_backend_pid()
           AND application_name NOT IN ('helena status', 'helena init', 'helena clear-locks'))
           AS helena,
       count(*) FILTER (WHERE usename = session_user) AS role_used,
       (SELECT rolconnlimit FROM pg_roles
         WHERE rolname = session_user AND rolconnlimit >= 0 AND NOT rolsuper) AS role_max,
       count(*) FILTER (WHERE datname = %(database)s) AS database_used,
       (SELECT datconnlimit FROM pg_database
         WHERE datname = %(database)s AND datconnlimit >= 0) AS database_max
  FROM pg_stat_activity
 WHERE {_CLIENT}
"""

_HOLDERS = f"""
SELECT usename::text, application_name, count(*)::int FROM pg_stat_activity
 WHERE {_CLIENT} AND {_OTHERS}
 GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT 5
"""


def queries(inquiry: Inquiry, database: str) -> Mapping[str, Any]:
    """The active queries and the idle transactions."""
    counts = inquiry.one("active_queries", _COUNTS, {"database": database})
    if counts is None:
        return {}
    if not (counts.complete and counts.tracked):
        inquiry.unknown["active_queries"] = UNTRACKED if counts.complete else NEEDS_MONITOR
        return {}
    found = inquiry.one("active_queries", _LONGEST, {"database": database})
    longest = _session(found) if found else None
    return {
        "active_queries": counts.active,
        "idle_in_transaction": counts.idle,
        "longest_idle_seconds": counts.longest_idle,
        "longest_query": longest,
        "longest_query_seconds": (longest and longest.seconds) or 0.0,
    }


def waits(inquiry: Inquiry, database: str) -> Mapping[str, Any]:
    """Who waits for a lock, and who holds them up."""
    rows = inquiry.all("lock_waits", _WAITS, {"database": database, "most": MOST_WAITING})
    if rows is None:
        return {}
    waiting = [
        Session(
            row.pid,
            row.user,
            row.application,
            row.state,
            _age(row.seconds),
            without_secrets(row.query),
            # Parallel workers make it name a session twice.
            blocked_by=tuple(dict.fromkeys(row.blockers)),
        )
        for row in rows
    ]
    edges: Edges = {session.pid: frozenset(session.blocked_by) for session in waiting}
    held_up = {pid: len(behind(edges, pid)) for pid in roots(edges) if isinstance(pid, int)}
    return {
        "lock_waits": rows[0].total if rows else 0,
        "waiting": tuple(waiting),
        "blocking": tuple(_blocking(inquiry, database, held_up)),
    }


def _session(row: Any) -> Session:
    values = {"query": without_secrets(row.query), "seconds": _age(row.seconds)}
    return Session(**{**row._asdict(), **values})


def _age(seconds: float | None) -> float | None:
    """Not below zero, for clocks are set; None where the role may not see it."""
    return None if seconds is None else max(0.0, seconds)


def _blocking(inquiry: Inquiry, database: str, held_up: Mapping[int, int]) -> Iterable[Session]:
    if not held_up:
        return
    rows = inquiry.all("blocking", _THESE, {"pids": list(held_up)}) or []
    known = {row.pid: row for row in rows}
    for pid, count in held_up.items():
        if pid == 0:
            row = inquiry.one("blocking", _PREPARED, {"database": database})
            user, seconds = (row.user, row.seconds) if row else (None, None)
            name = row and row.names and f"PREPARE TRANSACTION {row.names}"
            yield Session(0, user, None, "prepared transaction", seconds, name, holds_up=count)
        elif pid in known:
            yield replace(_session(known[pid]), holds_up=count)
        else:
            yield Session(pid, None, None, None, None, None, holds_up=count)


def locks(inquiry: Inquiry, database: str) -> Mapping[str, Any]:
    """Which relations are locked against readers; holders before those who wait."""
    rows = inquiry.all("locks", _LOCKS, {"database": database})
    return {} if rows is None else {"locks": tuple(RelationLock(*row) for row in rows)}


def connections(inquiry: Inquiry, database: str) -> Mapping[str, Any]:
    """How many connections are in use, and how many there can be."""
    row = inquiry.one("connections", _CONNECTIONS, {"database": database})
    if row is None:
        return {}
    holders = inquiry.all("holders", _HOLDERS) or []
    return {
        "connections": Connections(**row._asdict()),
        "holders": tuple(Holder(*holder) for holder in holders),
    }
