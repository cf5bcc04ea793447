"""Writes the operations of one flush into one table, and finds those that cannot be written.

A group fails or succeeds as a whole, under a savepoint. When one fails because of a row, its halves
are tried, and theirs, so that k bad rows among n cost O(k log n) statements while the good ones go
in. A merged row that fails alone is taken apart: its operations are judged one by one.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import psycopg
from msgspec import Struct

from helena_cli.batch import plan
from helena_cli.batch.flush import Waiting
from helena_cli.batch.operation import Operation
from helena_cli.batch.plan import Blocked, Group, Mode, Row
from helena_cli.batch.reading import Columns, Reader, Step
from helena_cli.batch.table import ForeignKey
from helena_cli.batch.verdict import Verdict
from helena_cli.database import catalog, equality, failure, statement
from helena_cli.database.bulk_load import BulkLoad
from helena_cli.database.failure import Failure
from helena_cli.database.transaction import Transaction

#: Rows of a group that are tried alone to find out whether a missing permission concerns all.
PERMISSION_SAMPLE = 64


class LaneFailed(Exception):
    """The table cannot be written now; nothing of it may stay in the transaction."""

    def __init__(self, waiting: Waiting) -> None:
        super().__init__(waiting.reason)
        self.waiting = waiting


class Undo(Exception):
    """Leaves a savepoint on purpose, without an effect."""


class Written(Struct):
    """What became of the operations of one table."""

    written: list[int] = []
    coalesced: list[int] = []
    dead: list[Verdict] = []
    held: list[Verdict] = []
    rows: int = 0

    def add(self, other: "Written") -> None:
        """Take in what became of the operations of another table."""
        self.written += other.written
        self.coalesced += other.coalesced
        self.dead += other.dead
        self.held += other.held
        self.rows += other.rows


class TableWriter:
    """Writes into one table within one transaction.

    `confirm()` is called before anything is held against an operation: it raises when the table is
    not as the catalog's copy says. `hold(operation, foreign key)` returns the parent's lane and
    whether the operation is put back until the parent is there.
    """

    def __init__(
        self,
        transaction: Transaction,
        reader: Reader,
        bulk: BulkLoad,
        *,
        confirm: Callable[[], None],
        hold: Callable[[Operation, ForeignKey], tuple[str, bool]],
        blame_rows: bool,
    ) -> None:
        self._transaction = transaction
        self._table = reader.table
        self._reader = reader
        self._bulk = bulk
        self._confirm = confirm
        self._hold = hold
        self._blame_rows = blame_rows
        self._blocked = Blocked(self._reader)
        self._statements: dict[tuple[Mode, Columns, int | None], bytes] = {}
        self._group: Group | None = None
        self._permitted: bool | None = None
        #: The keys whose values are but numbers by now.
        self._ranked: set[int] = set()
        self.result = Written()

    def write(
        self, operations: Sequence[Operation], ahead: Mapping[int, Step | Verdict]
    ) -> Written:
        """Write what is due of these operations, which come by id; `ahead` spares to read them.

        Raises LaneFailed, FlushFailed, and what `confirm` raises.
        """
        steps, dead = self._reader.read(operations, ahead)
        if dead:
            self._confirm()
        self.result.dead += dead
        self._ranked = equality.decide(self._transaction, self._table, steps, self._judge)
        arranged = plan.arrange(self._reader, steps, self._blocked)
        self.result.held += arranged.held
        for group in arranged.groups:
            self._group, self._permitted = group, None
            rows = self._unblocked(group.rows)
            if rows and self._load(rows):
                self._record(rows)
            else:
                self._write(rows)
        return self.result

    def _write(self, rows: Sequence[Row]) -> bool:
        """Write rows of one mode and one set of columns; whether that went well at once."""
        rows = self._unblocked(rows)
        error = self._send(rows) if rows else None
        if error is None:
            self._record(rows)
            return True
        if self._judge(error) is Failure.ROW and len(rows) > 1:
            self._halve(rows)
        elif any(row.merged for row in rows):
            for originals in plan.unmerge(rows):
                self._write(originals)
        else:
            for row in rows:
                self._refuse(row.first, error)
        return False

    def _halve(self, rows: Sequence[Row]) -> None:
        """Write rows among which one is bad."""
        middle = len(rows) // 2
        # The older half first: of two rows that exclude each other the older one stays.
        older, younger = rows[:middle], rows[middle:]
        if self._write(older) and len(younger) > 1:
            # Then the bad one is here, and there is no need to try.
            self._halve(younger)
        else:
            self._write(younger)

    def _send(self, rows: Sequence[Row], *, undo: bool = False) -> psycopg.Error | None:
        """One statement under a savepoint; the error that undid it."""
        try:
            with self._transaction.savepoint():
                self._execute(rows)
                if undo:
                    raise Undo
        except Undo:
            return None
        except psycopg.Error as error:
            return error
        return None

    def _load(self, rows: Sequence[Row]) -> bool:
        """Write rows by COPY, where that is possible: it asks for the keys by their values."""
        if rows[0].first.key in self._ranked:
            return False
        try:
            return self._bulk.load(self._transaction, plan.by_key(rows))
        except psycopg.Error as error:
            self._judge(error)
            return False

    def _execute(self, rows: Sequence[Row]) -> None:
        row = rows[0]
        form = (row.mode, row.columns, row.first.key)
        query = self._statements.get(form)
        if query is None:
            key = None if form[2] is None else self._table.keys[form[2]]
            composed = statement.write(self._table, row.mode, row.columns.names, key)
            self._statements[form] = query = self._transaction.compose(composed)
        data = [plan.data(self._reader, row) for row in plan.by_key(rows)]
        self._transaction.write(query, [statement.rows(data)])

    def _record(self, rows: Sequence[Row]) -> None:
        result = self.result
        result.rows += len(rows)
        for row in rows:
            if not row.merged:
                result.written.append(row.first.operation.id)
            else:
                *merged, last = row.steps
                result.written.append(last.operation.id)
                result.coalesced += [step.operation.id for step in merged]

    def _unblocked(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows that need not wait for an operation that was put back a moment ago."""
        if not self._blocked:
            return rows
        free = []
        for row in rows:
            verdicts = [self._blocked.check(step) for step in row.steps]
            self.result.held += [verdict for verdict in verdicts if verdict]
            steps = [s for s, verdict in zip(row.steps, verdicts, strict=True) if not verdict]
            if len(steps) == len(verdicts):
                free.append(row)
            elif steps:
                self._write([plan.part(self._reader, row, steps)])
        return free

    def _judge(self, error: psycopg.Error) -> Failure:
        """ROW or GROUP; raises when the error concerns more than that."""
        found = failure.classify(error.sqlstate)
        if found is Failure.TRANSIENT:
            raise failure.flush_failed(error)
        if error.sqlstate != failure.LOCK_NOT_AVAILABLE:
            self._confirm()
        if found is Failure.UNKNOWN:
            if not self._blame_rows:
                raise failure.flush_failed(error)
            return Failure.ROW
        if found is Failure.LANE or (found is Failure.PERMISSION and not self._half_permitted()):
            raise LaneFailed(failure.waiting(error))
        return Failure.ROW if found is Failure.PERMISSION else found

    def _half_permitted(self) -> bool:
        """Whether at least half of the group may be written: then single rows are forbidden."""
        if self._permitted is None:
            rows = self._group.rows if self._group else []
            if len(rows) > PERMISSION_SAMPLE:
                rows = random.Random(0).sample(rows, PERMISSION_SAMPLE)
            allowed = len(rows) // 2 if rows else -1
            for row in rows:
                if allowed >= 0:
                    allowed -= self._is_forbidden(row)
            self._permitted = allowed >= 0
        return self._permitted

    def _is_forbidden(self, row: Row) -> bool:
        """Try one row alone and undo it."""
        error = self._send([row], undo=True)
        found = failure.classify(error.sqlstate) if error else None
        if error and found is Failure.TRANSIENT:
            raise failure.flush_failed(error)
        return found is Failure.PERMISSION

    def _refuse(self, step: Step, error: psycopg.Error) -> None:
        """The error concerns this operation alone."""
        operation, parent = step.operation, None
        if error.sqlstate == failure.FOREIGN_KEY_VIOLATION:
            foreign_key = self._violated(error)
            if foreign_key is not None:
                parent, held = self._hold(operation, foreign_key)
                if held:
                    self._blocked.add(step, operation.id)
                    self.result.held.append(failure.verdict(operation, error, parent))
                    return
        self.result.dead.append(failure.verdict(operation, error, parent))

    def _violated(self, error: psycopg.Error) -> ForeignKey | None:
        """The foreign key that lacks its parent row; None when this row is the parent."""
        names = error.diag.schema_name, error.diag.table_name, error.diag.constraint_name
        schema, table, constraint = (name or "" for name in names)
        if (schema, table) == (self._table.schema, self._table.name):
            own = [key for key in self._table.foreign_keys if key.constraint == constraint]
            return own[0] if own else None
        found = catalog.foreign_key(self._transaction, schema, table, constraint)
        return None if found is None or found.parent == self._table.oid else found
