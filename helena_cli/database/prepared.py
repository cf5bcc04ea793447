"""Prepared transactions: who waits for them, as far as the locks tell.

They have no pid. pg_blocking_pids says 0 for all of them, so the one that is in the way is found by
its locks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from helena_cli.database.blocking import Session

# Its locks are those that share its own virtual transaction.
QUERY = """
WITH locks AS MATERIALIZED (SELECT * FROM pg_catalog.pg_locks),
held AS (
  SELECT x.gid, l.* FROM pg_catalog.pg_prepared_xacts x
    JOIN locks own ON own.pid IS NULL AND own.transactionid = x.transaction AND own.granted
    JOIN locks l ON l.pid IS NULL AND l.virtualtransaction = own.virtualtransaction)
SELECT x.gid, x.database::text AS database, x.owner::text AS "user", x.prepared,
       extract(epoch FROM clock_timestamp() - x.prepared)::float8 AS seconds,
       x.database = current_database() AND (x.owner = current_user OR me.rolsuper) AS may_end,
       (SELECT oid::bigint FROM pg_database WHERE datname = x.database) = %(database)s AS here,
       ARRAY(SELECT DISTINCT h.relation::bigint FROM held h WHERE h.gid = x.gid
               AND h.relation IS NOT NULL) AS relations,
       ARRAY(SELECT w.pid || ' ' || w.mode || ' ' || h.mode FROM held h JOIN locks w
               ON NOT w.granted AND (w.locktype, w.database, w.relation, w.page, w.tuple,
                  w.virtualxid, w.transactionid, w.classid, w.objid, w.objsubid)
               IS NOT DISTINCT FROM (h.locktype, h.database, h.relation, h.page, h.tuple,
                  h.virtualxid, h.transactionid, h.classid, h.objid, h.objsubid)
              WHERE h.gid = x.gid) AS waiters
  FROM pg_catalog.pg_prepared_xacts x
  JOIN pg_catalog.pg_roles me ON me.rolname = current_user
"""


#: Which modes each mode of a lock conflicts with, by their order of strength.
_MODES = (
    "AccessShareLock",
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
)
_CONFLICTS = ("7", "67", "4567", "34567", "23567", "234567", "1234567", "01234567")


def session(row: Mapping[str, Any]) -> Session:
    """One row of the query."""
    return Session(
        pid=None,
        gid=row["gid"],
        here=row["here"],
        database=row["database"],
        user=row["user"],
        state="prepared",
        seconds=row["seconds"],
        xact_start=row["prepared"],
        may_end=row["may_end"],
        relations=frozenset(row["relations"]),
        written=frozenset(row["relations"]),
    )


def blocked(rows: Iterable[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Which of them each waiting session waits for, by its pid."""
    found: dict[int, list[str]] = {}
    for row in rows:
        for waiter in row["waiters"]:
            pid, wanted, held = waiter.split(" ")
            if str(_MODES.index(held)) in _CONFLICTS[_MODES.index(wanted)]:
                found.setdefault(int(pid), []).append(row["gid"])
    return found
