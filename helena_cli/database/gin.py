"""The pending lists of GIN indexes, each against its own limit.

An insert appends to the list, until one that finds it full has to fold it into the index. Only
pgstattuple can tell how long it is, and to superusers pageinspect.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from psycopg import sql

from helena_cli.database.health import GinIndex, Health
from helena_cli.database.inquiry import Inquiry
from helena_cli.database.tables import WATCHED, named

#: The largest indexes are looked at; the rest would only make the answer late.
MOST_INDEXES = 50

NO_EXTENSION = "the extension pgstattuple is not installed"

_EXTENSION = """
    (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
      WHERE e.extname = '{0}') AS {0}"""

# Nothing here opens an index.
_INDEXES = f"""{WATCHED}
SELECT x.oid::int8, x.oid::regclass::text AS index, i.indrelid::regclass::text AS table,
       coalesce(option.fastupdate, true) AS fastupdate,
       coalesce(option.limit_kb, s.setting::int8) * 1024
           / current_setting('block_size')::int8 AS limit_pages,
       {_EXTENSION.format("pgstattuple")}, {_EXTENSION.format("pageinspect")}
  FROM watched JOIN pg_index i ON i.indrelid = watched.oid AND i.indisvalid
  JOIN pg_class x ON x.oid = i.indexrelid AND x.relkind = 'i' AND x.relpersistence <> 't'
  JOIN pg_am m ON m.oid = x.relam AND m.amname = 'gin'
  JOIN pg_settings s ON s.name = 'gin_pending_list_limit',
       LATERAL (SELECT bool_and(option_value::bool) FILTER (WHERE option_name = 'fastupdate')
                           AS fastupdate,
                       max(option_value::int8) FILTER (WHERE option_name = 'gin_pending_list_limit')
                           AS limit_kb
                  FROM pg_options_to_table(x.reloptions)) option
 ORDER BY x.relpages DESC, 2 LIMIT {MOST_INDEXES}
"""

_PGSTATTUPLE = "SELECT pending_pages::int8 FROM {0}.pgstatginindex(%(oid)s::oid::regclass)"
_PAGEINSPECT = (
    "SELECT n_pending_pages::int8 AS pending_pages"
    " FROM {0}.gin_metapage_info({0}.get_raw_page(%(oid)s::oid::regclass::text, 0))"
)


def pending(inquiry: Inquiry, tables: Iterable[str], health: Health) -> Mapping[str, Any]:
    """The GIN indexes of the watched tables; one that cannot be read says why."""
    rows = inquiry.all("gin", _INDEXES, named(tables))
    return {} if rows is None else {"gin": tuple(_read(inquiry, row, health) for row in rows)}


def _read(inquiry: Inquiry, row: Any, health: Health) -> GinIndex:
    pages, reason = _pages(inquiry, row, health)
    return GinIndex(row.index, row.table, pages, row.limit_pages, reason, row.fastupdate)


def _pages(inquiry: Inquiry, row: Any, health: Health) -> tuple[int | None, str | None]:
    lock = health.lock_on(row.oid)
    if lock is not None:
        return None, lock.reason
    reason = NO_EXTENSION
    for question in _questions(row):
        found = inquiry.one(row.index, question, {"oid": row.oid})
        if found is not None:
            return found.pending_pages, None
        reason = inquiry.unknown.pop(row.index)
    return None, reason


def _questions(row: Any) -> Iterator[sql.Composed]:
    for schema, question in ((row.pageinspect, _PAGEINSPECT), (row.pgstattuple, _PGSTATTUPLE)):
        # pgstattuple last, for its refusal says what would help.
        if schema is not None and (question is _PGSTATTUPLE or row.pgstattuple is None):
            yield sql.SQL(question).format(sql.Identifier(schema))
