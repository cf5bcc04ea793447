"""Many rows into a document table, empty or not: plain COPY, and Helena with its own settings."""

import statistics
from typing import Any

import psycopg

from tests.benchmarks import operations, server
from tests.benchmarks.operations import COLUMNS, NAMES, OWN, TABLE, Way

#: The ways that are compared, and the rows to a transaction.
WAYS: dict[str, tuple[Way, int]] = {
    "plain COPY of 1,000": (operations.plain_copy, 1000),
    "plain COPY of 5,000": (operations.plain_copy, 5000),
    "Helena, add_operation": (operations.helena_one_by_one, OWN),
    "Helena, add_operations": (operations.helena_bulk, OWN),
    "Helena, queued before": (operations.helena_flusher, OWN),
}

#: Column → the expression that makes of `n` what `operations.make_row` makes of it.
_EXPRESSIONS = {
    "es_index": "'osint_reports_pdf'",
    "es_doc_id": "'notes:folder-' || n %% 97 || '/document-' || lpad(n::text, 7, '0') || '.md'",
    "doc_type": "'general_documentation'",
    "issuer": "'issuer ' || n %% 53",
    "filename": "'document-' || lpad(n::text, 7, '0') || '.md'",
    "file_size": "2048 + n %% 1000",
    "sha256": "lpad(to_hex(n), 64, '0')",
    "indexed_at": "'2026-01-02T03:04:05'",
    "data_classification": "'public'",
    "investigation_id": "'investigation-' || n %% 31",
    "tags": "ARRAY['markdown', 'tag-' || n %% 211, 'topic-' || n %% 17]",
    "metadata": "jsonb_build_object('title', 'Document number ' || n,"
    " 'path', 'folder-' || n %% 97 || '/document-' || lpad(n::text, 7, '0') || '.md',"
    " 'preview', repeat('A few words about the matter. ', 5),"
    " 'line_count', n %% 400, 'word_count', n %% 3000)",
}


def fill(connection: psycopg.Connection[Any], count: int) -> None:
    """Let the server make the first `count` of the rows that `operations.make_rows` makes."""
    values = ", ".join(_EXPRESSIONS[column] for column in COLUMNS)
    query = f"INSERT INTO {TABLE} ({NAMES}) SELECT {values} FROM generate_series(0, %s - 1) AS n"
    connection.execute(query.encode(), [count])
    settle(connection)


def settle(connection: psycopg.Connection[Any]) -> None:
    """Do what the writers so far have left to do, so that the next one does not pay for it.

    Above all it empties the pending lists of the GIN indexes.
    """
    connection.execute(f"VACUUM (ANALYZE) {TABLE}".encode())
    connection.execute("CHECKPOINT")


def measure(admin: str, held: int, count: int, runs: int) -> dict[str, float]:
    """Rows per second of each way, the median of `runs` rounds; each writes rows of its own.

    Give enough of them: a GIN index first puts some ten thousand into a list, which costs little,
    and sorts them in later.
    """
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    total = held
    with server.database(admin) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        fill(connection, held)
        for _ in range(runs):
            for name, (way, batch) in WAYS.items():
                if not held:
                    connection.execute(f"TRUNCATE {TABLE} CASCADE".encode())
                    total = 0
                rows = operations.make_rows(count, total)
                settle(connection)
                rates[name].append(count / operations.seconds(way, dsn, rows, batch))
                total += count
                found = connection.execute(f"SELECT count(*) FROM {TABLE}".encode()).fetchone()
                assert found == (total,), f"{name} wrote {found}"
    return {name: statistics.median(values) for name, values in rates.items()}
