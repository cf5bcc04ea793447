"""Writes batches into PostgreSQL: one flush is one transaction on one connection.

The connection is kept between flushes, and forgotten as soon as anything is wrong with it.
"""

from collections.abc import Callable, Iterable

import psycopg
from psycopg.pq import TransactionStatus

from helena_cli.batch.flush import Batch, FlushFailed, Outcome
from helena_cli.batch.operation import Operation
from helena_cli.batch.reading import Reading
from helena_cli.database.catalog import Catalog
from helena_cli.database.connection import Connection
from helena_cli.database.failure import flush_failed
from helena_cli.database.flushing import Flush, Hold, TableChanged
from helena_cli.database.maintenance import Maintenance
from helena_cli.database.transaction import Transaction
from helena_cli.errors import HelenaError

Seal = Callable[[Outcome], None]


class PostgresWriter:
    """The writer of the batch engine. Not safe for threads. Times in milliseconds."""

    LOCK_TIMEOUT = 5_000
    PROBE_LOCK_TIMEOUT = 500
    STATEMENT_TIMEOUT = 10_000
    IDLE_TIMEOUT = 15_000

    def __init__(self, connect: Callable[[str], Connection], *, host: str) -> None:
        """`connect(purpose)` opens a connection or raises DatabaseUnreachable."""
        self._connect = connect
        self._host = host
        self._connection: Connection | None = None
        self._catalog = Catalog()
        self._maintenance = Maintenance(lambda: connect("maintenance"))

    def write(self, batch: Batch, *, hold: Hold, seal: Seal, busy: Callable[[], None]) -> Outcome:
        """Apply a batch in one transaction; see `batch.flush.Writer`."""
        since = self._catalog.now()
        try:
            return self._flush(batch, hold, seal, busy, since)
        except TableChanged:
            # All tables are read anew, so it cannot happen twice.
            self._catalog.forget()
            return self._flush(batch, hold, seal, busy, since)

    def read_ahead(self, operations: Iterable[Operation]) -> dict[str, Reading]:
        """Read operations of the next batch; see `batch.flush.Writer`."""
        return self._catalog.read_ahead(operations)

    def maintain(self, tables: frozenset[str]) -> None:
        """Empty the GIN pending lists of these tables on a second connection. Never raises."""
        self._maintenance.run(tables)

    def close(self) -> None:
        """Close all connections."""
        self._forget()
        self._maintenance.close()

    def _flush(
        self, batch: Batch, hold: Hold, seal: Seal, busy: Callable[[], None], since: float
    ) -> Outcome:
        connection = self._open()
        transaction = Transaction(connection, busy)
        transaction.begin(
            lock_timeout=self.PROBE_LOCK_TIMEOUT if batch.probe else self.LOCK_TIMEOUT,
            statement_timeout=self.STATEMENT_TIMEOUT,
            idle_timeout=self.IDLE_TIMEOUT,
        )
        flush = Flush(transaction, self._catalog, batch, hold, host=self._host, since=since)
        try:
            outcome = flush.run()
            seal(outcome)
            transaction.commit()
            return outcome
        except psycopg.Error as caught:
            error = caught
        finally:
            self._end(connection)
        raise flush_failed(error)

    def _open(self) -> Connection:
        connection = self._connection
        if connection is None or connection.closed:
            try:
                self._connection = connection = self._connect("flush")
            except HelenaError as error:
                raise FlushFailed(str(error), remedy=error.remedy) from error
        return connection

    def _end(self, connection: Connection) -> None:
        """Leave no transaction open, whatever happened."""
        status = connection.info.transaction_status
        if status is TransactionStatus.IDLE:
            return
        try:
            if status is TransactionStatus.ACTIVE:
                # An interrupt came in the middle of a statement.
                self._forget()
            else:
                connection.execute("ROLLBACK")
        except psycopg.Error:
            self._forget()

    def _forget(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
