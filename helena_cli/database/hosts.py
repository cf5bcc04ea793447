"""Which hosts write into a database, and how far each has come, from their position rows."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from helena_cli.database.health import Health, HostRow, Position
from helena_cli.database.inquiry import Inquiry

#: The latest are read: every spool that there ever was has left its rows.
MOST_ROWS = 2000

_PREPARED = "SELECT to_regclass('helena.spool_position')::oid::int8 AS oid"

_POSITIONS = f"""
SELECT coalesce(host, '') AS host, spool_id, table_name, last_operation_id,
       coalesce(cardinality(held), 0) AS held, updated_at
  FROM helena.spool_position ORDER BY updated_at DESC, spool_id, table_name LIMIT {MOST_ROWS}
"""


def prepared(inquiry: Inquiry, health: Health) -> Mapping[str, Any]:
    """Whether `helena init` was here, and the position rows of all hosts."""
    found = inquiry.one("prepared", _PREPARED)
    if found is None:
        inquiry.unknown["hosts"] = inquiry.unknown["prepared"]
        return {}
    if found.oid is None:
        return {"prepared": False}
    lock = health.lock_on(found.oid)
    if lock is not None:
        inquiry.unknown["hosts"] = lock.reason
        return {"prepared": True}
    rows = inquiry.all("hosts", _POSITIONS) or []
    return {"prepared": True, "hosts": tuple(grouped(rows))}


def grouped(rows: Sequence[Any]) -> Iterable[HostRow]:
    """The rows host by host, by name; within a host the latest first."""
    for host, group in groupby(sorted(rows, key=lambda row: row.host), lambda row: row.host):
        positions = tuple(Position(*row[1:]) for row in group)
        yield HostRow(
            host=host,
            spools=len({position.spool for position in positions}),
            tables=len({position.table for position in positions}),
            updated_at=max(position.updated_at for position in positions),
            held=sum(position.held for position in positions),
            positions=positions,
        )
