"""How far a spool has come in each table: the rows that make every operation count exactly once."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg
from msgspec import Struct

from helena_cli.batch.flush import FlushFailed, Waiting
from helena_cli.database.failure import Failure, classify, flush_failed, waiting
from helena_cli.database.transaction import Transaction
from helena_cli.errors import HelenaError, SchemaMissing

_TARGET = b"SELECT id::text FROM helena.meta"

_LOCK = b"""\
SELECT table_name, last_operation_id, held, nonce, (SELECT id::text FROM helena.meta)
  FROM helena.spool_position
 WHERE spool_id = $1 AND table_name = ANY($2::text[])
 ORDER BY table_name
   FOR UPDATE"""

_INSERT = b"""\
INSERT INTO helena.spool_position (spool_id, table_name, host)
SELECT $1, table_name, $3 FROM unnest($2::text[]) AS table_name ORDER BY table_name
ON CONFLICT (spool_id, table_name) DO NOTHING"""

_ADVANCE = b"""\
UPDATE helena.spool_position AS p
   SET last_operation_id = moved.last_id, held = moved.held,
       nonce = $3, host = $4, updated_at = now()
  FROM json_to_recordset($1) AS moved(table_name text, last_id bigint, held bigint[])
 WHERE p.spool_id = $2 AND p.table_name = moved.table_name"""


class Position(Struct, frozen=True):
    """A position row as it was found, locked until the transaction ends."""

    table: str
    last_operation_id: int = 0
    held: frozenset[int] = frozenset()
    nonce: str = ""
    #: The `helena.meta` id of the database; None when there is none.
    target_id: str | None = None

    def is_due(self, operation_id: int) -> bool:
        """Whether no earlier flush has settled this operation."""
        return operation_id > self.last_operation_id or operation_id in self.held


def target_id(transaction: Transaction) -> str:
    """The id of this database. Raises FlushFailed when `helena init` was never completed."""
    row = transaction.execute(_TARGET).fetchone()
    if row is None:
        missing = SchemaMissing("helena.meta is empty.", remedy="Run: helena init.")
        raise FlushFailed(str(missing), remedy=missing.remedy) from missing
    return str(row[0])


def lock(
    transaction: Transaction, spool_id: str, host: str, tables: Iterable[str]
) -> tuple[dict[str, Position], dict[str, Waiting]]:
    """Lock the positions of these tables; a name that cannot even be stored must wait."""
    names = sorted(tables)
    try:
        with transaction.savepoint():
            return _lock(transaction, spool_id, host, names), {}
    except psycopg.Error as error:
        if classify(error.sqlstate) is not Failure.ROW:
            raise
    found: dict[str, Position] = {}
    refused: dict[str, Waiting] = {}
    for name in names:
        try:
            with transaction.savepoint():
                found |= _lock(transaction, spool_id, host, [name])
        except psycopg.Error as error:
            if classify(error.sqlstate) is not Failure.ROW:
                raise
            refused[name] = waiting(error)
    return found, refused


def _lock(
    transaction: Transaction, spool_id: str, host: str, names: list[str]
) -> dict[str, Position]:
    """Names come sorted: this is the one order in which everybody locks them."""
    found = _select(transaction, spool_id, names)
    missing = [name for name in names if name not in found]
    if missing:
        # A row that does not exist cannot be locked: two flushers would both begin at 0.
        transaction.execute(_INSERT, [spool_id, missing, host])
        found = _select(transaction, spool_id, names)
    return found


def _select(transaction: Transaction, spool_id: str, names: list[str]) -> dict[str, Position]:
    found = transaction.execute(_LOCK, [spool_id, names]).fetchall()
    return {row[0]: Position(row[0], row[1], frozenset(row[2]), *row[3:]) for row in found}


class Move(Struct, frozen=True):
    """Where a position goes."""

    table: str
    last_operation_id: int
    held: Sequence[int]


def advance(
    transaction: Transaction, spool_id: str, host: str, nonce: str, moves: Sequence[Move]
) -> None:
    """Move positions."""
    if not moves:
        return
    rows: list[dict[str, Any]] = [
        {"table_name": move.table, "last_id": move.last_operation_id, "held": list(move.held)}
        for move in moves
    ]
    moved = transaction.execute(_ADVANCE, [json.dumps(rows), spool_id, nonce, host]).rowcount
    if moved != len(moves):
        raise FlushFailed(f"{moved} of {len(moves)} position rows could be moved")


_REMEDIES = {
    "42P01": "Run: helena init.",
    "3F000": "Run: helena init.",
    "42703": "Helena's tables are of another version. Run: helena init.",
    "42501": "Let the owner of the schema helena run: GRANT USAGE ON SCHEMA helena TO role; GRANT "
    "SELECT ON helena.meta TO role; GRANT SELECT, INSERT, UPDATE ON helena.spool_position TO role.",
}


def failed(error: psycopg.Error) -> FlushFailed:
    """The end of a flush that could not use Helena's own tables."""
    failed = flush_failed(error)
    cause = failed.__cause__
    failed.remedy = _REMEDIES.get(error.sqlstate or "", failed.remedy)
    if isinstance(cause, HelenaError):
        cause.remedy = failed.remedy
    return failed
