"""The spool's side of the contract with a writer, in memory: ids, nonces and what was put back."""

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
import psycopg

from helena_cli.batch.flush import Batch, Outcome
from helena_cli.batch.operation import Kind, Operation
from helena_cli.database.writer import PostgresWriter

Hold = Callable[[Operation, str], bool]


class Counting(psycopg.Connection[Any]):
    """Counts round trips, of all connections together."""

    trips = 0

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        Counting.trips += 1
        return super().wait(*args, **kwargs)


def never(operation: Operation, parent: str) -> bool:
    """Put nothing back."""
    return False


def always(operation: Operation, parent: str) -> bool:
    """Put everything back."""
    return True


class Desk:
    """Queues operations and flushes them through a real writer, as the engine does."""

    def __init__(self, dsn: str, *, spool_id: str = "spool", through: str = "") -> None:
        """`through` is the conninfo that the writer uses, by default `dsn` too."""
        self.dsn = dsn
        self.through = through or dsn
        self.spool_id = spool_id
        self.pending: dict[int, Operation] = {}
        self.nonces: defaultdict[str, set[str]] = defaultdict(set)
        self.target_id: str | None = None
        self.connected: list[str] = []
        self.sessions: list[psycopg.Connection[Any]] = []
        self.sealed: list[Outcome] = []
        self.writer = PostgresWriter(self.connect, host="test")
        self.next_id = 1
        self.flushes = 0
        self.admin = psycopg.connect(dsn, autocommit=True)

    def connect(self, purpose: str) -> psycopg.Connection[Any]:
        self.connected.append(purpose)
        session = Counting.connect(
            self.through,
            autocommit=True,
            prepare_threshold=None,
            application_name=f"helena {purpose}",
        )
        self.sessions.append(session)
        return session

    def close(self) -> None:
        self.writer.close()
        self.admin.close()

    def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run SQL as the administrator; the rows."""
        cursor = self.admin.execute(query.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []

    def one(self, query: str, *parameters: Any) -> Any:
        """The only value of the only row."""
        ((value,),) = self.sql(query, *parameters)
        return value

    def add(self, kind: Kind, table: str, /, **values: Any) -> int:
        """Queue an operation; its id."""
        return self.add_json(kind, table, json.dumps(values))

    def add_json(self, kind: Kind, table: str, data: str) -> int:
        """Queue an operation with this JSON; its id."""
        identifier = self.next_id
        self.next_id += 1
        self.pending[identifier] = Operation(identifier, kind, table, data.encode())
        return identifier

    def batch(self, **options: Any) -> Batch:
        """All that is queued, as one batch."""
        self.flushes += 1
        operations = tuple(self.pending[number] for number in sorted(self.pending))
        known = {o.table: frozenset(self.nonces[o.table]) for o in operations}
        return Batch(
            spool_id=self.spool_id,
            target_id=self.target_id,
            operations=operations,
            nonce=f"{self.spool_id} {self.flushes}",
            known_nonces=known,
            **options,
        )

    def flush(
        self,
        *,
        hold: Hold = never,
        seal: Callable[[Outcome], None] | None = None,
        **options: Any,
    ) -> Outcome:
        """Flush all that is queued and settle what came of it."""
        batch = self.batch(**options)

        def sealing(outcome: Outcome) -> None:
            self.sealed.append(outcome)
            for table in outcome.settled_tables:
                self.nonces[table].add(batch.nonce)
            if seal:
                seal(outcome)

        outcome = self.writer.write(batch, hold=hold, seal=sealing, busy=lambda: None)
        self.settle(outcome)
        return outcome

    def settle(self, outcome: Outcome) -> None:
        """Forget what is done; check that every due operation has exactly one fate."""
        self.target_id = outcome.target_id
        dead = [verdict.operation_id for verdict in outcome.dead]
        held = [verdict.operation_id for verdict in outcome.held]
        gone = [*outcome.written, *outcome.coalesced, *outcome.skipped, *dead]
        due = {n for n, o in self.pending.items() if o.due and o.table not in outcome.waiting}
        assert sorted([*gone, *held]) == sorted(due)
        assert outcome.settled_tables.isdisjoint(outcome.waiting)
        for number in gone:
            del self.pending[number]
        for number in held:
            self.put_back(number)

    def put_back(self, number: int, *, due: bool = True) -> None:
        """Mark an operation as held."""
        self.pending[number] = msgspec.structs.replace(
            self.pending[number], held_since=1.0, due=due
        )

    def position(self, table: str) -> tuple[int, list[int]]:
        """The last operation's id and the held ids, as the database has them."""
        ((last, held),) = self.sql(
            "SELECT last_operation_id, held FROM helena.spool_position"
            " WHERE spool_id = %s AND table_name = %s",
            self.spool_id,
            table,
        )
        return last, held
