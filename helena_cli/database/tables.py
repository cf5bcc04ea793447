"""What the server's statistics say of the watched tables, without opening one of them.

Their real sizes would need a lock on each, so the pages that the last VACUUM or ANALYZE counted
have to do.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helena_cli.database.health import Health, TableState
from helena_cli.database.inquiry import Inquiry

#: The largest are shown; the rest would only make the answer long.
MOST_TABLES = 100

#: A name without a schema is looked up as the writer does it; partitions hold the rows.
WATCHED = """
WITH RECURSIVE watched AS (
  SELECT c.oid
    FROM unnest(%(schemas)s::text[], %(names)s::text[]) AS given(schema, name)
    JOIN pg_class c ON c.relname = given.name::name
    JOIN pg_namespace s ON s.oid = c.relnamespace
   WHERE CASE WHEN given.schema IS NULL THEN pg_table_is_visible(c.oid)
              ELSE s.nspname = given.schema::name END
  UNION
  SELECT h.inhrelid FROM watched w JOIN pg_inherits h ON h.inhparent = w.oid)
"""

_TABLES = f"""{WATCHED}
SELECT c.oid::int8, c.oid::regclass::text AS table,
       coalesce(nullif(pg_stat_get_live_tuples(c.oid), 0),
           CASE WHEN c.reltuples >= 0 THEN c.reltuples::int8 END, 0) AS rows,
       pg_stat_get_dead_tuples(c.oid) AS dead_rows,
       (coalesce(c.relpages, 0)::int8 + coalesce(t.relpages, 0) + coalesce((
           SELECT sum(x.relpages) FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
            WHERE i.indrelid = c.oid), 0)::int8)
           * current_setting('block_size')::int8 AS bytes,
       c.relpages > 0 OR c.reltuples >= 0 AS counted,
       greatest(pg_stat_get_last_vacuum_time(c.oid), pg_stat_get_last_autovacuum_time(c.oid))
           AS last_vacuum,
       greatest(pg_stat_get_last_analyze_time(c.oid), pg_stat_get_last_autoanalyze_time(c.oid))
           AS last_analyze
  FROM watched JOIN pg_class c USING (oid) LEFT JOIN pg_class t ON t.oid = c.reltoastrelid
 WHERE c.relkind IN ('r', 'm')
 ORDER BY c.relpages DESC, 2 LIMIT {MOST_TABLES}
"""


def named(tables: Iterable[str]) -> Mapping[str, Sequence[str | None]]:
    """The values for WATCHED."""
    parts = [table.rpartition(".") for table in tables]
    return {
        "schemas": [schema or None for schema, _, _ in parts],
        "names": [name for _, _, name in parts],
    }


def states(inquiry: Inquiry, tables: Iterable[str], health: Health) -> Mapping[str, Any]:
    """One row for each watched table that exists."""
    rows = inquiry.all("tables", _TABLES, named(tables))
    if rows is None:
        return {}
    return {"tables": tuple(_state(row, health) for row in rows)}


def _state(row: Any, health: Health) -> TableState:
    lock = health.lock_on(row.oid)
    return TableState(
        table=row.table,
        rows=row.rows,
        dead_rows=row.dead_rows,
        bytes=row.bytes if row.counted else None,
        last_vacuum=row.last_vacuum,
        last_analyze=row.last_analyze,
        locked=None if lock is None else lock.reason,
    )
