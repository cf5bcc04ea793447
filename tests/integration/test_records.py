"""The records in the tables that `helena init` makes: every field has its column."""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from helena_cli import BatchEngine, config
from helena_cli.batch import records
from tests.hosts import PROJECT, Host

pytestmark = pytest.mark.postgres

AT = datetime(2026, 1, 2, 3, 4, 5)

REFERENCE: records.DocumentReference = {
    "es_doc_id": "a",
    "es_index": "index",
    "doc_type": "report",
    "issuer": "issuer",
    "report_url": "https://example.org/a",
    "filename": "a.pdf",
    "file_size": 17,
    "sha256": "ab",
    "indexed_at": AT,
    "data_classification": "internal",
    "investigation_id": "case",
    "tags": ["x", "y"],
    "metadata": {"pages": 3},
}
MESSAGE: records.Message = {
    "id": "m1",
    "project_id": "p",
    "sender": "a",
    "recipient": "b",
    "message_type": "ALERT",
    "content": "c",
    "context": {"n": 1},
    "timestamp": AT,
    "requires_response": True,
    "response_to": None,
    "importance": 0.9,
    "tags": ["x"],
}
CONTEXT: records.AgentContext = {
    "agent_name": "a",
    "project_id": "p",
    "context_key": "k",
    "context_value": [1, {"b": None}],
    "updated_at": AT,
    "importance": 1,
}
USAGE: records.DocumentUsage = {
    "es_doc_id": "a",
    "accessed_by": "b",
    "access_timestamp": AT,
    "query_used": "q",
    "access_purpose": "p",
    "session_id": "s",
    "results_count": 5,
    "response_time_ms": 1.5,
}


@pytest.fixture
def engine(helena_dsn: str, state_dir: Path) -> Iterator[BatchEngine]:
    environ = {"HELENA_DSN": helena_dsn, "HELENA_STATE_DIR": str(state_dir)}
    with BatchEngine(config.load(environ=environ)) as engine:
        yield engine


@pytest.fixture
def database(helena_dsn: str) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    with psycopg.connect(helena_dsn, autocommit=True, row_factory=dict_row) as connection:
        yield connection


def rows(database: psycopg.Connection[dict[str, Any]], table: str) -> list[dict[str, Any]]:
    """The rows, without a number that the database gave them."""
    found = database.execute(f"SELECT * FROM {table}".encode()).fetchall()
    return [{k: v for k, v in row.items() if (k, type(v)) != ("id", int)} for row in found]


def test_every_field_of_a_record_gets_into_its_column(
    engine: BatchEngine, database: psycopg.Connection[dict[str, Any]]
):
    engine.add_document_reference(REFERENCE)
    engine.add_message(MESSAGE)
    engine.add_agent_context(CONTEXT)
    engine.log_document_usage(USAGE)
    assert engine.flush(60)
    written: Mapping[str, Mapping[str, Any]] = {
        "es_document_references": REFERENCE,
        "messages": MESSAGE,
        "agent_contexts": CONTEXT,
        "es_document_usage_log": USAGE,
    }
    for table, record in written.items():
        assert rows(database, table) == [record]


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (REFERENCE, records.DocumentReference),
        (MESSAGE, records.Message),
        (CONTEXT, records.AgentContext),
        (USAGE, records.DocumentUsage),
    ],
)
def test_no_field_is_forgotten_here(record: Mapping[str, Any], fields: type):
    assert record.keys() == fields.__annotations__.keys()


def test_a_reference_replaces_a_message_stays_and_each_use_is_logged(
    engine: BatchEngine, database: psycopg.Connection[dict[str, Any]]
):
    for number in range(3):
        engine.add_document_reference({"es_doc_id": "a", "file_size": number})
        engine.add_message({"id": "m", "sender": "a", "content": str(number)})
        engine.add_agent_context({**CONTEXT, "context_value": number})
        engine.log_document_usage({"es_doc_id": "a", "accessed_by": str(number)})
    assert engine.flush(60)
    assert [row["file_size"] for row in rows(database, "es_document_references")] == [2]
    assert [row["content"] for row in rows(database, "messages")] == ["0"]
    assert [row["context_value"] for row in rows(database, "agent_contexts")] == [2]
    users = [row["accessed_by"] for row in rows(database, "es_document_usage_log")]
    assert users == ["0", "1", "2"]


SCRIPT = """
from helena_cli import add_agent_context, add_document_reference, add_message, flush
from helena_cli import log_document_usage

log_document_usage({"es_doc_id": "a", "accessed_by": "searcher"})
add_document_reference({"es_doc_id": "a"})
add_message({"sender": "core", "content": "decided"})
add_agent_context({"agent_name": "a", "project_id": "p", "context_key": "k", "context_value": {}})
assert flush(60)
"""


def test_a_script_needs_nothing_but_the_four_functions(
    helena_dsn: str, state_dir: Path, database: psycopg.Connection[dict[str, Any]]
):
    host = Host(helena_dsn, state_dir)
    try:
        result = host.run(SCRIPT)
        assert (result.returncode, result.stderr) == (0, "")
    finally:
        host.close()
    (message,) = rows(database, "messages")
    assert (message["recipient"], message["message_type"]) == ("Team", "NOTIFICATION")
    assert (message["importance"], message["context"]) == (0.5, {})
    now = datetime.now(UTC).replace(tzinfo=None)
    assert now - timedelta(minutes=5) < message["timestamp"] <= now
    (reference,) = rows(database, "es_document_references")
    assert reference["es_index"] == "osint_reports_pdf"
    assert (reference["doc_type"], reference["data_classification"]) == ("document", "public")
    assert (reference["tags"], reference["metadata"]) == ([], {})
    assert len(rows(database, "es_document_usage_log")) == 1
    assert len(rows(database, "agent_contexts")) == 1


def test_the_scripts_of_the_readme_run(
    helena_dsn: str, state_dir: Path, database: psycopg.Connection[dict[str, Any]]
):
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(
        r"^```python\n(from helena_cli import .*?)^```", readme, re.DOTALL | re.MULTILINE
    )
    assert len(blocks) >= 4
    hits = 'hits = [{"_id": f"hit-{n}", "name": "a.pdf"} for n in range(3)]'
    wait = "from helena_cli import flush\nassert flush(60)"
    host = Host(helena_dsn, state_dir)
    try:
        result = host.run("\n".join([hits, *blocks, wait]))
        assert (result.returncode, result.stderr) == (0, "")
        assert (host.law().dead, host.law().spooled) == (0, 0)
    finally:
        host.close()
    known = {row["es_doc_id"] for row in rows(database, "es_document_references")}
    assert known == {"report-17", "hit-0", "hit-1", "hit-2"}
    assert [row["es_doc_id"] for row in rows(database, "es_document_usage_log")] == ["report-17"]
