"""What the writer reads from the catalog, and how often."""

import psycopg
import pytest

from helena_cli.batch.flush import Waiting
from helena_cli.batch.table import Column, ForeignKey, Table
from helena_cli.database.catalog import TIME_TO_LIVE, Catalog
from helena_cli.database.transaction import Transaction
from tests.writing import Desk

pytestmark = pytest.mark.postgres


def table(found: Table | Waiting) -> Table:
    assert isinstance(found, Table)
    return found


def test_a_table_is_described_by_columns_keys_and_parents(desk: Desk):
    catalog = Catalog()
    found = catalog.tables(
        Transaction(desk.admin), ["messages", "agent_contexts", "es_document_usage_log"]
    )
    messages = table(found["messages"])
    assert (messages.schema, messages.name, messages.keys) == ("public", "messages", (("id",),))
    assert messages.columns[0] == Column(
        "id", "character varying(255)", "text", length=255, copied_as="scalar"
    )
    assert messages.copyable
    assert [column.name for column in messages.columns][-2:] == ["importance", "tags"]
    assert messages.foreign_keys == (
        ForeignKey(
            "messages_response_to_fkey", ("response_to",), messages.oid, "public", "messages", True
        ),
    )
    assert table(found["agent_contexts"]).keys == (("agent_name", "project_id", "context_key"),)
    log = table(found["es_document_usage_log"])
    assert [key.parent_name for key in log.foreign_keys] == ["es_document_references"]


def test_types_are_spelled_so_that_they_mean_the_same_everywhere(desk: Desk):
    desk.sql(
        "CREATE SCHEMA s; CREATE DOMAIN s.d AS int; CREATE TYPE s.\"E e\" AS ENUM ('x');"
        'CREATE TABLE t (a s.d, b s."E e"[], c numeric(10, 2), d timestamp(3), e bpchar, f bit,'
        ' g "char", h varchar, i char(3), j int GENERATED ALWAYS AS IDENTITY)'
    )
    found = table(Catalog().tables(Transaction(desk.admin), ["t"])["t"])
    assert [column.type for column in found.columns] == [
        "s.d", 's."E e"[]', "numeric(10,2)", "timestamp(3) without time zone", "bpchar", "bit(1)",
        '"char"', "character varying", "character(3)", "integer",
    ]  # fmt: skip
    assert [column.name for column in found.columns if column.always_identity] == ["j"]
    desk.add("insert", "t", a=1, b=["x"], c=1, d="2026-01-01", e="long", f="1", g="g", h="h", i="i")
    assert desk.flush().rows == 1
    assert desk.one("SELECT e FROM t") == "long"


def test_a_table_is_remembered_for_a_while(desk: Desk):
    now = [100.0]
    catalog = Catalog(clock=lambda: now[0])
    transaction = Transaction(desk.admin)

    def columns() -> list[str]:
        found = catalog.tables(transaction, ["t"])["t"]
        return [column.name for column in table(found).columns]

    desk.sql("CREATE TABLE t (a int)")
    assert columns() == ["a"]
    desk.sql("ALTER TABLE t ADD b int")
    now[0] += TIME_TO_LIVE
    assert columns() == ["a"]
    now[0] += 1
    assert columns() == ["a", "b"]
    desk.sql("ALTER TABLE t ADD c int")
    assert catalog.confirm(transaction, "t", now[0]) is True
    assert catalog.confirm(transaction, "t", now[0] + 1) is False
    assert columns() == ["a", "b", "c"]


def test_the_absence_of_a_table_is_not_remembered(desk: Desk):
    catalog = Catalog()
    transaction = Transaction(desk.admin)
    assert isinstance(catalog.tables(transaction, ["t"])["t"], Waiting)
    desk.sql("CREATE TABLE t (a int)")
    assert isinstance(catalog.tables(transaction, ["t"])["t"], Table)


def test_a_bare_name_is_looked_for_in_the_search_path(desk: Desk):
    desk.sql("CREATE SCHEMA s; CREATE TABLE s.t (a int); CREATE TABLE t (b int)")
    transaction = Transaction(desk.admin)
    assert table(Catalog().tables(transaction, ["t"])["t"]).schema == "public"
    desk.sql("SET search_path = s, public")
    assert table(Catalog().tables(transaction, ["t"])["t"]).schema == "s"
    assert table(Catalog().tables(transaction, ["public.t"])["public.t"]).schema == "public"


def test_nothing_in_the_catalog_waits_for_a_locked_table(desk: Desk):
    desk.sql(
        "CREATE TABLE p (k int PRIMARY KEY);"
        "CREATE TABLE t (k serial PRIMARY KEY, v int DEFAULT 1 CHECK (v > 0), p int REFERENCES p,"
        " g int GENERATED ALWAYS AS (v * 2) STORED); CREATE UNIQUE INDEX ON t (abs(v)) WHERE v > 1"
    )
    desk.sql("SET lock_timeout = 100")
    with psycopg.connect(desk.dsn) as other:
        other.execute("LOCK TABLE t, p IN ACCESS EXCLUSIVE MODE")
        catalog = Catalog()
        found = table(catalog.tables(Transaction(desk.admin), ["t"])["t"])
        assert catalog.confirm(Transaction(desk.admin), "t", catalog.now() + 1)
    assert found.keys == (("k",),)
