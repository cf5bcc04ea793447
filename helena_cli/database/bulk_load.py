"""New rows by COPY, which costs the server little more than half of what an upsert does.

COPY has no ON CONFLICT. So it is for rows whose keys are all new, of tables and types for which it
means what the statement means; whatever else comes up is undone, and left to the statement.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import psycopg
from psycopg.types.json import Json

from helena_cli.batch import plan
from helena_cli.batch.plan import Mode, Row
from helena_cli.batch.reading import Columns, Reader
from helena_cli.batch.table import Special
from helena_cli.database import failure, statement
from helena_cli.database.copy_text import CopyText
from helena_cli.database.failure import Failure
from helena_cli.database.transaction import Transaction

#: Rows for which two more round trips pay.
WORTHWHILE = 64

#: Groups of a table that go by the statement at once, after one that turned out to have to.
PAUSE = 8

#: Rows that are sent at a time: the server reads them while the next ones are made.
BLOCK = 250


class _Refused(Exception):
    """These rows are not for COPY."""


class BulkLoad:
    """Loads rows into one table. Kept between flushes: it remembers what is worth a try."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._table = reader.table
        self._texts: dict[Columns, CopyText | None] = {}
        #: Groups that are left to the statement because of one that could not be loaded.
        self._pause = 0

    def load(self, transaction: Transaction, rows: Sequence[Row]) -> bool:
        """Write the rows of one group, in order; False when nothing was written.

        The values of their keys are those in the database. Raises the driver's errors when they
        concern more than these rows.
        """
        columns = rows[0].columns
        if len(rows) < WORTHWHILE or not self._table.copyable:
            return False
        self._pause -= 1
        if self._pause >= 0:
            return False
        text = self._text(columns)
        if text is None or not self._try(transaction, text, rows):
            columns.lines, self._pause = None, PAUSE
            return False
        # The next ones are made while the server works on these.
        columns.lines = text.lines
        return True

    def _try(self, transaction: Transaction, text: CopyText, rows: Sequence[Row]) -> bool:
        key = rows[0].first.key
        try:
            with transaction.savepoint():
                if key is not None:
                    self._check_keys(transaction, key, rows)
                query = transaction.compose(statement.copy(self._table, text.names))
                if transaction.copy(query, self._blocks(text, rows)) != len(rows):
                    raise _Refused
                if key is None:
                    query = transaction.compose(statement.differs(self._table))
                    _refuse_any(transaction, query, self._columns(rows))
        except _Refused:
            return False
        except psycopg.Error as error:
            if failure.classify(error.sqlstate) in (Failure.TRANSIENT, Failure.LANE):
                raise
            return False
        return True

    def _text(self, columns: Columns) -> CopyText | None:
        if columns not in self._texts:
            named = [column for column in self._table.columns if column.name in columns.names]
            whole = all(column.copied_as is not None for column in named)
            self._texts[columns] = CopyText(named) if whole else None
        return self._texts[columns]

    def _check_keys(self, transaction: Transaction, key: int, rows: Sequence[Row]) -> None:
        """Raises _Refused when the table has one of these keys, or may have it, or differs."""
        if rows[-1].value is Special.BAD:
            raise _Refused
        names, keys = self._table.keys[key], [row.value for row in rows]
        updates = rows[0].mode is Mode.UPSERT
        query = transaction.compose(statement.any_exists(self._table, names, updates=updates))
        parameters = [*self._columns(rows), Json(keys, dumps=msgspec.json.encode)]
        _refuse_any(transaction, query, parameters)

    def _columns(self, rows: Sequence[Row]) -> list[Any]:
        """The names and the types of the columns that are given."""
        names = rows[0].columns.names
        types = {column.name: column.type for column in self._table.columns}
        return [list(names), [types[name] for name in names]]

    def _blocks(self, text: CopyText, rows: Sequence[Row]) -> Iterator[bytes]:
        """The lines, many at a time; raises _Refused."""
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            lines: Sequence[bytes | None]
            lines = [None if row.merged else row.first.line for row in block]
            if None in lines:
                lines = text.lines([plan.values(self.reader, row) for row in block])
            made = [line for line in lines if line is not None]
            if len(made) < len(block):
                raise _Refused
            yield b"".join(made)


def _refuse_any(transaction: Transaction, query: bytes, parameters: list[Any]) -> None:
    """Raises _Refused unless all answers are no."""
    if any(transaction.execute(query, parameters).fetchone() or [True]):
        raise _Refused
