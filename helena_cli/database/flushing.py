"""One flush: the position rows make every operation count exactly once, table by table.

They are locked first and moved last, in the transaction that writes the rows. So a COMMIT whose
answer was lost shows in the position, and two flushers of one spool wait for each other. A table
that cannot be written is rolled back to its savepoint: its lane waits, the others go on.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

import psycopg

from helena_cli.batch.flush import Batch, FlushFailed, Outcome, Waiting
from helena_cli.batch.operation import Operation
from helena_cli.batch.reading import Reader, Step
from helena_cli.batch.table import ForeignKey, Table, parents_first
from helena_cli.batch.verdict import Verdict
from helena_cli.database import position
from helena_cli.database.catalog import Catalog
from helena_cli.database.position import Move, Position
from helena_cli.database.table_writer import LaneFailed, TableWriter, Written
from helena_cli.database.transaction import Transaction
from helena_cli.errors import ConfigurationError

Hold = Callable[[Operation, str], bool]

#: Ids that a position row may hold; with one more the lane waits.
MOST_HELD = 1000

_COPIED = Waiting(
    "the position row was written by another copy of this spool (restored or copied)",
    remedy="Only one copy of a spool may go on. To go on with this one: helena init --new-spool; "
    "what is queued becomes dead letters, to be retried or dropped by hand.",
)


class TableChanged(Exception):
    """A table is no longer what the catalog said a while ago: plan again."""


class Flush:
    """One attempt to write a batch. Make a new one for the next."""

    def __init__(
        self,
        transaction: Transaction,
        catalog: Catalog,
        batch: Batch,
        hold: Hold,
        *,
        host: str,
        since: float,
    ) -> None:
        self._transaction = transaction
        self._catalog = catalog
        self._batch = batch
        self._ask = hold
        self._host = host
        self._since = since
        #: Lane → all of its operations; those that no earlier flush has settled; and the others.
        self._given: dict[str, list[Operation]] = defaultdict(list)
        self._work: dict[str, list[Operation]] = defaultdict(list)
        self._skipped: dict[str, list[int]] = defaultdict(list)
        self._tables: dict[str, Table] = {}
        self._waiting: dict[str, Waiting] = {}
        self._moves: list[Move] = []
        self._done = Written()

    def run(self) -> Outcome:
        """Do everything but COMMIT. Raises FlushFailed, TableChanged and the driver's errors."""
        batch = self._batch
        target_id, positions = self._begin()
        self._sort_out(positions)
        self._resolve()
        for table in self._in_order():
            self._write(table, positions)
        for lane in positions.keys() - self._tables.keys() - self._waiting.keys():
            self._moves.append(self._move(positions[lane], []))
        position.advance(self._transaction, batch.spool_id, self._host, batch.nonce, self._moves)
        return self._outcome(target_id, positions)

    def _begin(self) -> tuple[str, dict[str, Position]]:
        """Check whose database this is and lock the position rows."""
        batch = self._batch
        try:
            lanes = {operation.table for operation in batch.operations}
            found, refused = position.lock(self._transaction, batch.spool_id, self._host, lanes)
            # One look is enough for both, unless there was no position to look at.
            target_id = next((one.target_id for one in found.values()), None)
            target_id = target_id or position.target_id(self._transaction)
            if batch.target_id not in (None, target_id):
                raise _foreign_database(batch.target_id, target_id)
            self._waiting.update(refused)
            return target_id, found
        except psycopg.Error as caught:
            error = caught
        raise position.failed(error)

    def _sort_out(self, positions: dict[str, Position]) -> None:
        known = self._batch.known_nonces
        for lane, found in positions.items():
            if found.nonce and found.nonce not in known.get(lane, ()):
                self._waiting[lane] = _COPIED
        for operation in self._batch.operations:
            lane = operation.table
            if lane in self._waiting:
                continue
            self._given[lane].append(operation)
            if positions[lane].is_due(operation.id):
                self._work[lane].append(operation)
            else:
                self._skipped[lane].append(operation.id)

    def _resolve(self) -> None:
        found = self._catalog.tables(self._transaction, self._work)
        for lane, table in found.items():
            if isinstance(table, Table):
                self._tables[lane] = table
            elif any(operation.due for operation in self._work[lane]):
                self._waiting[lane] = table

    def _in_order(self) -> list[Table]:
        """Each table once, parents first."""
        first: dict[int, int] = {}
        for lane, table in self._tables.items():
            lowest = self._work[lane][0].id
            first[table.oid] = min(first.get(table.oid, lowest), lowest)
        return parents_first(list({t.oid: t for t in self._tables.values()}.values()), first)

    def _lanes(self, oid: int) -> list[str]:
        """All names under which this batch knows a table."""
        return [lane for lane, table in self._tables.items() if table.oid == oid]

    def _write(self, table: Table, positions: dict[str, Position]) -> None:
        """Write one table, or let its lanes wait."""
        lanes = self._lanes(table.oid)
        operations = [operation for lane in lanes for operation in self._work[lane]]
        operations.sort(key=attrgetter("id"))
        reader = self._catalog.reader(table)
        writer = TableWriter(
            self._transaction,
            reader,
            self._catalog.bulk_load(reader),
            confirm=lambda: self._confirm(lanes[0]),
            hold=self._hold,
            blame_rows=self._batch.blame_rows,
        )
        try:
            with self._transaction.savepoint():
                done = writer.write(operations, self._ahead(reader, lanes))
                moves = [self._move(positions[lane], done.held) for lane in lanes]
        except LaneFailed as failed:
            self._waiting.update(dict.fromkeys(lanes, failed.waiting))
            return
        self._moves += moves
        self._done.add(done)

    def _ahead(self, reader: Reader, lanes: Iterable[str]) -> dict[int, Step | Verdict]:
        """What this reader has read beforehand of these lanes."""
        readings = [self._batch.ahead.get(lane) for lane in lanes]
        ahead: dict[int, Step | Verdict] = {}
        for reading in readings:
            if reading is not None and reading.reader is reader:
                ahead.update(reading.steps)
        return ahead

    def _confirm(self, lane: str) -> None:
        if not self._catalog.confirm(self._transaction, lane, self._since):
            raise TableChanged

    def _hold(self, operation: Operation, foreign_key: ForeignKey) -> tuple[str, bool]:
        """The parent's lane, and whether the operation is put back until the parent is there."""
        qualified = f"{foreign_key.parent_schema}.{foreign_key.parent_name}"
        bare = [foreign_key.parent_name] if foreign_key.visible else []
        # Nobody knows how the parent's own operations spell its name.
        names = [*self._lanes(foreign_key.parent), *bare, qualified]
        for name in dict.fromkeys(names):
            if self._ask(operation, name):
                return name, True
        return names[0], False

    def _move(self, found: Position, held: Sequence[Verdict]) -> Move:
        """Where the position of a lane goes. Raises LaneFailed when too much is held."""
        given = self._given[found.table]
        ids = {operation.id for operation in given}
        # What is not in the batch was settled by hand, unless the spool has yet to come to it.
        reached = max((o.id for o in given if o.held_since is None), default=0)
        keep = {id for id in found.held if id > reached and id not in ids}
        keep |= {operation.id for operation in self._work[found.table] if not operation.due}
        keep |= {v.operation_id for v in held if v.operation_id in ids}
        if len(keep) > MOST_HELD:
            reason = f"{len(keep)} of its operations wait for others; a lane may hold {MOST_HELD}"
            raise LaneFailed(Waiting(reason, remedy="Write the rows that they refer to."))
        return Move(found.table, max([found.last_operation_id, *ids]), sorted(keep))

    def _outcome(self, target_id: str, positions: dict[str, Position]) -> Outcome:
        done, moved = self._done, [move.table for move in self._moves]
        return Outcome(
            target_id=target_id,
            written=tuple(done.written),
            coalesced=tuple(done.coalesced),
            skipped=tuple(id for lane in moved for id in self._skipped[lane]),
            dead=tuple(done.dead),
            held=tuple(done.held),
            waiting=self._waiting,
            settled_tables=frozenset(moved),
            nonces={lane: positions[lane].nonce for lane in moved},
            rows=done.rows,
        )


def _foreign_database(expected: str | None, found: str) -> FlushFailed:
    error = ConfigurationError(
        f"This spool belongs to another database: it was made for {expected}, this one is {found}.",
        remedy="Mend the address of the database; or, if this is the right one now: helena init "
        "--new-spool, which makes dead letters of what is queued, to be retried or dropped.",
    )
    failed = FlushFailed(str(error), remedy=error.remedy)
    failed.__cause__ = error
    return failed
