"""How long a script is held up by each call, while the flusher writes what it has queued."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from msgspec import Struct

from helena_cli import BatchEngine
from helena_cli.batch.records import Message
from tests.benchmarks import operations, server
from tests.benchmarks.operations import TABLE, Row

#: Operations to one call of `add_operations`.
BULK = 1000

Call = Callable[[Sequence[Any]], object]


class Held(Struct, frozen=True):
    """How long calls took, in microseconds; and what one operation cost on average."""

    median: float
    p99: float
    per_operation: float


def measure(admin: str, count: int) -> dict[str, Held]:
    """Way of writing → how long its calls took; the slow ways get a share of the rows only."""
    # The first of the large calls does not count either.
    count = max(count, 2 * BULK)
    rows = operations.make_rows(count)
    with server.database(admin) as dsn:
        held = {
            "connect, insert, commit": _each(_connect_and_commit(dsn), rows[: count // 30], 1),
        }
    with server.database(admin) as dsn, psycopg.connect(dsn) as connection:
        held["insert, commit"] = _each(_commit(connection), rows[: count // 5], 1)
    with _engine(admin) as engine:
        held["`add_operation`"] = _each(
            lambda part: engine.add_operation("insert", TABLE, part[0]), rows, 1
        )
    with _engine(admin) as engine:
        messages: list[Message] = [
            {"sender": "core", "content": f"message {n}"} for n in range(count)
        ]
        held["`add_message`"] = _each(lambda part: engine.add_message(part[0]), messages, 1)
    with _engine(admin) as engine:
        held[f"`add_operations` of {BULK:,}"] = _each(
            lambda part: engine.add_operations(("insert", TABLE, row) for row in part), rows, BULK
        )
    return held


@contextmanager
def _engine(admin: str) -> Iterator[BatchEngine]:
    """An engine as every script has it, with the default settings; it flushes meanwhile."""
    with (
        server.database(admin) as dsn,
        server.settings(dsn) as settings,
        BatchEngine(settings) as engine,
    ):
        yield engine
        assert engine.flush(120)


def _connect_and_commit(dsn: str) -> Call:
    return lambda part: operations.connection_per_operation(dsn, part, 1)


def _commit(connection: psycopg.Connection[Any]) -> Call:
    def call(part: Sequence[Row]) -> None:
        connection.execute(operations._statement(), operations._values(part[0]))
        connection.commit()

    return call


def _each(call: Call, rows: Sequence[Any], size: int) -> Held:
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    # The first call starts the thread and opens the files.
    call(parts[0])
    taken = []
    for part in parts[1:]:
        started = time.perf_counter_ns()
        call(part)
        taken.append((time.perf_counter_ns() - started) / 1000)
    taken.sort()
    return Held(
        median=taken[len(taken) // 2],
        p99=taken[int(len(taken) * 0.99)],
        per_operation=sum(taken) / (len(rows) - size),
    )
