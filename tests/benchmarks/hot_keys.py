"""Many updates of few rows, queued in bulk, against COPY of as many rows."""

import statistics
import time
from collections.abc import Sequence

import psycopg
from psycopg import sql

from helena_cli.runtime import Runtime
from tests.benchmarks import operations, server
from tests.benchmarks.operations import TABLE, Row

#: How many rows are updated again and again.
KEYS = 1000

#: Operations to one call of `add_operations`, and rows to one COPY.
BULK = 1000

COPY = "plain COPY"


def measure(admin: str, count: int, runs: int) -> dict[str, float]:
    """Operations per second of each way, the median of `runs` rounds."""
    rows = operations.make_rows(count)
    keys = [row["es_doc_id"] for row in rows[:KEYS]]
    whole = [row | {"es_doc_id": keys[n % KEYS]} for n, row in enumerate(rows)]
    changes = [{name: row[name] for name in ("es_doc_id", "file_size", "sha256")} for row in whole]
    updates = {"Helena, whole rows": whole, "Helena, two columns": changes}
    rates: dict[str, list[float]] = {name: [] for name in (COPY, *updates)}
    with server.database(admin) as dsn:
        for _ in range(runs):
            _empty(dsn)
            started = time.perf_counter()
            operations.plain_copy(dsn, rows, BULK)
            rates[COPY].append(count / (time.perf_counter() - started))
            for name, part in updates.items():
                _empty(dsn)
                operations.plain_copy(dsn, rows[:KEYS], BULK)
                rates[name].append(count / _update(dsn, part))
                _check(dsn, part)
    return {name: statistics.median(values) for name, values in rates.items()}


def _update(dsn: str, rows: Sequence[Row]) -> float:
    """Seconds from the first call until all is committed, with the default settings."""
    with server.settings(dsn) as settings, Runtime(settings) as runtime:
        started = time.perf_counter()
        for start in range(0, len(rows), BULK):
            part = rows[start : start + BULK]
            runtime.engine.add_operations(("update", TABLE, row) for row in part)
        runtime.drain()
        return time.perf_counter() - started


def _empty(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("TRUNCATE es_document_references CASCADE"))
        connection.execute("CHECKPOINT")


def _check(dsn: str, rows: Sequence[Row]) -> None:
    """Each key has what its last update gave it."""
    last = {row["es_doc_id"]: row["sha256"] for row in rows}
    with psycopg.connect(dsn) as connection:
        found = connection.execute(f"SELECT es_doc_id, sha256 FROM {TABLE}".encode())
        assert last.items() <= dict(found.fetchall()).items()
