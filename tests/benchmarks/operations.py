"""Rows into the document table with its seven indexes: the usual ways of writing, and Helena."""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
from psycopg import sql

from helena_cli.runtime import Runtime
from tests.benchmarks import server

Row = dict[str, Any]

#: Writes rows in batches; the seconds that count, None when all of it does.
Way = Callable[[str, Sequence[Row], int], float | None]

#: As many operations to a flush as the settings allow when nothing is set.
OWN = 0

TABLE = "es_document_references"
COLUMNS = (
    *("es_index", "es_doc_id", "doc_type", "issuer", "filename", "file_size", "sha256"),
    *("indexed_at", "data_classification", "investigation_id", "tags", "metadata"),
)
NAMES = ", ".join(COLUMNS)
UPSERT = "ON CONFLICT (es_doc_id) DO UPDATE SET " + ", ".join(
    f"{column} = EXCLUDED.{column}" for column in COLUMNS if column != "es_doc_id"
)


def make_row(n: int) -> Row:
    """A row like those of real documents, about 600 bytes as JSON."""
    return {
        "es_index": "osint_reports_pdf",
        "es_doc_id": f"notes:folder-{n % 97}/document-{n:07}.md",
        "doc_type": "general_documentation",
        "issuer": f"issuer {n % 53}",
        "filename": f"document-{n:07}.md",
        "file_size": 2048 + n % 1000,
        "sha256": f"{n:064x}",
        "indexed_at": "2026-01-02T03:04:05Z",
        "data_classification": "public",
        "investigation_id": f"investigation-{n % 31}",
        "tags": ["markdown", f"tag-{n % 211}", f"topic-{n % 17}"],
        "metadata": {
            "title": f"Document number {n}",
            "path": f"folder-{n % 97}/document-{n:07}.md",
            "preview": "A few words about the matter. " * 5,
            "line_count": n % 400,
            "word_count": n % 3000,
        },
    }


def make_rows(count: int, start: int = 0) -> list[Row]:
    """So many rows, all with keys of their own."""
    return [make_row(n) for n in range(start, start + count)]


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _values(row: Row) -> list[Any]:
    return [json.dumps(row[c]) if c == "metadata" else row[c] for c in COLUMNS]


def _statement(rows: int = 1) -> bytes:
    marks = ", ".join(f"({', '.join(['%s'] * len(COLUMNS))})" for _ in range(rows))
    return f"INSERT INTO {TABLE} ({NAMES}) VALUES {marks} {UPSERT}".encode()


def connection_per_operation(dsn: str, rows: Sequence[Row], _: int) -> None:
    """What the real-time writers did."""
    for row in rows:
        with psycopg.connect(dsn) as connection:
            connection.execute(_statement(), _values(row))


def commit_per_row(dsn: str, rows: Sequence[Row], _: int) -> None:
    """One connection, a commit for each row."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for row in rows:
            connection.execute(_statement(), _values(row))


def multi_row_values(dsn: str, rows: Sequence[Row], batch: int) -> None:
    """One INSERT with many rows, one transaction a batch."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for part in _batches(rows, batch):
            values = [value for row in part for value in _values(row)]
            connection.execute(_statement(len(part)), values)


def executemany(dsn: str, rows: Sequence[Row], batch: int) -> None:
    """psycopg's executemany, pipelined, one transaction a batch."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        for part in _batches(rows, batch):
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(_statement(), [_values(row) for row in part])


def plain_copy(dsn: str, rows: Sequence[Row], batch: int) -> None:
    """COPY without upsert: the ceiling of one connection."""
    copy_in = sql.SQL(f"COPY {TABLE} ({NAMES}) FROM STDIN")
    with psycopg.connect(dsn, autocommit=True) as connection:
        for part in _batches(rows, batch):
            with connection.cursor() as cursor, cursor.copy(copy_in) as copy:
                for row in part:
                    copy.write_row(_values(row))


def helena_one_by_one(dsn: str, rows: Sequence[Row], batch: int) -> None:
    """`add_operation` for each row, until all are committed."""
    with _runtime(dsn, batch) as runtime:
        for row in rows:
            runtime.engine.add_operation("insert", TABLE, row)
        runtime.drain()


def helena_bulk(dsn: str, rows: Sequence[Row], batch: int) -> None:
    """`add_operations` a thousand at a time, until all are committed."""
    with _runtime(dsn, batch) as runtime:
        for part in _batches(rows, 1000):
            runtime.engine.add_operations(("insert", TABLE, row) for row in part)
        runtime.drain()


def helena_flusher(dsn: str, rows: Sequence[Row], batch: int) -> float:
    """The flusher by itself, on what was queued before: other processes do that elsewhere."""
    with _runtime(dsn, batch) as runtime:
        for part in _batches(rows, 1000):
            runtime.spool.extend(("insert", TABLE, row) for row in part)
        started = time.perf_counter()
        runtime.drain()
        return time.perf_counter() - started


@contextlib.contextmanager
def _runtime(dsn: str, batch: int) -> Iterator[Runtime]:
    """A runtime whose flushes have exactly this size."""
    keys = ("HELENA_BATCH_SIZE", "HELENA_BATCH_MAX_SIZE") if batch else ()
    size = dict.fromkeys(keys, str(batch))
    with server.settings(dsn, **size) as settings, Runtime(settings) as runtime:
        yield runtime


#: Way → the share of the rows it gets: the slow ones are measured on fewer.
WAYS: dict[str, tuple[Way, float]] = {
    "connection per operation": (connection_per_operation, 0.03),
    "commit per row": (commit_per_row, 0.2),
    "multi-row VALUES": (multi_row_values, 1),
    "executemany": (executemany, 1),
    "plain COPY": (plain_copy, 1),
    "Helena, add_operation": (helena_one_by_one, 1),
    "Helena, add_operations": (helena_bulk, 1),
    "Helena, queued before": (helena_flusher, 1),
}


def seconds(way: Way, dsn: str, rows: Sequence[Row], batch: int) -> float:
    """How long one way takes."""
    started = time.perf_counter()
    counted = way(dsn, rows, batch)
    return time.perf_counter() - started if counted is None else counted


def measure(admin: str, count: int, batch: int, runs: int) -> dict[str, float]:
    """Rows per second of each way, the median of `runs` rounds in which all take their turn."""
    rows = make_rows(count)
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    with server.database(admin) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        for _ in range(runs):
            for name, (way, share) in WAYS.items():
                part = rows[: max(1, int(count * share))]
                connection.execute(sql.SQL("TRUNCATE es_document_references CASCADE"))
                connection.execute("CHECKPOINT")
                rates[name].append(len(part) / seconds(way, dsn, part, batch))
                found = connection.execute(f"SELECT count(*) FROM {TABLE}".encode()).fetchone()
                assert found == (len(part),), f"{name} wrote {found}"
    return {name: statistics.median(values) for name, values in rates.items()}
