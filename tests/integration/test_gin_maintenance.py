"""Pending lists of GIN indexes are emptied beside the flushes, as far as that is allowed."""

import logging
from typing import Any

import psycopg
import pytest

from helena_cli.database.maintenance import REFUSED_FOR, REST, Maintenance
from helena_cli.errors import DatabaseUnreachable
from tests.writing import Desk

pytestmark = pytest.mark.postgres

SIZE = "SELECT pending_pages FROM pgstatginindex('{}')"


def fill(desk: Desk, rows: int = 200) -> None:
    desk.sql("CREATE EXTENSION IF NOT EXISTS pgstattuple")
    for number in range(rows):
        desk.add(
            "insert",
            "es_document_references",
            es_index="i",
            es_doc_id=f"{number}",
            tags=[f"t{number}"],
        )
    desk.flush()


def pending(desk: Desk, index: str = "es_document_references_tags_idx") -> int:
    return int(desk.one(SIZE.format(index)))


def test_maintenance_empties_the_pending_lists_on_a_second_connection(desk: Desk):
    fill(desk)
    assert pending(desk) > 0
    desk.writer.maintain(frozenset({"es_document_references", "messages", "nowhere"}))
    assert pending(desk) == 0
    assert pending(desk, "es_document_references_metadata_idx") == 0
    desk.writer.maintain(frozenset({"public.es_document_references"}))
    assert desk.connected == ["flush", "maintenance"]


def test_the_indexes_of_partitions_are_maintained_too(desk: Desk):
    desk.sql(
        "CREATE EXTENSION pgstattuple;"
        "CREATE TABLE t (k int, tags text[]) PARTITION BY RANGE (k);"
        "CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (0) TO (1000);"
        "CREATE INDEX ON t USING gin (tags)"
    )
    for k in range(200):
        desk.add("insert", "t", k=k, tags=[f"t{k}"])
    desk.flush()
    assert pending(desk, "t_1_tags_idx") > 0
    desk.writer.maintain(frozenset({"t"}))
    assert pending(desk, "t_1_tags_idx") == 0


def test_a_locked_table_is_left_for_later(desk: Desk):
    fill(desk)
    with psycopg.connect(desk.dsn) as other:
        # TRUNCATE locks the indexes too.
        other.execute("TRUNCATE es_document_references CASCADE")
        desk.writer.maintain(frozenset({"es_document_references"}))
        other.rollback()
    desk.writer.maintain(frozenset({"es_document_references"}))
    assert pending(desk) == 0
    assert desk.connected == ["flush", "maintenance"]


def test_an_index_of_somebody_else_is_asked_once_an_hour(
    desk: Desk, caplog: pytest.LogCaptureFixture
):
    fill(desk)
    role = f"helena_test_{desk.one('SELECT md5(random()::text)')[:8]}"
    desk.sql(f"CREATE ROLE {role}")
    now = [1000.0]
    connection: psycopg.Connection[Any] = desk.connect("maintenance")
    connection.execute(f"SET ROLE {role}".encode())
    maintenance = Maintenance(lambda: connection, clock=lambda: now[0])
    caplog.set_level(logging.INFO, logger="helena_cli.database.maintenance")
    for later, messages in ((0.0, 2), (REFUSED_FOR - 1, 0), (1.0, 2)):
        caplog.clear()
        now[0] += later
        maintenance.run(["es_document_references"])
        assert len(caplog.records) == messages
    assert pending(desk) > 0
    maintenance.close()
    desk.sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_connection_that_cannot_be_made_is_tried_once_a_minute(caplog: pytest.LogCaptureFixture):
    now, tries = [1000.0], []

    def connect() -> psycopg.Connection[Any]:
        tries.append(now[0])
        raise DatabaseUnreachable("all connections are taken", remedy="")

    maintenance = Maintenance(connect, clock=lambda: now[0])
    for later in (0.0, 0.1, REST - 1, 1.0):
        now[0] += later
        maintenance.run(["t"])
    assert len(tries) == len(caplog.records) == 2
    maintenance.close()


def test_maintenance_outlives_its_connection(desk: Desk):
    fill(desk)
    tables = frozenset({"es_document_references"})
    desk.writer.maintain(tables)
    desk.sql(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE application_name = 'helena maintenance' AND datname = current_database()"
    )
    desk.writer.maintain(tables)
    for number in range(200, 400):
        desk.add(
            "insert", "es_document_references", es_index="i", es_doc_id=f"{number}", tags=["x"]
        )
    desk.flush()
    desk.writer.maintain(tables)
    assert pending(desk) == 0
    assert desk.connected == ["flush", "maintenance", "maintenance"]
