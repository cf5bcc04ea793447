"""What the flusher has to know of a spool at the beginning of a turn, in one look."""

import sqlite3
from collections.abc import Iterable, Mapping

from msgspec import Struct

from helena_cli.batch import ledger
from helena_cli.batch.ledger import Lane, Pressure
from helena_cli.batch.tally import Tally


class Standing(Struct, frozen=True):
    """How a spool stands, apart from what is in its inbox."""

    spool_id: str
    #: The `helena.meta` id of the database it belongs to; None before the first contact.
    target_id: str | None
    #: The lanes that have a reason to wait.
    waiting: tuple[Lane, ...]
    #: What asks for a flush.
    pressure: Pressure
    #: Lane → the nonces that an earlier flush may have left in its position row.
    nonces: Mapping[str, frozenset[str]]

    def known_nonces(self, tables: Iterable[str]) -> dict[str, frozenset[str]]:
        """The nonces of these tables; none of a table that had no flush yet."""
        return {table: self.nonces.get(table, frozenset()) for table in tables}


def read(connection: sqlite3.Connection, now: float) -> Standing:
    """Look, in an open transaction."""
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    nonces = connection.execute("SELECT name, nonces FROM lanes").fetchall()
    return Standing(
        spool_id=str(meta["spool_id"]),
        target_id=meta.get("target_id") or None,
        waiting=tuple(lane for lane in ledger.lanes(connection, Tally()) if lane.reason),
        pressure=ledger.pressure(connection, now),
        nonces={name: frozenset(known.split()) for name, known in nonces},
    )
